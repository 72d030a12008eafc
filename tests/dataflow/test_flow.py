"""The whole path of a change, on real servers: what the Parquet files say, replayed, is what the tables hold."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from harness.database import Database
from harness.flow import Busy, Flow, confirmed, following, publish, until_staged, wait_for
from harness.waiting import until
from harness.workload import HOSTILE, Workload, differences, replayed, tables

from pgoutput_source.embedded import MAJORS


@pytest.mark.slow
@pytest.mark.parametrize("any_pg", [min(MAJORS), max(MAJORS)], indirect=True)
def test_files_replayed_equal_the_tables(any_db: Database, tmp_path: Path) -> None:
    with Workload(any_db.dsn, seed=any_db.server.major) as workload:
        publish(any_db)
        made = workload.run(100_000)
        flow = Flow(any_db, tmp_path, PGOUTPUT_UNTIL="current", **HOSTILE)
        flow.run("-s", "1")

        found, count = replayed(flow.out)

        assert differences(found, tables(workload)) == []
        assert count >= made


def test_files_of_rows_that_cross_filters_equal_what_is_published(any_db: Database, tmp_path: Path) -> None:
    with Workload(any_db.dsn, seed=any_db.server.major, largest=1_000, publication="cdc") as workload:
        workload.connection.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
        workload.run(10_000)
        flow = Flow(any_db, tmp_path, PGOUTPUT_UNTIL="current", **HOSTILE)
        flow.run("-s", "1")

        assert differences(replayed(flow.out)[0], tables(workload)) == []


@pytest.mark.slow
def test_kill_9_loses_and_repeats_nothing(db: Database, tmp_path: Path) -> None:
    rng = random.Random(9)
    flow = Flow(db, tmp_path)
    publish(db)
    with Busy(db.dsn, seed=9, tables=6, largest=2_000) as workload:
        for turn in range(12):
            until(lambda turn=turn: workload.changes >= 1_000 * turn)  # type: ignore[misc]
            process = flow.start("-s", rng.choice(["1", "1", "0"]), *flow.recovery())
            with following(process) as lines:
                if rng.random() < 0.8:
                    wait_for(lines, "streaming from", process)
                time.sleep(rng.uniform(0, 2))
                process.send_signal(signal.SIGKILL)
        workload.stop()
        flow.run("-s", "1", *flow.recovery(), PGOUTPUT_UNTIL="current")

        found, count = replayed(flow.out)

        assert count > 10_000, count
        assert differences(found, tables(workload)) == []


@pytest.mark.slow
def test_an_acknowledgement_in_snapshot_would_be_noticed(db: Database, tmp_path: Path) -> None:
    rng = random.Random(9)
    flow = Flow(db, tmp_path)
    publish(db)
    with Busy(db.dsn, seed=9, tables=6, largest=2_000):
        for _ in range(10):
            # Between the acknowledgement and the epoch's end: at random moments it would take many kills.
            death = f"acknowledged:{rng.randint(3, 20)}"
            process = flow.start("-s", "0", *flow.recovery(), BREAK="acknowledge early", KILL_AT=death)
            with following(process) as lines:
                assert process.wait(120) in (1, -signal.SIGKILL), lines
            if any("SlotAhead" in line for line in lines):
                return
    pytest.fail("10 kills, and the early acknowledgements were never noticed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_publishes_and_acknowledges(db: Database, tmp_path: Path, number: signal.Signals) -> None:
    publish(db)
    flow = Flow(db, tmp_path)
    with Workload(db.dsn, seed=1, tables=3, largest=100) as workload:
        process = flow.start("-s", "1", *flow.recovery())
        with following(process) as lines:
            workload.run(2_000)
            until_staged(flow)
            process.send_signal(number)
            assert process.wait(60) == 0, "".join(lines)
        published, acknowledged = set(flow.out.glob("*.parquet")), confirmed(db)
        workload.run(2_000)
        flow.run("-s", "1", *flow.recovery(), PGOUTPUT_UNTIL="current")

        found, _ = replayed(flow.out)

        assert published
        assert acknowledged < confirmed(db)
        assert differences(found, tables(workload)) == []


def test_a_bounded_run_stops_although_writers_go_on(db: Database, tmp_path: Path) -> None:
    flow = Flow(db, tmp_path)
    publish(db)
    with Busy(db.dsn, seed=2, tables=6, largest=2_000) as workload:
        until(lambda: workload.changes > 1_000)
        flow.run("-s", "1", PGOUTPUT_UNTIL="current")
        first = replayed(flow.out)[1]
        flow.run("-s", "1", PGOUTPUT_UNTIL="current")

    assert 0 < first < replayed(flow.out)[1]


def test_without_recovery_a_restart_publishes_what_was_acknowledged(db: Database, tmp_path: Path) -> None:
    publish(db)
    flow = Flow(db, tmp_path)
    with Workload(db.dsn, seed=3, tables=3, largest=100) as workload:
        process = flow.start("-s", "0")
        with following(process) as lines:
            wait_for(lines, "streaming from", process)
            before = confirmed(db)
            workload.run(2_000)
            until(lambda: confirmed(db) > before, lines)
            process.kill()
        flow.run("-s", "1", PGOUTPUT_UNTIL="current")

        positions = {
            (row["_commit_lsn"], row["_seq"])
            for file in flow.out.glob("*.parquet")
            for row in pq.read_table(file, columns=["_commit_lsn", "_seq"]).to_pylist()
        }

        assert len(positions) >= workload.changes


def test_an_idle_publication_lets_the_wal_of_other_tables_go(db: Database, tmp_path: Path) -> None:
    with db.connect() as connection:
        connection.execute("CREATE TABLE published (id int PRIMARY KEY)")
        connection.execute("CREATE TABLE other (id int)")
        connection.execute("CREATE PUBLICATION cdc FOR TABLE published")
        connection.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
        flow = Flow(db, tmp_path)
        process = flow.start("-s", "0")
        with following(process) as lines:
            wait_for(lines, "streaming from", process)
            connection.execute("INSERT INTO other SELECT generate_series(1, 100000)")
            row = connection.execute("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn").fetchone()
            assert row is not None
            end = row[0]
            until(lambda: confirmed(db) >= end, "the slot did not move")
