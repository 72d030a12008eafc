"""Kills a flow again and again, with every other fault around it, and counts what was lost, repeated or too early.

    python -m benchmarks.chaos --kills 300 --seed 1 --major 18

A workload writes all the time. Each kill is a SIGKILL at a random moment or at a named place (tests/faults), with one
worker or two, with epochs of 0, 1 or 10 seconds; before some of them the walsender is terminated, the server is stopped
at once and started again, or the connection is cut. Every fifty kills the flow runs to the end, and its files are held
against a second slot, which nobody disturbed, and against the tables. A `SlotAhead` at any start means that something
was acknowledged before it was durable.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pyarrow.parquet as pq
from psycopg.conninfo import make_conninfo

from pgoutput_source import catalog
from pgoutput_source.embedded import Server
from pgoutput_source.replication import ReplicationStream
from pgoutput_source.transactions import Assembler

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from faults import PLACES  # noqa: E402
from workload import Workload, differences, replayed, tables  # noqa: E402

KILLS_A_ROUND = 50
LARGE = 30_000


@dataclass
class Report:
    """What happened, and what must not have."""

    kills: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    changes: int = 0
    lost: int = 0
    repeated: int = 0
    foreign: int = 0
    wrong_rows: int = 0
    violations: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Whether nothing was lost, repeated or acknowledged too early."""
        return not (self.lost or self.repeated or self.foreign or self.wrong_rows or self.violations or self.failures)

    def __str__(self) -> str:
        faults = ", ".join(f"{count} {name}" for name, count in sorted(self.faults.items()))
        return (
            f"{self.kills} kills, {self.changes} changes: {self.lost} lost, {self.repeated} repeated, "
            f"{self.foreign} that nobody made, {self.wrong_rows} wrong rows, "
            f"{self.violations} acknowledgement violations, {len(self.failures)} failures\n({faults})"
            + "".join(f"\n{text}" for text in self.failures)
        )


class Proxy:
    """TCP on loopback to a server on loopback, that can be cut."""

    def __init__(self, host: str, port: Callable[[], int]) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection((self._target[0], self._target[1]()))
            except OSError:
                near.close()
                continue
            self._pairs.append((near, far))
            threading.Thread(target=self._pump, args=(near, far), daemon=True).start()

    def _pump(self, near: socket.socket, far: socket.socket) -> None:
        others = {near: far, far: near}
        with near, far, contextlib.suppress(OSError, ValueError):
            while True:
                for ready in select.select(list(others), [], [], 1.0)[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    others[ready].sendall(data)

    def cut(self) -> None:
        """End all connections at once."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Take no more."""
        self._listener.close()
        self.cut()


class Writing(Workload):
    """A workload in a thread of its own that lives through restarts of its server."""

    def __init__(self, dsn: str, seed: int) -> None:
        super().__init__(dsn, seed=seed, tables=6, largest=100)
        self.dsn = dsn
        self.stopped = threading.Event()
        self.large = threading.Event()
        self.thread = threading.Thread(target=self._write, daemon=True)

    def _write(self) -> None:
        while not self.stopped.wait(0.03):
            try:
                if self.large.is_set():
                    self.large.clear()
                    self.connection.execute(self._insert(self.tables[0], LARGE))
                self.transaction()
            except psycopg.Error:
                self._again()

    def stop(self) -> None:
        """Write no more, and have a connection that works."""
        self.stopped.set()
        self.thread.join()
        self._again()

    def _again(self) -> None:
        for _ in range(300):
            with contextlib.suppress(psycopg.Error):
                self.connection.close()
                self.connection = psycopg.connect(self.dsn, autocommit=True)
                for table in self.tables:
                    row = self.connection.execute(
                        "SELECT array_agg(attname::text) FROM pg_attribute"
                        " WHERE attrelid = %s::regclass AND attnum > 0",
                        [table.identifier.as_string(self.connection)],
                    ).fetchone()
                    assert row is not None
                    # What a lost transaction added is not there.
                    table.columns = {name: kind for name, kind in table.columns.items() if name in row[0]}
                return
            time.sleep(0.1)


class Chaos:
    """One database, slot, recovery folder and output folder."""

    def __init__(self, server: Server, folder: Path, rng: random.Random, report: Report, mistake: str) -> None:
        self.server, self.folder, self.rng, self.report = server, folder, rng, report
        self.out = folder / "out"
        self.recovery = folder / "recovery"
        self.recovery.mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "bytewax.recovery", self.recovery, "1"], check=True)
        name = f"chaos_{rng.randrange(1 << 40):x}"
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        self.dsn = server.dsn(name)
        self.slots = (f"{name}_flow", f"{name}_oracle")
        with self.sql() as connection:
            connection.execute("CREATE PUBLICATION cdc FOR ALL TABLES")
            for slot in self.slots:
                connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])
        self.proxy = Proxy("127.0.0.1", lambda: server.port)
        self.environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PG", "BYTEWAX", "RUST_"))},
            "PYTHONPATH": str(ROOT / "tests"),
            "PGOUTPUT_DSN": make_conninfo(self.dsn, host="127.0.0.1", port=self.proxy.port),
            "PGOUTPUT_SLOT": self.slots[0],
            "PGOUTPUT_PUBLICATION": "cdc",
            "PGOUTPUT_OUT": str(self.out),
            "PGOUTPUT_MAX_FRAMES": "5000",  # so that large transactions are cut
            "MAX_AGE": "2",
            "BREAK": mistake,
        }

    def sql(self) -> psycopg.Connection[Any]:
        """A connection that does not go through the proxy."""
        return psycopg.connect(self.dsn, autocommit=True)

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        """The flow in a process of its own."""
        command = [sys.executable, "-m", "bytewax.run", "tests.all_tables", *arguments]
        command += ["-r", str(self.recovery), "-b", "0"]
        log = (self.folder / "flow.log").open("w")
        with log:
            return subprocess.Popen(
                command, cwd=ROOT, env=self.environ | environ, stdout=subprocess.DEVNULL, stderr=log, text=True
            )

    def said(self) -> str:
        """What the last process wrote to standard error."""
        return (self.folder / "flow.log").read_text()

    def kill_once(self, writing: Writing) -> None:
        """Start the flow, do things to it, and kill it."""
        rng, faults = self.rng, self.report.faults
        at = rng.choice(["", "", *rng.sample(list(PLACES), 2)])
        environ = {"KILL_AT": f"{at}:{rng.randint(1, 6)}"} if at else {}
        if "large" in at or rng.random() < 0.1:
            writing.large.set()
        workers, epoch = rng.choice(["1", "1", "2"]), rng.choice(["0", "0", "1", "1", "1", "10"])
        process = self.start("-w", workers, "-s", epoch, **environ)
        self.report.kills += 1
        faults[f"kills at {at}" if at else "kills at random"] += 1
        try:
            if rng.random() < 0.8:
                deadline = time.monotonic() + 30
                while "streaming from" not in self.said() and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.02)
            until = time.monotonic() + rng.uniform(0, 2.5) + (1.5 if at else 0)
            if rng.random() < 0.3:
                time.sleep(rng.uniform(0, 1))
                self._disturb(rng.choice([self.terminate, self.restart, self.cut]))
                until += 0.5
            while process.poll() is None and time.monotonic() < until:
                time.sleep(0.02)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            code = process.wait()
        said = self.said()
        if "SlotAhead" in said:
            self.report.violations += 1
        elif code != -signal.SIGKILL:
            self.report.failures.append(f"exit code {code}: {said[-1000:]}")

    def _disturb(self, fault: Callable[[], None]) -> None:
        self.report.faults[fault.__name__] += 1
        fault()

    def terminate(self) -> None:
        """End the walsender."""
        with self.sql() as connection:
            connection.execute(
                "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active AND slot_name = %s",
                [self.slots[0]],
            )

    def restart(self) -> None:
        """Stop the server in an instant and start it again: it forgets acknowledgements since its last checkpoint."""
        self.server.halt("immediate")
        self.server.start()

    def cut(self) -> None:
        """Cut the connection."""
        self.proxy.cut()

    def finish(self, writing: Writing) -> None:
        """Let the flow run to the end and hold its files against the other slot and the tables."""
        report = self.report
        process = self.start("-s", "1", PGOUTPUT_UNTIL="current")
        try:
            code = process.wait(300)
        finally:
            process.kill()
            process.wait()
        if code:
            report.violations += "SlotAhead" in self.said()
            report.failures.append(f"the last run: exit code {code}: {self.said()[-1000:]}")
            return
        found: Counter[tuple[str, int, int]] = Counter()
        for file in self.out.glob("*.parquet"):
            table = pq.read_table(file, columns=["_commit_lsn", "_seq"])
            name = (table.schema.metadata or {})[b"pg.table"].decode()
            found.update((name, lsn, seq) for lsn, seq in zip(*(c.to_pylist() for c in table.columns), strict=True))
        made = self._oracle()
        report.changes += len(made)
        report.lost += len(made - found.keys())
        report.foreign += len(found.keys() - made)
        report.repeated += sum(count - 1 for count in found.values())
        if not (report.lost or report.repeated):
            report.wrong_rows += len(differences(replayed(self.out)[0], tables(writing)))

    def _oracle(self) -> set[tuple[str, int, int]]:
        """Every change since the slots were made, read by one undisturbed stream."""
        made: set[tuple[str, int, int]] = set()
        with self.sql() as connection:
            end = catalog.current_lsn(connection)
            state = catalog.slot_state(connection, self.slots[1])
        assert state is not None
        assert state.confirmed_flush_lsn is not None
        assembler = Assembler((), look_up=catalog.defined_types(self.dsn))
        with ReplicationStream(self.dsn, slot=self.slots[1], publications=["cdc"]) as stream:
            stream.start(state.confirmed_flush_lsn)
            while assembler.in_transaction or max(assembler.end_lsn, stream.keepalive_lsn) < end:
                for batch in assembler.feed(stream.poll(timeout=0.2)).batches:
                    columns = (batch.data.column(name).to_pylist() for name in ("_commit_lsn", "_seq"))
                    made.update((batch.schema.table, *at) for at in zip(*columns, strict=True))
        return made

    def close(self) -> None:
        """Drop everything."""
        self.proxy.close()
        with self.sql() as connection:
            for slot in self.slots:
                connection.execute("SELECT pg_drop_replication_slot(%s)", [slot])


def run(kills: int, seed: int, major: int, *, mistake: str = "", show: bool = False, durable: bool = True) -> Report:
    """Kill a flow so many times; the report is printed as it grows if `show` is set."""
    rng, report = random.Random(seed), Report()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        with Server(major, tcp=True, settings={"fsync": durable, "full_page_writes": durable}) as server:
            while report.kills < kills and (report.held or mistake):
                count = min(kills - report.kills, KILLS_A_ROUND)
                chaos = Chaos(server, folder / str(report.kills), rng, report, mistake)
                writing = Writing(chaos.dsn, rng.randrange(1 << 20))
                with writing:
                    writing.thread.start()
                    for _ in range(count):
                        chaos.kill_once(writing)
                        if report.violations or report.failures:
                            break
                    writing.stop()
                    chaos.finish(writing)
                chaos.close()
                if show:
                    print(report, flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--major", type=int, default=18)
    parser.add_argument("--break", dest="mistake", default="", help="a mistake of tests/faults.py, which must be seen")
    options = parser.parse_args()
    begun = time.monotonic()
    report = run(options.kills, options.seed, options.major, mistake=options.mistake, show=True)
    print(f"seed {options.seed}, PostgreSQL {options.major}, {time.monotonic() - begun:.0f} s")
    sys.exit(not report.held)


if __name__ == "__main__":
    main()
