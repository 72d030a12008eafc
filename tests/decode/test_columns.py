"""The vectorised assembler says what the scalar reference says: for any stream, however it is cut, even broken."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from harness.database import Database
from harness.scalar import Row, Scalar, Version, plain
from harness.streams import frame, stream, streams, text_tuple
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgoutput_source import messages as m
from pgoutput_source.changes import METADATA_COLUMNS, ChangeBatch, ChangeSet, Message, Position
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.errors import ConfigurationError, DecodeError, PgOutputError, ProtocolError
from pgoutput_source.protocol.wire import Lsn, XLogData

seeds = st.integers(0, 2**63)


def cut(frames: Sequence[bytes], seed: int) -> list[list[bytes | memoryview]]:
    """The frames as feeds: cut anywhere, some of them empty, some of the frames as memoryviews."""
    r = random.Random(seed)
    count = r.choice([0, 1, 3, len(frames)])
    bounds = [0, *sorted(r.randint(0, len(frames)) for _ in range(count)), len(frames)]
    as_view = r.random() < 0.3
    return [[memoryview(f) if as_view else f for f in frames[a:b]] for a, b in pairwise(bounds)]


# ----------------------------------------------------------------------------------------------- what was assembled


@dataclass
class Outcome:
    """What came out of a stream, table version by table version, and the error that it ended with."""

    rows: dict[Version, list[Row]] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    state: object = None
    error: PgOutputError | None = None


def version_of(batch: ChangeBatch) -> Version:
    s = batch.schema
    columns = tuple(m.RelationColumn(c.key, c.name, c.type_oid, c.typmod) for c in s.columns)
    return (s.relation_id, s.namespace, s.name, s.replica_identity, columns)


def rows_of(batch: ChangeBatch) -> list[Row]:
    batch.data.validate(full=True)
    assert batch.data.schema.equals(batch.schema.arrow, check_metadata=True)

    columns = [plain(array) for array in batch.data.columns]
    width = len(batch.schema.columns)
    meta = dict(zip(METADATA_COLUMNS, columns[width:], strict=True))
    return [
        {"values": [c[i] for c in columns[:width]]} | {name: values[i] for name, values in meta.items()}
        for i in range(len(batch))
    ]


def check_order(changes: ChangeSet) -> None:
    """Batches stand in order of their first change, rows in order of their positions."""
    firsts = [b.first for b in changes.batches]
    assert firsts == sorted(firsts)

    for batch in changes.batches:
        positions = list(zip(batch.data["_commit_lsn"].to_pylist(), batch.data["_seq"].to_pylist(), strict=True))
        assert positions == sorted(set(positions))
        assert (batch.first, batch.last) == (positions[0], positions[-1])


def exact(value: object) -> object:
    """The same, with floats as their text, so that NaN equals itself and -0 differs from 0."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list | tuple):
        return [exact(v) for v in value]
    return {k: exact(v) for k, v in value.items()} if isinstance(value, dict) else value


def collect(outcome: Outcome, changes: ChangeSet) -> None:
    check_order(changes)
    for batch in changes.batches:
        outcome.rows.setdefault(version_of(batch), []).extend(rows_of(batch))
    outcome.messages += changes.messages


def vectorised(feeds: Sequence[Sequence[bytes | memoryview]], skip_until: Position | None = None) -> Outcome:
    outcome, assembler = Outcome(), Assembler(skip_until=skip_until)
    try:
        for feed in feeds:
            collect(outcome, assembler.feed(feed))
    except (ProtocolError, DecodeError) as error:
        outcome.error = error
    outcome.state = (assembler.position, assembler.end_lsn, assembler.in_transaction)
    return outcome


def scalar(feeds: Sequence[Sequence[bytes | memoryview]]) -> Outcome:
    reference, error = Scalar(), None
    try:
        for feed in feeds:
            reference.feed(feed)
    except (ProtocolError, DecodeError) as e:
        error = e
    state = (reference.position, reference.end_lsn, reference.begin is not None)
    return Outcome(reference.rows, reference.messages, state, error)


def assert_same(actual: Outcome, expected: Outcome) -> None:
    assert expected.error is None
    assert actual.error is None
    assert actual.rows.keys() == expected.rows.keys()
    for version, rows in expected.rows.items():
        for got, wanted in zip(actual.rows[version], rows, strict=True):
            assert exact(got) == exact(wanted)
    assert actual.messages == expected.messages
    assert actual.state == expected.state


# ------------------------------------------------------------------------------------------------- legal streams


@settings(max_examples=200, deadline=None)
@given(streams(), seeds)
def test_a_stream_assembles_as_the_reference_does_however_it_is_cut(frames: list[bytes], seed: int) -> None:
    feeds = cut(frames, seed)

    assert_same(vectorised(feeds), scalar(feeds))


def test_generated_streams_show_every_kind_of_change() -> None:
    """What the properties rest on: the generator makes each case, and makes it often."""
    seen: dict[str, int] = {}
    for seed in range(60):
        for version, rows in scalar([stream(seed, 12)]).rows.items():
            for row in rows:
                kinds = [row["_op"], row["_op"] + (" before" if row["_before"] is not None else " alone")]
                kinds += ["unchanged"] if row["_unchanged"] else []
                kinds += ["raw " + ("before" if k.startswith("_") else "now") for k, _ in row["_raw"] or ()]
                kinds += ["no columns"] if not version[4] else []
                for kind in kinds:
                    seen[kind] = seen.get(kind, 0) + 1

    wanted = {
        "I alone",
        "U alone",
        "U before",
        "D before",
        "T alone",
        "unchanged",
        "raw now",
        "raw before",
        "no columns",
    }
    assert {kind for kind, count in seen.items() if count > 30} >= wanted


@settings(max_examples=60, deadline=None)
@given(streams(), seeds)
def test_skip_until_drops_all_up_to_a_position_and_nothing_behind_it(frames: list[bytes], seed: int) -> None:
    expected = scalar([frames])
    positions = sorted((r["_commit_lsn"], r["_seq"]) for rows in expected.rows.values() for r in rows)
    if not positions:
        return
    lsn, seq = random.Random(seed).choice(positions)
    actual = vectorised(cut(frames, seed), skip_until=Position(Lsn(lsn), seq))

    kept = {
        version: [r for r in rows if (r["_commit_lsn"], r["_seq"]) > (lsn, seq)]
        for version, rows in expected.rows.items()
    }
    assert actual.error is None
    assert exact(actual.rows) == exact({version: rows for version, rows in kept.items() if rows})


@settings(max_examples=60, deadline=None)
@given(streams(), seeds)
def test_after_a_reconnect_nothing_is_lost_or_repeated(frames: list[bytes], seed: int) -> None:
    outcome, assembler = Outcome(), Assembler()
    for feed in cut(frames[: random.Random(seed).randint(0, len(frames))], seed):
        collect(outcome, assembler.feed(feed))
    assembler.reconnected()
    for feed in cut(frames, seed + 1):
        collect(outcome, assembler.feed(feed))

    assert exact(outcome.rows) == exact(scalar([frames]).rows)


# ------------------------------------------------------------------------------------------------ broken streams


def mutate(frames: list[bytes], seed: int) -> list[bytes]:
    """Frames dropped, repeated, swapped, truncated, lengthened; bytes replaced, most of them in the messages."""
    r = random.Random(seed)
    frames = list(frames)
    for _ in range(r.choice([1, 1, 1, 2, 4])):
        if len(frames) < 2:
            break
        i = r.randrange(len(frames) - 1)
        data = bytearray(frames[i])
        match r.choice(["drop", "repeat", "swap", "truncate", "lengthen", "flip", "flip", "flip", "flip", "retag"]):
            case "drop":
                del frames[i]
            case "repeat":
                frames.insert(r.randrange(len(frames)), frames[i])
            case "swap":
                frames[i], frames[i + 1] = frames[i + 1], frames[i]
            case "truncate":
                frames[i] = bytes(data[: r.randrange(len(data))])
            case "lengthen":
                frames[i] = bytes(data) + r.randbytes(r.choice([1, 5, 40]))
            case "retag":
                data[min(25, len(data) - 1)] = r.choice(b"BCOMRYIUDTSEcAbPpKrwk?")
                frames[i] = bytes(data)
            case _ if data:
                at = r.randrange(len(data)) if r.random() < 0.1 or len(data) <= 25 else r.randrange(25, len(data))
                data[at] = r.choice([r.randrange(256), data[at] ^ (1 << r.randrange(8)), ord(r.choice("tbnuNKO\0\1-"))])
                frames[i] = bytes(data)
    return frames


@settings(max_examples=500, deadline=None)
@given(seeds, seeds, seeds)
def test_a_broken_stream_is_refused_or_assembles_as_the_reference_does(one: int, two: int, three: int) -> None:
    feeds = cut(mutate(stream(one, 5), two), three)
    actual, expected = vectorised(feeds), scalar(feeds)

    if actual.error is None:
        assert_same(actual, expected)
        return
    assert isinstance(actual.error, PgOutputError)
    assert actual.error.lsn is not None
    # A legal stream is never refused; the type table alone may be more careful with values than the reference.
    assert expected.error is not None or isinstance(actual.error, DecodeError)
    for version, rows in actual.rows.items():
        assert exact(rows) == exact(expected.rows[version][: len(rows)])
    assert actual.messages == expected.messages[: len(actual.messages)]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=8), seeds)
@example([b""], 0)
@example([b"", b"k" + bytes(17)], 0)
@example([b"w" + bytes(24)], 0)
def test_any_frames_are_a_change_set_or_a_protocol_error(frames: list[bytes], seed: int) -> None:
    good = stream(seed, 1)
    actual, expected = vectorised([good, frames]), scalar([good, frames])

    assert (actual.error is None) == (expected.error is None)


# --------------------------------------------------------------------------------------------- one case, one fact

COLUMNS = (m.RelationColumn(True, "id", 23, -1), m.RelationColumn(False, "note", 25, -1))
TABLE = m.Relation(7, "public", "t", "d", COLUMNS)
BEGIN = m.Begin(Lsn(1000), 0, 700)
COMMIT = m.Commit(Lsn(1000), Lsn(1100), 0)
ROW = m.Insert(7, text_tuple("1", "a"))


def feed(*found: m.AnyMessage) -> Outcome:
    frames = [frame(x, 500) for x in found]
    whole, one_by_one = vectorised([frames]), vectorised([[f] for f in frames])

    assert (whole.error is None) == (one_by_one.error is None)
    if whole.error is None:
        assert_same(one_by_one, whole)
        assert_same(whole, scalar([frames]))
    return whole


ILLEGAL: dict[str, list[m.AnyMessage]] = {
    "a change outside a transaction": [BEGIN, TABLE, COMMIT, ROW],
    "a change before anything": [ROW],
    "Begin inside a transaction": [BEGIN, m.Begin(Lsn(2000), 0, 701)],
    "Commit outside a transaction": [COMMIT],
    "Commit with another LSN": [BEGIN, m.Commit(Lsn(1001), Lsn(1100), 0)],
    "Commit that ends before it starts": [BEGIN, m.Commit(Lsn(1000), Lsn(1000), 0)],
    "an older transaction": [BEGIN, COMMIT, m.Begin(Lsn(999), 0, 701)],
    "the same transaction again": [BEGIN, COMMIT, BEGIN],
    "a relation that was not announced": [BEGIN, ROW],
    "a relation that is announced too late": [BEGIN, ROW, TABLE],
    "a truncate of an unknown relation": [BEGIN, TABLE, m.Truncate((7, 8))],
    "a transactional message outside a transaction": [m.Message(True, Lsn(1), "", b"")],
    "a transactional message behind a transaction": [BEGIN, COMMIT, m.Message(True, Lsn(1), "", b"")],
    "too few columns": [BEGIN, TABLE, m.Insert(7, text_tuple("1"))],
    "too many columns": [BEGIN, TABLE, m.Insert(7, text_tuple("1", "a", None))],
    "an unchanged value in an old key": [BEGIN, TABLE, m.Delete(7, key=m.TupleData(b"un", (None, None)))],
    "a streamed transaction": [m.StreamStart(1, True)],
    "a prepared transaction": [m.BeginPrepare(Lsn(1), Lsn(2), 0, 1, "g")],
    "a moment that Arrow can't hold": [m.Begin(Lsn(1000), 2**63 - 1, 700), TABLE, ROW],
}


@pytest.mark.parametrize("found", ILLEGAL.values(), ids=ILLEGAL.keys())
def test_an_illegal_stream_is_a_protocol_error(found: list[m.AnyMessage]) -> None:
    assert isinstance(feed(*found).error, ProtocolError)


def test_a_value_that_is_not_of_its_type_names_where_it_stands() -> None:
    found: list[m.AnyMessage] = [BEGIN, TABLE, ROW, m.Insert(7, text_tuple("one", "a")), ROW]
    frames = [frame(x, 500 + i) for i, x in enumerate(found)]

    with pytest.raises(DecodeError) as caught:
        Assembler().feed(frames).of("public.t")

    e = caught.value
    assert (e.table, e.column, e.type_name, e.lsn) == ("public.t", "id", "integer", 503)


def test_a_relation_that_can_not_be_described_concerns_its_own_changes_alone() -> None:
    odd = m.Relation(8, "public", "odd", "d", (m.RelationColumn(True, "n", 1700, 4), *COLUMNS))
    twice = m.Relation(9, "public", "twice", "d", (*COLUMNS, *COLUMNS))
    rows = [ROW, m.Insert(8, text_tuple("1", "2", "3")), ROW, m.Insert(9, text_tuple("1", "2", "3", "4"))]
    found: list[m.AnyMessage] = [BEGIN, odd, TABLE, twice, *rows]
    changes = Assembler().feed([frame(x, 500) for x in found])

    assert changes.table("public.t")["id"].to_pylist() == [1, 1]
    assert [len(batch) for batch in changes] == [2, 1, 1]
    with pytest.raises(DecodeError, match="4 is not a modifier of its type") as caught:
        changes.of("public.odd")
    assert (caught.value.table, caught.value.column, caught.value.type_name) == ("public.odd", "n", "numeric")
    assert caught.value.lsn is not None


def test_a_negative_length_that_leads_back_into_its_own_frame_is_a_protocol_error() -> None:
    # The first value ends twelve bytes before it starts, in the relation's id. Read from there, the id's bytes are
    # the second value, of 78 bytes, which ends exactly where the frame does.
    relation_id = 0x74000000
    table = m.Relation(relation_id, "public", "t", "d", COLUMNS)
    insert = b"I" + relation_id.to_bytes(4, "big") + b"N" + b"\0\2" + b"t" + (-12).to_bytes(4, "big", signed=True)
    hostile = XLogData(Lsn(1), Lsn(1), 0, insert.ljust(84, b"x")).encode()

    with pytest.raises(ProtocolError):
        Assembler().feed([frame(BEGIN), frame(table), hostile])
    with pytest.raises(ProtocolError):
        Scalar().feed([frame(BEGIN), frame(table), hostile])


def test_more_bytes_than_arrow_can_count_are_refused_before_they_are_copied() -> None:
    frames = [memoryview(bytes(2**20))] * 2048

    with pytest.raises(ConfigurationError, match="in one feed"):
        Assembler().feed(frames)


def test_a_value_of_zero_bytes_is_not_null() -> None:
    [row] = feed(BEGIN, TABLE, m.Insert(7, text_tuple("1", "")), COMMIT).rows.popitem()[1]

    assert row["values"] == [1, ""]


def test_truncated_tables_are_counted_in_the_order_of_their_message() -> None:
    other = m.Relation(3, "", "pg_late", "n", ())
    outcome = feed(BEGIN, TABLE, other, ROW, m.Truncate((7, 3)), ROW, COMMIT)

    found = sorted((r["_seq"], version[1:3], r["_op"]) for version, rows in outcome.rows.items() for r in rows)
    t, late = ("public", "t"), ("pg_catalog", "pg_late")
    assert found == [(0, t, "I"), (1, t, "T"), (2, late, "T"), (3, t, "I")]


def test_a_schema_change_cuts_and_the_same_schema_sent_again_does_not() -> None:
    wider = m.Relation(7, "public", "t", "d", (*COLUMNS, m.RelationColumn(False, "n", 23, -1)))
    wide_row = m.Insert(7, text_tuple("1", "a", "5"))
    found: list[m.AnyMessage] = [BEGIN, TABLE, ROW, TABLE, ROW, wider, wide_row, wider, wide_row, COMMIT]
    changes = Assembler().feed([frame(x, 500) for x in found])

    assert [(len(b), len(b.schema.columns)) for b in changes.batches] == [(2, 2), (2, 3)]


def test_an_old_value_fills_what_is_unchanged_only_where_it_was_sent() -> None:
    moved = m.Update(7, m.TupleData(b"uu", (None, None)), key=text_tuple("1", None))
    full = m.Relation(8, "public", "f", "f", COLUMNS)
    kept = m.Update(8, m.TupleData(b"tu", (b"2", None)), old=text_tuple("1", "old"))
    rows = [r for found in feed(BEGIN, TABLE, full, moved, kept, COMMIT).rows.values() for r in found]

    assert [(r["values"], r["_before"], r["_unchanged"]) for r in rows] == [
        ([1, None], [1, None], ["note"]),
        ([2, "old"], [1, "old"], None),
    ]


# -------------------------------------------------------------------------------------------- what servers send


def record(db: Database, statements: Sequence[str], publication: str = "FOR ALL TABLES") -> list[bytes]:
    """The frames that the server sends for what the statements do."""
    connection = db.connect()
    connection.execute(f"CREATE PUBLICATION p {publication}")
    connection.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    for statement in statements:
        connection.execute(statement)
    changes = connection.execute(
        "SELECT lsn - '0/0', data FROM pg_logical_slot_peek_binary_changes('s', NULL, NULL,"
        " 'proto_version', '1', 'publication_names', 'p', 'messages', 'true')"
    ).fetchall()
    return [XLogData(Lsn(int(lsn)), Lsn(int(lsn)), 0, data).encode() for lsn, data in changes]


def workload(seed: int) -> list[str]:
    """Random DDL and DML: savepoints, multi-inserts, TOAST, every replica identity, misfits, messages."""
    r = random.Random(seed)
    big = "(SELECT string_agg(md5(i::text), '') FROM generate_series(1, 200) i)"
    long_key = "(SELECT string_agg(md5(i::text), '') FROM generate_series(1, 75) i)"
    statements = [
        "CREATE TABLE pk (id int PRIMARY KEY, note text, n numeric(10,2), at timestamptz, x float8, ok bool)",
        "CREATE TABLE full_row (id bigint, note text, n numeric(10,2))",
        "ALTER TABLE full_row REPLICA IDENTITY FULL",
        "CREATE TABLE by_index (id int NOT NULL, code text NOT NULL UNIQUE, note text)",
        "ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_code_key",
        "CREATE TABLE nothing ()",
        "CREATE TYPE mood AS ENUM ('sad', 'ok')",
        "CREATE TABLE moods (id serial PRIMARY KEY, m mood)",
    ]
    kept = "ON CONFLICT DO NOTHING"

    def some_of_pk() -> str:
        first, more = r.randint(0, 60), r.choice([0, 0, 5, 40])
        series = f"generate_series({first}, {first + more}) i"
        return f"INSERT INTO pk SELECT i, 'n' || i, i / 7.0, now(), i / 3.0, i % 2 = 0 FROM {series} {kept}"

    def one_of_full_row() -> str:
        note, n = r.choice([big, "NULL", "'x'"]), r.choice(["1", "NULL"])
        return f"INSERT INTO full_row VALUES ({r.randint(1, 9)}, {note}, {n})"

    def one_of_by_index() -> str:
        code = f"{r.choice([long_key, repr('c')])} || {r.randint(1, 30)}"
        return f"INSERT INTO by_index VALUES ({r.randint(1, 9)}, {code}, {big}) {kept}"

    choices: list[Callable[[], str]] = [
        some_of_pk,
        lambda: f"INSERT INTO pk VALUES ({r.randint(100, 120)}, {big}, 'NaN', 'infinity', '-Infinity', NULL) {kept}",
        lambda: f"UPDATE pk SET n = n + 1 WHERE id % 3 = {r.randint(0, 2)}",
        lambda: f"UPDATE pk SET id = {r.getrandbits(30)} WHERE id = {r.randint(0, 120)}",
        lambda: f"DELETE FROM pk WHERE id % 11 = {r.randint(0, 10)}",
        one_of_full_row,
        lambda: f"UPDATE full_row SET n = coalesce(n, 0) + 1 WHERE id = {r.randint(1, 9)}",
        lambda: f"DELETE FROM full_row WHERE id = {r.randint(1, 9)}",
        one_of_by_index,
        lambda: f"UPDATE by_index SET id = id + 1 WHERE id = {r.randint(1, 9)}",
        lambda: f"DELETE FROM by_index WHERE id = {r.randint(1, 9)}",
        lambda: "INSERT INTO nothing DEFAULT VALUES",
        lambda: f"INSERT INTO moods (m) VALUES ('{r.choice(['sad', 'ok'])}')",
        lambda: "TRUNCATE full_row, nothing RESTART IDENTITY",
        lambda: f"SELECT pg_logical_emit_message({r.choice(['true', 'false'])}, 'p', 'c')",
        lambda: f"ALTER TABLE full_row ADD COLUMN a{r.getrandbits(30)} int DEFAULT 4",
        lambda: "ALTER TABLE full_row ALTER COLUMN n TYPE numeric(10,2)",
        lambda: f"ALTER TABLE moods RENAME TO m{r.getrandbits(30)}; CREATE TABLE moods (id serial PRIMARY KEY, m mood)",
        lambda: "ANALYZE pk",
    ]
    for _ in range(60):
        body = [r.choice(choices)() for _ in range(r.choice([1, 1, 1, 3, 8]))]
        if len(body) > 1 and r.random() < 0.5:
            body = [body[0], "SAVEPOINT s", *body[1:], r.choice(["ROLLBACK TO s", "RELEASE s"]), r.choice(choices)()]
        statements.append("; ".join(body) if len(body) == 1 else f"BEGIN; {'; '.join(body)}; COMMIT")
    return statements


@pytest.mark.parametrize("seed", range(2))
def test_what_a_server_sends_assembles_as_the_reference_does(any_db: Database, seed: int) -> None:
    frames = record(any_db, workload(seed))
    rows = [row for found in scalar([frames]).rows.values() for row in found]
    assert {row["_op"] for row in rows} == set("IUDT")
    assert any(row["_unchanged"] for row in rows)

    for i in range(4):
        feeds = cut(frames, seed + i)
        assert_same(vectorised(feeds), scalar(feeds))


def test_a_row_filter_makes_an_insert_with_an_unchanged_value_and_it_is_no_null(db: Database) -> None:
    frames = record(
        db,
        [
            "CREATE TABLE filtered (id int PRIMARY KEY, shown bool, note text)",
            "ALTER TABLE filtered ALTER COLUMN note SET STORAGE EXTERNAL",
            "ALTER PUBLICATION p ADD TABLE filtered WHERE (id > 0)",
            "INSERT INTO filtered VALUES (-1, false, repeat('x', 100000))",
            "UPDATE filtered SET id = 1",
        ],
        publication="",
    )
    [row] = vectorised([frames]).rows.popitem()[1]

    assert (row["_op"], row["values"], row["_unchanged"]) == ("I", [1, False, None], ["note"])
