"""Tables in folders of Parquet files: a folder for each table, and in the footer of each file how far its table is.

Parts that come together become a file. It is published by its rename: what its footer says is true as soon as its rows
can be seen. See `parquet.folder` for what a folder holds.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa

from pgoutput_source.changes.schema import MetadataNames, TableName
from pgoutput_source.destinations.base import Destination, Job, Mode, Reached, Refused
from pgoutput_source.destinations.spool import Point
from pgoutput_source.destinations.targets import Target
from pgoutput_source.errors import ConfigurationError, SinkError
from pgoutput_source.files import explained, folder_name, sync
from pgoutput_source.parquet.folder import (
    INDEX,
    STAGING,
    WRITING,
    Folder,
    FolderLock,
    Part,
    add_to_index,
    entry_of,
    position_of,
    published_files,
    read_index,
)
from pgoutput_source.parquet.partitions import partitions
from pgoutput_source.parquet.writer import ROW_GROUP_BYTES, Codec, PartWriter

logger = logging.getLogger(__name__)

_THREADS: Final = 8
"""Tables that are written at once: most of the time goes into waiting for the disk. Each needs a few descriptors."""

_PACKED: Final = 4
"""How many times larger changes usually are in memory than in a file."""


class _Known(NamedTuple):
    """What a folder has: how far its table is, and how many bytes its index had then.

    A crash between the files of one commit leaves partitions that are further than the table: `ahead` has the number
    that each reached.
    """

    reached: Reached | None
    ahead: Mapping[str, int]
    size: int


class ParquetDestination(Destination):
    """Folders of Parquet files below `root`; see `ParquetSink`."""

    mode: Mode = "history"

    def __init__(
        self,
        root: Path,
        *,
        codec: Codec,
        max_rows: int,
        max_bytes: int,
        partition_by: str | None = None,
        retention: timedelta | None = None,
    ) -> None:
        self.root, self.codec, self.max_rows, self.max_bytes = root.absolute(), codec, max_rows, max_bytes
        self.partition_by, self.retention = partition_by, retention
        self._expired: dict[Target, float] = {}  # when old files were last looked for, by the monotonic clock
        self._known: dict[Target, _Known] = {}
        self._threads: ThreadPoolExecutor | None = None

    def __repr__(self) -> str:
        return str(self.root)

    def close(self) -> None:
        """End the threads."""
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown()

    def reached(self, target: Target) -> Reached | None:
        """How far a table is. The folder is only read: the other thread may be writing to it."""
        folder = self.root / target.name
        entries = read_index(folder)
        with explained("can't read", folder):
            for file in published_files(folder):
                if (name := file.relative_to(folder).as_posix()) not in entries:
                    entries[name] = _entry(file)
        return _reached(target, entries)

    def apply(self, jobs: Iterable[Job]) -> None:
        """Publish files of several tables at once, and those of one table one after the other."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="pgoutput-parquet")
        running: dict[Future[None], Target] = {}
        try:
            for job in jobs:
                while len(running) >= _THREADS or job.target in running.values():
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        del running[future]
                        future.result()
                running[self._threads.submit(self._apply, job)] = job.target
            for future in running:
                future.result()
        finally:
            wait(running)

    # -- one job ----------------------------------------------------------------------------------------------------

    def _apply(self, job: Job) -> None:
        with self._locked(job.target) as (reached, ahead, _):
            if reached is not None:
                job = _missing(job, reached)
            if len(job.changes) < 1024 * len(job.parts):
                # Otherwise more time goes into the chunks than into the rows.
                job = job._replace(changes=job.changes.combine_chunks())
            for some in self._chunks(job):
                files = self._files(some, ahead)
                for count, (partition, changes) in enumerate(files, 1):
                    self._publish(some, partition, changes, whole=count == len(files))
                if files:
                    reached = Reached(some.number, some.last, job.origin)
            if job.changes and (reached is None or reached.number < job.number):
                raise SinkError(
                    f"{job.target} has files of a commit that was cut off after {reached}, and {job.number} is no part "
                    "of it",
                    hint="the spool lacks what came with these files: restore it, or start afresh",
                )
            self._known[job.target] = _Known(reached, {}, self._size(job.target))
            self._expire(job.target)

    def _expire(self, target: Target) -> None:
        """Delete files that were published before the time that is kept, at most once an hour. The newest one stays.

        The index keeps their entries: they say how far the table is, and that these files are not missing.
        """
        now = time.monotonic()
        if self.retention is None or now < self._expired.get(target, -math.inf) + min(
            3600, self.retention.total_seconds()
        ):
            return
        self._expired[target] = now
        folder = self.root / target.name
        entries, before = read_index(folder), datetime.now(UTC) - self.retention
        deleted = 0
        with explained("can't delete from", folder):
            for file in published_files(folder)[:-1]:
                entry = entries.get(file.relative_to(folder).as_posix())
                if entry is not None and datetime.fromisoformat(entry["published_at"]) < before:
                    file.unlink()
                    deleted += 1
        if deleted:
            logger.info("%s: deleted %d files from before %s", folder, deleted, before.isoformat(timespec="seconds"))

    @contextlib.contextmanager
    def _locked(self, target: Target) -> Iterator[_Known]:
        """Own a folder for the moment. What is known of it holds if nobody has written to it since."""
        folder = self.root / target.name
        with explained("can't read", folder):
            if target not in self._known and not folder.exists():
                self._known[target] = _Known(None, {}, 0)
        while True:
            lock = FolderLock(folder)
            try:
                known = self._known.pop(target, None)
                if known is not None and known.size == self._size(target):
                    yield known
                    return
            finally:
                lock.close()
            with contextlib.closing(Folder(folder)) as opened:
                if opened.staged:
                    raise _not_ours(target)
                opened.sweep()
                reached = _reached(target, opened.entries)
                ahead = _ahead(opened.entries, 0 if reached is None else reached.number)
                self._known[target] = _Known(reached, ahead, self._size(target))

    def _size(self, target: Target) -> int:
        index = self.root / target.name / INDEX
        with explained("can't read", index):
            return index.stat().st_size if index.exists() else 0

    def _files(self, job: Job, ahead: Mapping[str, int]) -> list[tuple[str, pa.Table]]:
        """The changes of each partition, without those that are there."""
        begin = None if self.partition_by is None else f"{folder_name(self.partition_by)}="
        if other := [partition for partition in ahead if begin is None or not partition.startswith(begin)]:
            raise SinkError(
                f"{job.target} has partition {other[0]} of a commit that was cut off, and partition_by is "
                f"{self.partition_by!r}",
                hint="start once with the partition_by of the run before, and change it then",
            )
        if self.partition_by is None:
            return [("", job.changes)]
        try:
            found = partitions(job.changes, self.partition_by)
        except ConfigurationError as e:
            raise Refused.at(job.target, e.message, hint=e.hint, table=_table(job)) from e
        for number in set(ahead.values()):
            left = dict(partitions(job.split(number)[1], self.partition_by))
            found = [(p, left.get(p) if ahead.get(p) == number else changes) for p, changes in found]
        return [(partition, changes) for partition, changes in found if changes]

    def _chunks(self, job: Job) -> Iterator[Job]:
        """The changes of each file, if there were no partitions: parts until there are enough rows or bytes."""
        begin = size = end = 0
        each = job.changes.nbytes / max(1, len(job.changes))
        for number, after in job.parts or ((job.number, len(job.changes)),):
            size += int(each * (after - end))
            end = after
            enough = end - begin >= self.max_rows or size >= self.max_bytes * _PACKED
            if end > begin and (enough or end == len(job.changes)):
                changes = job.changes.slice(begin, end - begin)
                parts = tuple((n, e - begin) for n, e in job.parts if begin < e <= end)
                yield job._replace(number=number, last=_point(changes, -1), changes=changes, parts=parts)
                begin, size = end, 0

    def _publish(self, job: Job, partition: str, changes: pa.Table, *, whole: bool) -> None:
        folder = self.root / job.target.name
        name = f"t{job.number:08d}"
        writing = folder / STAGING / f"{name}{WRITING}"
        writer = PartWriter(self.codec, name, writing, changes.schema, _heavy(changes))
        try:
            writer.part = replace(writer.part, number=job.number, whole=whole, partition=partition)
            writer.write(changes)
            part = writer.close()
        except BaseException:
            writer.abandon()
            raise
        file = folder / part.file
        with explained("can't publish", file):
            if not file.parent.exists():
                file.parent.mkdir()
                sync(folder)
            sync(writing)
            os.rename(writing, file)
            sync(file.parent)
            # The next start adds again what a power cut takes away.
            add_to_index(folder, part, durably=False)


def _entry(file: Path) -> dict[str, Any]:
    part = Part.read(file)
    return {} if part is None else entry_of(part)


def _reached(target: Target, entries: Mapping[str, Mapping[str, Any]]) -> Reached | None:
    """How far a folder with these files is."""
    if not entries:
        return None
    if any(entry.get("number") is None or entry["last"] is None for entry in entries.values()):
        raise _not_ours(target)
    number = max((int(entry["number"]) for entry in entries.values() if entry["whole"]), default=0)
    if not number:
        return None
    there = [entry for entry in entries.values() if entry["number"] <= number]
    commit_lsn, seq = max(position_of(entry["last"]) for entry in there)
    return Reached(number, (int(commit_lsn), seq), tuple(there[0]["origin"] or ("", "", "")))


def _ahead(entries: Mapping[str, Mapping[str, Any]], number: int) -> dict[str, int]:
    """The number that each partition has reached, where it is larger than that of the table."""
    found: dict[str, int] = {}
    for file, entry in entries.items():
        if entry["number"] > number:
            partition = file.rpartition("/")[0]
            found[partition] = max(entry["number"], found.get(partition, 0))
    return found


def _not_ours(target: Target) -> Refused:
    return Refused.at(
        target,
        f"{target} has files of another program, or of a ParquetSink for a single table",
        hint="give this sink folders of its own, or move the files away",
    )


def _missing(job: Job, reached: Reached) -> Job:
    """The job without what the folder has."""
    done, changes = job.split(reached.number)
    begin = _point(changes, 0) if len(changes) else None
    if job.origin != reached.origin or (begin is None and job.last > reached.point) or (begin or _END) <= reached.point:
        raise SinkError(
            f"somebody else writes to {job.target}: it is at {reached}, and {begin or job.last} comes",
            hint="give each sink folders of its own",
        )
    parts = tuple((number, end - len(done)) for number, end in job.parts if end > len(done))
    return job._replace(changes=changes, parts=parts)


_END: Final = (1 << 64, 0)


def _table(job: Job) -> TableName:
    metadata = job.changes.schema.metadata or {}
    return TableName(*(metadata[name].decode() for name in (b"pg.namespace", b"pg.name")))


def _point(changes: pa.Table, index: int) -> Point:
    names = MetadataNames.of(changes.schema)
    lsn, seq = (changes.column(name)[index].as_py() for name in (names.commit_lsn, names.seq))
    return lsn, seq


def _heavy(changes: pa.Table) -> set[str]:
    """Columns with values so large that statistics of them would take much memory."""
    return {
        name
        for name, column in zip(changes.schema.names, changes.columns, strict=True)
        if column.nbytes > ROW_GROUP_BYTES and any(chunk.nbytes > ROW_GROUP_BYTES for chunk in column.chunks)
    }
