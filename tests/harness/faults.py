"""Faults of a flow, made from within its process: deaths at named places, and mistakes that tests must notice.

`KILL_AT` names a place and, behind a colon, how many times it is passed before the process kills itself with SIGKILL:
``KILL_AT="mid-rename:2"``. `BREAK` names deliberate mistakes, with commas between them. `SLOW_FSYNC` is the longest
that an fsync takes, in seconds: see `slow_fsyncs`. None of it is part of the package: `install` patches it.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest

from pgoutput_source import destinations
from pgoutput_source.dataflow import run, source
from pgoutput_source.dataflow.run import gate
from pgoutput_source.decode.in_progress import StreamedTransactions
from pgoutput_source.destinations.parked import ParkedParts
from pgoutput_source.destinations.postgres import PostgresDestination
from pgoutput_source.destinations.spool import Spool
from pgoutput_source.parquet.folder import Folder, FolderLock
from pgoutput_source.parquet.writer import PartWriter
from pgoutput_source.sinks import IpcSink, base, parquet
from pgoutput_source.stream import start
from pgoutput_source.stream.parking import Parking
from pgoutput_source.stream.replication import ReplicationStream
from pgoutput_source.stream.session import SlotSession

Place = tuple[Any, str, bool]
"""Who has the method, its name, and whether the death comes before it."""

PLACES: dict[str, Place] = {
    "start: before the stream": (ReplicationStream, "start", True),
    "start: after the stream": (ReplicationStream, "start", False),
    "start: the folder is open": (Folder, "_own", False),
    "start: the folder is repaired": (parquet._ParquetPartition, "_restore", False),
    "in a large transaction": (source._SlotPartition, "next_batch", False),
    "snapshot in a large transaction": (source._SlotPartition, "snapshot", False),
    "mid-spill": (StreamedTransactions, "_write", True),
    "in a streamed transaction's commit": (StreamedTransactions, "take", False),
    "before staging": (parquet._ParquetPartition, "snapshot", True),
    "before a part's fsync": (Folder, "stage", True),
    "after staging": (parquet._ParquetPartition, "snapshot", False),
    "epoch durable, nothing committed": (gate, "opened", True),
    "committed, nothing published": (Folder, "commit", False),
    "mid-rename": (Folder, "_append", True),
    "published, parts not deleted": (Folder, "_append", False),
    "published, not acknowledged": (ReplicationStream, "acknowledge", True),
    "acknowledged": (ReplicationStream, "acknowledge", False),
    "before the next epoch": (gate, "opened", False),
}
SINK_PLACES: dict[str, Place] = {
    "a sink before staging": (base._TwoPhasePartition, "snapshot", True),
    "a sink behind staging": (base._TwoPhasePartition, "snapshot", False),
    "a sink before publishing": (base._TwoPhasePartition, "committed", True),
    "a sink between publishing and forgetting that it has to": (IpcSink, "publish", False),
    "a sink behind publishing": (base._TwoPhasePartition, "committed", False),
}
"""Of the sinks beside Parquet."""

PARK_PLACES: dict[str, Place] = {
    "before what is parked is synced": (Parking, "state", True),
    "what is parked is synced": (Parking, "state", False),
    "in a replay": (Parking, "replay", False),
    "what was replayed is durable": (Parking, "durable", True),
    "what was replayed is deleted": (Parking, "durable", False),
}
"""Of parked tables and their replay."""

FOLDER_PLACES: dict[str, Place] = {
    "an epoch is spooled": (Spool, "put", False),
    "an epoch is committed": (Spool, "commit", False),
    "before a table's file is written": (FolderLock, "_take", False),
    "a table's file is written": (PartWriter, "close", False),
    "a table's file is renamed": (destinations.parquet, "add_to_index", True),
    "a table's file is published": (destinations.parquet, "add_to_index", False),
    "an applied epoch is dropped": (Spool, "drop", False),
}
"""Of folders for all tables."""

TABLE_PLACES: dict[str, Place] = {
    "before an epoch is in the spool": (Spool, "put", True),
    "an epoch is in the spool": (Spool, "put", False),
    "an epoch of the spool is committed": (Spool, "commit", False),
    "within the destination's transaction": (PostgresDestination, "_apply", False),
    "applied, and in the spool": (PostgresDestination, "apply", False),
    "applied and dropped": (Spool, "drop", False),
    **{name: place for name, place in PLACES.items() if place[0] not in (Folder, parquet._ParquetPartition)},
}
"""Of all tables in PostgreSQL."""

REFUSED_PLACES: dict[str, Place] = {
    "before a refused part is parked": (ParkedParts, "put", True),
    "a refused part is parked": (ParkedParts, "put", False),
    "parked parts are applied": (ParkedParts, "drop", True),
    "applied parts are deleted": (ParkedParts, "drop", False),
}
"""Of tables that a destination refuses."""

LARGE = ("in a large transaction", "snapshot in a large transaction")
STREAMED = ("mid-spill", "in a streamed transaction's commit")

# r^8 of a random number: most take milliseconds, some take nearly all of the time. A library, because the recovery
# store is SQLite within Bytewax, and does not come through Python's os.
_SLOW = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
static int slowly(const char *name, int fd) {
    static __thread unsigned seed;
    if (!seed) { struct timespec now; clock_gettime(CLOCK_MONOTONIC, &now); seed = now.tv_nsec | 1; }
    const char *most = getenv("SLOW_FSYNC");
    double s = rand_r(&seed) / (double)RAND_MAX;
    s *= s; s *= s; s *= s;
    s *= most ? atof(most) : 0;
    struct timespec nap = {(time_t)s, (long)((s - (time_t)s) * 1e9)};
    nanosleep(&nap, 0);
    return ((int (*)(int))dlsym(RTLD_NEXT, name))(fd);
}
int fsync(int fd) { return slowly("fsync", fd); }
int fdatasync(int fd) { return slowly("fdatasync", fd); }
"""


def slow_fsyncs(folder: Path, seconds: float) -> dict[str, str]:
    """The environment of a process whose fsyncs take up to `seconds`, those of its recovery store included.

    Without a C compiler only those that Python makes are slow.
    """
    library = folder / "slow.so"
    compiler = shutil.which("cc")
    if compiler and sys.platform == "linux" and not library.exists():
        (folder / "slow.c").write_text(_SLOW)
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, folder / "slow.c", "-ldl"], check=True)
    preload = {"LD_PRELOAD": str(library)} if library.exists() else {}
    return {"SLOW_FSYNC": str(seconds), **preload}


def install() -> None:
    """Patch what `KILL_AT` and `BREAK` name; nothing without them.

    `OPEN_FILES` is the most descriptors that the process may have. `FILE_SIZE` is the most bytes that a file may have,
    as if the disk were full; `UMASK` the process's umask, in octal; `LATE` lets nothing come from the server in the
    first epoch; `TELL_ALL` logs everything that there is to log, and the metrics at the exit.
    """
    if most := os.environ.get("OPEN_FILES"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(most), int(most)))
    if size := os.environ.get("FILE_SIZE"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
    if umask := os.environ.get("UMASK"):
        os.umask(int(umask, 8))
    if os.environ.get("TELL_ALL"):
        logging.basicConfig(level=logging.DEBUG)
        atexit.register(lambda: print(generate_latest().decode(), file=sys.stderr))
    if os.environ.get("LATE"):
        _come_late()
    if (seconds := os.environ.get("SLOW_FSYNC")) and "LD_PRELOAD" not in os.environ:
        _slow_down(float(seconds))
    for mistake in filter(None, os.environ.get("BREAK", "").split(",")):
        _break(mistake)
    at = os.environ.get("KILL_AT", "")
    if at:
        name, _, count = at.rpartition(":")
        _die_at(name, int(count))


def _slow_down(seconds: float) -> None:
    fsync = os.fsync

    def slowly(fd: Any) -> None:
        time.sleep(seconds * random.random() ** 8)
        fsync(fd)

    os.fsync = slowly


def _come_late() -> None:
    receive, polls = SlotSession._poll, itertools.count()

    def poll(self: Any, timeout: float) -> Any:
        return receive(self, timeout) if next(polls) else ()

    SlotSession._poll = poll  # type: ignore[method-assign]


def _die_at(name: str, count: int) -> None:
    places = PLACES | SINK_PLACES | PARK_PLACES | FOLDER_PLACES | TABLE_PLACES | REFUSED_PLACES
    owner, method, before = places[name]
    original: Callable[..., Any] = getattr(owner, method)
    left = count

    def passed(*arguments: Any) -> None:
        nonlocal left
        if name in LARGE and not arguments[0].session.in_transaction:
            return
        if method == "take" and not arguments[0].pending:
            return
        if method == "commit" and not arguments[1]:
            return
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def patched(*arguments: Any, **options: Any) -> Any:
        if owner is Parking and not (arguments[0]._staged if method == "durable" else arguments[0]._tables):
            return original(*arguments, **options)
        if before:
            passed(*arguments)
        result = original(*arguments, **options)
        if not before:
            passed(*arguments)
        return result

    setattr(owner, method, patched)


def _break(mistake: str) -> None:
    partition = source._SlotPartition
    if mistake == "acknowledge early":
        snapshot = partition.snapshot

        def early(self: Any) -> Any:
            state = snapshot(self)
            self.session.frames.acknowledge(self.staged, now=True)
            time.sleep(0.1)
            return state

        partition.snapshot = early  # type: ignore[method-assign]
    elif mistake == "publish early":
        stage = parquet._ParquetPartition.snapshot

        def publish(self: Any) -> Any:
            state = stage(self)
            with gate.lock:
                self.committed()
                self.drain()
            return state

        parquet._ParquetPartition.snapshot = publish  # type: ignore[method-assign]
    elif mistake in ("raise", "stall"):
        write, calls = parquet._ParquetPartition.write_batch, itertools.count(1)

        def failing(self: Any, values: Any) -> None:
            if next(calls) == 3:
                if mistake == "raise":
                    raise RuntimeError("the sink has had enough")
                time.sleep(5)
            write(self, values)

        parquet._ParquetPartition.write_batch = failing  # type: ignore[method-assign]
    elif mistake == "forget":
        reconcile = start.reconcile
        start.reconcile = lambda *a: (None, reconcile(*a)[1])
    elif mistake == "ask no receipt":
        IpcSink.published = lambda *_: True  # type: ignore[method-assign]
    elif mistake == "trust no state":
        gate.durable = lambda *_: False  # type: ignore[method-assign]
    elif mistake == "keep void states":
        run.drop_void = lambda folder: 0  # type: ignore[attr-defined]
    else:
        raise ValueError(mistake)
