"""What a start does for each pair of resume state and slot: go on, drop what comes again, or one clear error.

Nothing is ever created, dropped or moved that was not asked for: each case that fails leaves the slots as they were.
Other cells: another timeline and conflicts on standbys in `test_standby`, another history in `test_history`, a slot
that changes while a flow runs in `test_replication`, and the way out of a gap in `test_resync`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from harness.database import NEWEST, Database
from harness.flow import Busy, Flow, confirmed, failure, following, publish, wait_for
from harness.slots import absent, ahead, ids, insert, invalidate, lost, of_another_plugin, recreated
from harness.waiting import until
from harness.workload import Workload, differences, replayed, tables
from psycopg.conninfo import make_conninfo

from pgoutput_source.embedded import Server
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.stream.replication import ReplicationStream


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    """A server whose settings may be changed, and that may be killed."""
    with Server(NEWEST, settings={"max_prepared_transactions": 10}) as server:
        yield server


def unchanged(db: Database, flow: Flow) -> None:
    """The slot is where the state is, or where it was made."""


def active(db: Database, flow: Flow) -> None:
    assert isinstance(flow, Held)
    flow.holder = ReplicationStream(db.dsn, slot="cdc", publications=["cdc"])
    flow.holder.start(Lsn(0))


def idle_for_too_long(db: Database, flow: Flow) -> None:
    invalidate(db, "idle_replication_slot_timeout = '1s'", lambda _: time.sleep(0.5))


def physical(db: Database, flow: Flow) -> None:
    absent(db, flow)
    with db.connect() as connection:
        connection.execute("SELECT pg_create_physical_replication_slot('cdc')")


def two_phase(db: Database, flow: Flow) -> None:
    absent(db, flow)
    with db.connect() as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput', false, true)")


def of_another_database(db: Database, flow: Flow) -> None:
    flow.environ["PGOUTPUT_DSN"] = make_conninfo(db.dsn, dbname="postgres")


Spoil = Callable[[Database, Flow], None]
# The error without a state, the error with one, and a word of the remedy.
CASES: list[tuple[Spoil, str | None, str | None, str]] = [
    (unchanged, None, None, ""),
    (active, "SlotInUse", "SlotInUse", "stop the other one"),
    (idle_for_too_long, "SlotLost", "SlotLost", "idle_replication_slot_timeout"),
    (absent, "SlotNotFound", "SlotNotFound", "slot"),
    (ahead, None, "SlotAhead", "resync"),
    (recreated, None, "SlotAhead", "resync"),
    (lost, "SlotLost", "SlotLost", "resync"),
    (of_another_plugin, "SlotMismatch", "SlotMismatch", "another slot"),
    (physical, "SlotMismatch", "SlotMismatch", "another slot"),
    (two_phase, "SlotMismatch", "SlotMismatch", "without"),
    (of_another_database, "SlotMismatch", "SlotMismatch", "dbname="),
]


@pytest.mark.parametrize("state", [False, True], ids=["no state", "state"])
@pytest.mark.parametrize(("spoil", "without", "with_state", "remedy"), CASES, ids=[case[0].__name__ for case in CASES])
def test_a_slot_that_does_not_fit(
    own: Server, tmp_path: Path, state: bool, spoil: Spoil, without: str | None, with_state: str | None, remedy: str
) -> None:
    db = Database(own)
    flow = Held(db, tmp_path)
    try:
        publish(db)
        with db.connect() as connection:
            connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
        insert(db, 1, 100)
        arguments = flow.recovery()
        if state:
            flow.run("-s", "0", *arguments, PGOUTPUT_UNTIL="current")
        spoil(db, flow)
        before = slots(db)

        error = with_state if state else without
        if error is None:
            insert(db, 201, 300)
            flow.run("-s", "0", *arguments, PGOUTPUT_UNTIL="current")
            # Without a state the slot is the only memory, and what it has is all there is.
            assert ids(flow) == [*([] if spoil in (ahead, recreated) else range(1, 101)), *range(201, 301)]
            assert [name for name, *_ in slots(db)] == ["cdc"]
            return
        said, code = failure(
            flow,
            *arguments,
        )

        assert code == 1
        assert error in said
        assert remedy in said
        assert "Traceback" not in said
        # While somebody reads from a slot, the server moves its restart_lsn by itself.
        kept = (0, 1, 3) if spoil is active else (0, 1, 2, 3)
        assert [[row[i] for i in kept] for row in slots(db)] == [[row[i] for i in kept] for row in before]
    finally:
        if flow.holder is not None:
            flow.holder.close(graceful=True)
        with db.connect() as connection:  # a physical slot belongs to no database
            connection.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
        db.drop()


class Held(Flow):
    """A flow whose slot may be held by somebody else."""

    holder: ReplicationStream | None = None


def slots(db: Database) -> list[tuple[Any, ...]]:
    with db.connect() as connection:
        return connection.execute(
            "SELECT slot_name, plugin, restart_lsn, confirmed_flush_lsn FROM pg_replication_slots ORDER BY 1"
        ).fetchall()


def test_an_absent_slot_says_where_the_state_ends(own: Server, tmp_path: Path) -> None:
    db = Database(own)
    publish(db)
    flow = Flow(db, tmp_path)
    flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
    end = confirmed(db)
    absent(db, flow)

    said, _ = failure(flow, *flow.recovery())
    db.drop()

    assert f"the recovery folder ends at {end >> 32:X}/{end & 0xFFFFFFFF:X}" in said


@pytest.mark.parametrize("how", ["kill", "immediate"])
def test_a_slot_behind_the_state_sends_again_what_is_dropped(own: Server, tmp_path: Path, how: Any) -> None:
    db = Database(own)
    try:
        publish(db)
        flow = Flow(db, tmp_path)
        with Workload(db.dsn, seed=12, tables=3, largest=100) as workload:
            workload.run(2_000)
            flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
            reached = confirmed(db)
            workload.connection.close()
            own.halt(how)  # the slot's position is not always written at once
            own.start()
            workload.connection = psycopg.connect(db.dsn, autocommit=True)
            assert confirmed(db) < reached
            flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
            workload.run(500)
            flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")

            found, _ = replayed(flow.out)

            assert differences(found, tables(workload)) == []
    finally:
        db.drop()


def test_a_state_of_another_server(own: Server, db: Database, tmp_path: Path) -> None:
    other = Database(own)
    publish(db)
    publish(other)
    flow = Flow(other, tmp_path)
    flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
    flow.environ["PGOUTPUT_DSN"] = db.dsn
    before = confirmed(db)

    said, code = failure(flow, *flow.recovery())
    other.drop()

    assert code == 1
    assert "StateError" in said
    assert "belongs to database system" in said
    assert confirmed(db) == before


@pytest.mark.slow
@pytest.mark.parametrize("major", [17, NEWEST])
def test_a_promoted_standby_goes_on_where_the_primary_was_killed(major: int, tmp_path: Path) -> None:
    with Server(major) as primary, primary.standby(settings={"sync_replication_slots": True}) as standby:
        db = Database(primary)
        with db.connect() as connection:
            connection.execute("CREATE PUBLICATION cdc FOR ALL TABLES")
            connection.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput', failover => true)")
            connection.execute("ALTER SYSTEM SET synchronized_standby_slots = 'standby'")
            connection.execute("SELECT pg_reload_conf()")
        flow = Flow(db, tmp_path)
        flow.environ["PGOUTPUT_DSN"] = make_conninfo(
            db.dsn,
            host=f"{primary.host},{standby.host}",
            port=f"{primary.port},{standby.port}",
            target_session_attrs="read-write",
        )
        with Busy(db.dsn, seed=13, tables=4, largest=200) as workload:
            process = flow.start("-s", "1", *flow.recovery())
            with following(process) as lines:
                wait_for(lines, "streaming from", process)

                def synced() -> bool:
                    with db.connect() as connection:  # or the primary says in 15 seconds which transactions run
                        connection.execute("SELECT pg_log_standby_snapshot()")
                    with psycopg.connect(standby.dsn(), autocommit=True) as connection:
                        query = "SELECT FROM pg_replication_slots WHERE slot_name = 'cdc' AND synced AND NOT temporary"
                        return connection.execute(query).fetchone() is not None

                until(synced, "the slot is not on the standby", 120)
                reached = confirmed(db)
                until(lambda: confirmed(db) > reached, lines)
                workload.stop()
                workload.connection.close()
                primary.halt("kill")
                standby.promote()
                wait_for(lines, "connected again", process)
                db.server = standby
                workload.connection = psycopg.connect(db.dsn, autocommit=True)
                reached = confirmed(db)
                workload.run(workload.changes + 1_000)
                until(lambda: confirmed(db) > reached, lines)
                process.terminate()
                assert process.wait(60) == 0, "".join(lines)
            flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")

            found, _ = replayed(flow.out)

            assert differences(found, tables(workload)) == []


@pytest.mark.slow
def test_a_promoted_standby_that_never_had_all_is_refused(tmp_path: Path) -> None:
    with Server(NEWEST) as primary, primary.standby() as standby:
        db = Database(primary)
        publish(db)
        flow = Flow(db, tmp_path)
        with db.connect() as connection:
            connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
            end = connection.execute("SELECT pg_current_wal_lsn()").fetchone()

            def received() -> bool:
                with psycopg.connect(standby.dsn(), autocommit=True) as other:
                    row = other.execute("SELECT pg_last_wal_replay_lsn() >= %s", end).fetchone()
                    return row == (True,)

            until(received, "the standby does not follow")
            standby.halt("fast")
            connection.execute("INSERT INTO t SELECT generate_series(1, 100)")
            flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
        primary.halt("kill")
        standby.start()
        standby.promote()
        db.server = standby
        flow.environ["PGOUTPUT_DSN"] = db.dsn
        said, code = failure(flow, *flow.recovery())
        assert (code, "SlotNotFound" in said, "this server is a promoted standby" in said) == (1, True, True), said
        with db.connect() as connection:
            connection.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
        before = confirmed(db)

        said, code = failure(flow, *flow.recovery())

        assert code == 1
        assert "StateError" in said
        assert "never had all of them" in said
        assert confirmed(db) == before
