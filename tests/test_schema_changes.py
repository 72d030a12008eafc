"""Tables that change while they are captured: what their batches and files say, and which table a row is of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import bytewax.operators as op
import duckdb
import polars as pl
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bytewax.dataflow import Dataflow
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.testing import run_main
from harness.database import Database
from harness.notation import peeked, rendered

import pgoutput_source.operators as cdc
from pgoutput_source import ParquetSink, PgOutputSource, read
from pgoutput_source.changes import ChangeSet
from pgoutput_source.dataflow.run import gate
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.errors import SchemaChanged
from pgoutput_source.postgres.definitions import Definitions


def captured(db: Database, *statements: str) -> psycopg.Connection[Any]:
    """A connection behind a publication of all tables and its slot, with `statements` committed before them."""
    connection = db.connect()
    for statement in statements:
        connection.execute(statement.encode())
    connection.execute("CREATE PUBLICATION p FOR ALL TABLES")
    connection.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    return connection


def fed(assembler: Assembler, frames: Sequence[bytes], step: int) -> Iterator[ChangeSet]:
    for at in range(0, len(frames), step):
        yield assembler.feed(frames[at : at + step])


# -- which table a row is of ----------------------------------------------------------------------------------------

RENAMED = (
    "INSERT INTO s1.x VALUES (1)",
    "ALTER SCHEMA s1 RENAME TO s2",
    "INSERT INTO s2.x VALUES (2)",
    "CREATE SCHEMA s1",
    "CREATE TABLE s1.x (id int)",
    "INSERT INTO s1.x VALUES (10)",
    "INSERT INTO s2.x VALUES (3)",
    "TRUNCATE s2.x",
    "INSERT INTO s1.x VALUES (11)",
)


@pytest.mark.parametrize("step", [1, 1000])
def test_case_60_a_name_that_another_table_has_now_is_nobody_elses(any_db: Database, step: int) -> None:
    """PostgreSQL 14 and 15 do not announce a table again when its schema is renamed: 2 comes under the old name.

    That is the right table yet. Once a second one has the name, what comes of the first has to be called otherwise.
    """
    c = captured(any_db, "CREATE SCHEMA s1", "CREATE TABLE s1.x (id int)")
    for statement in RENAMED:
        c.execute(statement.encode())
    frames = peeked(c)
    second = "s2.x" if any_db.server.major >= 16 else "s1.x"

    found = list(fed(Assembler(look_up=Definitions(any_db.dsn)), frames, step))
    assert rendered(found) == f"+s1.x{{1}} | +{second}{{2}} | +s1.x{{10}} | +s2.x{{3}} | T(s2.x) | +s1.x{{11}}"

    # Without the catalogue the two would be one table, and the third row of the first a row of the second.
    if any_db.server.major < 16:
        assert "+s1.x{10} | +s1.x{3} |" in rendered(list(fed(Assembler(), frames, step)))


def test_case_60_a_new_connection_is_told_the_new_name(any_db: Database) -> None:
    c = captured(any_db, "CREATE SCHEMA s1", "CREATE TABLE s1.x (id int)")
    for statement in RENAMED[:3]:
        c.execute(statement.encode())
    assembler = Assembler(look_up=Definitions(any_db.dsn))
    assembler.feed(peeked(c))
    c.execute("SELECT pg_replication_slot_advance('s', pg_current_wal_lsn())")
    c.execute("INSERT INTO s2.x VALUES (4)")
    assembler.reconnected()

    assert rendered([assembler.feed(peeked(c))]) == "+s2.x{4}"


@pytest.mark.parametrize("step", [1, 1000])
def test_case_60_a_row_of_a_table_whose_name_nobody_knows_is_refused(any_db: Database, step: int) -> None:
    c = captured(any_db, "CREATE SCHEMA s1", "CREATE TABLE s1.x (id int)")
    for statement in (*RENAMED, "DROP SCHEMA s2 CASCADE"):
        c.execute(statement.encode())
    sets = fed(Assembler(look_up=Definitions(any_db.dsn)), peeked(c), step)

    if any_db.server.major >= 16:
        assert "+s2.x{3} | T(s2.x) | +s1.x{11}" in rendered(list(sets))
    else:
        with pytest.raises(SchemaChanged, match=r"another table has this name now.*table s1\.x.*LSN") as caught:
            list(sets)
        assert "start again" in (caught.value.hint or "")


@pytest.mark.parametrize("step", [5, 1000])
def test_a_table_that_is_dropped_and_made_again_is_two_versions_of_one_name(any_db: Database, step: int) -> None:
    c = captured(any_db, "CREATE TABLE t (id int PRIMARY KEY, v text)")
    c.execute("INSERT INTO t VALUES (1, 'a')")
    c.execute("UPDATE t SET v = 'b'")
    c.execute("DROP TABLE t")
    c.execute("CREATE TABLE t (v text PRIMARY KEY)")
    c.execute("INSERT INTO t VALUES ('new')")
    c.execute(
        "ALTER TABLE t RENAME TO old; CREATE TABLE t (id int); INSERT INTO t VALUES (2); INSERT INTO old VALUES (3)"
    )
    sets = list(fed(Assembler(look_up=Definitions(any_db.dsn)), peeked(c), step))

    assert rendered(sets) == "+t{1,a} | ~t{1,b} | +t{new} | +t{2} +old{3}"
    assert len({b.schema.relation_id for s in sets for b in s.batches}) == 3


# -- batches and files ----------------------------------------------------------------------------------------------

STEPS = (
    ("INSERT INTO t VALUES (1, 10, 'a')",),
    ("ALTER TABLE t ADD extra date", "INSERT INTO t VALUES (2, 20, 'b', '2026-01-02')"),
    ("ALTER TABLE t ALTER n TYPE bigint", "INSERT INTO t VALUES (3, 3000000000, 'c', NULL)"),
    (
        "INSERT INTO t VALUES (4, 40, 'd'); ALTER TABLE t DROP extra; INSERT INTO t VALUES (5, 50, 'e');"
        " ALTER TABLE t ADD flag bool DEFAULT true; INSERT INTO t VALUES (6, 60, 'f');"
        " UPDATE t SET n = 61 WHERE id = 6",
    ),
    ("ALTER TABLE t RENAME v TO w", "INSERT INTO t VALUES (7, 70, 'g', false)"),
    ("ALTER TABLE t REPLICA IDENTITY FULL", "DELETE FROM t WHERE id = 7"),
    ("ANALYZE t", "COMMENT ON TABLE t IS 'nothing new'", "INSERT INTO t VALUES (8, 80, 'h', NULL)"),
)
VERSIONS = 7
ROWS = [
    ("I", 1, 10, "a", None, None, None),
    ("I", 2, 20, "b", "2026-01-02", None, None),
    ("I", 3, 3_000_000_000, "c", None, None, None),
    ("I", 4, 40, "d", None, None, None),
    ("I", 5, 50, "e", None, None, None),
    ("I", 6, 60, "f", None, True, None),
    ("U", 6, 61, "f", None, True, None),
    ("I", 7, 70, None, None, False, "g"),
    ("D", 7, 70, None, None, False, "g"),
    ("I", 8, 80, None, None, None, "h"),
]


class Capture:
    """The dataflow of a user, run to the end of what is committed, again and again."""

    def __init__(self, db: Database, folder: Path) -> None:
        self.dsn, self.out, self.store = db.dsn, folder / "out", folder / "recovery"
        self.store.mkdir()
        init_db_dir(self.store, 1)  # type: ignore[no-untyped-call]

    def run(self, **options: Any) -> None:
        gate.abandon()
        flow = Dataflow("t")
        source = PgOutputSource(self.dsn, slot="s", publication="p", until="current", **options)
        rows = cdc.table("rows", op.input("in", flow, source), "public.t")
        cdc.output("out", rows, ParquetSink(self.out, max_age=timedelta(hours=1)))
        config = RecoveryConfig(str(self.store))  # type: ignore[no-untyped-call]
        run_main(flow, epoch_interval=timedelta(0), recovery_config=config)  # type: ignore[no-untyped-call]

    @property
    def files(self) -> list[Path]:
        return sorted(self.out.glob("*.parquet"))


@pytest.mark.parametrize("down", [False, True], ids=["in one run", "while the consumer is down"])
def test_files_over_all_versions_of_a_table(any_db: Database, tmp_path: Path, down: bool) -> None:
    c = captured(any_db, "CREATE TABLE t (id int PRIMARY KEY, n int, v text)")
    capture = Capture(any_db, tmp_path)
    for step in STEPS:
        for statement in step:
            c.execute(statement.encode())
        if down:
            capture.run()
    capture.run()

    # A file holds one version, the index names it, and tables of equal schemas share one.
    index = [json.loads(line) for line in (capture.out / "_index.jsonl").read_text().splitlines()]
    schemas = {file.name: pq.read_schema(file) for file in capture.files}
    assert [line["file"] for line in index] == list(schemas)
    by_version = {line["schema"]: schemas[line["file"]] for line in index}
    # A version that goes on in a transaction that drops `extra` does not know the number of `extra` there.
    assert len(by_version) == VERSIONS + down
    for line in index:
        kind = schemas[line["file"]]
        assert kind.equals(by_version[line["schema"]], check_metadata=True)
    assert len(schemas) == VERSIONS + 2 * down  # two versions go on in the next run

    # One dataset over all of them, for whoever reads it.
    names = ("_op", "id", "n", "v", "extra", "flag", "w")
    table = (
        read(capture.out, table="public.t").to_table().sort_by([("_commit_lsn", "ascending"), ("_seq", "ascending")])
    )
    assert table.schema.field("n").type == pa.int64()
    rows = zip(*(table.column(name).to_pylist() for name in names), strict=True)
    assert [(*row[:4], row[4] and str(row[4]), *row[5:]) for row in rows] == ROWS
    glob = str(capture.out / "*.parquet")
    query = f"SELECT {', '.join(names)} FROM read_parquet('{glob}', union_by_name = true) ORDER BY _commit_lsn, _seq"
    assert [(*row[:4], row[4] and str(row[4]), *row[5:]) for row in duckdb.execute(query).fetchall()] == ROWS
    frames = [pl.read_parquet(file) for file in capture.files]
    frame = pl.concat(frames, how="diagonal_relaxed").sort("_commit_lsn", "_seq").select(names)
    assert [(*row[:4], row[4] and str(row[4]), *row[5:]) for row in frame.rows()] == ROWS


def test_a_column_that_becomes_of_another_kind_has_files_of_both_kinds(any_db: Database, tmp_path: Path) -> None:
    """Each file has its own type; `read` gives the column as text, which holds all: nobody should add them up."""
    c = captured(any_db, "CREATE TABLE t (id int PRIMARY KEY, v text)")
    for statement in (
        "INSERT INTO t VALUES (1, '7')",
        "ALTER TABLE t ALTER v TYPE bigint USING v::bigint",
        "INSERT INTO t VALUES (2, 8)",
        "ALTER TABLE t ALTER v TYPE smallint",  # narrower
        "INSERT INTO t VALUES (3, 9)",
    ):
        c.execute(statement.encode())
    capture = Capture(any_db, tmp_path)
    capture.run()

    kinds = [pq.read_schema(file).field("v").type for file in capture.files]
    assert kinds == [pa.utf8(), pa.int64(), pa.int16()]
    assert [pq.read_table(file).column("v").to_pylist() for file in capture.files] == [["7"], [8], [9]]
    together = read(capture.out).to_table().sort_by("id").column("v")
    assert (together.type, together.to_pylist()) == (pa.utf8(), ["7", "8", "9"])


def test_a_flow_whose_tables_must_not_change_stops_before_the_change_and_goes_on_when_it_may(
    any_db: Database, tmp_path: Path
) -> None:
    c = captured(any_db, "CREATE TABLE t (id int PRIMARY KEY, v text)", "CREATE TABLE other (id int)")
    c.execute("INSERT INTO t VALUES (1, 'a')")
    capture = Capture(any_db, tmp_path)
    capture.run(on_schema_change="fail")
    c.execute("ANALYZE t")
    c.execute("INSERT INTO t VALUES (2, 'b')")
    capture.run(on_schema_change="fail")
    c.execute("INSERT INTO t VALUES (3, 'c')")
    c.execute("ALTER TABLE t ALTER id TYPE bigint, ADD w int")
    c.execute("INSERT INTO t VALUES (4, 'd', 5)")
    with pytest.raises((RuntimeError, SchemaChanged)) as caught:
        capture.run(on_schema_change="fail")
    cause: BaseException | None = caught.value
    while not isinstance(cause, SchemaChanged):
        assert cause is not None
        cause = cause.__cause__
    assert "no more column 'id' integer" in cause.message
    assert "now column 'id' bigint" in cause.message
    assert sorted(read(capture.out).to_table().column("id").to_pylist()) in ([1, 2], [1, 2, 3])

    capture.run(on_schema_change="evolve")
    assert sorted(read(capture.out).to_table().column("id").to_pylist()) == [1, 2, 3, 4]
