"""A folder of published Parquet files, with the parts that are staged for it: file names, renames and the index.

    out/orders/0000000001C9C380-00000000-5f1c09ab-00000007.parquet    published: complete, committed, never changed
    out/orders/_index.jsonl                                           one line per published file
    out/orders/_staging/5f1c09ab-00000009.writing                     a part that is being written
    out/orders/_staging/5f1c09ab-00000008.r0001…-00000012.staged      complete and synced; its epoch may still be lost
    out/orders/_staging/5f1c09ab-00000008.unproven                    the same, written by a process without a gate
    out/orders/_staging/5f1c09ab-00000007.committed                   its epoch is durable: it will be published
    out/orders/_staging/void                                          names of parts whose epoch never became durable

A *part* is one Parquet file, staged by one epoch or a piece of it. A published file holds one part (renamed) or several
(merged). Its footer lists them under ``pgoutput_source``. So after a crash at any moment the files themselves say which
parts are published. The index repeats the footers and is repaired from them. Every rename is atomic, and its directory
is fsynced before anything relies on it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pgoutput_source.changes.schema import Position, TableName
from pgoutput_source.errors import ConfigurationError, SinkError
from pgoutput_source.files import explained, need_file, no_locks, sync
from pgoutput_source.protocol.wire import Lsn

logger = logging.getLogger(__name__)

FOOTER: Final = "pgoutput_source"
"""The key of this package's entry in a file's footer."""

STAGING: Final = "_staging"
INDEX: Final = "_index.jsonl"

WRITING: Final = ".writing"
STAGED: Final = ".staged"
UNPROVEN: Final = ".unproven"
COMMITTED: Final = ".committed"
MERGING: Final = ".merging"
VOID: Final = "void"

MAX_VOID: Final = 4096
"""The most names to remember. A crash leaves only a few."""

_ORIGIN = ("pg.system", "pg.database", "pg.slot")


@dataclass(frozen=True, slots=True)
class Part:
    """One complete Parquet file, staged or published. `names` are the parts that it holds, usually one.

    `first` and `last` are positions as (commit_lsn, seq), None for data without positions. `schema` is a digest of the
    Arrow schema with its metadata; `origin` is the system, database and slot that its metadata names. `arrived` is when
    the first row arrived, in seconds of Unix time.

    Files of a sink of many tables say that they complete all parts of their table up to `number`, or, if not `whole`,
    only what these parts have for the file's own `partition`: a path like ``day=2026-11-25`` below the folder.
    """

    names: tuple[str, ...]
    rows: int
    size: int
    table: str
    schema: str
    origin: tuple[str, ...] | None
    first: tuple[int, int] | None
    last: tuple[int, int] | None
    arrived: float
    number: int | None = None
    whole: bool = True
    partition: str = ""

    @property
    def name(self) -> str:
        """The lineage and number of its first part."""
        return self.names[0]

    @property
    def file(self) -> str:
        """The published file, below the folder. Names sort by the position of their first change."""
        place = "{:016X}-{:08X}".format(*self.first) if self.first else f"{int(self.arrived * 1e6):020d}"
        name = f"{place}-{self.name}.parquet"
        return f"{self.partition}/{name}" if self.partition else name

    def state(self) -> dict[str, Any]:
        """Builtins only."""
        state = asdict(self)
        if self.number is None:
            for name in ("number", "whole", "partition"):
                del state[name]
        return state

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Part:
        """From `state`, also after a round trip through JSON."""
        pairs = {key: tuple(state[key]) if state[key] else None for key in ("origin", "first", "last")}
        return cls(**{**state, **pairs, "names": tuple(state["names"])})

    @classmethod
    def merged(cls, parts: list[Part]) -> Part:
        """One file that holds all `parts`."""
        return replace(
            parts[0],
            names=tuple(name for part in parts for name in part.names),
            rows=sum(part.rows for part in parts),
            size=sum(part.size for part in parts),
            first=min((part.first for part in parts if part.first), default=None),
            last=max((part.last for part in parts if part.last), default=None),
            arrived=min(part.arrived for part in parts),
        )

    @classmethod
    def read(cls, path: Path) -> Part | None:
        """The part that a file's footer describes; None if another program wrote the file.

        Raises:
            SinkError: It is not a Parquet file.
        """
        try:
            metadata = pq.read_metadata(path).metadata or {}
        except pa.ArrowInvalid as e:
            raise SinkError(f"{path} is damaged: {e}", hint="move it away; its changes must be read again") from e
        entry = metadata.get(FOOTER.encode())
        return None if entry is None else replace(cls.from_state(json.loads(entry)), size=path.stat().st_size)


def schema_digest(schema: pa.Schema) -> str:
    """A digest that is equal for equal schemas, metadata included."""
    return hashlib.sha1(schema.serialize().to_pybytes(), usedforsecurity=False).hexdigest()[:16]


def origin_of(metadata: dict[bytes, bytes] | None) -> tuple[str, ...] | None:
    """System, database and slot from the metadata of a schema or footer; None if it does not name them."""
    values = tuple((metadata or {}).get(key.encode(), b"").decode() for key in _ORIGIN)
    return values if any(values) else None


def table_of(schema: pa.Schema) -> str:
    """The table that a schema's metadata names; empty if it names none."""
    return str((schema.metadata or {}).get(b"pg.table", b"").decode())


class Asked:
    """The table that a reader asks for, compared with the tables of files.

    Schema and name decide. Files of version 0.1.0 only have both joined by a dot. If the dots of such a text can be
    read in several ways, it matches each of these tables.

    >>> asked = Asked('a."b.c"')
    >>> [asked.has(text) for text in ('a."b.c"', "a.b.c", '"a.b".c')]
    [True, True, False]
    """

    def __init__(self, table: str) -> None:
        self.table = table
        self.name: TableName | None = None
        try:
            self.name = TableName.parse(table)
        except ConfigurationError as e:
            self._refusal = e

    def has(self, text: str) -> bool:
        """Whether a file that names its table as `text` may belong to this table.

        Raises:
            ConfigurationError: `table` can be read in several ways, and `text` is one of them.
        """
        if self.name is not None:
            return self.name.written(text)
        if text != self.table and may_be(text, self.table):
            raise self._refusal
        return text == self.table

    def of(self, schema: pa.Schema) -> bool:
        """Whether a file with this schema belongs to the table; see `has`."""
        metadata = schema.metadata or {}
        if self.name is None or b"pg.namespace" not in metadata:
            return self.has(table_of(schema))
        return self.name == tuple(metadata[key].decode() for key in (b"pg.namespace", b"pg.name"))


def may_be(table: str, text: str) -> bool:
    """Whether version 0.1.0 wrote `text` for the table that is now written `table`.

    >>> may_be('a."b.c"', "a.b.c"), may_be("a.b.c", "a.b.c")
    (True, False)
    """
    try:
        return TableName.parse(table).written(text)
    except ConfigurationError:
        return False


class FolderInUse(SinkError):
    """Another process or sink owns the folder."""


def published_files(folder: Path) -> list[Path]:
    """The published files, those in partitions included, in the order of their first changes."""
    return sorted(_files(folder), key=lambda file: file.name)


def _files(folder: Path) -> Iterator[Path]:
    yield from folder.glob("*.parquet")
    for partition in folder.glob("*=*"):
        yield from _files(partition)


class FolderLock:
    """The lock of a folder, which is created with it. One owner at a time holds it, until `close`.

    Raises:
        SinkError: The folder is in use, can't be created or written, or is on a file system without locks.
    """

    _open: ClassVar[weakref.WeakSet[FolderLock]] = weakref.WeakSet()

    def __init__(self, path: Path) -> None:
        self.path = path
        staging = path / STAGING
        with explained("can't write to", path):
            new = not staging.exists()
            staging.mkdir(parents=True, exist_ok=True)
            if new:
                sync(path.parent)
                sync(path)
            self._file = os.open(staging / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        need_file(self._file)
        FolderLock._open.add(self)
        try:
            with explained("can't open", path):
                self._take()
        except BaseException:
            self.close()
            raise

    def _take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._file, 32, 0).decode(errors="replace").strip()
            raise FolderInUse(
                f"{self.path} is in use by process {owner or 'unknown'}",
                hint="give each sink its own folder, and wait until an earlier run has ended",
            ) from None
        except OSError as e:
            if (refusal := no_locks(e, self.path)) is not None:
                raise refusal from None
            raise

    def sign(self) -> None:
        """Say which process has it."""
        with explained("can't write to", self.path / STAGING):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
            os.fsync(self._file)

    def close(self) -> None:
        """Leave the folder to others."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @classmethod
    def forked(cls) -> None:
        """A lock lasts until every copy of its descriptor is closed. A child's copy would outlive the parent."""
        for lock in list(cls._open):
            lock.close()


os.register_at_fork(after_in_child=FolderLock.forked)


class Folder:
    """The folder, owned by one partition of a sink. Opening it locks out other owners, and repairs the folder.

    Raises:
        SinkError: It can't be created or written, is in use, or holds Parquet files of another program.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = path.absolute()  # Arrow would take "run:7/orders" for a URL
        self.staging = path / STAGING
        self._lock: FolderLock | None = None
        try:
            self._own()
            with explained("can't open", path):
                self.entries = self._read_index()
                self._adopt_files()
                self.void = self._read_void()
                self.staged = {
                    file.name.split(".")[0]: file
                    for file in self.staging.iterdir()
                    if file.suffix in (STAGED, UNPROVEN, COMMITTED)
                }
        except BaseException:
            self.close()
            raise
        self.done = {name for entry in self.entries.values() for name in entry["parts"]}

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.close()

    @property
    def origins(self) -> set[tuple[str, ...]]:
        """System, database and slot that the published changes come from."""
        return {tuple(entry["origin"]) for entry in self.entries.values() if entry["origin"]}

    def __str__(self) -> str:
        rows = sum(entry["rows"] for entry in self.entries.values())
        last = max((position_of(entry["last"]) for entry in self.entries.values() if entry["last"]), default=None)
        upto = f" up to {last}" if last else ""
        return f"{self.path} holds {len(self.entries)} files, {rows} rows{upto}"

    # -- staging ------------------------------------------------------------------------------------------------

    def writing(self, name: str) -> Path:
        """The path at which a part is written."""
        return self.staging / f"{name}{WRITING}"

    def stage(self, name: str, epoch: str | None) -> None:
        """Mark a complete part of a closed epoch as staged. It is durable after `sync`.

        The epoch has a name if this process has a gate.
        """
        with explained("can't stage", self.writing(name)):
            sync(self.writing(name))
            self._move(name, self.writing(name), UNPROVEN if epoch is None else f".{epoch}{STAGED}")

    def epoch(self, name: str) -> str | None:
        """The name of the epoch that staged a part; None if the part's file does not say."""
        parts = self.staged[name].name.split(".")
        return parts[1] if len(parts) == 3 else None

    def commit(self, parts: list[Part]) -> None:
        """Mark these parts, whose epochs are durable, as committed. The mark survives a crash."""
        todo = [part for part in parts if self.staged[part.name].suffix != COMMITTED]
        if todo:
            with explained("can't commit in", self.staging):
                for part in todo:
                    self._move(part.name, self.staged[part.name], COMMITTED)
                self.sync()

    def sync(self, path: Path | None = None) -> None:
        """Make the names in the staging folder durable, or the content of one file."""
        with explained("can't sync", path or self.staging):
            sync(path or self.staging)

    def discard(self, names: Iterable[str]) -> None:
        """Delete staged parts whose rows come again or are published, and half-written files."""
        with explained("can't clean", self.staging):
            for name in names:
                os.unlink(self.staged.pop(name))

    def annul(self, names: Iterable[str], still: Iterable[str]) -> None:
        """Delete staged parts of epochs that never became durable, and remember their names.

        Bytewax may keep the state of such an epoch and resume from it later. That state then lists parts whose rows
        were delivered again. Of the names remembered so far, only those in `still` are kept.
        """
        todo = list(names)
        if todo:
            self.void = dict.fromkeys([*still, *todo][-MAX_VOID:])
            fresh = self.staging / f"{VOID}{WRITING}"
            with explained("can't clean", self.staging):
                fresh.write_text("".join(f"{name}\n" for name in self.void))
                sync(fresh)
                os.rename(fresh, self.staging / VOID)
                sync(self.staging)
        self.discard(todo)

    def sweep(self) -> None:
        """Delete the files that a crash left half-written."""
        with explained("can't clean", self.staging):
            for file in self.staging.iterdir():
                if file.suffix in (WRITING, MERGING):
                    os.unlink(file)

    def _move(self, name: str, source: Path, suffix: str) -> None:
        target = self.staging / f"{name}{suffix}"
        os.rename(source, target)
        self.staged[name] = target

    # -- publishing ---------------------------------------------------------------------------------------------

    def publish(self, part: Part, source: Path) -> None:
        """Make a complete, synced file visible by moving `source`. Its parts are done from then on."""
        target = self.path / part.file
        with explained("can't publish", target):
            os.rename(source, target)
            sync(self.path)
            self.done.update(part.names)
            self._append(part)
            if source == self.staged.get(part.name):
                del self.staged[part.name]
            else:
                self.discard(part.names)

    def _append(self, part: Part) -> None:
        self.entries[part.file] = add_to_index(self.path, part)

    # -- opening ------------------------------------------------------------------------------------------------

    def _own(self) -> None:
        self._lock = FolderLock(self.path)
        self._lock.sign()

    def _read_index(self) -> dict[str, dict[str, Any]]:
        """The index, after a line that a crash cut off is removed. The files make up for it."""
        index = self.path / INDEX
        with explained("can't read", index):
            data = index.read_bytes() if index.exists() else b""
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(index, whole)
        return read_index(self.path)

    def _read_void(self) -> dict[str, None]:
        names = self.staging / VOID
        with explained("can't read", names):
            return dict.fromkeys(names.read_text().split() if names.exists() else ())

    def _adopt_files(self) -> None:
        for file in published_files(self.path):
            name = file.relative_to(self.path).as_posix()
            if name not in self.entries:
                with explained("can't index", file):
                    part = Part.read(file)
                    if part is None or part.file != name:
                        raise SinkError(
                            f"{file} was not written by this sink, or was renamed",
                            hint="give the sink its own folder, or move the file away",
                        )
                    self._append(part)


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of a folder's index, by file. What a crash cut off is left out."""
    index = folder / INDEX
    entries = {}
    with explained("can't read", index):
        lines = index.read_bytes().splitlines(keepends=True) if index.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
            file = entry["file"]
        except (ValueError, KeyError, TypeError):
            if line.endswith(b"\n"):
                logger.warning("%s: a damaged line was skipped; the files have what it said", index)
            continue
        if line.endswith(b"\n"):
            entries[file] = entry
    return entries


def add_to_index(folder: Path, part: Part, *, durably: bool = True) -> dict[str, Any]:
    """Add a published file to a folder's index. Gives its entry."""
    entry = entry_of(part)
    line = json.dumps(entry).encode() + b"\n"
    index = os.open(folder / INDEX, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(index, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if durably:
            os.fsync(index)
    finally:
        os.close(index)
    return entry


def entry_of(part: Part) -> dict[str, Any]:
    """What the index says of a published file."""
    return {
        "file": part.file,
        "rows": part.rows,
        "bytes": part.size,
        "first": str(Position(Lsn(part.first[0]), part.first[1])) if part.first else None,
        "last": str(Position(Lsn(part.last[0]), part.last[1])) if part.last else None,
        "table": part.table,
        "schema": part.schema,
        "origin": part.origin,
        "parts": part.names,
        "published_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        **({} if part.number is None else {"number": part.number, "whole": part.whole}),
    }


def position_of(text: str) -> Position:
    """A position as the index writes it."""
    lsn, _, seq = text.partition("#")
    return Position(Lsn(lsn), int(seq))
