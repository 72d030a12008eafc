"""Values in binary: for each the server's own bytes give what its own text gives, in a column and to the letter."""

from __future__ import annotations

import json
import logging
import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import psycopg
import pyarrow as pa
import pytest
from harness.database import Database
from harness.notation import peeked
from harness.streams import encode
from harness.type_cases import CASES, PINNED, Case, plain
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from psycopg import sql

from pgoutput_source import PgOutputReader, peek
from pgoutput_source import messages as m
from pgoutput_source.changes import ChangeBatch, ChangeSet
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.decode.in_progress import StreamedTransactions
from pgoutput_source.embedded import Server
from pgoutput_source.errors import ConfigurationError, DecodeError, PgOutputError
from pgoutput_source.postgres.connection import Connection, connect
from pgoutput_source.postgres.definitions import Definitions
from pgoutput_source.postgres.publications import text_columns
from pgoutput_source.protocol.wire import Lsn, XLogData, parse_frame
from pgoutput_source.types import TYPES, PgType, types_of
from pgoutput_source.types.base import Sent

RELAXED = settings(
    deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
TEXT_ONLY = ("tsquery", "regclass")
"""Of the cases, the types that can't be read in binary."""


class Oracle:
    """The server: what it writes for a text read as a type, in text and in binary."""

    def __init__(self, server: Server) -> None:
        self.major = server.major
        self.connection = psycopg.connect(server.dsn(), autocommit=True, options=PINNED)

    def ask(self, sql: str, inputs: list[str]) -> tuple[PgType, pa.DataType, list[bytes], list[bytes]]:
        """The type's row and Arrow type, and of each input the server's text and what its send function writes."""
        query = f"SELECT t::{sql} FROM json_array_elements_text(%s) WITH ORDINALITY AS u(t, n) ORDER BY n"
        answers = []
        for binary in (False, True):
            result = self.connection.execute(query, [json.dumps(inputs)], binary=binary).pgresult
            assert result is not None
            answers.append([bytes(result.get_value(i, 0) or b"") for i in range(result.ntuples)])
            oid, typmod = result.ftype(0), result.fmod(0)
        row = types_of(self.major * 10_000)[oid]
        return row, row.arrow(typmod), answers[0], answers[1]


@pytest.fixture(scope="module")
def every_oracle(any_pg: Server) -> Iterator[Oracle]:
    oracle = Oracle(any_pg)
    yield oracle
    oracle.connection.close()


@pytest.fixture(scope="module")
def oracle(pg: Server) -> Iterator[Oracle]:
    oracle = Oracle(pg)
    yield oracle
    oracle.connection.close()


def same(one: pa.Array, other: pa.Array) -> bool:
    """Equal in type and in values, where NaN equals itself and -0 differs from 0."""
    return one.type == other.type and repr(plain(one)) == repr(plain(other))


def drawn(case: Case, data: st.DataObject, most: int = 60) -> list[str]:
    value = st.one_of(case.inputs, st.sampled_from(case.edges)) if case.edges else case.inputs
    return data.draw(st.lists(value, max_size=most))


# ------------------------------------------------------------------------------------------------- value by value


@pytest.mark.parametrize("case", CASES, ids=str)
@given(data=st.data())
@RELAXED
def test_what_is_sent_in_binary_is_what_the_text_says(case: Case, every_oracle: Oracle, data: st.DataObject) -> None:
    if every_oracle.major < case.since:
        pytest.skip(f"only since PostgreSQL {case.since}")
    row, arrow, texts, sent = every_oracle.ask(case.sql, drawn(case, data))
    if row.binary is None:
        assert row.name in TEXT_ONLY
        return
    assert list(map(row.binary.text, sent)) == texts
    decoded = row.binary.decode(Sent.of(sent), arrow)
    decoded.validate(full=True)
    assert same(decoded, row.decode(pa.array(texts, pa.binary()), arrow))


def test_what_was_a_number_before_postgresql_17_and_is_an_infinity_since() -> None:
    largest = struct.pack(">qii", 2**63 - 1, 2**31 - 1, 2**31 - 1)
    for major, text, value in (
        (16, b"178956970 years 7 mons 2147483647 days 2562047788:00:54.775807", True),
        (17, b"infinity", False),
    ):
        for oid, sent in ((1186, largest), (1187, struct.pack(">iiIiii", 1, 0, 1186, 1, 1, 16) + largest)):
            row = types_of(major * 10_000)[oid]
            assert row.binary is not None
            assert row.binary.text(sent).strip(b'{}"') == text
            assert row.binary.decode(Sent.of([sent]), row.arrow(-1)).is_valid().to_pylist() == [value]


def test_there_is_one_nan() -> None:
    """Of the many that a float can be, which all have the same text."""
    for oid, sent in ((701, bytes.fromhex("fff8000000000001")), (700, bytes.fromhex("ffc00001"))):
        row = TYPES[oid]
        assert row.binary is not None
        arrays = (
            row.binary.decode(Sent.of([sent]), row.arrow(-1)),
            row.decode(pa.array([b"NaN"], pa.binary()), row.arrow(-1)),
        )
        one, other = (array.buffers()[1].to_pybytes()[: len(sent)] for array in arrays)
        assert one == other


# ------------------------------------------------------------------------------------------------- hostile bytes


def mutated(value: bytes, rng: random.Random) -> bytes:
    data = bytearray(value)
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randint(0, len(data))
        match rng.choice("fffsil"):
            case "f" if at < len(data):
                data[at] = rng.choice([data[at] ^ (1 << rng.randrange(8)), 0, 1, 127, 128, 255, rng.randrange(256)])
            case "s":
                del data[at:]
            case "i":
                data[at:at] = rng.randbytes(rng.choice([1, 2, 4, 8]))
            case "l" if at + 4 <= len(data):
                data[at : at + 4] = struct.pack(">i", rng.choice([-1, -2, 0, 1, 2**31 - 1, -(2**31), len(data)]))
    return bytes(data)


def outcome(row: PgType, arrow: pa.DataType, value: bytes) -> pa.Array | None:
    assert row.binary is not None
    try:
        return row.binary.decode(Sent.of([value]), arrow)
    except ValueError:
        return None


@pytest.mark.parametrize("case", [c for c in CASES if c.sql not in TEXT_ONLY], ids=str)
@given(data=st.data())
@RELAXED
def test_hostile_bytes_are_refused_or_mean_what_their_text_says(
    case: Case, oracle: Oracle, data: st.DataObject
) -> None:
    """What is accepted has a text, which gives the same; and alone and in a column values fare the same."""
    row, arrow, _, sent = oracle.ask(case.sql, drawn(case, data, 4))
    assume(sent)
    assert row.binary is not None
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    hostile = [mutated(value, rng) for value in sent for _ in range(20) if len(value) < 400]
    hostile += data.draw(st.lists(st.binary(max_size=40)))
    alone = [outcome(row, arrow, value) for value in hostile]
    accepted = [(value, array) for value, array in zip(hostile, alone, strict=True) if array is not None]
    for value, array in accepted:
        array.validate(full=True)
        assert same(array, row.decode(pa.array([row.binary.text(value)], pa.binary()), arrow)), value
    column = row.binary.decode(Sent.of([value for value, _ in accepted]), arrow)
    assert repr(plain(column)) == repr([v for _, array in accepted for v in plain(array)])
    refused = [value for value, array in zip(hostile, alone, strict=True) if array is None]
    if refused:
        mixed = [*(v for v, _ in accepted), rng.choice(refused)]
        rng.shuffle(mixed)
        with pytest.raises(ValueError):  # noqa: PT011
            row.binary.decode(Sent.of(mixed), arrow)


FIXED = {
    "bool": "t", "int2": "1", "int4": "1", "int8": "1", "oid": "1", "float4": "1", "float8": "1", "date": "2024-01-01",
    "time": "12:00", "timestamp": "2024-01-01", "timestamptz": "2024-01-01", "uuid": "0" * 32, "xid": "1", "xid8": "1",
    "pg_lsn": "0/1", "money": "1", "interval": "1 day", "timetz": "12:00+01", "macaddr": "08002b010203", "tid": "(1,2)",
    "macaddr8": "08002b0102030405", "point": "(1,2)", "box": "(1,2),(3,4)", "circle": "<(1,2),3>", "line": "{1,2,3}",
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), FIXED.items())
def test_a_value_of_another_width_is_refused(name: str, text: str, oracle: Oracle) -> None:
    row, arrow, _, (value,) = oracle.ask(name, [text])
    assert row.binary is not None
    assert outcome(row, arrow, value) is not None
    for other in [value[:length] for length in range(len(value))] + [value + bytes(n) for n in range(1, 9)]:
        assert outcome(row, arrow, other) is None, other
        with pytest.raises(ValueError):  # noqa: PT011
            row.binary.text(other)


# ------------------------------------------------------------------------------------------------- whole streams


DEFINED = """
CREATE EXTENSION hstore; CREATE EXTENSION citext; CREATE EXTENSION ltree; CREATE EXTENSION seg;
CREATE TYPE mood AS ENUM ('sad', 'a,b', 'it''s "so"');
CREATE DOMAIN amount AS numeric(10,2); CREATE DOMAIN price AS amount CHECK (VALUE >= 0);
CREATE DOMAIN scores AS int[];
CREATE TYPE inner_t AS (a int, "b c" text);
CREATE TYPE outer_t AS (i inner_t, at timestamptz, gone int, moods mood[], p price);
ALTER TYPE outer_t DROP ATTRIBUTE gone;
CREATE TYPE price_range AS RANGE (subtype = price);
CREATE TYPE floats AS RANGE (subtype = float8);
"""
VALUES: dict[str, list[str]] = {
    "mood": ["'sad'", """'it''s "so"'"""],
    "mood[]": ["ARRAY['a,b', NULL]::mood[]", "'{{sad},{sad}}'"],
    "price": ["1.5", "'NaN'"],
    "price[]": ["ARRAY[1.5, NULL]::price[]", "'{NaN}'", "'{{1.5},{2}}'"],
    "scores": ["'{1,2}'", "'{{1,2},{3,4}}'", "'[0:1]={1,2}'"],
    "inner_t": ["ROW(1, 'x')", "ROW(NULL, '')", "ROW(NULL, NULL)", r"""ROW(-1, E'q"\\,() ''é\n')"""],
    "inner_t[]": [r"""ARRAY[ROW(1, 'a "b" \'), NULL]::inner_t[]""", "'{}'", """'{{"(1,a\\\\,)"}}'"""],
    "outer_t": ["ROW(ROW(7, 'a, \"b\"'), NULL, ARRAY['a,b']::mood[], 2)", "ROW(NULL, 'infinity', NULL, 2)"],
    "price_range": ["'[1,2.5)'", "'empty'", "'(,)'", "'[1,NaN)'"],
    "price_multirange": ["'{}'", "'{[1,2),[3,4)}'"],
    "floats": ["'[1.5,Infinity)'", "'[-0,1e-300]'"],
    "hstore": [r"""hstore(ARRAY['a', 'q"\', ''], ARRAY[NULL, ' =>,"', ''])""", "''"],
    "hstore[]": [r"""ARRAY[hstore('a"', 'b\')]""", "'{{a=>1},{b=>2}}'"],
    "citext": ["'Ab'"],
    "ltree": ["'Top.Science'"],
    "seg": ["'1 .. 2'"],
    "aclitem": ["'postgres=r/postgres'"],
}


def tables_of_every_type(connection: Connection) -> None:
    """One row for each n-th edge of every type, updated, and deleted: new rows, old rows and keys."""
    major = connection.info.server_version // 10_000
    columns: list[tuple[str, list[str]]] = []
    for case in CASES:
        if case.since <= major and case.sql not in TEXT_ONLY:
            columns.append((case.sql, [sql.Literal(edge).as_string() for edge in case.edges]))
    connection.execute("SET search_path = public")
    connection.execute(DEFINED)
    columns += VALUES.items()
    listed = ", ".join(f"c{i} {name}" for i, (name, _) in enumerate(columns))
    connection.execute(f"CREATE TABLE every (id int PRIMARY KEY, {listed})".encode())
    connection.execute("ALTER TABLE every REPLICA IDENTITY FULL")
    connection.execute("CREATE PUBLICATION p FOR TABLE every")
    connection.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    connection.execute("BEGIN")
    for row in range(max(len(edges) for _, edges in columns) + 1):
        cells = [edges[row] if row < len(edges) else "NULL" for _, edges in columns]
        connection.execute(f"INSERT INTO every VALUES ({row}, {', '.join(cells)})".encode())
    connection.execute("UPDATE every SET id = id + 100 WHERE id % 2 = 0; DELETE FROM every WHERE id % 3 = 0; COMMIT")


def fed(connection: Connection, dsn: str, frames: Sequence[bytes], **streamed: Any) -> list[ChangeSet]:
    """The frames of a server, assembled as a reader of it does."""
    assembler = Assembler(
        look_up=Definitions(dsn),
        types=types_of(connection.info.server_version),
        streamed=StreamedTransactions(**streamed) if streamed else None,
    )
    sets = [assembler.feed(frames)]
    while assembler.pending:
        sets.append(assembler.feed([]))
    assembler.close()
    return sets


def assert_same(one: Sequence[ChangeSet], other: Sequence[ChangeSet]) -> list[ChangeBatch]:
    """Batch by batch and column by column; the batches."""
    left, right = ([batch for each in sets for batch in each.batches] for sets in (one, other))
    assert [batch.schema for batch in left] == [batch.schema for batch in right]
    for a, b in zip(left, right, strict=True):
        b.data.validate(full=True)
        assert a.data.schema.equals(b.data.schema)
        for name in a.data.schema.names:
            assert same(a.data[name], b.data[name]), name
    return left


def kinds(frames: Sequence[bytes]) -> set[str]:
    """In which ways values are sent in inserts."""
    found: set[int] = set()
    for data in frames:
        frame = parse_frame(data)
        if isinstance(frame, XLogData) and frame.payload[:1] == b"I":
            insert = m.decode(frame.payload)
            assert isinstance(insert, m.Insert)
            found |= set(insert.new.kinds)
    return {chr(kind) for kind in found}


def test_a_column_of_every_type_is_the_same_in_binary_and_in_any_mixture(any_db: Database) -> None:
    with connect(any_db.dsn) as c:
        tables_of_every_type(c)
        text, binary = (peeked(c, binary=value) for value in ("false", "true"))
        assert kinds(text) == {"t", "n"}
        assert kinds(binary) == {"t", "b", "n"}
        expected = fed(c, any_db.dsn, text)
        (batch,) = assert_same(expected, fed(c, any_db.dsn, binary))
        assert batch.data["_raw"].null_count < len(batch)
        assert batch.data["_before"].null_count < len(batch)
        for seed in range(4):
            assert_same(expected, fed(c, any_db.dsn, mixture(text, binary, random.Random(seed))))
        assert_same(expected, [peek(any_db.dsn, slot="s", publication="p", binary="on")])
        assert text_columns(c, ["p"]) == []


def mixture(text: list[bytes], binary: list[bytes], rng: random.Random) -> list[bytes]:
    """The same messages, with each value from one or the other."""

    def tuples(one: m.TupleData, other: m.TupleData) -> m.TupleData:
        cells = [
            rng.choice(pair)
            for pair in zip(
                zip(one.kinds, one.values, strict=True), zip(other.kinds, other.values, strict=True), strict=True
            )
        ]
        return m.TupleData(bytes(kind for kind, _ in cells), tuple(value for _, value in cells))

    mixed = []
    for a, b in zip(text, binary, strict=True):
        x, y = parse_frame(a), parse_frame(b)
        assert isinstance(x, XLogData)
        assert isinstance(y, XLogData)
        one, other = m.decode(x.payload), m.decode(y.payload)
        if isinstance(one, m.Insert | m.Update | m.Delete):
            names = [name for name in ("new", "old", "key") if getattr(one, name, None) is not None]
            changed: dict[str, Any] = {name: tuples(getattr(one, name), getattr(other, name)) for name in names}
            one = replace(one, **changed)
        mixed.append(XLogData(Lsn(x.start), Lsn(x.start), 0, encode(one)).encode())
    return mixed


def test_transactions_in_progress_bring_binary_as_well(any_db: Database) -> None:
    with connect(any_db.dsn) as c:
        c.execute(
            "CREATE TABLE public.t (id int PRIMARY KEY, x float8, at timestamptz, n numeric(10,2), v text, u uuid)"
        )
        c.execute("CREATE PUBLICATION p FOR ALL TABLES")
        c.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        c.execute("SET logical_decoding_work_mem = '64kB'")
        c.execute(
            "BEGIN; INSERT INTO public.t SELECT i, i / 7.0, now(), i / 3.0, 'x' || i, md5(i::text)::uuid"
            " FROM generate_series(1, 3000) i; SAVEPOINT s; DELETE FROM public.t WHERE id < 100; ROLLBACK TO s;"
            " UPDATE public.t SET n = 'NaN', at = 'infinity' WHERE id % 10 = 0; COMMIT"
        )
        options = {"proto_version": "2", "streaming": "on"}
        expected = fed(c, any_db.dsn, peeked(c, binary="false"))
        frames = peeked(c, binary="true", **options)
        assert b"S" in {frame[25:26] for frame in frames}
        streamed = fed(c, any_db.dsn, frames, memory=100_000, parallel=False)
    whole, pieces = (pa.Table.from_batches([b.data for s in sets for b in s.batches]) for sets in (expected, streamed))
    for name in whole.column_names:
        assert same(whole[name].combine_chunks(), pieces[name].combine_chunks()), name


# ------------------------------------------------------------------------------------------------- how it is chosen


def prepared(db: Database, columns: str, publication: str = "FOR TABLE t") -> Connection:
    c = connect(db.dsn)
    c.execute(f"CREATE SCHEMA s; CREATE TABLE public.t (id int PRIMARY KEY, {columns})".encode())
    c.execute("SET search_path = public")
    c.execute(f"CREATE PUBLICATION p {publication}".encode())
    c.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    return c


def read(db: Database, binary: str) -> ChangeSet:
    with PgOutputReader(db.dsn, slot="s", publication="p", until="current", binary=binary) as reader:
        return next(reader.sets())


@pytest.mark.parametrize(
    ("columns", "publication", "left_out"),
    [
        ("a int, b text[], c tstzrange, d numeric", "FOR TABLE t", ""),
        ("a aclitem", "FOR TABLE t", ""),  # has no send function, so it comes as text in any case
        ("a tsquery", "FOR TABLE t", "public.t.a tsquery"),
        ("a tsquery, b int", "FOR TABLE t (id, b)", ""),
        ("a regclass, b regtype[]", "FOR ALL TABLES", "public.t.a regclass; public.t.b regtype[]"),
        ("a aclitem[]", "FOR TABLES IN SCHEMA public", "public.t.a aclitem[]"),
        ("a int, b tsvector, c timetz[]", "FOR TABLE t", "public.t.b tsvector; public.t.c time with time zone[]"),
    ],
)
def test_auto_is_binary_unless_a_published_column_is_better_read_as_text(
    db: Database, columns: str, publication: str, left_out: str, caplog: pytest.LogCaptureFixture
) -> None:
    with prepared(db, columns, publication) as c:
        assert "; ".join(text_columns(c, ["p"], by_value=True)) == left_out
        never = text_columns(c, ["p"])
        c.execute("INSERT INTO t (id) VALUES (1)")
    with caplog.at_level(logging.INFO, "pgoutput_source.postgres.publications"):
        for binary in ("auto", "off"):
            assert read(db, binary).table("public.t")["id"].to_pylist() == [1]
    assert ("because some can't be read" in caplog.text) == bool(left_out)
    if not never:
        assert read(db, "on").table("public.t")["id"].to_pylist() == [1]
        return
    with pytest.raises(ConfigurationError, match="as text only") as caught:
        read(db, "on")
    assert left_out in str(caught.value)
    with pytest.raises(ConfigurationError, match="as text only"):
        peek(db.dsn, slot="s", publication="p", binary="on")


def test_a_column_that_comes_later_and_can_be_read_as_text_only_is_an_error_with_its_remedy(db: Database) -> None:
    reader = PgOutputReader(db.dsn, slot="s", publication="p", binary="auto")
    with prepared(db, "a int") as c:
        c.execute("INSERT INTO t VALUES (1, 1)")
        changes = reader.sets()
        assert len(next(changes)) == 1
        c.execute("ALTER TABLE t ADD q tsquery")
        c.execute("INSERT INTO t VALUES (2, 2, NULL)")  # of which nothing is sent
        assert next(changes).table("public.t")["q"].to_pylist() == [None]
        c.execute("INSERT INTO t VALUES (3, 3, 'a & b')")
        with pytest.raises(DecodeError, match="can't be read") as caught:
            next(changes).table("public.t")
        reader.close(graceful=False)
    error = caught.value
    assert (error.table, error.column, error.type_name) == ("public.t", "q", "tsquery")
    assert 'binary="off"' in str(error)
    assert read(db, "auto").table("public.t")["q"].to_pylist()[-1] == "'a' & 'b'"


def test_a_composite_that_was_altered_is_the_same_misfit_as_in_text(db: Database) -> None:
    with prepared(db, "p int") as c:
        c.execute("CREATE TYPE pair AS (a text, b text)")
        c.execute("ALTER TABLE t ADD q pair, ADD r pair[]")
        c.execute(
            "INSERT INTO t VALUES (1, 1, ROW('x', 'y'), ARRAY[ROW('x, ', 'y')::pair]), (2, 2, ROW('7', 'z'), '{}')"
        )
        c.execute("ALTER TABLE t DROP q, DROP r")
        c.execute("ALTER TYPE pair ALTER ATTRIBUTE a TYPE int")
        (first,) = assert_same(*(fed(c, db.dsn, peeked(c, binary=b)) for b in ("false", "true")))
    assert first.data["q"].null_count == 2
    assert first.data["_raw"].to_pylist() == [
        [("q", "(x,y)"), ("r", '{"(\\"x, \\",y)"}')],
        [("q", "(7,z)"), ("r", "{}")],
    ]


def test_a_value_of_a_type_that_is_gone_is_an_error_in_binary_and_text_without(db: Database) -> None:
    with prepared(db, "a int") as c:
        c.execute("CREATE TYPE mood AS ENUM ('sad')")
        c.execute("ALTER TABLE t ADD m mood")
        c.execute("INSERT INTO t VALUES (1, 1, 'sad')")
        c.execute("ALTER TABLE t DROP m; DROP TYPE mood")
    with pytest.raises(PgOutputError, match='binary="off"'):
        read(db, "auto").table("public.t")
    assert read(db, "off").table("public.t")["m"].to_pylist() == ["sad"]


def test_a_reader_may_change_between_text_and_binary_wherever_it_stopped(db: Database) -> None:
    with prepared(db, "n numeric(10,2), at timestamptz") as c:
        c.execute("INSERT INTO t SELECT i, i / 7.0, '2024-01-01' FROM generate_series(1, 20) i")
        for i in range(21, 61):
            c.execute(f"INSERT INTO t VALUES ({i}, 'NaN', 'infinity')".encode())
        expected = peek(db.dsn, slot="s", publication="p").table("public.t")
    parts = []
    for binary in ("on", "off", "auto", "off"):
        with PgOutputReader(db.dsn, slot="s", publication="p", until="current", binary=binary, max_frames=60) as reader:
            changes = next(reader.sets(), None)
            if changes is not None:
                parts.append(changes.table("public.t"))
                reader.ack(changes)
    got = pa.concat_tables(parts)
    positions = list(zip(*(got[name].to_pylist() for name in ("_commit_lsn", "_seq")), strict=True))
    first = [positions.index(position) for position in dict.fromkeys(positions)]
    for name in expected.column_names:
        assert same(expected[name].combine_chunks(), got[name].take(first).combine_chunks()), name
