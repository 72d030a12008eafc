"""`ParquetSink` writes Arrow batches to a folder of Parquet files, exactly once. Readers see only complete files.

There are two phases. In ``snapshot()`` the epoch becomes *staged* parts: complete Parquet files, synced and invisible.
After the gate, when the epoch is durable, they are marked *committed*. Parts that are due are *published*: a large part
is only renamed, small parts are merged into a larger file. The resume state lists the staged and committed parts. So
after a crash at any moment the next start finds one of these cases (see `folder`):

    the epoch never became durable    its parts are not in the resume state: delete them, their rows come again
    durable, not yet published        the parts are in the resume state: publish them when due
    published, not yet deleted        the footer of the published file lists the parts: delete them
    in the state, but missing         somebody removed the parts: an error
    no resume state                   committed parts may have been acknowledged: publish them; for staged parts the
                                      source's state tells whether their rows come again: see `gate`
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition

from pgoutput_source.dataflow.run import gate
from pgoutput_source.destinations.delivery import OnTableError
from pgoutput_source.destinations.parquet import ParquetDestination
from pgoutput_source.destinations.targets import FolderTargets
from pgoutput_source.errors import ConfigurationError, SinkError, check_version
from pgoutput_source.files import explained, folds_case, local_path
from pgoutput_source.parquet.folder import (
    MERGING,
    STAGED,
    Folder,
    FolderInUse,
    Part,
    origin_of,
)
from pgoutput_source.parquet.writer import ROW_GROUP_BYTES, ROW_GROUP_ROWS, Codec, PartWriter, merge
from pgoutput_source.sinks.base import State
from pgoutput_source.sinks.items import Item, record_batches
from pgoutput_source.sinks.tables import TableSink

logger = logging.getLogger(__name__)


STATE_VERSION: Final = 1

MAX_PARTS: Final = 64
"""The most parts that wait to be merged into one file."""


class ParquetSink(FixedPartitionedSink[Item, State]):
    """Arrow batches as Parquet files in a folder.

    There is no parallelism: one partition writes the folder. With recovery (``-r``) every row is in exactly one
    published file. Without it nothing is lost, but a crash may write rows twice. Readers see only complete files of
    committed epochs, which never change: ``folder/*.parquet``, `read`, or the lines of ``folder/_index.jsonl``.

    A file holds rows of one Arrow schema, that is, of one version of one table. It is published when it reaches one of
    the limits, or when the run ends. Until then its rows wait, durably, in ``folder/_staging``. File names sort by the
    position of the first change. A folder belongs to one sink of one running process, and to the database and slot of
    its changes. If the folder already has files, a run continues after them.

    **All tables.** ``ParquetSink("out/{schema}/{table}")`` takes the `ChangeSet`s of a source. Each table of the
    publication gets a folder of its own, as above, when its first change comes; so does a table that is created later.
    What a path can't hold is percent-encoded, and so are a leading underscore or dot and an equals sign. What is
    durable and not published waits in one spool for all tables. With recovery every row is in exactly one file, too. A
    file ends with an epoch, so it may have one epoch more than the limits; `max_bytes` is an estimate.

    Args:
        folder: The folder, created when the dataflow starts; or, with ``{table}`` and ``{schema}`` in it, the folder of
            each table.
        max_rows: Rows in a file; it may have up to one row group more.
        max_bytes: Bytes in a file; it may have up to one row group more.
        max_age: How long a row waits for others before it is published. Zero publishes every epoch.
        compression: A codec, named as in Parquet and Arrow: "zstd", "snappy", "lz4", "gzip", "brotli", "none".
        compression_level: The codec's level; codecs without levels ignore it.
        tables: With ``{table}``: patterns of the tables to take, as ``public.*``. All by default.
        exclude: With ``{table}``: patterns of the tables to leave out.
        spool: With ``{table}``: the folder for what waits. By default ``_spool`` beside the folders of the tables.
        partition_by: With ``{table}``: "day", so that changes go to folders by the day of their commit, UTC, like
            ``day=2026-11-25``; or the name of a column. A table without the column has no partitions.
        retention: With ``{table}``: how long files are kept after they were published; all by default. Older ones are
            deleted, except a table's newest, when the table's next file is published, at most once an hour. `current`
            needs the whole history: it lacks rows that have not changed since.
        on_table_error: With ``{table}``: what happens when a table can't be taken. "stop" stops the flow. "park" keeps
            what comes of the table in the spool, in order, goes on with the others, and tries it again at each start.

    Raises:
        ConfigurationError: An option is invalid.

    Example:
        >>> ParquetSink("out/orders", max_age=timedelta(seconds=10))
        ParquetSink('out/orders')
        >>> ParquetSink("out/orders", compression="zip")
        Traceback (most recent call last):
        pgoutput_source.errors.ConfigurationError: compression 'zip' is not one that Parquet and this Arrow know
        hint: zstd is fast and small
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_rows: int = 1_000_000,
        max_bytes: int = 128 * 1024 * 1024,
        max_age: timedelta = timedelta(seconds=60),
        compression: str = "zstd",
        compression_level: int | None = 1,
        tables: Iterable[str] = ("*",),
        exclude: Iterable[str] = (),
        spool: str | Path | None = None,
        partition_by: str | None = None,
        retention: timedelta | None = None,
        on_table_error: OnTableError = "stop",
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_bytes", max_bytes)):
            if value < 1:
                raise ConfigurationError(f"{name} is {value}", hint=f"{name} must be at least 1")
        if max_age < timedelta(0):
            raise ConfigurationError(f"max_age is {max_age}", hint="zero publishes every epoch")
        self.folder = local_path(folder)
        self.max_rows = max_rows
        self.max_bytes = max_bytes
        self.max_age = max_age.total_seconds()
        self.codec = Codec.of(compression, compression_level)
        self._built = False
        self._tables: _Tables | None = None
        options: dict[str, tuple[Any, Any]] = {"tables": (tables, ("*",)), "exclude": (exclude, ())}
        options |= {"spool": (spool, None), "partition_by": (partition_by, None)}
        options |= {"on_table_error": (on_table_error, "stop"), "retention": (retention, None)}
        if retention is not None and retention <= timedelta(0):
            raise ConfigurationError(f"retention is {retention}", hint="None keeps every file")
        if "{table}" in str(self.folder):
            self._tables = _Tables(self, tables, exclude, spool, partition_by, retention, on_table_error)
        elif given := [name for name, (value, default) in options.items() if value != default]:
            raise ConfigurationError(
                f"{given[0]}= is for a sink of many tables, and {str(self.folder)!r} is one folder",
                hint="write ParquetSink('out/{schema}/{table}')",
            )

    def __repr__(self) -> str:
        return f"ParquetSink({str(self.folder)!r})"

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of the tables that a sink of all tables takes."""
        return () if self._tables is None else self._tables.patterns

    def list_parts(self) -> list[str]:
        """One partition. Its name never changes: it is the key of the resume state."""
        if self._tables is not None:
            return self._tables.list_parts()
        self._built = False
        gate.expect(self, self._settle)
        return ["parquet"]

    def _settle(self) -> None:
        """Before any data arrives, check that the folder can be used, and publish what an earlier run committed."""
        if not self._built:
            with contextlib.suppress(FolderInUse):  # by the part, in another process of the cluster
                _ParquetPartition(self, None).close()
            self._built = False

    def part_fn(self, item_key: str) -> int:
        """Every key goes to the single partition."""
        return 0

    def build_part(self, step_id: str, for_part: str, resume_state: State | None) -> Any:
        """Open and repair the folder.

        Raises:
            SinkError: The folder can't be used, or does not fit the resume state.
            StateError: The resume state is of another version.
        """
        if self._tables is not None:
            return self._tables.build_part(step_id, for_part, resume_state)
        return _ParquetPartition(self, resume_state)


class _Tables(TableSink):
    """A folder for each table: a `ParquetSink` with a template."""

    def __init__(
        self,
        sink: ParquetSink,
        tables: Iterable[str],
        exclude: Iterable[str],
        spool: str | Path | None,
        partition_by: str | None,
        retention: timedelta | None,
        on_table_error: OnTableError,
    ) -> None:
        parts = sink.folder.parts
        fixed = next(i for i, part in enumerate(parts) if "{" in part)
        self.root, self.template = Path(*parts[:fixed]), str(sink.folder)
        super().__init__(
            ParquetDestination(
                self.root,
                codec=sink.codec,
                max_rows=sink.max_rows,
                max_bytes=sink.max_bytes,
                partition_by=partition_by,
                retention=retention,
            ),
            FolderTargets("/".join(parts[fixed:]), tables=tables, exclude=exclude),
            spool=self.root / "_spool" if spool is None else spool,
            max_age=timedelta(seconds=sink.max_age),
            on_table_error=on_table_error,
        )

    def __repr__(self) -> str:
        return f"ParquetSink({self.template!r})"

    def build_part(self, step_id: str, for_part: str, resume_state: State | None) -> Any:
        """Go on as the resume state says; see `TableSink`."""
        with explained("can't create", self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        self.targets.folded = folds_case(self.root)
        return super().build_part(step_id, for_part, resume_state)


@dataclass(slots=True)
class _Plan:
    """What to do with staged parts that are not in the resume state."""

    publish: list[Part] = field(default_factory=list)  # their rows will not come again
    delete: list[str] = field(default_factory=list)  # their rows will come again


class _ParquetPartition(StatefulSinkPartition[Item, State]):
    """Owns the folder. What the gate reads changes only under the gate's lock."""

    def __init__(self, sink: ParquetSink, resume: State | None) -> None:
        if resume is not None:
            check_version(resume, STATE_VERSION, str(sink))
        self.sink = sink
        sink._built = True
        self.folder: Folder = Folder(sink.folder)
        self.open: list[PartWriter] = []  # one for each schema
        self.closed: list[Part] = []  # of the current epoch
        self.staged: list[Part] = []  # of the last snapshot
        self.committed_parts: list[Part] = []
        self.unsettled: list[str] = []  # staged, but not in the resume state
        self.annulled: list[str] = []
        self.since: dict[str, float] = {}  # when the first row of each part arrived, by the monotonic clock
        self.ended = False
        try:
            self.lineage: str = secrets.token_hex(4) if resume is None else resume["lineage"]
            self.next: int = 1 if resume is None else resume["next"]
            self.known = self.folder.origins
            if any("number" in entry for entry in self.folder.entries.values()):
                raise SinkError(
                    f"{sink.folder} belongs to a sink of many tables", hint="give this sink a folder of its own"
                )
            if self.folder.entries:
                logger.info("%s; continuing after them", self.folder)
            self._restore([] if resume is None else [Part.from_state(part) for part in resume["parts"]])
        except BaseException:
            self.folder.close()
            raise
        gate.register(self)

    # -- Bytewax calls these ------------------------------------------------------------------------------------

    def write_batch(self, values: list[Item]) -> None:
        for item in values:
            for batch in record_batches(item, self.sink):
                if batch.num_rows:
                    self._add(batch)

    def snapshot(self) -> State:
        with gate.lock:
            # A snapshot proves that the one before is durable. If this process has a gate, it is published already.
            self.committed()
        while self.open:
            self._close(self.open[0])
        epoch = gate.epoch() if gate.hosted() else None
        for part in self.closed:
            self.folder.stage(part.name, epoch)
        self.folder.sync()
        with gate.lock:
            self.staged, self.closed = self.closed, []
            gate.staged(self)
            waiting = [part.state() for part in (*self.committed_parts, *self.staged)]
        return {"v": STATE_VERSION, "lineage": self.lineage, "next": self.next, "parts": waiting}

    def close(self) -> None:
        complete = not self.open and not self.closed
        for writing in self.open:
            writing.abandon()
        with gate.lock:
            if complete and gate.finishing() and (self.staged or self.committed_parts):
                # The last epoch is not durable yet. It may be acknowledged without another call to this partition.
                self.ended = True
                self._commit()
                gate.ended(self)
            else:
                gate.unregister(self)
            self.folder.close()

    # -- the gate calls these -----------------------------------------------------------------------------------

    def committed(self) -> None:
        if not self.ended:
            if self.unsettled:
                plan, self.unsettled = self._plan(self.unsettled), []
                self._settle(plan)
            self._commit()
            self._publish(self._due())

    def drain(self) -> None:
        if not self.ended:
            self._publish(self._groups())
            return
        # This partition was closed and unlocked the folder. Another owner publishes the same from the resume state.
        try:
            self.folder = Folder(self.sink.folder)
        except FolderInUse as e:
            logger.info("%s; %d parts are left to it", e.message, len(self.committed_parts))
            return
        try:
            there, done = self.folder.staged, self.folder.done
            self.committed_parts = [p for p in self.committed_parts if p.name in there and p.name not in done]
            self._publish(self._groups())
        finally:
            self.folder.close()

    # -- writing ------------------------------------------------------------------------------------------------

    def _add(self, batch: pa.RecordBatch) -> None:
        step = min(ROW_GROUP_ROWS, self.sink.max_rows)
        for start in range(0, batch.num_rows, step):
            writing = self._writing(batch.schema)
            if batch.nbytes > ROW_GROUP_BYTES and writing.waiting_rows + writing.part.rows:
                # A very large value gets a new file: the first rows of a file decide how it is encoded.
                self._close(writing)
                writing = self._writing(batch.schema)
            writing.add(batch.slice(start, step) if batch.num_rows > step else batch)
            if writing.waiting_rows >= step or writing.waiting_bytes >= ROW_GROUP_BYTES:
                writing.flush()
                if writing.part.rows >= self.sink.max_rows or writing.part.size >= self.sink.max_bytes:
                    self._close(writing)
        while sum(writing.waiting_bytes for writing in self.open) >= ROW_GROUP_BYTES:
            max(self.open, key=lambda writing: writing.waiting_bytes).flush()

    def _writing(self, schema: pa.Schema) -> PartWriter:
        for writing in self.open:
            if writing.schema.equals(schema, check_metadata=True):
                return writing
        self._check_origin(schema)
        name = f"{self.lineage}-{self.next:08d}"
        self.next += 1
        self.open.append(PartWriter(self.sink.codec, name, self.folder.writing(name), schema))
        return self.open[-1]

    def _close(self, writing: PartWriter) -> None:
        part = writing.close()
        self.open.remove(writing)
        self.closed.append(part)
        self.since[part.name] = writing.begun

    def _check_origin(self, schema: pa.Schema) -> None:
        origin = origin_of(schema.metadata)
        if self.known and origin is not None and origin not in self.known:
            there = " and ".join(_origin_text(known) for known in sorted(self.known))
            raise SinkError(
                f"{self.sink.folder} holds changes of {there}, these are of {_origin_text(origin)}",
                hint="give each database and slot its own folder, or move the old files away",
                table=(schema.metadata or {}).get(b"pg.table", b"").decode() or None,
            )

    # -- committing and publishing ------------------------------------------------------------------------------

    def _commit(self) -> None:
        self.folder.commit(self.staged)
        self.committed_parts += self.staged
        self.staged = []

    def _groups(self) -> list[list[Part]]:
        """The committed parts, grouped into future files, in the order of each group's first part."""
        groups: list[list[Part]] = []
        growing: dict[str, list[Part]] = {}
        for part in self.committed_parts:
            group = growing.get(part.schema)
            if group is None or self._full(group) or self._large(part) or not self._fits([*group, part]):
                group = growing[part.schema] = []
                groups.append(group)
            group.append(part)
        return groups

    def _due(self) -> list[list[Part]]:
        """Groups that are full or old, and earlier groups of the same table: a table's files appear in order."""
        groups = self._groups()
        growing = {group[0].schema: index for index, group in enumerate(groups)}
        last: dict[str, int] = {}
        for index, group in enumerate(groups):
            old = time.monotonic() - self.since[group[0].name] >= self.sink.max_age
            if old or self._full(group) or growing[group[0].schema] != index:
                last[group[0].table] = index
        return [group for index, group in enumerate(groups) if index <= last.get(group[0].table, -1)]

    def _fits(self, group: list[Part]) -> bool:
        return _rows(group) <= self.sink.max_rows and _size(group) <= self.sink.max_bytes

    def _large(self, part: Part) -> bool:
        """Whether a part is large enough for its own file: merging would write it twice for little gain."""
        return part.rows * 8 >= self.sink.max_rows or part.size * 8 >= self.sink.max_bytes

    def _full(self, group: list[Part]) -> bool:
        enough = _rows(group) >= self.sink.max_rows or _size(group) >= self.sink.max_bytes
        return enough or len(group) >= MAX_PARTS or self._large(group[0])

    def _publish(self, groups: list[list[Part]]) -> None:
        for group in groups:
            if len(group) == 1:
                part, source = group[0], self.folder.staged[group[0].name]
            else:
                files = [self.folder.staged[part.name] for part in group]
                source = self.folder.staging / f"{group[0].name}{MERGING}"
                part = merge(self.sink.codec, group, files, source)
                self.folder.sync(source)
            self.folder.publish(part, source)
            for name in part.names:
                self.since.pop(name, None)
            self.committed_parts = [p for p in self.committed_parts if p.name not in part.names]
            logger.debug("published %s: %d rows, %d parts", part.file, part.rows, len(part.names))

    # -- resuming -----------------------------------------------------------------------------------------------

    def _restore(self, listed: list[Part]) -> None:
        """Bring the folder in line with the resume state."""
        folder = self.folder
        folder.sweep()
        self._check_ahead()
        self.annulled = self._annulled([part.name for part in listed])
        waiting = self._waiting(listed)
        keep = {part.name for part in waiting}
        folder.discard([name for name in folder.staged if name in folder.done and name not in keep])
        folder.commit(waiting)
        self.committed_parts = waiting
        now = time.time()
        self.since = {part.name: time.monotonic() - max(0.0, now - part.arrived) for part in waiting}
        self.known |= {part.origin for part in waiting if part.origin}
        others = [name for name in folder.staged if name not in keep]
        # Only the gate can decide about staged parts, once the sources are open.
        self.unsettled = [name for name in others if folder.staged[name].suffix == STAGED and not gate.hosted()]
        self._settle(self._plan([name for name in others if name not in self.unsettled]))

    def _waiting(self, listed: list[Part]) -> list[Part]:
        """The parts of the state that are still to be published; a missing one is an error."""
        folder = self.folder
        waiting = [part for part in listed if part.name not in folder.done and part.name not in folder.void]
        for part in waiting:
            if part.name not in folder.staged:
                raise SinkError(
                    f"part {part.name} with {part.rows} rows is gone: it is neither in {folder.staging} nor published",
                    hint="somebody removed it. Put it back; or start afresh: a new folder, recovery folder and slot",
                )
        return waiting

    def _plan(self, names: list[str]) -> _Plan:
        """Decide about parts that are staged but not in the resume state. Changes nothing."""
        plan = _Plan()
        for name in names:
            part = Part.read(self.folder.staged[name])
            if part is not None and self._never_again(part):
                plan.publish.append(part)
            else:
                plan.delete.append(name)
        plan.publish.sort(key=lambda part: (part.arrived, part.name))
        return plan

    def _settle(self, plan: _Plan) -> None:
        """Carry a plan out."""
        path = self.folder.path
        if plan.delete:
            logger.info("%s: deleted %d staged parts of epochs that never became durable", path, len(plan.delete))
        self.folder.annul(plan.delete, self.annulled)
        self.annulled += plan.delete
        if plan.publish:
            logger.info("%s: publishing %d parts that an earlier run left committed", path, len(plan.publish))
            waiting, self.committed_parts = self.committed_parts, plan.publish
            self.folder.commit(plan.publish)
            self._publish(self._groups())
            self.committed_parts = waiting
        self.known |= {part.origin for part in plan.publish if part.origin}
        for writing in self.open:
            self._check_origin(writing.schema)

    def _never_again(self, part: Part) -> bool:
        """Whether the rows of a part that is staged but not in the resume state will not be delivered again."""
        own = part.name.startswith(f"{self.lineage}-")
        epoch = self.folder.epoch(part.name)
        if self.folder.staged[part.name].suffix != STAGED:
            return not own
        durable = gate.durable(epoch, part.first, part.origin[-1] if part.origin else None)
        if durable is not None:
            return durable
        if own or not gate.hosted():
            return not own
        raise SinkError(
            f"{self.folder.path} holds part {part.name} with {part.rows} rows, which an earlier run staged, for a step "
            "that has no resume state: nothing tells whether they will be delivered again",
            hint="if the step or the flow was renamed, start it once under the old name. Otherwise decide what to do "
            f"with the file in {self.folder.staging}, and remove it",
        )

    def _annulled(self, listed: list[str]) -> list[str]:
        """Names of annulled parts that a later resume state may still list. Their numbers are never used again."""
        prefix = f"{self.lineage}-"
        of_state = self.next

        def number(name: str) -> int:
            return int(name.removeprefix(prefix)) if name.startswith(prefix) else -1

        self.next = max([self.next, *(number(name) + 1 for name in (*self.folder.void, *self.folder.staged))])
        return [
            name
            for name in self.folder.void
            if not name.startswith(prefix) or number(name) >= of_state or name in listed
        ]

    def _check_ahead(self) -> None:
        """Raise if published parts are newer than the resume state: their rows would come twice."""
        prefix = f"{self.lineage}-"
        known, ahead = self.next, []
        for file, entry in sorted(self.folder.entries.items()):
            numbers = [int(name.removeprefix(prefix)) for name in entry["parts"] if name.startswith(prefix)]
            if numbers and max(numbers) >= known and (self.folder.path / file).exists():
                ahead.append(file)
            # A number is never used twice. The index may still hold the number of a file that was moved away.
            self.next = max([self.next, *(number + 1 for number in numbers)])
        if ahead:
            raise SinkError(
                f"{self.folder.path} is ahead of the recovery folder: {ahead[0]} holds changes that will come again",
                hint="an old recovery folder was restored, or a failed run published its last files. "
                f"Move {' and '.join(ahead)} away, and start again",
            )


def _rows(parts: list[Part]) -> int:
    return sum(part.rows for part in parts)


def _size(parts: list[Part]) -> int:
    return sum(part.size for part in parts)


def _origin_text(origin: tuple[str, ...]) -> str:
    system, database, slot = origin
    return f"database {database!r}, slot {slot!r}, system {system}"
