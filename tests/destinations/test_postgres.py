"""Tables in another PostgreSQL database: the source's tables are the oracle, read by the server."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest
from harness.database import Database
from harness.flow import Busy, Flow, failure, following, publish, wait_for
from harness.workload import Workload
from psycopg import sql

from pgoutput_source.embedded import Server


def into(db: Database, target: Database, folder: Path, **environ: str) -> Flow:
    settings = {"MODE": "mirror", "SPOOL": str(folder / "spool"), "INTO": target.dsn} | environ
    return Flow(db, folder, module="harness.into_tables", **settings)


def rows(connection: psycopg.Connection[Any], schema: str, name: str, columns: list[str]) -> list[tuple[Any, ...]]:
    """A table's rows as the server writes them."""
    texts = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(c)) for c in columns)
    query = sql.SQL("SELECT {} FROM {}").format(texts, sql.Identifier(schema, name))
    return sorted(connection.execute(query).fetchall(), key=repr)


def differ(db: Database, target: Database, tables: list[tuple[str, str]]) -> list[str]:
    """What a mirror has that its source has not, and the reverse."""
    wrong = []
    with db.connect() as source, target.connect() as mirror:
        for connection in (source, mirror):
            connection.execute("SET TimeZone TO 'UTC'; SET DateStyle TO 'ISO'; SET extra_float_digits TO 1")
        for schema, name in tables:
            query = (
                "SELECT attname FROM pg_attribute WHERE attrelid = format('%%I.%%I', %s::text, %s::text)::regclass"
                " AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum"
            )
            columns = [c for (c,) in source.execute(query, (schema, name)).fetchall()]
            expected = rows(source, schema, name, columns)
            there = mirror.execute("SELECT to_regclass(format('%%I.%%I', %s::text, %s::text))", (schema, name))
            found = rows(mirror, schema, name, columns) if there.fetchone() != (None,) else []
            if found != expected:
                more, less = [r for r in found if r not in expected], [r for r in expected if r not in found]
                wrong.append(f"{schema}.{name}: only in the mirror {more[:2]}, only in the source {less[:2]}")
    return wrong


def unkeyed(workload: Workload) -> str:
    return ",".join(str(t.name) for t in workload.tables if not t.keyed)


def keyed(workload: Workload) -> list[tuple[str, str]]:
    return [(t.name.namespace, t.name.name) for t in workload.tables if t.keyed]


@pytest.fixture
def target(pg: Server) -> Any:
    made = Database(pg)
    yield made
    made.drop()


def test_a_mirror_equals_its_source(db: Database, target: Database, tmp_path: Path) -> None:
    with Workload(db.dsn, seed=3, tables=8, largest=300) as workload:
        publish(db)
        flow = into(db, target, tmp_path, EXCLUDE=unkeyed(workload), PGOUTPUT_UNTIL="current")
        for _ in range(3):
            workload.run(700)
            flow.run("-s", "0", *flow.recovery())
            assert differ(db, target, keyed(workload)) == []


@pytest.mark.parametrize("max_age", ["0", "0.5"])
def test_kill_9_while_parts_are_spooled_and_applied(
    db: Database, target: Database, tmp_path: Path, max_age: str
) -> None:
    rng = random.Random(max_age)
    with Busy(db.dsn, seed=5, tables=6, largest=200) as workload:
        publish(db)
        flow = into(db, target, tmp_path, EXCLUDE=unkeyed(workload), MAX_AGE=max_age)
        for _ in range(8):
            process = flow.start("-s", rng.choice(["0", "1"]), *flow.recovery())
            with following(process) as lines:
                wait_for(lines, "streaming from", process)
                time.sleep(rng.uniform(0, 1.0))
                process.send_signal(signal.SIGKILL)
        workload.stop()
        flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
    assert differ(db, target, keyed(workload)) == []


def test_a_lost_spool_is_an_error(db: Database, target: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY)")
        publish(db)
        c.execute("INSERT INTO t SELECT generate_series(1, 100)")
    flow = into(db, target, tmp_path, MAX_AGE="60")
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
    assert differ(db, target, [("public", "t")]) == []
