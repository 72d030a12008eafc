"""Bytewax's recovery store, before Bytewax opens it: where the next run begins, and which states it must not load.

A store is a folder of SQLite files, the *parts*. A part has the states of some keys, each with the epoch at whose end
it was taken, and how far each worker of each run came. A run begins with the first epoch that some worker has not
ended. For each key it loads the last state before that epoch.

A process can die after it has written an epoch's states but before it has written that the epoch is over. The next run
repeats that epoch with other items. If a key gets none of them, its old state stays in the store. If this run also ends
before the key has a later state, the third run would load a state that was never committed, and the key would get items
twice. `drop_void` removes such *void* states while they can still be recognized.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from pgoutput_source.errors import StateError

logger = logging.getLogger(__name__)

VERSION: Final = 5
"""The version of the stores that this module reads, in SQLite's user_version."""

TABLES: Final = ("parts", "exs", "fronts", "commits")
"""The tables that determine where the next run begins. The first column of each is created_at."""

Tables = dict[str, list[tuple[Any, ...]]]

_OPEN: Final = 128
"""A process that has a part open holds a shared lock on this byte of its wal-index.

https://www.sqlite.org/walformat.html
"""


def parts(folder: Path) -> list[Path]:
    """The store's files in a folder."""
    return sorted(folder.glob("part-*.sqlite3"))


@contextlib.contextmanager
def part_file(file: Path, mode: str) -> Iterator[sqlite3.Connection]:
    """A part; `mode` is SQLite's: "ro", "rw".

    Raises:
        StateError: It can't be used, or is of another version.
    """
    try:
        store = sqlite3.connect(f"{file.absolute().as_uri()}?mode={mode}", uri=True)
        try:
            version = store.execute("PRAGMA user_version").fetchone()[0]
            if version != VERSION:
                raise StateError(
                    f"{file} is a recovery store of version {version}; this release reads version {VERSION}",
                    hint="start afresh with a new recovery folder",
                )
            yield store
        finally:
            store.close()
    except sqlite3.Error as e:
        raise StateError(
            f"{file} can't be used: {e}", hint="end the flow that uses it; check that it is intact and writable"
        ) from e


def progress(stores: Sequence[sqlite3.Connection]) -> Tables:
    """The rows of `TABLES` in all parts together."""
    return {
        table: [row for store in stores for row in store.execute(f"SELECT * FROM {table}").fetchall()]
        for table in TABLES
    }


def complete(tables: Tables) -> bool:
    """Whether these tables come from all parts. Each part has only some of the runs and workers."""
    return 0 < max((count for _, _, count in tables["parts"]), default=0) <= len(tables["parts"])


def resume_epoch(tables: Tables) -> int:
    """The epoch with which the next run begins; with an incomplete set of parts, a lower bound."""
    if not complete(tables) or not tables["exs"]:
        return int(max((epoch for _, _, epoch in tables["commits"]), default=0) + 1)
    _, execution, workers, begun = max(tables["exs"], key=lambda row: row[1])
    frontiers = {worker: int(begun) for worker in range(workers)}
    for _, of, worker, frontier in tables["fronts"]:
        if of == execution:
            frontiers[worker] = max(frontiers[worker], frontier)
    return min(frontiers.values())


def in_use(file: Path) -> bool:
    """Whether another process has a part open. A process that has it open must not ask: it would lose its locks."""
    try:
        index = os.open(file.with_name(f"{file.name}-shm"), os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.lockf(index, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _OPEN)
    except (BlockingIOError, PermissionError):
        return True
    except OSError as e:
        raise StateError(
            f"{file} can't be locked: {e.strerror}",
            hint="SQLite needs a file system with locks: put the recovery folder on a local one",
        ) from e
    finally:
        os.close(index)
    return False


def drop_void(folder: Path) -> int:
    """Remove the states of epochs that never became durable, and return their number.

    It does nothing while another process has the store open, because an epoch may be about to become durable. It also
    does nothing if the folder lacks a part of the store, because only all parts together tell where a run begins.

    `pgoutput_source.run` and ``python -m bytewax.run`` do this themselves. A program that calls ``run_main`` or
    ``cluster_main`` with a recovery folder must call it first.

    Raises:
        StateError: The store can't be used.

    Example:
        >>> import tempfile
        >>> drop_void(Path(tempfile.mkdtemp()))
        0
    """
    files = parts(folder)
    if any(map(in_use, files)):
        return 0
    with contextlib.ExitStack() as stack:
        stores = [stack.enter_context(part_file(file, "rw")) for file in files]
        tables = progress(stores)
        if not complete(tables) or not tables["exs"]:
            return 0
        begin, dropped = resume_epoch(tables), 0
        for store in stores:
            with store:
                dropped += store.execute("DELETE FROM snaps WHERE snap_epoch >= ?", [begin]).rowcount
    if dropped:
        logger.info("%s: dropped %d states of an epoch that never became durable", folder, dropped)
    return dropped


def steps(folder: Path) -> set[str]:
    """The ids of the steps that have a state in the store.

    Raises:
        StateError: The store can't be used.
    """
    found: set[str] = set()
    for file in parts(folder):
        with part_file(file, "ro") as store:
            rows = store.execute("SELECT DISTINCT step_id FROM snaps WHERE ser_change IS NOT NULL")
            found.update(step for (step,) in rows)
    return found
