"""The numbered conformance cases: what is committed, on each major, and what must come out of its slot.

A case is a line of the table below, or a function that has its numbers in its name. Statements of a case are committed
one by one; several on a line, or between BEGIN and COMMIT, are one transaction. The notation is that of `notation`.

`test_case_numbers` says where the other numbers are, and what does not apply. What PostgreSQL itself does otherwise on
some majors is a line of its own, with `until`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from harness.conformance_cases import CASES, FULL, ONE, WIDE, Case
from harness.database import Database
from harness.flow import Flow, publish
from harness.notation import positions, rendered
from harness.slot import ALL, Slot, T, run
from harness.streams import frame

from pgoutput_source import PgOutputReader
from pgoutput_source import messages as m
from pgoutput_source.changes import ChangeSet, Position
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.embedded import Server
from pgoutput_source.errors import PublicationError, SchemaChanged, SlotMismatch
from pgoutput_source.postgres import checks
from pgoutput_source.postgres.slots import slot_state
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.settings import SourceSettings


@pytest.fixture(scope="module")
def arena(any_pg: Server) -> Iterator[Database]:
    """One database for all cases of a major."""
    database = Database(any_pg)
    yield database
    database.drop()


@pytest.fixture
def bare(arena: Database) -> Iterator[Database]:
    """The same database, as empty as at first."""
    yield arena
    while arena._connections:
        arena._connections.pop().close()
    with arena.connect() as c:
        for slot in ("s", "two"):
            c.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s", [slot]
            )
        c.execute("SELECT pg_replication_origin_drop(roname) FROM pg_replication_origin")
        for (name,) in c.execute("SELECT pubname FROM pg_publication").fetchall():
            c.execute(f'DROP PUBLICATION "{name}"')
        found = c.execute("SELECT nspname FROM pg_namespace WHERE nspname ~ '^(public|s[0-9])$'").fetchall()
        for (name,) in found:
            c.execute(f"DROP SCHEMA {name} CASCADE")
        c.execute("CREATE SCHEMA public")


def acknowledged(database: Database, **options: Any) -> list[ChangeSet]:
    """What a reader gives out up to what is committed, each set acknowledged."""
    found = []
    with PgOutputReader(database.dsn, slot="s", publication="p", until="current", **options) as reader:
        for changes in reader.sets():
            found.append(changes)
            reader.ack(changes)
    return found


def ids(cases: list[Case]) -> list[str]:
    return [f"case {c.number} from {c.since}" if c.since > 14 else f"case {c.number}" for c in cases]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_case(bare: Database, case: Case) -> None:
    if not case.since <= bare.server.major <= case.until:
        pytest.skip(f"PostgreSQL {case.since} to {case.until}")
    slot = Slot(bare, case.before, case.publish)
    slot.run(case.sql)

    assert rendered(slot.sets(**case.options), names=case.names) == case.expected
    assert not slot.assembler.in_transaction


def test_case_6_7_a_relation_comes_once_a_connection_and_is_no_change_of_the_schema(bare: Database) -> None:
    slot = Slot(bare)
    slot.run("INSERT INTO t VALUES (1, 'a')\nINSERT INTO t VALUES (2, 'b')")
    frames = slot.frames()

    assert bytes(f[25] for f in frames) == b"BRICBIC"
    assert rendered([slot.assembler.feed(frames)]) == "+t{1,a} | +t{2,b}"

    slot.run("INSERT INTO t VALUES (3, 'c')")
    slot.assembler.reconnected()
    known = slot.assembler.relations.current(frame_relation(frames)).schema
    again = slot.assembler.feed(slot.frames())

    assert rendered([again]) == "+t{3,c}"
    assert again.batches[0].schema is known


def frame_relation(frames: list[bytes]) -> int:
    """The relation that the first Relation message announces."""
    relation = next(m.decode(f[25:]) for f in frames if f[25] == ord("R"))
    assert isinstance(relation, m.Relation)
    return relation.relation_id


def test_case_12_rows_of_one_copy_share_an_lsn_and_have_positions_of_their_own(bare: Database) -> None:
    slot = Slot(bare)
    with slot.connection.cursor() as cursor, cursor.copy("COPY t FROM STDIN") as copy:
        copy.write("1\ta\n2\tb\n3\tc\n")
    sets = slot.sets()

    assert rendered(sets) == "+t{1,a} +t{2,b} +t{3,c}"
    lsns = [lsn for s in sets for b in s.batches for lsn in b.data["_lsn"].to_pylist()]
    assert len(set(lsns)) == 1
    assert len(set(positions(sets))) == 3


def test_case_21_a_transaction_that_the_server_spilled_is_one_transaction(bare: Database) -> None:
    slot = Slot(bare)
    slot.connection.execute("SET logical_decoding_work_mem = '64kB'")
    slot.run("INSERT INTO t SELECT i, 'value ' || i FROM generate_series(1, 10000) i")
    frames = slot.frames()
    sets = [slot.assembler.feed(frames[i : i + 3000]) for i in range(0, len(frames), 3000)]

    assert len({lsn for lsn, _ in positions(sets)}) == 1
    assert [seq for _, seq in positions(sets)] == list(range(10_000))
    assert [i for s in sets for i in s.table("public.t")["id"].to_pylist()] == list(range(1, 10_001))


def test_case_24_as_many_columns_as_a_table_can_have(bare: Database) -> None:
    slot = Slot(bare, f"CREATE TABLE w ({', '.join(f'c{i} bool' for i in range(1600))})")
    slot.run(f"INSERT INTO w (c0, c1599) VALUES (true, false)\nINSERT INTO w SELECT {', '.join(['true'] * 1600)}")
    batch = slot.assembler.feed(slot.frames()).batches[0]

    first, second = batch.data.select(range(1600)).to_pylist()
    assert [v for v in first.values() if v is not None] == [True, False]
    assert set(second.values()) == {True}


def test_case_27_a_namespace_that_is_not_sent_is_pg_catalog(bare: Database) -> None:
    slot = Slot(bare, "SET allow_system_table_mods = on\nCREATE TABLE pg_catalog.mine (id int)")
    try:
        slot.run("INSERT INTO pg_catalog.mine VALUES (1)")
        assert rendered(slot.sets()) == "+pg_catalog.mine{1}"
    finally:
        slot.run("DROP TABLE pg_catalog.mine")


def test_case_29_transactions_come_in_the_order_of_their_commits(bare: Database) -> None:
    slot = Slot(bare)
    other = bare.connect()
    slot.run("BEGIN\nINSERT INTO t VALUES (1, 'a')")
    run(other, "BEGIN\nINSERT INTO t VALUES (2, 'b')\nCOMMIT")
    slot.run("INSERT INTO t VALUES (3, 'c')\nCOMMIT")

    assert rendered(slot.sets()) == "+t{2,b} | +t{1,a} +t{3,c}"


def test_case_30_transaction_numbers_may_wrap_around() -> None:
    def transaction(lsn: int, xid: int) -> list[bytes]:
        lsns = Lsn(lsn), Lsn(lsn + 8)
        return [frame(m.Begin(lsns[0], 0, xid), lsn), frame(m.Commit(*lsns, 0), lsn + 8)]

    assembler = Assembler()
    assembler.feed(transaction(100, 2**32 - 1) + transaction(200, 3))

    assert assembler.end_lsn == 208


def test_case_57_58_70_what_a_new_version_of_a_table_is(bare: Database) -> None:
    slot = Slot(bare, "CREATE TABLE c (id int PRIMARY KEY, v varchar(5))")
    slot.run("""INSERT INTO c VALUES (1, 'a')
        ANALYZE c
        CREATE INDEX ci ON c (v)
        COMMENT ON TABLE c IS 'nothing new'
        ALTER TABLE c ALTER v SET DEFAULT 'x', ALTER v SET NOT NULL
        INSERT INTO c VALUES (2, 'b')
        ALTER TABLE c ALTER v TYPE varchar(20)
        INSERT INTO c VALUES (3, 'c')
        ALTER TABLE c RENAME TO c2
        INSERT INTO c2 VALUES (4, 'd')""")
    frames = slot.frames()
    batches = slot.assembler.feed(frames).batches

    assert bytes(f[25] for f in frames).count(b"R") > 3  # announced again without a change
    assert [len(b) for b in batches] == [2, 1, 1]
    assert [b.schema.columns[1].typmod for b in batches] == [9, 24, 24]
    assert [b.table for b in batches] == ["public.c", "public.c", "public.c2"]
    assert len({b.schema.relation_id for b in batches}) == 1


def test_case_28_47_which_columns_are_the_identity(bare: Database) -> None:
    slot = Slot(bare, FULL + "CREATE TABLE n (id int)\nCREATE TABLE k (v int, id int PRIMARY KEY)")
    slot.run("INSERT INTO n VALUES (1)\nINSERT INTO t VALUES (1, 'a')\nINSERT INTO k VALUES (2, 1)")
    found = {b.schema.name: b.schema.key for b in slot.assembler.feed(slot.frames()).batches}

    assert found == {"n": (), "t": ("id", "v"), "k": ("id",)}


def test_case_69_an_attribute_that_a_composite_type_got_meanwhile(bare: Database) -> None:
    slot = Slot(bare, "CREATE TYPE pair AS (a int, b text)\nCREATE TABLE c (id int, p pair)")
    slot.run("INSERT INTO c VALUES (1, (1, 'x'))")
    first = slot.assembler.feed(slot.frames()).batches[0]
    slot.run("ALTER TYPE pair ADD ATTRIBUTE c int\nINSERT INTO c VALUES (2, (2, 'y', 3))")
    slot.assembler.reconnected()
    second = slot.assembler.feed(slot.frames()).batches[0]

    assert first.data["p"].to_pylist() == [{"a": 1, "b": "x"}]
    # What its type can't hold is no error and not lost: it is kept as it came.
    assert second.data["p"].to_pylist() == [None]
    assert second.data["_raw"].to_pylist() == [[("p", "(2,y,3)")]]


@pytest.mark.parametrize("how", ["after the slot", "made again", "renamed"])
def test_case_77_78_79_a_publication_that_is_missing_where_a_change_stands_ends_the_stream(
    bare: Database, how: str
) -> None:
    """PostgreSQL 18 only warns, and leaves the rows out. What stands before is given out in an earlier run."""
    slot = Slot(bare, T, "SELECT 1" if how == "after the slot" else ALL)
    if how != "after the slot":
        slot.run("INSERT INTO t VALUES (0, 'before')")
        assert rendered(acknowledged(bare)) == "+t{0,before}"
        slot.run("ALTER PUBLICATION p RENAME TO q" if how == "renamed" else "DROP PUBLICATION p")
    slot.run("INSERT INTO t VALUES (1, 'a')")
    slot.run("ALTER PUBLICATION q RENAME TO p" if how == "renamed" else ALL)
    slot.run("INSERT INTO t VALUES (2, 'b')")
    state = "SELECT confirmed_flush_lsn FROM pg_replication_slots"
    before = slot.connection.execute(state).fetchone()

    for _ in range(2):
        reader = PgOutputReader(bare.dsn, slot="s", publication="p", until="current")
        with reader, pytest.raises(PublicationError, match='"p"') as caught:
            list(reader.sets())
        assert "older than the slot" in (caught.value.hint or "")
    assert slot.connection.execute(state).fetchone() == before


def test_case_85_column_lists_that_contradict_each_other_are_the_servers_error(bare: Database) -> None:
    if bare.server.major < 15:
        pytest.skip("column lists come with PostgreSQL 15")
    slot = Slot(bare, WIDE, "CREATE PUBLICATION p FOR TABLE d (id, n)\nCREATE PUBLICATION q FOR TABLE d (id, v)")
    slot.run("INSERT INTO d VALUES (2, 'x', 3)")

    with pytest.raises(psycopg.errors.FeatureNotSupported, match="different column lists"):
        slot.frames(publications="p,q")


def test_case_105_a_two_phase_slot_is_refused(bare: Database) -> None:
    slot = Slot(bare)
    slot.run("SELECT pg_create_logical_replication_slot('two', 'pgoutput', false, true)")
    settings = SourceSettings.of(dsn=bare.dsn, slot="two", publication="p")

    with pytest.raises(SlotMismatch, match="two-phase") as caught:
        checks.check(slot.connection, settings)
    assert "slot without" in (caught.value.hint or "")
    for streaming in ("off", "on"):
        with pytest.raises(SlotMismatch, match="two-phase"):
            PgOutputReader(bare.dsn, slot="two", publication="p", streaming=streaming).open()


@pytest.mark.parametrize("streaming", ["off", "on", "parallel"])
def test_case_103_104_105_what_was_prepared_comes_when_it_is_committed_whoever_reads_meanwhile(
    bare: Database, streaming: str
) -> None:
    if streaming == "parallel" and bare.server.major < 16:
        pytest.skip("parallel comes with PostgreSQL 16")
    slot = Slot(bare)
    slot.run(f"ALTER DATABASE {bare.name} SET logical_decoding_work_mem = '64kB'")

    slot.run("""BEGIN
        INSERT INTO t SELECT i, 'prepared' FROM generate_series(1, 3000) i
        PREPARE TRANSACTION 'kept'
        BEGIN
        INSERT INTO t SELECT i, 'never' FROM generate_series(4001, 6000) i
        PREPARE TRANSACTION 'dropped'
        INSERT INTO t VALUES (-1, 'between')""")
    assert rendered(acknowledged(bare, streaming=streaming)) == "+t{-1,between}"
    slot.run("INSERT INTO t VALUES (-2, 'b')\nROLLBACK PREPARED 'dropped'")
    assert rendered(acknowledged(bare, streaming=streaming)) == "+t{-2,b}"
    slot.run("COMMIT PREPARED 'kept'\nINSERT INTO t VALUES (-3, 'c')")
    found = acknowledged(bare, streaming=streaming)

    assert [i for s in found for i in s.table("public.t")["id"].to_pylist()] == [*range(1, 3001), -3]
    assert [seq for _, seq in positions(found)] == [*range(3000), 0]
    assert acknowledged(bare, streaming=streaming) == []
    # Asking for it once would turn the slot into one that brings rows before they are committed, for ever.
    state = slot_state(slot.connection, "s")
    assert state is not None
    assert state.two_phase is False


def test_case_118_a_reader_goes_on_in_the_midst_of_a_transaction(bare: Database) -> None:
    slot = Slot(bare)
    slot.run("INSERT INTO t VALUES (1, 'a'), (2, 'b'), (3, 'c'); TRUNCATE t\nINSERT INTO t VALUES (4, 'd')")
    frames = slot.frames()
    commit_lsn = positions([slot.fresh().feed(frames)])[0][0]
    texts = ["+t{1,a}", "+t{2,b}", "+t{3,c}", "T(t)", "| +t{4,d}"]

    for seq in range(4):
        rest = Assembler(skip_until=Position(Lsn(commit_lsn), seq)).feed(frames)
        assert list(_texts(rest)) == texts[seq + 1 :]


def _texts(changes: ChangeSet) -> Iterator[str]:
    """Changes in notation, for sets that begin in the midst of a transaction."""
    for batch in changes.batches:
        for row in batch.data.to_pylist():
            text = f"+t{{{row['id']},{row['v']}}}" if row["_op"] == "I" else "T(t)"
            yield f"| {text}" if row["id"] == 4 else text
    assert all(t.tables == ("public.t",) for t in changes.truncates)
    assert len(changes.truncates) == sum(row == "T" for b in changes.batches for row in b.data["_op"].to_pylist())


# ------------------------------------------------------------------------------------ tables that must stay as they are

CHANGES = {
    "ALTER TABLE t ADD w int": "now column 'w' integer",
    "ALTER TABLE t DROP v": "no more column 'v' text",
    "ALTER TABLE t RENAME v TO w": "no more column 'v' text, now column 'w' text",
    "ALTER TABLE t ALTER v TYPE varchar(5)": "no more column 'v' text, now column 'v' character varying(9)",
    "ALTER TABLE t RENAME TO u": "no more public.t, now public.u",
    "ALTER TABLE t REPLICA IDENTITY FULL": "now replica identity 'f'",
    "DROP TABLE t\nCREATE TABLE t (id int PRIMARY KEY)": "no more column 'v' text",
    "ALTER TABLE t DROP v\nALTER TABLE t ADD v text": None,
    "ANALYZE t\nCREATE INDEX ON t (v)\nALTER TABLE t ALTER v SET DEFAULT 'x'": None,
}


@pytest.mark.parametrize("ddl", CHANGES)
def test_a_table_that_must_not_change_ends_the_stream_when_it_does(bare: Database, ddl: str) -> None:
    if bare.server.major not in (14, 18):
        pytest.skip("the oldest and the newest")
    slot = Slot(bare, ONE)
    slot.run("INSERT INTO t (id) VALUES (2)")
    slot.assembler = Assembler(known_tables={})
    slot.sets()
    slot.run(ddl)
    slot.run(f"INSERT INTO {'u' if 'TO u' in ddl else 't'} (id) VALUES (3)")
    frames = slot.frames()
    # Also behind a restart: what a table was is part of the resume state.
    assemblers = [Assembler(known_tables={}), Assembler(known_tables=slot.assembler.relations.known)]
    for assembler, part in zip(
        assemblers, (frames, frames[-4:] if b"R" in _tags(frames[-4:]) else frames), strict=True
    ):
        expected = CHANGES[ddl]
        if expected is None:
            assembler.feed(part)
            continue
        with pytest.raises(SchemaChanged, match=re.escape(expected)) as caught:
            [batch.data for batch in assembler.feed(part)]
        assert caught.value.table == "public.t"
        assert caught.value.lsn


def _tags(frames: list[bytes]) -> bytes:
    return bytes(f[25] for f in frames)


@pytest.mark.slow
def test_a_flow_whose_tables_must_not_change_remembers_them(db: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        run(c, T)
        publish(db)
        run(c, "INSERT INTO t VALUES (1, 'a')")
        flow = Flow(db, tmp_path, PGOUTPUT_UNTIL="current", PGOUTPUT_ON_SCHEMA_CHANGE="fail")
        flow.run("-s", "1", *flow.recovery())
        run(c, "ALTER TABLE t ADD w int\nINSERT INTO t VALUES (2, 'b', 3)")
        process = flow.start("-s", "1", *flow.recovery())
        _, said = process.communicate(timeout=60)

        assert process.returncode != 0
        assert "SchemaChanged: the table has changed: now column 'w' integer (at table public.t" in said
        Flow(db, tmp_path, PGOUTPUT_UNTIL="current").run("-s", "1", *flow.recovery())
