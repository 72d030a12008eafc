"""Kills a flow again and again, with every other fault around it, and counts what was lost, repeated or too early.

    python -m benchmarks.chaos --kills 300 --seed 1 --major 18
    python -m benchmarks.chaos --kills 60 --no-recovery
    python -m benchmarks.chaos --kills 60 --copy
    python -m benchmarks.chaos --kills 100 --to mirror
    python -m benchmarks.chaos --break "acknowledge early"

A workload writes all the time, sometimes a transaction of a million rows. Each kill is a SIGKILL at a random moment
or at a named place (tests/harness/faults): of a process with one worker or two, or of one or both of two processes with
recovery folders of their own; with epochs of 0, 1 or 10 seconds, with transactions streamed while they are in progress
or not, with values as text or binary, with fsyncs that take up to a second, in an environment that would shape values,
of all rows or of those that pass filters. Around it the walsender is terminated, the server is stopped at once and
started again, the connection is cut or falls silent, the disk is full, the sink raises or hangs for longer than
wal_sender_timeout, or the flow was about to end normally.

Every fifty kills the flow runs to the end. Its files are then compared with an undisturbed second slot and with the
tables. A `SlotAhead` at any start means that something was acknowledged before it was durable. Without
recovery, changes may come twice, but none may be lost. With --copy the tables are copied too, and the files, replayed
in the order of positions, are compared with the tables alone. With --to all tables go into another
database, as mirror or as history: the mirror is compared with the tables, the positions of the history with the second
slot. A deliberate mistake (`--break`) must be detected.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgoutput_source.changes.schema import TableName
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.embedded import Server
from pgoutput_source.postgres.definitions import Definitions
from pgoutput_source.postgres.slots import slot_state
from pgoutput_source.postgres.system import current_lsn
from pgoutput_source.stream.replication import ReplicationStream

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from harness.faults import LARGE, PLACES, STREAMED, TABLE_PLACES, slow_fsyncs  # noqa: E402
from harness.mirrors import differ, keyed, unkeyed  # noqa: E402
from harness.proxy import Proxy  # noqa: E402
from harness.workload import HOSTILE, Workload, differences, replayed, tables  # noqa: E402

KILLS_A_ROUND = 50
LARGE_ROWS = 30_000
MILLION = "public.million"
PATIENCE = 120
"""Seconds for what takes one or two on a machine that has nothing else to do."""

FAULTS = {
    "": 60,
    "terminate": 7,
    "restart": 7,
    "cut": 7,
    "freeze": 5,
    "drain": 5,
    "stall": 3,
    "raise": 3,
    "full disk": 3,
}
"""What may happen before a kill, and how often of a hundred times."""

ENDS = {"drain": {0, -signal.SIGTERM}, "raise": {1}, "full disk": {1}}
"""Exit codes that a fault may lead to when it comes before the kill."""

UNREACHABLE = {"terminate", "restart", "cut", "freeze"}
"""Faults that end a start: only a connection that was there before is made again."""

POSITIONS = pa.schema([("_commit_lsn", pa.uint64()), ("_seq", pa.uint64())])


@dataclass
class Report:
    """What happened, and what must not have."""

    recovery: bool = True
    kills: int = 0
    happened: Counter[str] = field(default_factory=Counter)
    changes: int = 0
    lost: int = 0
    repeated: int = 0
    foreign: int = 0
    wrong_rows: int = 0
    violations: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Whether nothing was lost or acknowledged too early, and, with recovery, nothing repeated."""
        repeated = self.repeated if self.recovery else 0
        return not (self.lost or repeated or self.foreign or self.wrong_rows or self.violations or self.failures)

    def __str__(self) -> str:
        happened = ", ".join(f"{count} {name}" for name, count in sorted(self.happened.items()) if count)
        return (
            f"{self.kills} kills, {self.changes} changes: {self.lost} lost, {self.repeated} repeated, "
            f"{self.foreign} that nobody made, {self.wrong_rows} wrong rows, "
            f"{self.violations} acknowledgement violations, {len(self.failures)} failures\n({happened})"
            + "".join(f"\n{text}" for text in self.failures)
        )


class Writing(Workload):
    """A workload in a thread of its own that lives through restarts of its server."""

    def __init__(self, dsn: str, seed: int, *, filtered: bool) -> None:
        super().__init__(dsn, seed=seed, tables=6, largest=100, publication="cdc" if filtered else None)
        self.dsn = dsn
        self.stopped = threading.Event()
        self.large = threading.Event()
        self.million = threading.Event()
        self.thread = threading.Thread(target=self._write, daemon=True)

    def create(self) -> None:
        super().create()
        self.connection.execute("CREATE TABLE million (id bigint PRIMARY KEY, amount numeric(12,2), note text)")
        if self.publication:
            self.connection.execute("ALTER PUBLICATION cdc ADD TABLE million")
        else:
            self.connection.execute("CREATE PUBLICATION cdc FOR ALL TABLES")

    def _write(self) -> None:
        while not self.stopped.wait(0.03):
            try:
                if self.large.is_set():
                    self.large.clear()
                    self.connection.execute(self._insert(self.tables[0], LARGE_ROWS))
                if self.million.is_set():
                    self.connection.execute(
                        "INSERT INTO million SELECT i, random() * 1e9, md5(i::text) FROM"
                        " (SELECT generate_series(n + 1, n + 1000000) i"
                        "  FROM (SELECT coalesce(max(id), 0) n FROM million) m) g"
                    )
                self.transaction()
            except psycopg.Error:
                self._again()
            finally:
                self.million.clear()

    def stop(self) -> None:
        """Write no more, and have a connection that works."""
        self.stopped.set()
        self.thread.join()
        self._again()

    def _again(self) -> None:
        for _ in range(10 * PATIENCE):
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
    """One database, slot, recovery store and output folder."""

    def __init__(
        self,
        server: Server,
        folder: Path,
        rng: random.Random,
        report: Report,
        *,
        mistake: str,
        millions: bool,
        copy: bool = False,
        to: str = "",
    ) -> None:
        self.copy, self.to = copy, to
        self.server, self.folder, self.rng, self.report = server, folder, rng, report
        self.mistake, self.millions = mistake, millions
        self.heavy = 0
        self.out = folder / "out"
        # Two parts, which two processes keep in folders of their own.
        self.stores = [folder / "recovery0", folder / "recovery1"]
        for store in self.stores:
            store.mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "bytewax.recovery", self.stores[0], "2"], check=True)
        name = f"chaos_{rng.randrange(1 << 40):x}"
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
            if to:
                connection.execute(f"CREATE DATABASE {name}_into".encode())
        self.dsn = server.dsn(name)
        self.source, self.target = _Place(self.dsn), _Place(server.dsn(f"{name}_into"))
        self.slots = (f"{name}_flow", f"{name}_oracle")
        self.proxy = Proxy(lambda: server.port)
        self.environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PG", "BYTEWAX", "RUST_"))},
            "PYTHONPATH": str(ROOT / "tests"),
            "PGOUTPUT_SLOT": self.slots[0],
            "PGOUTPUT_PUBLICATION": "cdc",
            "PGOUTPUT_OUT": str(self.out),
            # So that large transactions are cut, streamed or not.
            "PGOUTPUT_MAX_FRAMES": "5000",
            "PGOUTPUT_MAX_BYTES": "500000",
            "MAX_AGE": "2",
            **({"PGOUTPUT_SNAPSHOT": "initial", "CHUNK_ROWS": "200"} if copy else {}),
            **({"MODE": to, "INTO": f"postgres:{self.target.dsn}", "SPOOL": str(folder / "spool")} if to else {}),
        }

    def create_slots(self) -> None:
        """For the flow and for the oracle, at one time, once there is a publication."""
        with self.sql() as connection:
            for slot in self.slots:
                connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])

    def sql(self) -> psycopg.Connection[Any]:
        """A connection that does not go through the proxy."""
        return psycopg.connect(self.dsn, autocommit=True)

    # -- one run ------------------------------------------------------------------------------------------------

    def start(self, processes: int, *arguments: str, **environ: str) -> list[subprocess.Popen[bytes]]:
        """The flow in so many processes, each with its part of the recovery store."""
        for part in list(self.folder.glob("recovery?/part-1.sqlite3*")):
            part.rename(self.stores[processes - 1] / part.name)
        with ExitStack() as stack:
            # All ports are held until all are known, so that none is given out twice.
            held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(processes)]
            addresses = ";".join(f"127.0.0.1:{each.getsockname()[1]}" for each in held)
        started = []
        for number in range(processes):
            module = "harness.into_tables" if self.to else "harness.all_tables"
            command = [sys.executable, "-m", "bytewax.run", module, *arguments]
            if processes > 1:
                command += ["-i", str(number), "-a", addresses]
            if self.report.recovery:
                command += ["-r", str(self.stores[number]), "-b", "0"]
            with (self.folder / f"{number}.log").open("wb") as log:
                started.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=self.environ | environ, stdout=subprocess.DEVNULL, stderr=log
                    )
                )
        return started

    def said(self, processes: int) -> str:
        """What the processes of the last run wrote to standard error."""
        return "".join((self.folder / f"{number}.log").read_text(errors="replace") for number in range(processes))

    def options(self, *, streamed: bool) -> dict[str, str]:
        """How the same changes come: what may be another from run to run."""
        choice = self.rng.choice
        how = ["on", "parallel"] if self.server.major >= 16 else ["on"]
        options = {
            "PGOUTPUT_STREAMING": choice(how if streamed else ["off", *how]),
            "PGOUTPUT_STREAMING_MEMORY": choice(["0", "100000", "64000000"]),
            "PGOUTPUT_BINARY": choice(["off", "on", "auto"]),
        }
        return options | ({"PGOUTPUT_HEARTBEAT_SECONDS": "0.3"} if choice([False, True]) else {})

    def connection(self, **settings: str) -> dict[str, str]:
        """The way through the proxy, with server settings of this session's own."""
        options = " ".join(f"-c {name}={value}" for name, value in settings.items())
        return {"PGOUTPUT_DSN": make_conninfo(self.dsn, host="127.0.0.1", port=self.proxy.port, options=options)}

    def kill_once(self, writing: Writing) -> None:
        """Start the flow, do things to it, and kill it."""
        rng, happened = self.rng, self.report.happened
        place = rng.choice(["", "", *rng.sample(list(TABLE_PLACES if self.to else PLACES), 2)])
        fault = rng.choices(list(FAULTS), list(FAULTS.values()))[0]
        layout = rng.choice(["1 worker", "1 worker", "2 workers", "2 processes"])
        epoch = rng.choice(["0", "0", "1", "1", "1"] if place else ["0", "0", "1", "1", "1", "10"])
        slow, hostile = rng.random() < 0.15, rng.random() < 0.5
        count = 2 if layout == "2 processes" else 1
        options = self.options(streamed=place in STREAMED)
        environ = options | self.connection(
            logical_decoding_work_mem=rng.choice(["64kB", "64kB", "4MB"]),
            wal_sender_timeout="3s" if fault in ("freeze", "stall") else "60s",
        )
        if self.to == "mirror":
            environ["EXCLUDE"] = unkeyed(writing)
        if self.to:
            environ["MAX_AGE"] = rng.choice(["0", "0", "1"])
        environ["BREAK"] = ",".join(filter(None, [self.mistake, fault if fault in ("raise", "stall") else ""]))
        environ |= HOSTILE if hostile else {}
        if fault == "full disk":
            environ["FILE_SIZE"] = str(rng.choice([20_000, 200_000, 1_000_000]))
        if slow:
            environ |= slow_fsyncs(self.folder, 1.0)
        if place:
            environ["KILL_AT"] = f"{place}:{rng.randint(1, 6)}"
        if place in LARGE + STREAMED or rng.random() < 0.1:
            writing.large.set()
        if self.millions and rng.random() < 0.03:
            writing.million.set()
            happened["transactions of a million rows"] += 1
            self.heavy = 5
        self.heavy -= 1

        workers = ["-w", "2"] if layout == "2 workers" else []
        processes = self.start(count, *workers, "-s", epoch, **environ)
        try:
            if rng.random() < 0.8:
                self._wait(processes, "streaming from")
            if rng.random() < 0.5:
                self._wait_for_million(processes, writing)
            time.sleep(rng.uniform(0, 1) if fault else 0)
            self.disturb(fault, processes)
            # With a million rows to go through again, a second or two would never bring it any further.
            longest = 12.0 if self.heavy >= 0 else 2.5
            until = time.monotonic() + rng.uniform(0, longest) + (1 if count > 1 else 0)
            until += {"freeze": 5, "stall": 5, "drain": -1}.get(fault, 0) + (4 if place else 0) + (1 if slow else 0)
            while all(process.poll() is None for process in processes) and time.monotonic() < until:
                time.sleep(0.02)
            codes = self._kill(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        self.report.kills += 1
        happened[f"of {layout}"] += 1
        happened[f"with epochs of {epoch} s"] += 1
        happened[f"with streaming {options['PGOUTPUT_STREAMING']}"] += 1
        happened[f"with binary {options['PGOUTPUT_BINARY']}"] += 1
        happened["with a heartbeat"] += "PGOUTPUT_HEARTBEAT_SECONDS" in options
        happened["with slow fsyncs"] += slow
        happened["in a hostile environment"] += hostile
        happened[f"at {place}" if place and -signal.SIGKILL in codes else "at random"] += 1
        happened["while a million rows were on their way"] += self.heavy >= 0
        if fault:
            happened[f"fault: {fault}"] += 1
        self._judge(codes, fault, count)

    def _wait(self, processes: list[subprocess.Popen[bytes]], text: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while text not in self.said(len(processes)) and time.monotonic() < deadline:
            if any(process.poll() is not None for process in processes):
                return
            time.sleep(0.02)

    def _wait_for_million(self, processes: list[subprocess.Popen[bytes]], writing: Writing) -> None:
        deadline = time.monotonic() + PATIENCE
        while writing.million.is_set() and time.monotonic() < deadline:
            if any(process.poll() is not None for process in processes):
                return
            time.sleep(0.05)

    def disturb(self, fault: str, processes: list[subprocess.Popen[bytes]]) -> None:
        """Make a fault that comes from outside of the processes."""
        match fault:
            case "terminate":
                with self.sql() as connection:
                    connection.execute(
                        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
                        " WHERE active AND slot_name = %s",
                        [self.slots[0]],
                    )
            case "restart":  # it forgets acknowledgements since its last checkpoint
                self.server.halt("immediate")
                self.server.start(PATIENCE)
            case "cut":
                self.proxy.cut()
            case "freeze":
                self.proxy.freeze()
            case "drain":
                for process in processes:
                    process.send_signal(signal.SIGTERM)

    def _kill(self, processes: list[subprocess.Popen[bytes]]) -> set[int]:
        """Kill one or all; the exit codes of those that died before, or of all if all were killed."""
        rng = self.rng
        died = {process.returncode for process in processes if process.poll() is not None}
        if not died:
            victim = rng.choice(processes)
            victim.send_signal(signal.SIGKILL)
            victim.wait()
        # The others notice by themselves that a peer is gone, or die as suddenly.
        patience = time.monotonic() + rng.choice([0, 0.05, 10])
        while any(process.poll() is None for process in processes) and time.monotonic() < patience:
            time.sleep(0.01)
        for process in processes:
            process.kill()
        codes = {process.wait() for process in processes}
        return died or (codes if len(processes) == 1 else set())

    def _judge(self, codes: set[int], fault: str, processes: int) -> None:
        """`codes` are those of processes that ended before anything was done to them but `fault`."""
        said = self.said(processes)
        if "SlotAhead" in said:
            self.report.violations += 1
            self.report.failures.append(said[-1000:])
            return
        allowed = {-signal.SIGKILL} | ENDS.get(fault, set())
        if processes > 1 and (-signal.SIGKILL in codes or fault == "drain"):
            allowed.add(1)  # a peer is gone; a signal in the first moments of a member ends it at once
        if fault in UNREACHABLE and "ConnectionFailed" in said and "streaming from" not in said:
            allowed.add(1)
        if not codes <= allowed:
            self.report.failures.append(f"exit codes {codes}, fault {fault!r}: {said[-2000:]}")

    # -- the end of a round -------------------------------------------------------------------------------------

    def finish(self, writing: Writing) -> None:
        """Let the flow run to the end and hold its files against the other slot and the tables."""
        report = self.report
        environ = self.options(streamed=False) | self.connection(logical_decoding_work_mem="64kB")
        if self.to == "mirror":
            environ["EXCLUDE"] = unkeyed(writing)
        (process,) = self.start(1, "-s", "1", BREAK=self.mistake, PGOUTPUT_UNTIL="current", **environ)
        try:
            code = process.wait(10 * PATIENCE)
        finally:
            process.kill()
            process.wait()
        if code:
            report.violations += "SlotAhead" in self.said(1)
            report.failures.append(f"the last run: exit code {code}: {self.said(1)[-2000:]}")
            return
        if self.to == "mirror":
            wrong = differ(self.source, self.target, [*keyed(writing), ("public", "million")])  # type: ignore[arg-type]
            with self.sql() as connection:
                for schema, name in keyed(writing):
                    count = connection.execute(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(schema, name)))
                    report.changes += (count.fetchone() or (0,))[0]
            report.wrong_rows += len(wrong)
            report.failures += wrong
            return
        if self.copy:
            # Which changes come as such depends on when each row is read. The rows that they leave do not.
            try:
                states, changes = replayed(self.out, but=[MILLION])
            except AssertionError as e:
                report.failures.append(f"what was copied and streamed can't be replayed: {e}")
                return
            report.changes += changes
            report.wrong_rows += len(differences(states, tables(writing))) + self._million_differs(writing)
            return
        found: dict[str, list[pa.Table]] = defaultdict(list)
        for file in self.out.glob("*.parquet"):
            found[_table_of(file)].append(pq.read_table(file, columns=POSITIONS.names).cast(POSITIONS))
        if self.to:
            found |= self._positions_there()
        made = self._oracle()
        before = report.lost + report.foreign
        for name in found.keys() | made.keys():
            self._compare(found.get(name, []), made.get(name, []))
        if not self.to and report.lost + report.foreign == before and not (report.repeated and report.recovery):
            states, _ = replayed(self.out, repeats=not report.recovery, but=[MILLION])
            report.wrong_rows += len(differences(states, tables(writing))) + self._million_differs(writing)

    def _positions_there(self) -> dict[str, list[pa.Table]]:
        """The positions that the tables of a history have."""
        found = {}
        with self.target.connect() as connection:
            names = connection.execute("SELECT namespace, name FROM pgoutput.published").fetchall()
            for schema, name in names:
                query = sql.SQL("SELECT (_commit_lsn - '0/0')::bigint, _seq FROM {}").format(
                    sql.Identifier(schema, name)
                )
                rows = connection.execute(query).fetchall()
                columns = list(zip(*rows, strict=True)) or [(), ()]
                found[str(TableName(schema, name))] = [
                    pa.table(dict(zip(POSITIONS.names, map(list, columns), strict=True)), schema=POSITIONS)
                ]
        return found

    def _compare(self, found: list[pa.Table], made: list[pa.Table]) -> None:
        """Count positions of one table."""
        files, oracle = (pa.concat_tables([POSITIONS.empty_table(), *each]) for each in (found, made))
        distinct = files.group_by(POSITIONS.names).aggregate([])
        self.report.changes += oracle.num_rows
        self.report.repeated += files.num_rows - distinct.num_rows
        self.report.lost += oracle.join(distinct, POSITIONS.names, join_type="left anti").num_rows
        self.report.foreign += distinct.join(oracle, POSITIONS.names, join_type="left anti").num_rows

    def _million_differs(self, writing: Writing) -> bool:
        """Whether the rows of the millions, which are too many for Python objects, are others than in their table."""
        row = writing.connection.execute("SELECT count(*), sum(id)::bigint, sum(amount) FROM million").fetchone()
        files = [file for file in self.out.glob("*.parquet") if _table_of(file) == MILLION]
        read = [pq.read_table(file, columns=["id", "amount"]).replace_schema_metadata(None) for file in files]
        if not read:
            return row != (0, None, None)
        rows = pa.concat_tables(read).group_by("id").aggregate([("amount", "min")])
        return row != (rows.num_rows, pc.sum(rows["id"]).as_py(), pc.sum(rows["amount_min"]).as_py())

    def _oracle(self) -> dict[str, list[pa.Table]]:
        """Every change since the slots were made, read by one undisturbed stream."""
        made: dict[str, list[pa.Table]] = defaultdict(list)
        with self.sql() as connection:
            end = current_lsn(connection)
            state = slot_state(connection, self.slots[1])
        assert state is not None
        assert state.confirmed_flush_lsn is not None
        assembler = Assembler((), look_up=Definitions(self.dsn))
        with ReplicationStream(self.dsn, slot=self.slots[1], publications=["cdc"]) as stream:
            stream.start(state.confirmed_flush_lsn)
            while assembler.in_transaction or max(assembler.end_lsn, stream.sent) < end:
                for batch in assembler.feed(stream.poll(timeout=0.2)).batches:
                    made[batch.schema.table].append(pa.table(batch.data.select(POSITIONS.names)).cast(POSITIONS))
        return made

    def close(self) -> None:
        """Drop everything."""
        self.proxy.close()
        with self.sql() as connection:
            for slot in self.slots:
                connection.execute("SELECT pg_drop_replication_slot(%s)", [slot])
        shutil.rmtree(self.folder)


@dataclass(frozen=True)
class _Place:
    """A database that can be connected to."""

    dsn: str

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.dsn, autocommit=True)


def _table_of(file: Path) -> str:
    return str((pq.read_schema(file).metadata or {})[b"pg.table"].decode())


def run(
    kills: int,
    seed: int,
    major: int,
    *,
    mistake: str = "",
    recovery: bool = True,
    long: bool = False,
    copy: bool = False,
    to: str = "",
) -> Report:
    """Kill a flow so many times.

    With `copy` the flow copies the tables, also those that are recreated. With `to`, "mirror" or "history", the tables
    go into another database. A `long` run has transactions of a million
    rows and a server that syncs to disk, and prints the report as it grows.
    """
    rng, report = random.Random(seed), Report(recovery)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    settings: dict[str, str | bool] = {"fsync": long, "full_page_writes": long, "max_wal_size": "4GB"}
    try:
        with Server(major, tcp=True, settings=settings) as server:
            while report.kills < kills and report.held:
                count = min(kills - report.kills, 5 if mistake else KILLS_A_ROUND)
                chaos = Chaos(
                    server,
                    folder / str(report.kills),
                    rng,
                    report,
                    mistake=mistake,
                    millions=long and not mistake and not to,
                    copy=copy,
                    to=to,
                )
                filtered = rng.random() < 0.5 and to != "mirror"
                report.happened["rounds with row filters"] += filtered
                writing = Writing(chaos.dsn, rng.randrange(1 << 20), filtered=filtered)
                with writing:
                    chaos.create_slots()
                    writing.thread.start()
                    for _ in range(count):
                        chaos.kill_once(writing)
                        if report.violations or report.failures:
                            break
                    writing.stop()
                    if not (report.violations or report.failures):
                        chaos.finish(writing)
                chaos.close()
                if long:
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
    parser.add_argument("--no-recovery", dest="recovery", action="store_false", help="run the flow without -r")
    parser.add_argument("--copy", action="store_true", help="run the flow with an initial copy; needs recovery")
    parser.add_argument("--to", choices=["mirror", "history"], default="", help="all tables into another database")
    parser.add_argument("--break", dest="mistake", default="", help="a mistake of harness.faults, which must be seen")
    options = parser.parse_args()
    begun = time.monotonic()
    report = run(
        options.kills,
        options.seed,
        options.major,
        mistake=options.mistake,
        recovery=options.recovery,
        long=True,
        copy=options.copy,
        to=options.to,
    )
    print(f"seed {options.seed}, PostgreSQL {options.major}, {time.monotonic() - begun:.0f} s")
    if options.mistake:
        print(f"{options.mistake}: {'not seen' if report.held else 'seen'} after {report.kills} kills")
    sys.exit(report.held is bool(options.mistake))


if __name__ == "__main__":
    main()
