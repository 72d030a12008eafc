"""Tables in another PostgreSQL database: the source's tables are the oracle, read by the server."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from harness.database import Database
from harness.flow import Busy, Flow, failure, following, publish, wait_for
from harness.mirrors import differ, of_keys, with_keys
from harness.waiting import until
from harness.workload import Workload

from pgoutput_source.destinations.base import Job
from pgoutput_source.destinations.postgres import PostgresDestination
from pgoutput_source.destinations.spool import Portion
from pgoutput_source.destinations.targets import Target
from pgoutput_source.embedded import Server
from pgoutput_source.testing import batch


def into(db: Database, target: Database, folder: Path, **environ: str) -> Flow:
    settings = {"MODE": "mirror", "SPOOL": str(folder / "spool"), "INTO": target.dsn} | environ
    return Flow(db, folder, module="harness.into_tables", **settings)


@pytest.fixture
def target(pg: Server) -> Any:
    made = Database(pg)
    yield made
    made.drop()


def test_a_mirror_equals_its_source(db: Database, target: Database, tmp_path: Path) -> None:
    with Workload(db.dsn, seed=3, tables=8, largest=300) as workload:
        publish(db)
        flow = into(db, target, tmp_path, PGOUTPUT_UNTIL="current", **of_keys(workload))
        for _ in range(3):
            workload.run(700)
            flow.run("-s", "0", *flow.recovery())
            assert differ(db, target, with_keys(workload)) == []


def test_a_mirror_of_tables_that_were_there_before(db: Database, target: Database, tmp_path: Path) -> None:
    with Workload(db.dsn, seed=8, tables=6, largest=300) as workload:
        workload.run(1_000)
        publish(db)
        workload.run(500)
        flow = into(db, target, tmp_path, **of_keys(workload), PGOUTPUT_SNAPSHOT="initial")
        flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
        workload.run(500)
        flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
        assert differ(db, target, with_keys(workload)) == []


@pytest.mark.slow
@pytest.mark.parametrize("max_age", ["0", "0.5"])
def test_kill_9_while_parts_are_spooled_and_applied(
    db: Database, target: Database, tmp_path: Path, max_age: str
) -> None:
    rng = random.Random(max_age)
    with Busy(db.dsn, seed=5, tables=6, largest=200) as workload:
        publish(db)
        flow = into(db, target, tmp_path, **of_keys(workload), MAX_AGE=max_age, **CUT)
        for _ in range(5):
            process = flow.start("-s", rng.choice(["0", "1"]), *flow.recovery())
            with following(process) as lines:
                wait_for(lines, "streaming from", process)
                time.sleep(rng.uniform(0, 1.0))
                process.send_signal(signal.SIGKILL)
        workload.stop()
        flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current", PGOUTPUT_MAX_FRAMES="5000")
    assert differ(db, target, with_keys(workload)) == []


CUT = {"PGOUTPUT_MAX_FRAMES": "7"}  # and an epoch for each poll


def test_readers_see_whole_transactions_though_epochs_cut_them(db: Database, target: Database, tmp_path: Path) -> None:
    shift = "UPDATE t SET id = id + 1; UPDATE f SET id = id + 1; UPDATE t SET n = n + id"
    with db.connect() as c, target.connect() as t:
        c.execute("CREATE TABLE t (id int PRIMARY KEY DEFERRABLE, n int); CREATE TABLE f (LIKE t INCLUDING ALL)")
        c.execute("ALTER TABLE t REPLICA IDENTITY FULL; ALTER TABLE f REPLICA IDENTITY FULL")
        publish(db)
        for name in "tf":
            c.execute(f"INSERT INTO {name} SELECT i, 0 FROM generate_series(1, 20) AS i".encode())
        flow = into(db, target, tmp_path, KEY='{"public.t": "id", "public.f": "id"}', **CUT)
        process = flow.start("-s", "0", *flow.recovery())
        with following(process) as lines:
            wait_for(lines, "streaming from", process)
            seen = set()
            for _ in range(20):
                c.execute(shift.encode())
                deadline = time.monotonic() + 1
                while time.monotonic() < deadline and differ(db, target, [("public", "t"), ("public", "f")]) != []:
                    if t.execute("SELECT to_regclass('public.f')").fetchone() != (None,):
                        query = "SELECT min(id), max(id), count(*) FROM (TABLE t UNION ALL TABLE f) AS u"
                        seen |= set(t.execute(query.encode()).fetchall())
            until(lambda: differ(db, target, [("public", "t"), ("public", "f")]) == [], lines)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, lines
        assert differ(db, target, [("public", "t"), ("public", "f")]) == []
    assert seen
    assert {(high - low, count) for low, high, count in seen} == {(19, 40)}


def test_a_lost_spool_is_an_error(db: Database, target: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY)")
        publish(db)
        c.execute("INSERT INTO t SELECT generate_series(1, 100)")
    flow = into(db, target, tmp_path, MAX_AGE="60")
    process = flow.start("-s", "0", *flow.recovery())
    with following(process) as lines:
        wait_for(lines, "streaming from", process)
        until(lambda: list((tmp_path / "spool").glob("*.committed")), lines)
        epoch = flow.epoch()
        until(lambda: flow.epoch() > epoch + 2, lines)  # the state of a later epoch lists it
        process.send_signal(signal.SIGKILL)
    for file in (tmp_path / "spool").glob("*.committed"):
        file.rename(file.with_suffix(".away"))
    said, code = failure(flow, *flow.recovery())
    assert code != 0
    assert "neither staged nor published" in said
    for file in (tmp_path / "spool").glob("*.away"):
        file.rename(file.with_suffix(".committed"))
    flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
    assert differ(db, target, [("public", "t")]) == []


SHAPES = [
    "INSERT INTO t VALUES (1, 'a', 1), (2, 'b', 2)",
    "ALTER TABLE t ADD COLUMN plain int; ALTER TABLE t ADD COLUMN filled text DEFAULT 'x'; DELETE FROM t WHERE id = 1",
    "INSERT INTO t VALUES (3, 'c', 3, 3, 'y')",
    "ALTER TABLE t RENAME note TO n; ALTER TABLE t RENAME amount TO note; ALTER TABLE t RENAME n TO amount;"
    " UPDATE t SET note = 20 WHERE id = 2",
    "ALTER TABLE t ALTER note TYPE bigint; UPDATE t SET note = note * 10000000000",
    "ALTER TABLE t DROP COLUMN plain; ALTER TABLE t ADD COLUMN plain timestamptz; UPDATE t SET plain = now()",
    "ALTER TABLE t ALTER plain TYPE text USING 'was ' || plain; UPDATE t SET amount = amount",
    "UPDATE t SET id = id + 10; DELETE FROM t WHERE id = 12",
    "TRUNCATE t; INSERT INTO t (id, amount) VALUES (7, 'seven')",
    "DROP TABLE t; CREATE TABLE t (id text PRIMARY KEY, other int[]); INSERT INTO t VALUES ('x', '{1,NULL}')",
]


def test_a_mirror_follows_alter_table(db: Database, target: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, note text, amount int)")
        publish(db)
        flow = into(db, target, tmp_path, PGOUTPUT_UNTIL="current")
        for shape in SHAPES:
            c.execute(shape.encode())
            flow.run("-s", "0", *flow.recovery())
            assert differ(db, target, [("public", "t")]) == [], shape
    with target.connect() as c:
        unknown = c.execute("SELECT count(*) FROM t WHERE _unchanged IS NOT NULL").fetchone()
        assert unknown == (0,)


def test_an_unknown_value_stays_named_when_its_column_is_renamed(
    db: Database, target: Database, tmp_path: Path
) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, n int)")
        c.execute("CREATE TABLE odd (id int PRIMARY KEY, _op int)")  # left out: its changes can't be decoded
        publish(db)
        flow = into(db, target, tmp_path, EXCLUDE="public.odd", PGOUTPUT_UNTIL="current")
        c.execute("INSERT INTO t VALUES (1, 1); INSERT INTO odd VALUES (1, 1)")
        flow.run("-s", "0", *flow.recovery())
        c.execute("ALTER TABLE t ADD drawn float8 DEFAULT random(); INSERT INTO t VALUES (2, 2)")
        flow.run("-s", "0", *flow.recovery())
        c.execute("ALTER TABLE t RENAME n TO m; ALTER TABLE t RENAME drawn TO n; INSERT INTO t VALUES (3, 3)")
        flow.run("-s", "0", *flow.recovery())
    with target.connect() as c:
        assert c.execute("SELECT id, m, _unchanged FROM t ORDER BY id").fetchall() == [
            (1, 1, ["n"]),
            (2, 2, None),
            (3, 3, None),
        ]


def test_values_that_can_not_be_cast_are_unknown(db: Database, target: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, n text)")
        publish(db)
        flow = into(db, target, tmp_path, PGOUTPUT_UNTIL="current")
        c.execute("INSERT INTO t VALUES (1, 'abc')")
        flow.run("-s", "0", *flow.recovery())
        c.execute("ALTER TABLE t ALTER n TYPE int USING length(n); INSERT INTO t VALUES (2, 2)")
        flow.run("-s", "0", *flow.recovery())
    with target.connect() as c:
        found = c.execute("SELECT id, n, n__2, _unchanged FROM t ORDER BY id").fetchall()
        assert found == [(1, None, "abc", ["n"]), (2, 2, None, None)]


def test_history_has_every_change(db: Database, target: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, day date)")
        c.execute("CREATE TABLE f (n numeric); ALTER TABLE f REPLICA IDENTITY FULL")
        publish(db)
        flow = into(db, target, tmp_path, MODE="history", PGOUTPUT_UNTIL="current")
        c.execute("INSERT INTO t VALUES (1, 'infinity'), (2, '0044-03-15 BC')")
        c.execute("UPDATE t SET id = 3 WHERE id = 1; DELETE FROM t WHERE id = 2; TRUNCATE t")
        c.execute("INSERT INTO f VALUES ('NaN'), (1.50); UPDATE f SET n = 2 WHERE n = 1.5")
        flow.run("-s", "0", *flow.recovery())
        c.execute("ALTER TABLE t ALTER id TYPE text; INSERT INTO t VALUES ('x', NULL)")
        flow.run("-s", "0", *flow.recovery())
    with target.connect() as c:
        query = "SELECT _op, id, day::text, _before->>'id' FROM t ORDER BY _commit_lsn, _seq"
        assert c.execute(query).fetchall() == [
            ("I", "1", "infinity", None),
            ("I", "2", "0044-03-15 BC", None),
            ("U", "3", "infinity", "1"),
            ("D", "2", None, "2"),
            ("T", None, None, None),
            ("I", "x", None, None),
        ]
        query = "SELECT _op, n::text, _before->>'n' FROM f ORDER BY _commit_lsn, _seq"
        assert c.execute(query).fetchall() == [("I", "NaN", None), ("I", "1.50", None), ("U", "2", "1.50")]


def test_what_can_not_be_applied_says_why(db: Database, target: Database, tmp_path: Path) -> None:
    with db.connect() as c, target.connect() as t:
        c.execute(
            "CREATE TABLE nokey (n int); ALTER TABLE nokey REPLICA IDENTITY FULL; CREATE TABLE t (id int PRIMARY KEY)"
        )
        publish(db)
        t.execute("CREATE TABLE t (id int)")
        c.execute("INSERT INTO nokey VALUES (1)")
        said, code = failure(into(db, target, tmp_path))
        assert code != 0
        assert "table public.nokey sends no key, and a mirror needs one" in said
        assert "REPLICA IDENTITY" in said
        c.execute("INSERT INTO t VALUES (1)")
        flow = into(db, target, tmp_path, EXCLUDE="public.nokey")
        said, code = failure(flow)
        assert code != 0
        assert "public.t is there already, and was not made by this package" in said
        t.execute("DROP TABLE t")
        flow.run("-s", "0", PGOUTPUT_UNTIL="current")
        assert differ(db, target, [("public", "t")]) == []


def test_control_applied_twice_without_numbers_a_mirror_is_wrong(db: Database, target: Database) -> None:
    """Upserts are not idempotent: the row that an unsent value is taken from is gone the second time."""
    note = "x" * 50
    first = batch("public.t", [("I", {"id": 1, "note": note})])
    moved = batch("public.t", [("U", {"id": 2, "note": None}, {"id": 1})], unchanged={0: ["note"]})

    def applied(numbers: list[int]) -> list[Any]:
        made = PostgresDestination(target.dsn, mode="mirror")
        with target.connect() as c:
            c.execute("DROP SCHEMA IF EXISTS pgoutput CASCADE; DROP TABLE IF EXISTS public.t")
        for number, changes in zip(numbers, (first, moved, moved), strict=True):
            table = pa.Table.from_batches([changes.data])
            made.apply([Job(Target("public", "t"), number, (number, 0), ("id",), "d", table)])
        made.close()
        with target.connect() as c:
            return c.execute("SELECT id, note, _unchanged FROM public.t").fetchall()

    assert applied([1, 2, 2]) == [(2, note, None)]
    assert applied([1, 2, 3]) != [(2, note, None)]


def test_parts_that_come_again_together_with_later_ones_are_applied_once(db: Database, target: Database) -> None:
    """A crash may leave applied epochs in the spool. The next run may take them and later ones as one job."""
    note, types = "x" * 50, {"id": pa.int64(), "note": pa.utf8()}
    first = batch("public.t", [("I", {"id": 1, "note": note})], types=types)
    moved = batch("public.t", [("U", {"id": 2}, {"id": 1})], unchanged={0: ["note"]}, types=types)
    later = batch("public.t", [("I", {"id": 3, "note": "y"})], types=types)
    parts = [
        (Portion(i, made.schema.full_name, "d", ("id",), (i, 0), (i, 0), 1), pa.Table.from_batches([made.data]))
        for i, made in enumerate((first, moved, later), 1)
    ]
    where = Target("public", "t")
    made = PostgresDestination(target.dsn, mode="mirror")
    made.apply([Job.of(where, parts[:2])])
    made.apply([Job.of(where, parts[1:])])
    made.close()
    with target.connect() as c:
        rows = c.execute("SELECT id, note, _unchanged FROM public.t ORDER BY id").fetchall()
        assert rows == [(2, note, None), (3, "y", None)]


@pytest.mark.parametrize("mode", ["mirror", "history"])
def test_metadata_columns_have_any_prefix(db: Database, target: Database, tmp_path: Path, mode: str) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, _op text, _commit_lsn text, note text)")
        c.execute("ALTER TABLE t ALTER note SET STORAGE EXTERNAL")
        publish(db)
        c.execute("INSERT INTO t SELECT 1, 'mine', '0/1', repeat('x', 10000)")
        flow = into(db, target, tmp_path, MODE=mode, PGOUTPUT_UNTIL="current")
        flow.run("-s", "0", *flow.recovery(), PGOUTPUT_METADATA_PREFIX="cdc_")
        c.execute("UPDATE t SET id = 2, _op = 'yours'; ALTER TABLE t ADD _unchanged int; INSERT INTO t VALUES (3)")
        flow.run("-s", "0", *flow.recovery(), PGOUTPUT_METADATA_PREFIX="x_")
        expected = c.execute("SELECT id, _op, _commit_lsn, note, _unchanged FROM t ORDER BY id").fetchall()
    with target.connect() as c:
        if mode == "mirror":
            query = "SELECT id, _op, _commit_lsn, note, _unchanged FROM t WHERE x_unchanged IS NULL ORDER BY id"
            assert c.execute(query).fetchall() == expected
        else:
            found = c.execute("SELECT x_op, id, _op, x_unchanged FROM t ORDER BY x_commit_lsn, x_seq").fetchall()
            assert found == [("I", 1, "mine", None), ("U", 2, "yours", ["note"]), ("I", 3, None, None)]
