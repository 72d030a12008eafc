"""Flows as processes of their own, beside a database that is busy."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self

import psycopg
import pytest

from harness.database import Database
from harness.waiting import PATIENCE, until
from harness.workload import Workload

ROOT = Path(__file__).parents[2]


class Flow:
    """A dataflow as users start it: a process of its own with an environment."""

    def __init__(self, db: Database, folder: Path, *, module: str = "harness.all_tables", **environ: str) -> None:
        if sys.version_info >= (3, 13):
            pytest.importorskip("bytewax")
        self.folder = folder
        self.out = folder / "out"
        self.module = module
        self.cwd = ROOT
        self.environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PG", "BYTEWAX", "RUST_"))},
            "PYTHONPATH": str(ROOT / "tests"),
            "PGOUTPUT_DSN": db.dsn,
            "PGOUTPUT_SLOT": "cdc",
            "PGOUTPUT_PUBLICATION": "cdc",
            "PGOUTPUT_OUT": str(self.out),
            **environ,
        }

    def recovery(self) -> tuple[str, ...]:
        """Arguments that make the flow recoverable; the folder is made at the first call."""
        folder = self.folder / "recovery"
        if not folder.exists():
            folder.mkdir()
            subprocess.run([sys.executable, "-m", "bytewax.recovery", folder, "1"], check=True)
        return ("-r", str(folder), "-b", "0")

    def epoch(self) -> int:
        """The first epoch that is not durable yet."""
        with closing(sqlite3.connect(self.folder / "recovery/part-0.sqlite3")) as store:
            found = store.execute("SELECT max(worker_frontier) FROM fronts").fetchone()
            return int(found[0] or 0)

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        """Start it; the interval between epochs must be among the arguments."""
        if "-r" not in arguments and arguments[:2] == ("-s", "0"):
            arguments = ("-s", "1", *arguments[2:])  # without recovery Bytewax takes no interval for ten seconds
        command = [sys.executable, "-m", "bytewax.run", self.module, *arguments]
        return subprocess.Popen(
            command,
            cwd=self.cwd,
            env=self.environ | environ,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    def run(self, *arguments: str, **environ: str) -> str:
        """Run to the end, expect success, and give what it said."""
        process = self.start(*arguments, **environ)
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
        return said


@contextmanager
def following(process: subprocess.Popen[str]) -> Iterator[list[str]]:
    """The lines that a process has written to standard error so far."""
    lines: list[str] = []
    assert process.stderr is not None

    def read(stream: Any) -> None:
        for line in stream:
            lines.append(line)

    thread = threading.Thread(target=read, args=(process.stderr,), daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        thread.join()
        process.stderr.close()


def wait_for(lines: list[str], text: str, process: subprocess.Popen[str], seconds: float = PATIENCE) -> None:
    """Wait until a process has written a line with this text.

    "streaming from" is the end of the connecting, and not yet the beginning of the run: a signal that comes at once
    interrupts the start instead of draining. `until_staged` waits for longer.
    """

    def there() -> bool:
        if any(text in line for line in lines):
            return True
        assert process.poll() is None, "".join(lines)
        return False

    until(there, lines, seconds)


def until_staged(flow: Flow) -> None:
    """Wait until something of an epoch is staged, so that the run has begun and has something to lose."""
    until(lambda: list(flow.out.glob("**/*.committed")) or list(flow.out.glob("**/*.parquet")), "nothing was staged")


def publish(db: Database) -> None:
    with db.connect() as connection:
        connection.execute("CREATE PUBLICATION cdc FOR ALL TABLES")
        connection.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")


def confirmed(db: Database) -> int:
    with db.connect() as connection:
        row = connection.execute(
            "SELECT confirmed_flush_lsn - '0/0'::pg_lsn FROM pg_replication_slots WHERE slot_name = 'cdc'"
        ).fetchone()
        assert row is not None
        return int(row[0])


class Busy(Workload):
    """A workload that goes on in a thread until it is stopped."""

    def __enter__(self) -> Self:
        super().__enter__()
        self._start()
        return self

    def _start(self) -> None:
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def again(self, dsn: str) -> None:
        """Go on after a stop, and after the server was away."""
        self.connection.close()
        self.connection = psycopg.connect(dsn, autocommit=True)
        self._start()

    def _work(self) -> None:
        while not self.stopped.wait(0.02):
            self.transaction()

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()

    def __exit__(self, *_: object) -> None:
        self.stop()
        super().__exit__()


def failure(flow: Flow, *arguments: str, **environ: str) -> tuple[str, int]:
    """What a run says that must fail, and its exit code."""
    environ = {"PGOUTPUT_UNTIL": "current", "PGOUTPUT_SLOT_WAIT_SECONDS": "1"} | environ
    process = flow.start("-s", "0", *arguments, **environ)
    _, said = process.communicate(timeout=120)
    return said, process.returncode
