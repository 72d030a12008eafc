"""`run`: what is published when it returns, what is left when it raises, and signals at every moment."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import bytewax.operators as op
import psycopg
import pytest
from bytewax.dataflow import Dataflow
from bytewax.testing import TestingSink, TestingSource
from harness.database import Database
from harness.flow import Flow, following, publish, wait_for
from harness.waiting import until

import pgoutput_source.operators as cdc
from pgoutput_source import ParquetSink, PgOutputSource, read, run
from pgoutput_source.dataflow.run import gate
from pgoutput_source.errors import ConfigurationError, ConnectionFailed, SinkError
from pgoutput_source.parquet.writer import ROW_GROUP_ROWS
from pgoutput_source.testing import batch


def orders(db: Database, *, insert: int) -> None:
    with psycopg.connect(db.dsn, autocommit=True) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS t (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY)")
        connection.execute(f"INSERT INTO t SELECT FROM generate_series(1, {insert})".encode())


def history(db: Database, folder: Path, **options: Any) -> Dataflow:
    flow = Dataflow("history")
    source = PgOutputSource(db.dsn, slot="cdc", publication="cdc", until="current", **options)
    cdc.output("out", cdc.table("t", op.input("pg", flow, source), "public.t"), ParquetSink(folder))
    return flow


def until_exists(folder: Path, pattern: str) -> None:
    until(lambda: list(folder.glob(pattern)), pattern)


def ids(folder: Path) -> list[int]:
    return sorted(read(folder).to_table()["id"].to_pylist())


@pytest.mark.parametrize("workers", [1, 2])
def test_all_is_published_when_it_returns_and_the_next_run_continues(
    db: Database, tmp_path: Path, workers: int
) -> None:
    publish(db)
    for number in (1, 2, 3):
        orders(db, insert=10)
        run(history(db, tmp_path / "out"), recovery=tmp_path / "store", epoch=timedelta(0), workers=workers)
        assert ids(tmp_path / "out") == list(range(1, number * 10 + 1))
        assert not gate.hosted()
        with closing(sqlite3.connect(tmp_path / "store/part-0.sqlite3")) as store, store:
            void = store.execute("SELECT count(*) FROM snaps WHERE step_id = 'void'").fetchone()
            store.execute("INSERT INTO snaps (step_id, state_key, snap_epoch) VALUES ('void', 'key', 1000000000)")
        assert void == (0,), "a state of an epoch that never became durable was kept"


def test_states_of_steps_that_the_flow_has_not_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, warnings in (("total", 0), ("total", 0), ("sum", 1)):
        flow = Dataflow("f")
        keyed = op.input("in", flow, TestingSource([("a", 1), ("b", 2)]))
        totals = op.stateful_map(name, keyed, lambda state, n: ((state or 0) + n, (state or 0) + n))
        op.output("out", totals, TestingSink([]))
        caplog.clear()
        run(flow, recovery=tmp_path / "store", epoch=timedelta(0))
        assert len(caplog.records) == warnings
    assert "f.total" in caplog.text
    assert "f.in" not in caplog.text


def test_what_ends_it_is_raised_as_itself_and_the_next_run_starts_clean(db: Database, tmp_path: Path) -> None:
    publish(db)
    orders(db, insert=10)
    (tmp_path / "out").write_text("no folder")
    with pytest.raises(SinkError, match="can't write to"):
        run(history(db, tmp_path / "out"))
    nobody = PgOutputSource("host=127.0.0.1 port=1", slot="cdc", publication="cdc")
    flow = Dataflow("nobody")
    cdc.output("out", cdc.table("t", op.input("pg", flow, nobody), "public.t"), ParquetSink(tmp_path / "other"))
    with pytest.raises(ConnectionFailed):
        run(flow)
    flow = Dataflow("wrong")
    divided = op.map("wrong", op.input("in", flow, TestingSource([0])), lambda x: ("key", 1 // x))
    op.output("out", divided, ParquetSink(tmp_path / "other"))
    with pytest.raises(Exception, match="wrong"):
        run(flow)
    (tmp_path / "out").unlink()

    run(history(db, tmp_path / "out"))

    assert ids(tmp_path / "out") == list(range(1, 11))


def test_one_dataflow_at_a_time(tmp_path: Path) -> None:
    started, go_on = threading.Event(), threading.Event()

    def wait(item: Any) -> Any:
        started.set()
        go_on.wait(60)
        return item

    flow = Dataflow("slow")
    rows = op.map("wait", op.input("in", flow, TestingSource([batch("public.t", [("I", {"id": 1})])])), wait)
    cdc.output("out", rows, ParquetSink(tmp_path / "out"))
    thread = threading.Thread(target=run, args=(flow,))
    thread.start()
    assert started.wait(60)
    with pytest.raises(ConfigurationError, match="runs in this process already"):
        run(flow)
    go_on.set()
    thread.join()
    assert not thread.is_alive()


PROGRAM = """
import os, sys
from datetime import timedelta
import bytewax.operators as op
from bytewax.dataflow import Dataflow
import pgoutput_source.operators as cdc
from pgoutput_source import ParquetSink, PgOutputSource, run
flow = Dataflow("program")
cdc.output("out", cdc.table("t", op.input("pg", flow, PgOutputSource.from_env()), "public.t"), ParquetSink("out"))
{}run(flow, epoch=timedelta(0), workers=int(sys.argv[1]))
print("returned")
"""

FORKS = """
def forking(item):
    if not os.path.exists("child"):
        child = os.fork()
        if not child:
            import time
            time.sleep(200)
            os._exit(1)
        open("child", "w").write(str(child))
    return item
forked = op.map("fork", op.input("other", flow, PgOutputSource.from_env(slot="forks")), forking)
cdc.output("again", cdc.table("u", forked, "public.t"), ParquetSink("o"))
"""


def program(dsn: str, folder: Path, workers: int, more: str = "") -> subprocess.Popen[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "BYTEWAX", "RUST_"))}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(more), str(workers)],
        cwd=folder,
        env=environ | {"PGOUTPUT_DSN": dsn, "PGOUTPUT_SLOT": "cdc", "PGOUTPUT_PUBLICATION": "cdc"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_drains_and_it_returns(db: Database, tmp_path: Path, number: signal.Signals, workers: int) -> None:
    publish(db)
    orders(db, insert=10)
    process = program(db.dsn, tmp_path, workers)
    assert process.stdout is not None
    with following(process) as lines:
        until_exists(tmp_path, "out/_staging/*.committed")
        process.send_signal(number)
        assert process.wait(60) == 0, "".join(lines)
        with process.stdout:
            assert process.stdout.read() == "returned\n"
        assert sum(number.name in line for line in lines) == 1
        assert len(lines) <= 4, lines
    assert ids(tmp_path / "out") == list(range(1, 11))


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_ends_what_waits_for_a_silent_server(tmp_path: Path, number: signal.Signals, workers: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dsn = f"host=127.0.0.1 port={silent.getsockname()[1]} user=x dbname=x connect_timeout=60"
        process = program(dsn, tmp_path, workers)
        silent.settimeout(30)
        with silent.accept()[0]:
            time.sleep(0.2)
            process.send_signal(number)
            said, log = process.communicate(timeout=30)  # half of the time that it would wait for the server
    assert (process.returncode, said) == (0, "returned\n"), log
    assert log.count("\n") == 1
    assert "stopped before anything was delivered" in log


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_signal_ends_what_waits_for_its_slot(db: Database, tmp_path: Path, workers: str) -> None:
    publish(db)
    flow = Flow(db, tmp_path)
    reading = flow.start("-s", "1")
    with following(reading) as lines:
        wait_for(lines, "streaming from", reading)
        for number in (signal.SIGTERM, signal.SIGINT):
            waiting = flow.start("-s", "1", "-w", workers)
            with following(waiting) as said:
                wait_for(said, "is in use by process", waiting)
                waiting.send_signal(number)
                assert waiting.wait(30) == 0, said  # it would wait for twice that
                assert len(said) <= 3, said
        assert reading.poll() is None


@contextmanager
def forking(db: Database, folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A program whose flow has forked, and its child, which sleeps."""
    publish(db)
    orders(db, insert=10)
    with db.connect() as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('forks', 'pgoutput')")
        connection.execute("INSERT INTO t DEFAULT VALUES")
    process = program(db.dsn, folder, 1, FORKS)
    assert process.stdout is not None
    with following(process) as lines, process.stdout:
        written = folder / "child"
        until(lambda: written.exists() and written.read_text(), lines)
        child = int(written.read_text())
        try:
            yield process, child
        finally:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def test_a_forked_child_has_no_part_in_the_run(db: Database, tmp_path: Path) -> None:
    with forking(db, tmp_path) as (process, child):

        def ended() -> bool:
            os.kill(child, signal.SIGTERM)  # again and again: Python forgets one that comes amid the fork
            return Path(f"/proc/{child}/stat").read_text().split()[2] == "Z"

        until(ended, "the child took the signal for the run's")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_forked_child_does_not_keep_the_slot_beyond_its_parent(db: Database, tmp_path: Path) -> None:
    with forking(db, tmp_path) as (process, child), db.connect() as connection:
        process.kill()
        process.wait()
        query = "SELECT bool_or(active) FROM pg_replication_slots"
        until(lambda: connection.execute(query).fetchone() == (False,), "a slot is still in use")
        os.kill(child, 0)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_second_ctrl_c_ends_a_drain_without_a_traceback(db: Database, tmp_path: Path, workers: str) -> None:
    publish(db)
    orders(db, insert=ROW_GROUP_ROWS)
    process = Flow(db, tmp_path).start("-s", "60", "-w", workers)
    with following(process) as lines:
        # Before the first batch a signal interrupts the start instead.
        until_exists(tmp_path, "out/_staging/*.writing")
        for text in ("SIGINT: draining", "SIGINT again"):
            process.send_signal(signal.SIGINT)
            wait_for(lines, text, process) if "again" not in text else process.wait(30)
        assert process.returncode == -signal.SIGINT
    assert "SIGINT again" in lines[-1]
    assert len(lines) <= 4, lines
