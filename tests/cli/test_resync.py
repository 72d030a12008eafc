"""What `resync` says of a lost slot, and what it does then, on real servers: the flow resumes; nothing is guessed."""

from __future__ import annotations

import hashlib
import pickle
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from harness.database import NEWEST, Database
from harness.flow import Flow, confirmed, following, publish, wait_for
from harness.resync import run
from harness.slots import absent, ahead, ids, insert, lost, of_another_plugin, recreated

from pgoutput_source import current
from pgoutput_source.cli import resync
from pgoutput_source.embedded import Server
from pgoutput_source.errors import StateError
from pgoutput_source.protocol.wire import Lsn


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    with Server(NEWEST) as server:
        yield server


@pytest.fixture
def lone(own: Server) -> Iterator[Database]:
    """A database on a server of which it has the only slot."""
    db = Database(own)
    yield db
    db.drop()


def everything(db: Database, folder: Path) -> tuple[list[tuple[Any, ...]], dict[str, str]]:
    """All slots, but for what moves by itself, and all files with their content."""
    with psycopg.connect(db.server.dsn(), autocommit=True) as connection:
        slots = connection.execute(
            "SELECT slot_name, plugin, restart_lsn, confirmed_flush_lsn FROM pg_replication_slots ORDER BY 1"
        ).fetchall()
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.endswith("-shm")]
    return slots, {str(file): hashlib.sha1(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize(
    ("spoil", "killed"),
    [(absent, True), (recreated, True), (ahead, False), (lost, False)],
    ids=["absent", "recreated", "moved", "lost"],
)
def test_a_flow_resumes_after_the_gap(
    lone: Database, tmp_path: Path, spoil: Callable[[Database, Flow], None], killed: bool
) -> None:
    db, flow = lone, Flow(lone, tmp_path)
    publish(db)
    with db.connect() as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
    insert(db, 1, 100)
    arguments = ("-s", "0", *flow.recovery())
    if killed:
        # Its epoch is durable, its file is still in the staging folder, and PostgreSQL has heard nothing of it.
        process = flow.start(*arguments, PGOUTPUT_UNTIL="current", KILL_AT="committed, nothing published:1")
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    else:
        flow.run(*arguments, PGOUTPUT_UNTIL="current")
    spoil(db, flow)
    before = everything(db, tmp_path)
    folder = ("--recovery", str(tmp_path / "recovery"))
    seen = Lsn(resync.RecoveryFolder([tmp_path / "recovery"], "cdc").state["lsn"])

    code, said = run(flow, *folder)

    assert code == 1
    assert everything(db, tmp_path) == before
    assert f"from {seen} to " in said
    assert re.search(r"[0-9] bytes of WAL", said)
    assert re.search(r"since +20\d\d-", said)
    assert "public.t, of publication cdc" in said
    assert "With --yes" in said

    code, said = run(flow, *folder, "--yes")

    assert code == 0, said
    assert f"resumes from {Lsn(confirmed(db))}" in said
    with db.connect() as connection:
        rows = connection.execute("SELECT coalesce(max(id), 0) FROM t").fetchone()
    assert rows is not None
    insert(db, rows[0] + 1, rows[0] + 100)
    assert run(flow, *folder) == (0, "slot cdc: nothing is missing\n")
    flow.run(*arguments, PGOUTPUT_UNTIL="current")
    assert ids(flow) == [*range(1, 101), *range(rows[0] + 1, rows[0] + 101)]


def test_an_interrupted_resync_is_finished_by_the_next(lone: Database, tmp_path: Path) -> None:
    db, flow = lone, Flow(lone, tmp_path)
    publish(db)
    with db.connect() as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
    insert(db, 1, 100)
    arguments = ("-s", "0", *flow.recovery())
    flow.run(*arguments, PGOUTPUT_UNTIL="current")
    absent(db, flow)
    insert(db, 101, 200)
    folder = ("--recovery", str(tmp_path / "recovery"))
    with sqlite3.connect(next((tmp_path / "recovery").glob("*.sqlite3"))) as store:
        store.execute("BEGIN IMMEDIATE")  # as a flow would that writes to it
        code, said = run(flow, *folder, "--yes")
        store.rollback()
    assert code == 1
    assert "end the flow that uses it" in said
    made = confirmed(db)

    code, said = run(flow, *folder, "--yes")

    assert code == 0
    assert confirmed(db) == made
    insert(db, 201, 300)
    flow.run(*arguments, PGOUTPUT_UNTIL="current")
    assert ids(flow) == [*range(1, 101), *range(201, 301)]


def test_a_copy_repairs_what_was_deleted_and_updated_in_the_gap(lone: Database, tmp_path: Path) -> None:
    db, flow = lone, Flow(lone, tmp_path, PGOUTPUT_UNTIL="current")
    publish(db)
    arguments = ("-s", "0", *flow.recovery())
    with db.connect() as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        connection.execute("INSERT INTO t SELECT n, 'old' FROM generate_series(1, 100) AS n")
        flow.run(*arguments)
        absent(db, flow)
        connection.execute("DELETE FROM t WHERE id > 90")
        connection.execute("UPDATE t SET v = 'new' WHERE id < 10")

        code, said = run(flow, "--recovery", str(tmp_path / "recovery"), "--copy", "--yes")
        assert code == 0, said
        assert "it copies again: public.t" in said
        connection.execute("INSERT INTO t VALUES (101, 'after')")
        flow.run(*arguments)

        expected = connection.execute("SELECT * FROM t ORDER BY id").fetchall()
    rows = current(flow.out, key="id").select(["id", "v"]).to_pylist()
    assert sorted((row["id"], row["v"]) for row in rows) == expected


def test_a_failover_slot_is_recreated_as_one(lone: Database, tmp_path: Path) -> None:
    db, flow = lone, Flow(lone, tmp_path)
    with db.connect() as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
        connection.execute("CREATE PUBLICATION cdc FOR ALL TABLES")
        connection.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput', failover => true)")
        insert(db, 1, 1)
        lost(db, flow)
        assert run(flow, "--yes")[0] == 0
        row = connection.execute("SELECT failover, wal_status FROM pg_replication_slots").fetchone()

    assert row == (True, "reserved")


def test_what_is_not_ours_is_left_alone(lone: Database, tmp_path: Path) -> None:
    db, flow = lone, Flow(lone, tmp_path)
    publish(db)
    process = flow.start("-s", "0")
    with following(process) as lines:
        wait_for(lines, "streaming from", process)
        code, said = run(flow, "--yes")
    assert (code, "SlotInUse" in said) == (1, True)
    process.wait()

    for publication, spoil, error in (
        ("nowhere", lambda *_: None, "PublicationError"),
        ("cdc", of_another_plugin, "SlotMismatch"),
    ):
        flow.environ["PGOUTPUT_PUBLICATION"] = publication
        spoil(db, flow)
        before = everything(db, tmp_path)
        code, said = run(flow, "--yes")
        assert (code, error in said) == (1, True), said
        assert everything(db, tmp_path) == before


def test_a_state_is_found_as_bytewax_finds_it_and_nothing_strange_is_unpickled(tmp_path: Path) -> None:
    pytest.importorskip("bytewax")
    subprocess.run([sys.executable, "-m", "bytewax.recovery", tmp_path, "2"], check=True)
    one, two = sorted(tmp_path.glob("*.sqlite3"))

    def snap(epoch: int) -> tuple[Any, ...]:
        return ("flow.in", "cdc", epoch, pickle.dumps({"v": 1, "slot": "cdc", "lsn": epoch}, 4))

    with sqlite3.connect(one) as store:
        store.executemany("INSERT INTO snaps VALUES ('2026-01-01 00:00:00', ?, ?, ?, ?)", [snap(n) for n in (5, 6, 7)])
        store.execute("INSERT INTO commits VALUES ('', 0, 5)")
        store.execute("INSERT INTO fronts VALUES ('', 0, 0, 7)")
    with sqlite3.connect(two) as store:
        store.execute("INSERT INTO exs VALUES ('', 0, 2, 1)")
        store.execute("INSERT INTO fronts VALUES ('', 0, 1, 8)")
        store.execute("INSERT INTO commits VALUES ('', 0, 5)")
    assert resync.RecoveryFolder([tmp_path], "cdc").state["lsn"] == 6
    two.rename(tmp_path / "elsewhere")
    assert resync.RecoveryFolder([tmp_path], "cdc").state["lsn"] == 5
    with pytest.raises(StateError, match="no state of slot 'other'"):
        resync.RecoveryFolder([tmp_path], "other")
    with pytest.raises(StateError, match="no recovery store"):
        resync.RecoveryFolder([tmp_path / "nowhere"], "cdc")
    with sqlite3.connect(one) as store:
        store.execute("UPDATE snaps SET ser_change = ?", [b"cos\nsystem\n(S'touch strange'\ntR."])
    with pytest.raises(StateError, match="not a builtin value"):
        resync.RecoveryFolder([tmp_path], "cdc")
    with sqlite3.connect(one) as store:
        store.execute("PRAGMA user_version = 6")
    with pytest.raises(StateError, match="version 6"):
        resync.RecoveryFolder([tmp_path], "cdc")
