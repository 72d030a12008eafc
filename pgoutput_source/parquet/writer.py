"""Writes one Parquet file: row groups, encodings that suit changes, and the footer."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pgoutput_source.changes.schema import MetadataNames
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.files import explained
from pgoutput_source.parquet.folder import FOOTER, Part, origin_of, schema_digest, table_of
from pgoutput_source.parquet.leaves import Leaf, leaves, stored

ROW_GROUP_ROWS: Final = 128 * 1024
ROW_GROUP_BYTES: Final = 32 * 1024 * 1024
"""How much Arrow data is collected before it is compressed. This bounds memory."""

_SAMPLE: Final = 1024


@dataclass(frozen=True, slots=True)
class Codec:
    """How column chunks are compressed."""

    name: str
    level: int | None

    @classmethod
    def of(cls, name: str, level: int | None) -> Codec:
        """The codec called `name` in Parquet and Arrow, without `level` if it has no levels."""
        known = name in ("zstd", "snappy", "lz4", "gzip", "brotli") and pa.Codec.is_available(name)
        if not known and name != "none":
            raise ConfigurationError(
                f"compression {name!r} is not one that Parquet and this Arrow know", hint="zstd is fast and small"
            )
        return cls(name, level if known and pa.Codec.supports_compression_level(name) else None)

    def writer(self, path: Path, sample: pa.Table, heavy: Set[str] = frozenset()) -> pq.ParquetWriter:
        """A writer for files like `sample`. Its values decide which columns get dictionaries.

        Columns in `heavy` get no statistics: Arrow holds each value half a dozen times to find the minimum and maximum,
        and then leaves out those longer than 4 KB.
        """
        dictionaries, encodings = _encodings(sample)
        return pq.ParquetWriter(
            path,
            sample.schema,
            compression=self.name,
            compression_level=self.level,
            use_dictionary=dictionaries,
            column_encoding=encodings,
            write_statistics=_light(sample.schema, heavy) if heavy else True,
        )


class PartWriter:
    """A part that is being written. Rows wait in memory until they fill a row group."""

    def __init__(self, codec: Codec, name: str, path: Path, schema: pa.Schema, heavy: Set[str] = frozenset()) -> None:
        self.codec = codec
        self.path = path
        self.schema, self._stored = schema, stored(schema)
        self.heavy = heavy
        self.begun = time.monotonic()
        self.part = Part(
            names=(name,),
            rows=0,
            size=0,
            table=table_of(schema),
            schema=schema_digest(schema),
            origin=origin_of(schema.metadata),
            first=None,
            last=None,
            arrived=time.time(),
        )
        self.waiting: list[pa.RecordBatch] = []
        self.waiting_rows = 0
        self.waiting_bytes = 0
        self._writer: pq.ParquetWriter | None = None

    def add(self, batch: pa.RecordBatch) -> None:
        """Keep a batch in memory until `flush`."""
        self.waiting.append(batch)
        self.waiting_rows += batch.num_rows
        self.waiting_bytes += batch.nbytes

    def write(self, table: pa.Table) -> None:
        """Write all rows of a table, one row group after the other."""
        for batch in table.to_batches(max_chunksize=ROW_GROUP_ROWS):
            if self.waiting_rows + batch.num_rows > ROW_GROUP_ROWS:
                self.flush()
            self.add(batch)
            if self.waiting_bytes >= ROW_GROUP_BYTES:
                self.flush()

    def flush(self) -> None:
        """Write the waiting rows as one row group."""
        if not self.waiting:
            return
        table = pa.Table.from_batches(self.waiting, self.schema)
        if self._stored is not self.schema:
            table = table.cast(self._stored)
        heavy = {name for name in table.schema.names if table.column(name).nbytes > ROW_GROUP_BYTES}
        if not heavy and table.num_rows < 1024 * len(self.waiting):
            # Otherwise the writer would spend more time on the chunks than on the rows.
            table = table.combine_chunks()
        self.waiting, self.waiting_rows, self.waiting_bytes = [], 0, 0
        first, last = positions(table)
        self.part = replace(
            self.part,
            rows=self.part.rows + table.num_rows,
            first=min((p for p in (self.part.first, first) if p), default=None),
            last=max((p for p in (self.part.last, last) if p), default=None),
        )
        with explained("can't write", self.path):
            if self._writer is None:
                self._writer = self.codec.writer(self.path, table, heavy | self.heavy)
            self._writer.write_table(table, row_group_size=table.num_rows)
            self.part = replace(self.part, size=self.path.stat().st_size)

    def close(self) -> Part:
        """Complete the file."""
        self.flush()
        assert self._writer is not None, "a part has rows"
        with explained("can't write", self.path):
            self._writer.add_key_value_metadata({FOOTER: json.dumps(self.part.state())})
            self._writer.close()
            return replace(self.part, size=self.path.stat().st_size)

    def abandon(self) -> None:
        """Give the part up. Its rows come again."""
        # If the file can't be removed now, the next start sweeps it. An error may be propagating already.
        with contextlib.suppress(OSError):
            if self._writer is not None:
                self._writer.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def merge(codec: Codec, parts: list[Part], files: list[Path], target: Path) -> Part:
    """Merge several files of one schema into one file. At most one row group is in memory."""
    part = Part.merged(parts)
    writer: pq.ParquetWriter | None = None
    with explained("can't write", target):
        try:
            for table in _row_groups(files):
                writer = writer or codec.writer(target, table, _heavy(files))
                writer.write_table(table, row_group_size=table.num_rows)
            assert writer is not None, "a part has rows"
            writer.add_key_value_metadata({FOOTER: json.dumps(part.state())})
            writer.close()
        except BaseException:
            # The disk may be full, so free the space. If that fails too, the next start sweeps the file.
            with contextlib.suppress(OSError):
                target.unlink(missing_ok=True)
            raise
        return replace(part, size=target.stat().st_size)


def positions(table: pa.Table) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """The lowest and highest position in `table`, whatever the order of its rows; None if it has none."""
    metadata = MetadataNames.of(table.schema)
    names = (metadata.commit_lsn, metadata.seq)
    if not all(name in table.schema.names and pa.types.is_integer(table.schema.field(name).type) for name in names):
        return None, None
    commits, seqs = (table.column(name) for name in names)
    ends = []
    for function in (pc.min, pc.max):
        commit = function(commits)
        if not commit.is_valid:
            return None, None
        ends.append((commit.as_py(), function(seqs.filter(pc.equal(commits, commit))).as_py() or 0))
    return ends[0], ends[1]


def _encodings(sample: pa.Table) -> tuple[list[str], dict[str, str]]:
    """Columns that are worth a dictionary, and the encodings of other columns that gain from one.

    Arrow's default, a dictionary for everything until it overflows, takes three times the CPU and half again as much
    space: positions, ids and times hardly repeat, and their differences are small.
    """
    repeated = {
        name
        for name, column in zip(sample.schema.names, sample.columns, strict=True)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        if len(column) >= _SAMPLE and pc.count_distinct(column.slice(0, _SAMPLE)).as_py() * 16 <= _SAMPLE
    }
    wanted: dict[str, set[str]] = {}
    for leaf in leaves(sample.schema):
        wanted.setdefault(leaf.path, set()).add(_encoding(leaf, repeated))
    # What leaves with the same path do not agree on is left to Arrow's plain encoding.
    agreed = {path: encodings.pop() for path, encodings in wanted.items() if len(encodings) == 1}
    return (
        [path for path, encoding in agreed.items() if encoding == _DICTIONARY],
        {path: encoding for path, encoding in agreed.items() if encoding == _DELTA},
    )


_DICTIONARY: Final = "RLE_DICTIONARY"
_DELTA: Final = "DELTA_BINARY_PACKED"
_PLAIN: Final = "PLAIN"


def _encoding(leaf: Leaf, repeated: Set[str]) -> str:
    if leaf.in_list:
        return _PLAIN
    if pa.types.is_dictionary(leaf.kind) or (leaf.column in repeated and not pa.types.is_nested(leaf.kind)):
        return _DICTIONARY
    return _DELTA if pa.types.is_integer(leaf.kind) or pa.types.is_temporal(leaf.kind) else _PLAIN


def _light(schema: pa.Schema, heavy: Set[str]) -> list[str]:
    """The paths of plain values, alone and in structs, except in columns of `heavy`."""
    return [leaf.path for leaf in leaves(schema) if not leaf.in_list and leaf.column not in heavy]


def _heavy(files: list[Path]) -> set[str]:
    """The columns that alone exceed the size limit in some row group of these files."""
    heavy: set[str] = set()
    for file in files:
        with pq.ParquetFile(file) as parquet:
            columns, metadata = [leaf.column for leaf in leaves(parquet.schema_arrow)], parquet.metadata
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            sizes = (group.column(i).total_uncompressed_size for i in range(metadata.num_columns))
            heavy |= {column for column, size in zip(columns, sizes, strict=True) if size > ROW_GROUP_BYTES}
    return heavy


def _row_groups(files: list[Path]) -> Iterator[pa.Table]:
    """The rows of several files of one schema, gathered into row groups of a good size."""

    def gathered() -> pa.Table:
        # Arrow reads the footer's entries into the schema, and ours describes only the part that it was written for.
        table = pa.concat_tables(waiting)
        metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != FOOTER.encode()}
        return table.replace_schema_metadata(metadata)

    waiting: list[pa.Table] = []
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for index in range(parquet.num_row_groups):
                waiting.append(parquet.read_row_group(index, use_threads=False))
                if (
                    sum(table.num_rows for table in waiting) >= ROW_GROUP_ROWS
                    or sum(table.nbytes for table in waiting) >= ROW_GROUP_BYTES
                ):
                    yield gathered()
                    waiting = []
    if waiting:
        yield gathered()
