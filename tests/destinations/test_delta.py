"""Tables in Delta Lake: the source's tables are the oracle, and DuckDB reads the files that the log lists."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable
from harness.database import Database
from harness.flow import Busy, Flow, failure, following, publish, wait_for
from harness.mirrors import keyed, unkeyed, unlike_source
from harness.type_cases import CASES, PINNED, Case
from harness.workload import Workload
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg import sql

from pgoutput_source import PgOutputReader
from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.changes.schema import TableName
from pgoutput_source.destinations.base import Job
from pgoutput_source.destinations.delta import DeltaDestination, DeltaTargets
from pgoutput_source.destinations.targets import Target
from pgoutput_source.embedded import Server
from pgoutput_source.errors import SinkError
from pgoutput_source.testing import batch
from pgoutput_source.types.written import written

Tables = list[tuple[str, str]]


def into(db: Database, folder: Path, **environ: str) -> Flow:
    settings = {"MODE": "mirror", "SPOOL": str(folder / "spool"), "INTO": f"delta:{folder}/lake/{{schema}}/{{table}}"}
    return Flow(db, folder, module="harness.into_tables", **(settings | environ))


def place(folder: Path, schema: str, name: str) -> str:
    target = DeltaTargets(f"{folder}/lake/{{schema}}/{{table}}").of(TableName(schema, name))
    assert target is not None
    return target.name


def stored(folder: Path, schema: str = "public", name: str = "t") -> pa.Table:
    """A Delta table, read by DuckDB from the files that its log lists."""
    table = DeltaTable(Path(place(folder, schema, name)).as_uri())
    files = [unquote(file) for file in table.file_uris()]
    kinds = pa.schema(table.schema().to_arrow())
    if not files:
        return kinds.empty_table()
    connection = duckdb.connect()
    connection.execute("SET TimeZone TO 'UTC'")
    rows = connection.read_parquet(files, union_by_name=True).to_arrow_table()
    rows = pa.Table.from_arrays([rows.column(f.name).cast(f.type) for f in kinds], schema=kinds.remove_metadata())
    own = pa.table(table.scan()).select(kinds.names).cast(rows.schema)
    assert sorted(map(repr, own.to_pylist())) == sorted(map(repr, rows.to_pylist()))  # NaN is not equal to itself
    return rows


@pytest.fixture
def scratch(pg: Server) -> Iterator[Database]:
    """A database for what was stored, so that a server can write it as text."""
    made = Database(pg)
    yield made
    made.drop()


def wrong(db: Database, folder: Path, scratch: Database, tables: Tables) -> list[str]:
    """What the mirrors have that their sources have not, and the reverse."""

    def read(schema: str, name: str) -> pa.Table | None:
        return stored(folder, schema, name) if Path(place(folder, schema, name)).exists() else None

    return unlike_source(db, scratch, tables, read)


def test_a_mirror_equals_its_source(db: Database, scratch: Database, tmp_path: Path) -> None:
    with Workload(db.dsn, seed=3, tables=8, largest=300) as workload:
        publish(db)
        flow = into(db, tmp_path, EXCLUDE=unkeyed(workload), PGOUTPUT_UNTIL="current")
        for _ in range(3):
            workload.run(700)
            flow.run("-s", "0", *flow.recovery())
            assert wrong(db, tmp_path, scratch, keyed(workload)) == []


def test_a_mirror_of_tables_that_were_there_before(db: Database, scratch: Database, tmp_path: Path) -> None:
    with Workload(db.dsn, seed=8, tables=6, largest=300) as workload:
        workload.run(1_000)
        publish(db)
        workload.run(500)
        flow = into(db, tmp_path, EXCLUDE=unkeyed(workload), PGOUTPUT_SNAPSHOT="initial", TWICE="1")
        flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
        workload.run(500)
        flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
        assert wrong(db, tmp_path, scratch, keyed(workload)) == []


@pytest.mark.slow
@pytest.mark.parametrize("max_age", ["0", "0.5"])
def test_kill_9_while_parts_are_spooled_and_committed(
    db: Database, scratch: Database, tmp_path: Path, max_age: str
) -> None:
    rng = random.Random(max_age)
    with Busy(db.dsn, seed=5, tables=6, largest=200) as workload:
        publish(db)
        flow = into(db, tmp_path, EXCLUDE=unkeyed(workload), MAX_AGE=max_age, PGOUTPUT_MAX_FRAMES="7")
        for _ in range(5):
            process = flow.start("-s", rng.choice(["0", "1"]), *flow.recovery())
            with following(process) as lines:
                wait_for(lines, "streaming from", process)
                time.sleep(rng.uniform(0, 1.0))
                process.send_signal(signal.SIGKILL)
        workload.stop()
        flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current", PGOUTPUT_MAX_FRAMES="5000")
    assert wrong(db, tmp_path, scratch, keyed(workload)) == []


def texts(rows: pa.RecordBatch, name: str, kind: str, raw_name: str) -> list[str | None]:
    """A column as PostgreSQL writes it."""
    text = written(rows.column(name), kind)
    exact = pc.map_lookup(rows.column("_raw"), pa.scalar(raw_name), "first")
    found: list[str | None] = pc.coalesce(text, exact.cast(text.type)).to_pylist()
    return found


def changes_of(table: pa.Table, columns: list[tuple[str, str]]) -> list[tuple[Any, ...]]:
    """Every change, in order, as texts."""
    rows = table.combine_chunks().to_batches()[0]
    metadata = [rows.column(n).to_pylist() for n in ("_commit_lsn", "_seq", "_lsn", "_xid", "_op", "_commit_ts")]
    unchanged = [None if u is None else tuple(u) for u in rows.column("_unchanged").to_pylist()]
    own = [texts(rows, name, kind, name) for name, kind in columns]
    before = rows.column("_before")
    parts = pa.RecordBatch.from_arrays(before.flatten(), [field.name for field in before.type])
    parts = parts.append_column("_raw", rows.column("_raw"))
    own += [texts(parts, name, kind, f"_before.{name}") for name, kind in columns]
    return sorted(zip(*metadata, unchanged, before.is_valid().to_pylist(), *own, strict=True))


def test_history_has_every_change(db: Database, tmp_path: Path) -> None:
    with Workload(db.dsn, seed=4, tables=6, largest=100) as workload:
        publish(db)
        flow = into(db, tmp_path, MODE="history", PGOUTPUT_UNTIL="current", TWICE="1")
        workload.run(600)
        expected: dict[TableName, list[pa.RecordBatch]] = {}
        with PgOutputReader(dsn=db.dsn, slot="cdc", publication="cdc", until="current") as reader:
            for some in reader.sets():
                for one in some.batches:
                    expected.setdefault(one.schema.full_name, []).append(one.data)
        flow.run("-s", "0", *flow.recovery())
    assert len(expected) == 6
    for (schema, name), batches in expected.items():
        fields = batches[0].schema
        columns = [(f.name, f.metadata[b"pg.type"].decode()) for f in fields if b"pg.type" in (f.metadata or {})]
        changes = pa.Table.from_batches(batches)
        assert changes_of(stored(tmp_path, schema, name), columns) == changes_of(changes, columns)


def drawn(cases: list[Case]) -> list[list[str]]:
    """Values of each type: those at its edges, and some others."""
    found: list[list[str]] = []

    @settings(max_examples=1, database=None, derandomize=True, deadline=None)
    @given(st.data())
    def draw(data: st.DataObject) -> None:
        found[:] = [[*case.edges, *data.draw(st.lists(case.inputs, min_size=3, max_size=3))] for case in cases]

    draw()
    return found


def test_values_of_every_type_are_read_back(db: Database, scratch: Database, tmp_path: Path) -> None:
    cases = [case for case in CASES if case.since <= db.server.major]
    values = drawn(cases)
    with db.connect(options=PINNED) as c:
        c.execute("CREATE TYPE public.nothing AS (); CREATE TYPE public.pair AS (a date, b time, c xid8[])")
        every = ", ".join(f"c{i} {case.sql}" for i, case in enumerate(cases))
        c.execute(f"CREATE TABLE public.t (id int PRIMARY KEY, {every}, n public.nothing, p public.pair)".encode())
        publish(db)
        for row in range(max(map(len, values))):
            cells = [some[row] if row < len(some) else None for some in values]
            there = [i for i, cell in enumerate(cells) if cell is not None]
            pair = f"(9999-12-{31 - row % 2},{'24:00' if row % 3 else ''},{{{row}}})"
            columns = [sql.Identifier(name) for name in ("id", "n", "p", *(f"c{i}" for i in there))]
            made = [sql.Literal(row), sql.SQL("ROW()"), sql.SQL("{}::public.pair").format(sql.Literal(pair))]
            made += [sql.SQL("{}::{}").format(sql.Literal(cells[i]), sql.SQL(cases[i].sql)) for i in there]
            insert = sql.SQL("INSERT INTO public.t ({}) VALUES ({})")
            c.execute(insert.format(*(sql.SQL(", ").join(some) for some in (columns, made))))
    flow = into(db, tmp_path, PGOUTPUT_UNTIL="current")
    flow.run("-s", "0", *flow.recovery())
    with scratch.connect() as c:
        c.execute("CREATE TYPE nothing AS (); CREATE TYPE pair AS (a date, b time, c xid8[])")
    assert wrong(db, tmp_path, scratch, [("public", "t")]) == []


def test_a_lost_spool_is_an_error(db: Database, scratch: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY)")
        publish(db)
        c.execute("INSERT INTO t SELECT generate_series(1, 100)")
    flow = into(db, tmp_path, MAX_AGE="60")
    process = flow.start("-s", "0", *flow.recovery())
    with following(process) as lines:
        wait_for(lines, "streaming from", process)
        deadline = time.monotonic() + 20
        while not list((tmp_path / "spool").glob("*.committed")):
            assert time.monotonic() < deadline, lines
            time.sleep(0.05)
        time.sleep(0.5)  # the state of a later epoch lists it
        process.send_signal(signal.SIGKILL)
    for file in (tmp_path / "spool").glob("*.committed"):
        file.rename(file.with_suffix(".away"))
    said, code = failure(flow, *flow.recovery())
    assert code != 0
    assert "neither staged nor published" in said
    for file in (tmp_path / "spool").glob("*.away"):
        file.rename(file.with_suffix(".committed"))
    flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
    assert wrong(db, tmp_path, scratch, [("public", "t")]) == []


SHAPES = [
    "INSERT INTO t VALUES (1, 'a', 1, 1), (2, 'b', 2, 2)",
    "ALTER TABLE t ADD COLUMN plain int; ALTER TABLE t ADD COLUMN filled text DEFAULT 'x'; DELETE FROM t WHERE id = 1",
    "INSERT INTO t VALUES (3, 'c', 3, 3, 3, 'y')",
    "ALTER TABLE t RENAME note TO n; ALTER TABLE t RENAME amount TO note; ALTER TABLE t RENAME n TO amount;"
    " UPDATE t SET note = 20 WHERE id = 2",
    "ALTER TABLE t ALTER note TYPE bigint; UPDATE t SET note = note * 10000000000",
    "ALTER TABLE t ALTER cents TYPE numeric(14,2); UPDATE t SET note = note WHERE id = 3",
    "ALTER TABLE t DROP COLUMN plain; ALTER TABLE t ADD COLUMN plain timestamptz; UPDATE t SET plain = now()",
    "ALTER TABLE t ALTER plain TYPE text USING 'was ' || plain; UPDATE t SET amount = amount",
    'ALTER TABLE t RENAME amount TO "AMOUNT"; UPDATE t SET id = id + 10; DELETE FROM t WHERE id = 12',
    "TRUNCATE t; INSERT INTO t (id, note) VALUES (7, 7)",
    "DROP TABLE t; CREATE TABLE t (id text PRIMARY KEY, other int[]); INSERT INTO t VALUES ('x', '{1,NULL}')",
]


def test_a_mirror_follows_alter_table(db: Database, scratch: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, note text, amount int, cents numeric(10,2))")
        publish(db)
        flow = into(db, tmp_path, PGOUTPUT_UNTIL="current", TWICE="1")
        for shape in SHAPES:
            c.execute(shape.encode())
            flow.run("-s", "0", *flow.recovery())
            assert wrong(db, tmp_path, scratch, [("public", "t")]) == [], shape
    assert stored(tmp_path).column("_unchanged").null_count == 1


def test_what_is_not_known_of_older_rows_is_named(db: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, n text, day date)")
        publish(db)
        flow = into(db, tmp_path, PGOUTPUT_UNTIL="current")
        c.execute("INSERT INTO t VALUES (1, 'abc', '10000-01-01')")
        flow.run("-s", "0", *flow.recovery())
        c.execute("ALTER TABLE t RENAME day TO d; ALTER TABLE t ADD drawn float8 DEFAULT random()")
        c.execute("ALTER TABLE t ALTER n TYPE int USING length(n); INSERT INTO t VALUES (2, 2, '2024-01-01', 0)")
        flow.run("-s", "0", *flow.recovery())
    kept, new = sorted(stored(tmp_path).drop_columns("_commit_lsn").to_pylist(), key=lambda row: row["id"])
    assert set(kept.pop("_unchanged")) == {"n", "drawn"}
    assert kept == {"id": 1, "n": None, "n__2": "abc", "d": None, "drawn": None, "_raw": [("d", "10000-01-01")]}
    assert new["_unchanged"] is None


def test_history_is_only_appended_to(db: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, n smallint, price numeric(8,2), day date)")
        publish(db)
        flow = into(db, tmp_path, MODE="history", PGOUTPUT_UNTIL="current")
        c.execute("INSERT INTO t VALUES (1, 1, 1.25, 'infinity'); UPDATE t SET id = 2; TRUNCATE t")
        flow.run("-s", "0", *flow.recovery())
        c.execute("ALTER TABLE t ALTER id TYPE bigint; ALTER TABLE t ALTER n TYPE text; ALTER TABLE t RENAME day TO d")
        c.execute(
            "ALTER TABLE t ALTER price TYPE numeric(6,1); INSERT INTO t VALUES (9876543210, 'x', 2.5, '10000-01-01')"
        )
        flow.run("-s", "0", *flow.recovery())
        c.execute("UPDATE t SET id = 3; ALTER TABLE t ALTER n TYPE int USING 7; INSERT INTO t VALUES (4, 4, 4, NULL)")
        flow.run("-s", "0", *flow.recovery())
    rows = stored(tmp_path)
    found = rows.take(pc.sort_indices(rows, [("_commit_lsn", "ascending"), ("_seq", "ascending")])).to_pylist()
    own = ("_op", "id", "n", "n__2", "price", "day", "d")
    assert [tuple(None if row[name] is None else str(row[name]) for name in own) for row in found] == [
        ("I", "1", "1", None, "1.25", None, None),
        ("U", "2", "1", None, "1.25", None, None),
        ("T", None, None, None, None, None, None),
        ("I", "9876543210", None, "x", "2.50", None, None),
        ("U", "3", None, "x", "2.50", None, None),
        ("I", "4", "4", None, "4.00", None, None),
    ]
    assert [row["_before"] and row["_before"]["id"] for row in found] == [None, 1, None, None, 9876543210, None]
    assert [dict(row["_raw"] or ()) for row in found][::3] == [{"day": "infinity"}, {"d": "10000-01-01"}]
    actions = DeltaTable(place(tmp_path, "public", "t")).history()
    assert {a["operation"] for a in actions} == {"CREATE TABLE", "WRITE"}
    assert {a["operationParameters"].get("mode") for a in actions[:-1]} == {"Append"}


def test_what_can_not_be_applied_says_why(db: Database, scratch: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        c.execute('CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE cased (a int PRIMARY KEY, "A" int)')
        publish(db)
        where = place(tmp_path, "public", "t")
        DeltaTable.create(where, pa.schema([pa.field("id", pa.int32())]))
        c.execute("INSERT INTO t VALUES (1)")
        flow = into(db, tmp_path)
        said, code = failure(flow)
        assert code != 0
        assert "was not made by this package" in said
        shutil.rmtree(where)
        flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
        said, code = failure(flow, *flow.recovery(), MODE="history", SPOOL=str(tmp_path / "other"))
        assert code != 0
        assert "holds a mirror, and this is mode 'history'" in said
        c.execute("SELECT pg_create_logical_replication_slot('other', 'pgoutput'); INSERT INTO t VALUES (2)")
        said, code = failure(flow, PGOUTPUT_SLOT="other", SPOOL=str(tmp_path / "other"))
        assert code != 0
        assert "slot 'cdc'" in said
        flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
        c.execute("INSERT INTO cased VALUES (1, 2)")
        said, code = failure(flow, *flow.recovery())
        assert code != 0
        assert "differ only by case" in said
        c.execute("INSERT INTO t VALUES (3)")
        said = flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current", ON_TABLE_ERROR="park")
        assert "cased" in said
    assert wrong(db, tmp_path, scratch, [("public", "t")]) == []


def t(folder: Path) -> Target:
    return Target("", place(folder, "public", "t"))


def test_a_table_with_deletion_vectors_is_refused(tmp_path: Path) -> None:
    where = tmp_path / "lake/public/t"
    DeltaTable.create(
        where, pa.schema([pa.field("id", pa.int64())]), configuration={"delta.enableDeletionVectors": "true"}
    )
    with pytest.raises(SinkError, match="deletion vectors"):
        DeltaDestination(mode="mirror").reached(t(tmp_path))


def job(folder: Path, number: int, made: ChangeBatch) -> Job:
    return Job(t(folder), number, (number, 0), ("id",), "d", pa.Table.from_batches([made.data]))


def test_control_applied_twice_without_numbers_a_mirror_is_wrong(tmp_path: Path) -> None:
    """Upserts are not idempotent: the row that an unsent value is taken from is gone the second time."""
    note, types = "x" * 50, {"id": pa.int64(), "note": pa.utf8()}
    first = batch("public.t", [("I", {"id": 1, "note": note})], types=types)
    moved = batch("public.t", [("U", {"id": 2}, {"id": 1})], unchanged={0: ["note"]}, types=types)

    def applied(folder: Path, numbers: list[int]) -> list[dict[str, Any]]:
        made = DeltaDestination(mode="mirror")
        made.apply(job(folder, number, changes) for number, changes in zip(numbers, (first, moved, moved), strict=True))
        found: list[dict[str, Any]] = stored(folder).select(["id", "note", "_unchanged"]).to_pylist()
        return found

    expected = [{"id": 2, "note": note, "_unchanged": None}]
    assert applied(tmp_path / "a", [1, 2, 2]) == expected
    assert applied(tmp_path / "b", [1, 2, 3]) != expected


def test_two_publishers_of_the_same_parts_apply_them_once(tmp_path: Path) -> None:
    """Each has a snapshot in which the parts are missing; the log tells the second one."""
    destinations = [DeltaDestination(mode="history"), DeltaDestination(mode="history")]
    for number in range(1, 6):
        changes = batch("public.t", [("I", {"id": number})])
        for destination in destinations:
            table = destination._handles.get(t(tmp_path))
            if table is not None:
                table.update_incremental = lambda table=table: delattr(table, "update_incremental")  # looks too early
            destination.apply([job(tmp_path, number, changes)])
    assert sorted(stored(tmp_path).column("id").to_pylist()) == [1, 2, 3, 4, 5]


OPTIMIZE = """
import sys, time
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError
print("ready", flush=True)
while True:
    try:
        DeltaTable(sys.argv[1]).optimize.z_order(["note"])
    except (CommitFailedError, DeltaError):
        pass
    time.sleep(0.005)
"""


def test_somebody_else_may_optimize_beside_it(tmp_path: Path) -> None:
    rng, types = random.Random(1), {"id": pa.int64(), "note": pa.utf8()}
    made, expected = DeltaDestination(mode="mirror"), {}
    made.apply([job(tmp_path, 1, batch("public.t", [("I", {"id": i, "note": "0"}) for i in range(300)], types=types))])
    expected = dict.fromkeys(range(300), "0")
    with subprocess.Popen(
        [sys.executable, "-c", OPTIMIZE, place(tmp_path, "public", "t")], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        for number in range(2, 42):
            ids = rng.sample(range(600), 20)
            gone = [i for i in ids if i in expected and rng.random() < 0.3]
            changes = [("D", {"id": i}, {"id": i}) if i in gone else ("I", {"id": i, "note": f"{number}"}) for i in ids]
            made.apply([job(tmp_path, number, batch("public.t", changes, types=types))])
            expected |= dict.fromkeys(ids, f"{number}")
            for i in gone:
                del expected[i]
        other.kill()
    operations = Counter(a["operation"] for a in DeltaTable(place(tmp_path, "public", "t")).history())
    assert operations["OPTIMIZE"] > 3
    rows = stored(tmp_path)
    assert dict(zip(rows.column("id").to_pylist(), rows.column("note").to_pylist(), strict=True)) == expected
    assert len(rows) == len(expected)


def test_small_files_are_compacted_and_old_ones_deleted(tmp_path: Path) -> None:
    made = DeltaDestination(mode="history", keep=timedelta(0))
    for number in range(1, 201):
        made.apply([job(tmp_path, number, batch("public.t", [("I", {"id": number})]))])
    folder = Path(place(tmp_path, "public", "t"))
    assert len(list(folder.glob("*.parquet"))) <= 40
    assert list((folder / "_delta_log").glob("*.checkpoint.parquet"))
    assert sorted(stored(tmp_path).column("id").to_pylist()) == list(range(1, 201))
    assert DeltaDestination(mode="history").reached(t(tmp_path)) == (200, (200, 0), ("", "", ""))
