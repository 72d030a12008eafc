"""A mirror of tables that change their names: the source's tables are the oracle."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from harness.database import Database
from harness.flow import Flow, failure, publish
from harness.mirrors import differ

from pgoutput_source.cli import main
from pgoutput_source.embedded import Server

STEPS = [
    ("INSERT INTO t VALUES (1, 'a'), (2, 'b')", ["t"]),
    ("ALTER TABLE t RENAME TO u; UPDATE u SET v = 'c' WHERE id = 2", ["u"]),
    ("ALTER TABLE u SET SCHEMA x; ALTER TABLE x.u RENAME v TO w; INSERT INTO x.u VALUES (3, 'd')", ["x.u"]),
    (
        "ALTER TABLE x.u RENAME TO t; ALTER TABLE x.t SET SCHEMA public; INSERT INTO t VALUES (4, 'e');"
        " CREATE TABLE u (id int PRIMARY KEY, q int); INSERT INTO u VALUES (1, 1)",
        ["t", "u"],
    ),
    ("ALTER TABLE t RENAME TO h; ALTER TABLE u RENAME TO t; ALTER TABLE h RENAME TO u; DELETE FROM t", ["t"]),
    ("INSERT INTO u VALUES (5, 'f')", ["t", "u"]),
    (
        "CREATE TABLE n (LIKE u INCLUDING ALL); INSERT INTO n SELECT * FROM u; ALTER TABLE u RENAME TO o;"
        " ALTER TABLE n RENAME TO u; INSERT INTO u VALUES (6, 'g')",
        ["t", "u"],
    ),
    ("DROP TABLE o; INSERT INTO t VALUES (7, 7); INSERT INTO u VALUES (7, 'h')", ["t", "u"]),
    ("DROP TABLE t; CREATE TABLE t (id text PRIMARY KEY); INSERT INTO t VALUES ('x')", ["t", "u"]),
]


@pytest.fixture
def target(pg: Server) -> Iterator[Database]:
    made = Database(pg)
    yield made
    made.drop()


def into(db: Database, target: Database, folder: Path, **environ: str) -> Flow:
    settings = {"MODE": "mirror", "SPOOL": str(folder / "spool"), "INTO": target.dsn} | environ
    return Flow(db, folder, module="harness.into_tables", **settings)


def mirrored(path: Path, name: str) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(path), read_only=True) as connection:
        return connection.execute(f"SELECT id, v FROM public.{name} ORDER BY id").fetchall()


def test_a_store_that_can_not_move_rows_refuses_a_renamed_table_until_it_is_copied_again(
    db: Database, tmp_path: Path
) -> None:
    file = tmp_path / "shop.duckdb"
    settings = {"MODE": "mirror", "SPOOL": str(tmp_path / "spool"), "INTO": f"duckdb:{file}"}
    flow = Flow(db, tmp_path, module="harness.into_tables", PGOUTPUT_UNTIL="current", **settings)
    run = ("-s", "0", *flow.recovery())
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        publish(db)
        c.execute("INSERT INTO t VALUES (1, 'a'), (2, 'b')")
        flow.run(*run)
        c.execute("ALTER TABLE t RENAME TO u; INSERT INTO u VALUES (3, 'c')")
        assert "public.u was public.t before it was renamed" in failure(flow, *run[2:])[0]
        assert "table public.u is parked" in flow.run(*run, ON_TABLE_ERROR="park")
        assert "table public.u is parked" in flow.run(*run, ON_TABLE_ERROR="park"), "tried again, and taken"
        # Under its old name it lacks what came under the new one.
        c.execute("ALTER TABLE u RENAME TO t; INSERT INTO t VALUES (4, 'd')")
        assert "public.t was public.u before it was renamed" in flow.run(*run, ON_TABLE_ERROR="park")
        assert mirrored(file, "t") == [(1, "a"), (2, "b")]
        asked = ["--dsn", db.dsn, "--slot", "cdc", "--publication", "cdc", "--table", "public.t"]
        assert main(["snapshot", *asked]) == 0
        for _ in range(2):
            flow.run(*run, ON_TABLE_ERROR="park")
        c.execute("UPDATE t SET v = 'e' WHERE id = 1")
        said = flow.run(*run, ON_TABLE_ERROR="park")
        assert "table public.u is parked" in said
        assert "table public.t is parked" not in said
        c.execute("DELETE FROM t WHERE id = 2")
        flow.run(*run, EXCLUDE="public.u")
        assert mirrored(file, "t") == c.execute("SELECT * FROM t ORDER BY id").fetchall()


def pairs(names: list[str]) -> list[tuple[str, str]]:
    return [("x", name[2:]) if name.startswith("x.") else ("public", name) for name in names]


def test_a_renamed_table_takes_its_rows_along(db: Database, target: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, v text); CREATE SCHEMA x")
        publish(db)
        flow = into(db, target, tmp_path, PGOUTPUT_UNTIL="current")
        for step, names in STEPS:
            c.execute(step.encode())
            flow.run("-s", "0", *flow.recovery())
            assert differ(db, target, pairs(names)) == [], step


@pytest.mark.parametrize("count", [1, 4])
def test_all_renames_at_once_and_again_after_a_crash(
    db: Database, target: Database, tmp_path: Path, count: int
) -> None:
    """The spool has epochs of all steps, and keeps most of them when the process dies after they were applied."""
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, v text); CREATE SCHEMA x")
        publish(db)
        for step, _ in STEPS[:-1]:
            for statement in step.split(";"):
                c.execute(statement.encode())
        flow = into(db, target, tmp_path, MAX_AGE="1", PGOUTPUT_MAX_FRAMES="3")
        process = flow.start("-s", "0", *flow.recovery(), KILL_AT=f"an applied epoch is dropped:{count}")
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        for statement in STEPS[-1][0].split(";"):
            c.execute(statement.encode())
        flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
        assert differ(db, target, pairs(["t", "u"])) == []
        c.execute("INSERT INTO u VALUES (8, 'i'); INSERT INTO t VALUES ('y')")
        flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
        assert differ(db, target, pairs(["t", "u"])) == []
