"""Several workers, as threads and as processes with recovery folders of their own: drains, kills, a hanging member."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest
from harness.database import Database
from harness.flow import Busy, Flow, confirmed, following, publish, until_staged, wait_for
from harness.waiting import until
from harness.workload import Workload, differences, replayed, tables

from pgoutput_source.embedded import shop

SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("number", SIGNALS)
def test_threads_drain(db: Database, tmp_path: Path, number: signal.Signals) -> None:
    publish(db)
    flow = Flow(db, tmp_path)
    with Workload(db.dsn, seed=4, tables=3, largest=100) as workload:
        process = flow.start("-s", "1", "-w", "2", *flow.recovery())
        with following(process) as lines:
            wait_for(lines, "streaming from", process)
            workload.run(2_000)
            until_staged(flow)
            process.send_signal(number)
            assert process.wait(60) == 0, "".join(lines)
            assert "Traceback" not in "".join(lines)
        workload.run(2_000)
        flow.run("-s", "1", "-w", "2", *flow.recovery(), PGOUTPUT_UNTIL="current")

        found, _ = replayed(flow.out)

        assert differences(found, tables(workload)) == []


def test_the_shop_s_flow_drains_and_goes_on_with_threads(db: Database, tmp_path: Path) -> None:
    shop.create(db.dsn)
    with db.connect() as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
    flow = Flow(db, tmp_path, module="flows.orders_cdc", PGOUTPUT_PUBLICATION="shop")
    for _ in range(2):
        process = flow.start("-s", "1", "-w", "2", *flow.recovery())
        with following(process) as lines:
            before = confirmed(db)
            take_orders(db, 100)
            until(lambda before=before: confirmed(db) > before, lines)  # type: ignore[misc]
            take_orders(db, 100)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, "".join(lines)

    assert list((tmp_path / "out/orders").glob("*.parquet"))


def take_orders(db: Database, count: int) -> None:
    steps = iter(range(count))
    shop.Workload(db.dsn, seed=1).run(lambda _: next(steps, None) is None)


class Cluster:
    """Two processes of one flow, each with a folder of its own for its half of the recovery store."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        whole = flow.folder / "recovery"
        whole.mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "bytewax.recovery", whole, "2"], check=True)
        for number in range(2):
            self.store(number).mkdir()
            (whole / f"part-{number}.sqlite3").rename(self.store(number) / f"part-{number}.sqlite3")

    def store(self, number: int) -> Path:
        return self.flow.folder / f"recovery{number}"

    @contextmanager
    def running(self, **environ: str) -> Iterator[tuple[list[subprocess.Popen[str]], list[list[str]]]]:
        """Both processes, the one that reads the slot first, and what each of them says."""
        with ExitStack() as stack:
            # All ports are held until all are known, so that none is given out twice.
            held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
            addresses = ";".join(f"127.0.0.1:{each.getsockname()[1]}" for each in held)
        with ExitStack() as stack:
            processes = [
                self.flow.start(
                    *("-s", "1", "-i", str(number), "-a", addresses),
                    *("-r", str(self.store(number)), "-b", "0"),
                    **environ,
                )
                for number in range(2)
            ]
            said = [stack.enter_context(following(process)) for process in processes]

            def streaming() -> bool:
                assert all(process.poll() is None for process in processes), said
                return any("streaming from" in line for lines in said for line in lines)

            until(streaming, said)
            if any("streaming from" in line for line in said[1]):
                processes.reverse()
                said.reverse()
            yield processes, said

    def finish(self) -> None:
        """Everything that was committed up to now is published by a last run."""
        with self.running(PGOUTPUT_UNTIL="current") as (processes, said):
            assert [process.wait(60) for process in processes] == [0, 0], said


@pytest.mark.parametrize("number", SIGNALS)
def test_processes_drain(db: Database, tmp_path: Path, number: signal.Signals) -> None:
    publish(db)
    flow = Flow(db, tmp_path)
    cluster = Cluster(flow)
    with Workload(db.dsn, seed=5, tables=3, largest=100) as workload:
        with cluster.running() as (processes, said):
            workload.run(2_000)
            until_staged(flow)
            for process in reversed(processes):
                process.send_signal(number)
            assert [process.wait(60) for process in processes] == [0, 0], said
            assert "Traceback" not in str(said)
        workload.run(1_000)
        cluster.finish()

        found, _ = replayed(flow.out)

        assert differences(found, tables(workload)) == []


def either(rng: random.Random, processes: list[subprocess.Popen[str]]) -> None:
    rng.choice(processes).kill()


def both(rng: random.Random, processes: list[subprocess.Popen[str]]) -> None:
    for process in rng.sample(processes, 2):
        process.kill()
        time.sleep(rng.choice([0, 0.05]))


@pytest.mark.slow
@pytest.mark.parametrize("victims", [either, both])
def test_killed_processes_lose_and_repeat_nothing(
    db: Database, tmp_path: Path, victims: Callable[[random.Random, list[subprocess.Popen[str]]], None]
) -> None:
    rng = random.Random(11)
    publish(db)
    flow = Flow(db, tmp_path)
    cluster = Cluster(flow)
    with Busy(db.dsn, seed=11, tables=6, largest=2_000) as workload:
        for _ in range(3):
            with cluster.running() as (processes, said):
                time.sleep(rng.uniform(0.2, 2.5))
                victims(rng, processes)
                # The others notice by themselves: none waits for a peer that is gone.
                assert all(process.wait(60) in (1, -signal.SIGKILL) for process in processes), said
        workload.stop()
        cluster.finish()

        found, count = replayed(flow.out)

        assert count > 1_000
        assert differences(found, tables(workload)) == []


def test_a_stopped_member_does_not_hold_the_slot_for_ever(db: Database, tmp_path: Path) -> None:
    publish(db)
    flow = Flow(db, tmp_path)
    cluster = Cluster(flow)
    with Workload(db.dsn, seed=6, tables=3, largest=100) as workload:
        with cluster.running(PGOUTPUT_STALL_SECONDS="3") as (processes, said):
            reading, other = processes
            workload.run(1_000)
            until_staged(flow)
            other.send_signal(signal.SIGSTOP)
            workload.run(1_000)
            before = confirmed(db)
            assert reading.wait(60) == 70, said
            free_of_readers(db)
        assert "no progress for" in "".join(said[0])
        assert confirmed(db) >= before
        cluster.finish()

        found, _ = replayed(flow.out)

        assert differences(found, tables(workload)) == []


def free_of_readers(db: Database) -> None:
    with psycopg.connect(db.dsn, autocommit=True) as connection:
        query = "SELECT active FROM pg_replication_slots"
        until(lambda: connection.execute(query).fetchall() == [(False,)], "the slot is still in use")
