"""`IpcSink` writes Arrow batches to a folder of Arrow IPC stream files, exactly once, with no more work than a copy.

    out/orders/r00018c3f9a1b2c3d-00000007-0000.arrows             published: complete, committed, never changed again
    out/orders/_published                                          the last token that was published
    out/orders/_staging/r00018c3f9a1b2c3d-00000008-0000.arrows    staged: complete and synced; its epoch may be lost yet

https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from pgoutput_source.errors import SinkError
from pgoutput_source.files import explained, local_path, sync
from pgoutput_source.parquet.folder import STAGING, WRITING
from pgoutput_source.parquet.writer import positions
from pgoutput_source.sinks.base import TwoPhaseSink
from pgoutput_source.sinks.items import Item, record_batches

SUFFIX = ".arrows"
PUBLISHED = "_published"
"""The file in the folder that names the last published token."""


class IpcSink(TwoPhaseSink[Item]):
    """Arrow batches as Arrow IPC stream files in a folder.

    There is no parallelism: one partition writes the folder. With recovery (``-r``) every row is in exactly one
    published file. Without it nothing that came from the source is lost, but a crash may write rows twice. Readers see
    only complete files of committed epochs, which never change: ``folder/*.arrows``.

    An epoch becomes one file per Arrow schema, so that two versions of a table never share a file. File names sort in
    the order of the epochs. Rows keep their layout in memory, with types, dictionaries and metadata, and
    ``pa.ipc.open_stream(file)`` maps them. This suits a reader that wants each epoch at once. For long-term storage
    `ParquetSink` writes fewer and smaller files.

    Args:
        folder: The folder. It is created when the first batch arrives.

    Example:
        >>> IpcSink("out/orders")
        IpcSink('out/orders')
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = local_path(folder)
        self.staging = self.folder / STAGING

    def __repr__(self) -> str:
        return f"IpcSink({str(self.folder)!r})"

    def stage(self, token: str, items: list[Item]) -> None:
        """Write one file per schema into the staging folder."""
        with explained("can't stage in", self.staging):
            self.staging.mkdir(parents=True, exist_ok=True)
            for number, batches in enumerate(_by_schema(items, self)):
                path = self.staging / f"{token}-{number:04d}{WRITING}"
                with path.open("wb") as file:
                    with pa.ipc.new_stream(file, batches[0].schema) as stream:
                        for batch in batches:
                            stream.write_batch(batch)
                    file.flush()
                    os.fsync(file.fileno())
                path.rename(path.with_suffix(SUFFIX))
            sync(self.staging)

    def publish(self, token: str) -> None:
        """Move its files to where readers look, in order."""
        with explained("can't publish in", self.folder):
            for file in self._files(token):
                target = self.folder / file.name
                if target.exists():
                    raise SinkError(
                        f"{self.folder} is ahead of the recovery folder: {target.name} is there already",
                        hint="an old recovery folder was restored. Start afresh with a new output folder",
                    )
                file.rename(target)
            sync(self.folder)
            # Readers may move the files away, so their names alone don't prove what was published.
            record = self.folder / f"{PUBLISHED}{WRITING}"
            record.write_text(token)
            record.rename(self.folder / PUBLISHED)

    def published(self, token: str) -> bool | None:
        """Whether it is the last published token, or its files are in the folder."""
        with explained("can't read", self.folder):
            record = self.folder / PUBLISHED
            if (record.exists() and record.read_text() == token) or any(self.folder.glob(f"{token}-????{SUFFIX}")):
                return True
        return False if token.startswith("r") else None  # version 0.1.0 kept no record

    def first(self, token: str) -> tuple[str, tuple[int, int]] | None:
        """From the columns `_commit_lsn` and `_seq` of its files."""
        found = []
        for file in self._files(token):
            with explained("can't read", file), pa.memory_map(str(file)) as source:
                table = pa.ipc.open_stream(source).read_all()
                slot = (table.schema.metadata or {}).get(b"pg.slot")
                first, _ = positions(table)
                if slot is None or first is None:
                    return None
                found.append((slot.decode(), first))
        return min(found, default=None)

    def discard(self, token: str) -> None:
        """Delete its files."""
        with explained("can't clean", self.staging):
            for file in self._files(token):
                file.unlink()

    def staged(self) -> Iterable[str]:
        """The tokens in the names of the staged files. Files that a crash left half-written are deleted."""
        with explained("can't clean", self.staging):
            for file in self.staging.glob(f"*{WRITING}"):
                file.unlink()
        return {file.stem.rpartition("-")[0] for file in self.staging.glob(f"*{SUFFIX}")}

    def _files(self, token: str) -> list[Path]:
        return sorted(self.staging.glob(f"{token}-????{SUFFIX}"))


def _by_schema(items: list[Item], sink: IpcSink) -> list[list[pa.RecordBatch]]:
    groups: list[list[pa.RecordBatch]] = []
    for batch in (batch for item in items for batch in record_batches(item, sink)):
        for group in groups:
            if group[0].schema.equals(batch.schema, check_metadata=True):
                group.append(batch)
                break
        else:
            groups.append([batch])
    return groups
