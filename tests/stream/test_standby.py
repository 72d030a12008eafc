"""Standbys: reading from one, its promotion while it is read, its conflicts, and failover before failover slots."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest
from harness.database import NEWEST, Database
from harness.flow import Flow, failure, following, wait_for
from harness.resync import run
from harness.slots import ids, insert
from harness.waiting import until

from pgoutput_source import PgOutputReader
from pgoutput_source.cli.resync import RecoveryFolder
from pgoutput_source.embedded import Server
from pgoutput_source.errors import PgOutputError, StateError
from pgoutput_source.postgres.connection import connect
from pgoutput_source.postgres.slots import create_slot
from pgoutput_source.protocol.wire import Lsn


def ask(dsn: str, query: str, *, rows: bool = True) -> Any:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(query.encode())
        row = cursor.fetchone() if rows else None
    return None if row is None else row[0]


def follow(primary: Database, standby: Server) -> None:
    """Wait until the standby has all that the primary has written."""
    end = ask(primary.dsn, "SELECT pg_current_wal_lsn()")
    until(lambda: bool(ask(standby.dsn(), f"SELECT pg_last_wal_replay_lsn() >= '{end}'")), "follow")


def make_slot(primary: Database, standby: Server) -> None:
    """The slot `cdc` on the standby; an idle primary has to say which transactions run."""
    with connect(standby.dsn(primary.name)) as connection:
        made = threading.Thread(target=create_slot, args=(connection, "cdc"))
        made.start()
        while made.is_alive():
            ask(primary.dsn, "SELECT pg_log_standby_snapshot()")
            made.join(0.2)


def table(db: Database) -> None:
    with db.connect() as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
        connection.execute("CREATE PUBLICATION cdc FOR ALL TABLES")


@pytest.mark.parametrize("major", [16, NEWEST])
def test_a_standby_is_read_while_it_is_promoted(major: int, tmp_path: Path) -> None:
    with Server(major) as primary, primary.standby() as standby:
        db = Database(primary)
        table(db)
        follow(db, standby)
        make_slot(db, standby)
        flow = Flow(db, tmp_path, PGOUTPUT_DSN=standby.dsn(db.name))
        arguments = flow.recovery()
        insert(db, 1, 100)
        follow(db, standby)
        flow.run("-s", "0", *arguments, PGOUTPUT_UNTIL="current")
        assert ids(flow) == [*range(1, 101)]

        process = flow.start("-s", "0", *arguments)
        with following(process) as lines:
            wait_for(lines, "streaming from", process)
            insert(db, 101, 200)
            follow(db, standby)
            primary.halt("kill")
            standby.promote()
            db.server = standby
            insert(db, 201, 300)
            end = Lsn(ask(db.dsn, "SELECT pg_current_wal_flush_lsn()"))

            def seen() -> Lsn:
                return Lsn(ask(db.dsn, "SELECT confirmed_flush_lsn FROM pg_replication_slots"))

            until(lambda: seen() >= end, "the promoted standby's changes")
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not any("connected again" in line for line in lines)
        assert any("was promoted, and is on timeline 2" in line for line in lines)
        assert RecoveryFolder([tmp_path / "recovery"], "cdc").state["timeline"] == 2
        standby.halt("kill")
        standby.start()
        insert(db, 301, 400)
        flow.run("-s", "0", *arguments, PGOUTPUT_UNTIL="current")

        assert ids(flow) == [*range(1, 401)]


@pytest.mark.parametrize("major", [16, NEWEST])
def test_a_conflict_with_recovery_loses_the_slot(major: int, tmp_path: Path) -> None:
    with Server(major) as primary, primary.standby(settings={"hot_standby_feedback": False}) as standby:
        db = Database(primary)
        table(db)
        follow(db, standby)
        make_slot(db, standby)
        process = Flow(db, tmp_path, PGOUTPUT_DSN=standby.dsn(db.name)).start("-s", "0")
        with following(process) as lines:
            wait_for(lines, "streaming from", process)
            with db.connect() as connection:
                connection.execute("CREATE TABLE other (id int)")
                connection.execute("DROP TABLE other")
                connection.execute("VACUUM pg_class, pg_attribute, pg_type, pg_depend")
                connection.execute("INSERT INTO t VALUES (1)")
            assert process.wait(60) == 1
        said = "".join(lines)

    assert "SlotLost" in said
    assert "hot_standby_feedback" in said
    assert "resync --slot cdc" in said


@pytest.mark.parametrize("major", [14, 16])  # from 16 on a standby decodes; from 17 on there are failover slots
def test_before_failover_slots_a_promoted_standby_says_what_was_lost(major: int, tmp_path: Path) -> None:
    with Server(major) as primary, primary.standby() as standby:
        db = Database(primary)
        table(db)
        publish_slot(db)
        flow = Flow(db, tmp_path)
        arguments = flow.recovery()
        insert(db, 1, 100)
        follow(db, standby)
        if major < 16:
            said, code = failure(Flow(db, tmp_path / "other", PGOUTPUT_DSN=standby.dsn(db.name)))
            assert (code, "NotConfigured" in said, "is a standby" in said) == (1, True, True), said
        flow.run("-s", "0", *arguments, PGOUTPUT_UNTIL="current")
        insert(db, 101, 200)
        follow(db, standby)
        primary.halt("kill")
        standby.promote()
        db.server = standby
        flow.environ["PGOUTPUT_DSN"] = db.dsn
        insert(db, 201, 300)
        seen = Lsn(RecoveryFolder([tmp_path / "recovery"], "cdc").state["lsn"])

        said, code = failure(flow, *arguments, "-s", "0")

        assert code == 1
        assert "SlotNotFound" in said
        assert f"the recovery folder ends at {seen}" in said
        assert "on timeline 2, which left timeline 1 at 0/" in said
        assert "resync --slot cdc" in said
        assert ask(db.dsn, "SELECT count(*) FROM pg_replication_slots WHERE slot_type = 'logical'") == 0

        code, said = run(flow, "--recovery", str(tmp_path / "recovery"), "--yes")
        assert (code, f"from {seen} to" in said) == (0, True), said
        insert(db, 301, 400)
        flow.run("-s", "0", *arguments, PGOUTPUT_UNTIL="current")

        assert ids(flow) == [*range(1, 101), *range(301, 401)]


def publish_slot(db: Database) -> None:
    with db.connect() as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")


class Reading:
    """A plain reader in a thread: what it has got, and how it ended."""

    def __init__(self, dsn: str, **options: Any) -> None:
        self.reader = PgOutputReader(dsn, slot="cdc", publication="cdc", reconnect_seconds=60, **options)
        self.got: list[int] = []
        self.error: PgOutputError | None = None
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        try:
            with self.reader:
                for change in self.reader:
                    self.got.append(change.row["id"])
        except PgOutputError as e:
            self.error = e

    def end(self) -> None:
        self.reader.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()


def several(*servers: Server, dbname: str) -> str:
    """A DSN of the one of them that answers first."""
    hosts, ports = (",".join(str(getattr(server, name)) for server in servers) for name in ("host", "port"))
    return servers[0].dsn(dbname, host=hosts, port=ports)


def test_a_reader_does_not_go_on_with_another_system() -> None:
    with Server(NEWEST) as one, Server(NEWEST) as other:
        other.run("psql", "-c", f"ALTER ROLE postgres PASSWORD '{one.password}'")
        other.password = one.password
        for server in (one, other):
            ask(server.dsn(), "CREATE TABLE t (id int PRIMARY KEY)", rows=False)
            ask(server.dsn(), "CREATE PUBLICATION cdc FOR ALL TABLES", rows=False)
            ask(server.dsn(), "SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
        reading = Reading(several(one, other, dbname="postgres"))
        ask(one.dsn(), "INSERT INTO t VALUES (1)", rows=False)
        until(lambda: reading.got == [1], "a change")
        ask(other.dsn(), "INSERT INTO t VALUES (2)", rows=False)
        before = ask(other.dsn(), "SELECT confirmed_flush_lsn FROM pg_replication_slots")
        one.halt("kill")
        reading.thread.join(60)

        assert isinstance(reading.error, StateError)
        assert "another database system answered" in reading.error.message
        assert reading.got == [1]
        assert ask(other.dsn(), "SELECT confirmed_flush_lsn FROM pg_replication_slots") == before


@pytest.mark.parametrize("read_before", [True, False], ids=["read before its promotion", "after"])
def test_a_reader_does_not_go_on_with_a_standby_that_never_had_all(read_before: bool) -> None:
    with Server(NEWEST) as primary, primary.standby() as standby:
        db = Database(primary)
        table(db)
        follow(db, standby)
        make_slot(db, standby)
        publish_slot(db)
        attributes = "any" if read_before else "read-write"
        reading = Reading(several(primary, standby, dbname=db.name) + f" target_session_attrs={attributes}")
        insert(db, 1, 10)
        follow(db, standby)
        standby.halt("fast")
        insert(db, 11, 20)
        until(lambda: len(reading.got) == 20, "the changes")
        primary.halt("kill")
        standby.start()
        if read_before:
            # It is on the same timeline still, and the reader can't tell what it will become.
            until(lambda: reading.reader._session.frames.generation > 0, "the reader's return")  # type: ignore[union-attr]
        standby.promote()
        db.server = standby
        insert(db, 21, 30)  # at positions that the former primary has used
        reading.thread.join(60)

        assert isinstance(reading.error, StateError), reading.error
        assert "never had" in reading.error.message or "does not have it" in reading.error.message
        assert reading.got == [*range(1, 21)]


def test_a_server_that_is_not_up_yet_is_waited_for() -> None:
    with Server(NEWEST) as primary:
        # Without hot standby it answers as a server does that replays its WAL after a crash.
        standby = primary.standby(settings={"hot_standby": False})
        starting = threading.Thread(target=standby.start)
        starting.start()
        try:
            until(lambda: (Path(standby.host) / f".s.PGSQL.{standby.port}").exists(), "its socket")
            reading = Reading(standby.dsn(), create=True)
            time.sleep(2)
            assert (reading.error, reading.thread.is_alive()) == (None, True)
            standby.promote()
            starting.join()
            ask(standby.dsn(), "CREATE TABLE t (id int PRIMARY KEY)", rows=False)
            until(lambda: ask(standby.dsn(), "SELECT active FROM pg_replication_slots") is True, "the slot")
            ask(standby.dsn(), "INSERT INTO t VALUES (1)", rows=False)
            until(lambda: reading.got == [1], "a change")
            reading.end()
        finally:
            standby.stop()
        assert reading.error is None
