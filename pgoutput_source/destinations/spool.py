"""The spool: what waits for a destination, one file for each epoch, outside of the destination.

    spool/r00018c3f9a1b2c3d-00000007.committed    its epoch is durable: it will be applied
    spool/r00018c3f9a1b2c3d-00000008.staged       written and synced, and its epoch may still be lost

A file holds *parts*: changes of one version of one table, as an Arrow IPC stream. Each has a number, which is larger
than those of all parts before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

import pyarrow as pa

from pgoutput_source.changes.schema import TableName
from pgoutput_source.errors import SinkError
from pgoutput_source.files import explained, local_path, no_locks, sync
from pgoutput_source.parquet.folder import FolderInUse

_WRITING, STAGED, COMMITTED = ".writing", ".staged", ".committed"
_VERSION: Final = 1
# Parts are mostly small: threads would cost several times what they do.
_OPTIONS: Final = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
_READING: Final = pa.ipc.IpcReadOptions(use_threads=False)

Point = tuple[int, int]
"""The commit LSN and the number within the transaction of a change."""


@dataclass(frozen=True, slots=True)
class Portion:
    """Changes of one version of a table that one epoch brought.

    Attributes:
        number: Larger than the number of every part before.
        table: Their table at the source.
        identity: Its replica identity: d, n, f or i.
        key: The columns of the replica identity.
        first: Where its first change stands.
        last: Where its last change stands.
        rows: How many changes it has.
        size: How many bytes they take in the file.
    """

    number: int
    table: TableName
    identity: str
    key: tuple[str, ...]
    first: Point
    last: Point
    rows: int
    size: int = 0

    def to_json(self) -> dict[str, Any]:
        """For the head of a file."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The part that `to_json` gave."""
        known = dict(values)
        known["table"] = TableName(*known["table"])
        for name in ("key", "first", "last"):
            known[name] = tuple(known[name])
        return cls(**known)


class Gone(SinkError):
    """An epoch is not in the spool."""


class Spool:
    """The folder; one process owns it.

    Raises:
        SinkError: It is in use, or the operating system refuses.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = local_path(folder)
        with explained("can't create", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._own()
        with explained("can't clean", self.folder):
            for path in self.folder.glob(f"*{_WRITING}"):
                path.unlink()

    def close(self) -> None:
        """Leave it to others."""
        self._lock.close()

    def _own(self) -> BinaryIO:
        with explained("can't lock", self.folder):
            lock = (self.folder / "lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            lock.close()
            if (refusal := no_locks(e, self.folder)) is not None:
                raise refusal from None
            raise FolderInUse(
                f"the spool {self.folder} is in use by another process",
                hint="give each sink its own spool=, and wait until an earlier run has ended",
            ) from None
        return lock

    def put(
        self, token: str, parts: Sequence[tuple[Portion, Sequence[pa.RecordBatch]]], *, continues: bool = False
    ) -> None:
        """Make an epoch's parts durable; `continues` says that the next epoch goes on with its last transaction."""
        path = self.folder / f"{token}{_WRITING}"
        with explained("can't write to", self.folder):
            bodies = []
            heads = []
            for part, batches in parts:
                body = pa.BufferOutputStream()
                with pa.ipc.new_stream(body, batches[0].schema, options=_OPTIONS) as stream:
                    for batch in batches:
                        stream.write_batch(batch)
                bodies.append(body.getvalue())
                heads.append(part.to_json() | {"size": len(bodies[-1])})
            with path.open("wb") as file:
                file.write(json.dumps({"v": _VERSION, "continues": continues, "parts": heads}).encode() + b"\n")
                for written in bodies:
                    file.write(written)
                file.flush()
                os.fsync(file.fileno())
            path.rename(path.with_suffix(STAGED))
            sync(self.folder)

    def commit(self, token: str) -> None:
        """The epoch is durable; a second time does nothing."""
        with explained("can't write to", self.folder):
            path = self.folder / f"{token}{STAGED}"
            if path.exists():
                path.rename(path.with_suffix(COMMITTED))
                sync(self.folder)

    def drop(self, token: str) -> None:
        """It was applied, or its items come again."""
        with explained("can't delete from", self.folder):
            for suffix in (STAGED, COMMITTED):
                (self.folder / f"{token}{suffix}").unlink(missing_ok=True)

    def tokens(self, suffix: str) -> list[str]:
        """The epochs that are staged or committed, in their order."""
        with explained("can't read", self.folder):
            return sorted(path.stem for path in self.folder.glob(f"*{suffix}"))

    def age(self, token: str) -> float:
        """When a committed epoch was staged, in seconds since 1970 by the file system's clock."""
        with explained("can't read", self.folder):
            return (self.folder / f"{token}{COMMITTED}").stat().st_mtime

    def size(self) -> int:
        """How many bytes wait."""
        size = 0
        with explained("can't read", self.folder):
            for path in self.folder.glob(f"*{COMMITTED}"):
                with contextlib.suppress(FileNotFoundError):  # applied meanwhile
                    size += path.stat().st_size
        return size

    def waiting(self) -> list[Portion]:
        """The parts of all epochs, without their rows. One that is applied meanwhile may be left out."""
        found = []
        for token in (*self.tokens(COMMITTED), *self.tokens(STAGED)):
            with contextlib.suppress(Gone):
                found += self.parts(token)
        return found

    def parts(self, token: str) -> list[Portion]:
        """What an epoch has, without its rows."""
        with self._opened(token) as file:
            return self._head(file)[0]

    def continues(self, token: str) -> bool:
        """Whether the next epoch goes on with the last transaction of this one."""
        with self._opened(token) as file:
            return self._head(file)[1]

    def read(
        self, token: str, wanted: Callable[[Portion], bool] = lambda _: True
    ) -> Iterator[tuple[Portion, pa.Table]]:
        """The parts of an epoch that are wanted, with their rows."""
        with self._opened(token) as file:
            for part in self._head(file)[0]:
                with explained("can't read", self.folder):
                    if not wanted(part):
                        file.seek(part.size, os.SEEK_CUR)
                        continue
                    body = file.read(part.size)
                try:
                    yield part, pa.ipc.open_stream(pa.py_buffer(body), options=_READING).read_all()
                except pa.ArrowInvalid as e:
                    raise self._damaged(token) from e

    def _opened(self, token: str) -> BinaryIO:
        with explained("can't read", self.folder):
            for suffix in (STAGED, COMMITTED):
                with contextlib.suppress(FileNotFoundError):
                    return (self.folder / f"{token}{suffix}").open("rb")
            raise Gone(
                f"{token} is gone from the spool {self.folder}",
                hint="somebody removed it. Put it back; or start afresh: a new destination, recovery folder and slot",
            )

    def _head(self, file: BinaryIO) -> tuple[list[Portion], bool]:
        try:
            head = json.loads(file.readline())
            version, continues = head["v"], bool(head["continues"])
            parts = [Portion.from_json(part) for part in head["parts"]]
        except (ValueError, KeyError, TypeError) as e:
            raise self._damaged(Path(file.name).stem) from e
        if version != _VERSION:
            raise SinkError(
                f"the spool {self.folder} has version {version!r}, and this is version {_VERSION}",
                hint="run the release that wrote it until it is empty",
            )
        return parts, continues

    def _damaged(self, token: str) -> SinkError:
        return SinkError(
            f"{token} in the spool {self.folder} is damaged",
            hint="its bytes are not those that were written and synced: look at the disk, and restore a backup of the "
            "spool, or start afresh: a new destination, recovery folder and slot",
        )
