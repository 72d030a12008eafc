"""The files of parked changes, in a folder for each slot.

    folder/slot/000000000042.arrows     raw changes of one version of a table, in one epoch: an Arrow IPC stream

Files are numbered in the order in which they were begun. A file gets its name once it is complete and synced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import numpy as np
import pyarrow as pa

from pgoutput_source.errors import StateError
from pgoutput_source.files import explained, sync

SUFFIX: Final = ".arrows"
WRITING: Final = ".writing"
_PIECE: Final = 8192  # changes of a replay that are decoded together

Pair = tuple[int, int]
"""A position as a state keeps it."""


@dataclass(frozen=True, slots=True)
class ParkedFile:
    """A file of parked changes, and what its own metadata say: `table` is the id of a `ParkedTable`."""

    path: Path
    number: int
    table: str
    name: str
    relation: int
    reason: str
    origin: tuple[str, str]  # the database system and the slot
    changes: int
    first: Pair
    last: Pair

    @classmethod
    def read(cls, path: Path) -> ParkedFile | None:
        """What is in a file; None if there is no change in it.

        Raises:
            StateError: It can't be read.
        """
        count, first, last = 0, (0, 0), (0, 0)
        with explained("can't read", path, StateError), path.open("rb") as file:
            try:
                with pa.ipc.open_stream(file) as stream:
                    said = {key.decode(): value.decode() for key, value in (stream.schema.metadata or {}).items()}
                    for batch in stream:
                        here = positions(batch)
                        first = here[0] if not count else first
                        count, last = count + len(here), here[-1]
            except pa.ArrowInvalid as e:
                raise StateError(f"{path} is not a file of parked changes: {e}", hint="restore it") from e
        if not count:
            return None
        return cls(
            path,
            int(path.stem),
            said["parked.table"],
            said["pg.table"],
            int(said["pg.relation_id"]),
            said["parked.reason"],
            (said.get("pg.system", ""), said.get("pg.slot", "")),
            count,
            first,
            last,
        )


def parked_files(folder: Path) -> list[ParkedFile]:
    """The files of parked changes in the folder of a slot, in the order of their numbers.

    Raises:
        StateError: One of them can't be read.
    """
    paths = sorted(path for path in folder.glob(f"*{SUFFIX}") if path.stem.isdigit())
    return [found for path in paths if (found := ParkedFile.read(path)) is not None]


def unreplayed(files: Sequence[ParkedFile], replayed: Pair | None) -> Iterator[pa.RecordBatch]:
    """The raw changes of a table after the last that was replayed, each once, in pieces that are decoded together.

    Each file has all changes of the table from its first to its last. Without a resume state files may overlap, and a
    later one begin before an earlier one: changes that were not acknowledged came again.

    Raises:
        StateError: A file can't be read.
    """
    for file in sorted(files, key=lambda file: file.first):
        with (
            explained("can't read", file.path, StateError),
            file.path.open("rb") as opened,
            pa.ipc.open_stream(opened) as stream,
        ):
            for batch in stream:
                for start in range(0, len(batch), _PIECE):
                    raw = batch.slice(start, _PIECE)
                    if replayed is not None:
                        fresh = [i for i, position in enumerate(positions(raw)) if position > replayed]
                        raw = raw.take(pa.array(np.array(fresh, np.int64))) if len(fresh) < len(raw) else raw
                    if len(raw):
                        replayed = positions(raw)[-1]
                        yield raw.replace_schema_metadata(stream.schema.metadata)


def positions(raw: pa.RecordBatch) -> list[Pair]:
    """The positions of raw changes."""
    return list(zip(raw.column("commit_lsn").to_pylist(), raw.column("seq").to_pylist(), strict=True))


@dataclass(slots=True)
class _Open:
    """A file that is being written: the changes of one version of a table in this epoch."""

    path: Path
    file: IO[bytes]
    stream: pa.RecordBatchStreamWriter
    metadata: Mapping[bytes, bytes]


class ParkedFolder:
    """The folder of one slot, and the files that are being written in it. It deletes those that a crash cut off.

    Attributes:
        path: The folder.
        next: The number of the next file.

    Raises:
        StateError: The folder can't be used.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.next = path, 0
        self._open: dict[str, _Open] = {}
        with explained("can't use", path, StateError):
            path.mkdir(parents=True, exist_ok=True)
            for above in (path.parent, path.parent.absolute().parent):
                sync(above)
            for unfinished in path.glob(f"*{WRITING}"):
                unfinished.unlink()

    def number(self) -> int:
        """The next number, which is nobody else's."""
        self.next += 1
        return self.next - 1

    def write(self, table: str, raw: pa.RecordBatch, reason: str) -> None:
        """Append raw changes of a table, which its id says, to its file of this epoch.

        Raises:
            StateError: The file can't be written.
        """
        with explained("can't park changes in", self.path, StateError):
            writing = self._open.get(table)
            if writing is not None and writing.metadata != raw.schema.metadata:  # another version
                self._finish(table)
                writing = None
            if writing is None:
                path = self.path / f"{self.number():012d}{WRITING}"
                said = {**raw.schema.metadata, "parked.table": table, "parked.reason": reason}
                file = path.open("wb")
                stream = pa.ipc.new_stream(file, raw.schema.with_metadata(said))
                writing = self._open[table] = _Open(path, file, stream, raw.schema.metadata)
            writing.stream.write_batch(raw.replace_schema_metadata(None))

    def finish(self) -> None:
        """Sync the files of this epoch, and give them their names.

        Raises:
            StateError: A file can't be written.
        """
        with explained("can't park changes in", self.path, StateError):
            if self._open:
                for table in list(self._open):
                    self._finish(table)
                sync(self.path)

    def _finish(self, table: str) -> None:
        writing = self._open.pop(table)
        writing.stream.close()
        writing.file.flush()
        os.fsync(writing.file.fileno())
        writing.file.close()
        writing.path.rename(writing.path.with_suffix(SUFFIX))

    def close(self) -> None:
        """Close the files; what was not synced comes again."""
        for writing in self._open.values():
            writing.file.close()
        self._open = {}
