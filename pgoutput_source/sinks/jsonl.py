"""`JsonLinesSink` writes changes, events and rows as lines of JSON, at least once, to a file or standard output."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np
import pyarrow as pa
from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition

from pgoutput_source.changes import exact_json
from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.changes.events import ChangeEvent
from pgoutput_source.changes.schema import Column
from pgoutput_source.changes.values import rows, to_python
from pgoutput_source.errors import SinkError
from pgoutput_source.files import explained, local_path, need_file

Item: TypeAlias = ChangeBatch | ChangeEvent | pa.RecordBatch | pa.Table | Mapping[str, Any]

_TOGETHER: Final = 4096  # how many rows become Python objects at once
_TAIL: Final = 1 << 16

_Texts: TypeAlias = dict[str, str]
"""The JSON text of each value, by column."""
_name = lru_cache(1024)(exact_json.dumps)


class JsonLinesSink(FixedPartitionedSink[Item, None]):
    r"""Lines of JSON in UTF-8, at least once: after a crash the lines of epochs that were not yet durable come again.

    There is no parallelism: one partition writes all lines in order. The sink only appends to its file, and syncs it at
    the end of each epoch, before the epoch is acknowledged. The next start removes a line that a crash cut off.
    Standard output is only flushed. To get each change once, drop lines whose position (`_commit_lsn`, `_seq`) or
    `message_id` came before, or use `ParquetSink` or `TwoPhaseSink`.

    A batch becomes one line per row, with the columns' own names. Values are lossless: numerics are strings, bytes are
    PostgreSQL's hexadecimal text, times are ISO 8601, json and jsonb are JSON. If PostgreSQL did not send a large value
    because it did not change, its column is absent and named in `_unchanged`. `_before`, `_unchanged` and `_raw` are
    absent when they are null. An event becomes pypgoutput's JSON, a dict its own.

    Args:
        file: A path, whose folder is created when the first item arrives; None for standard output.

    Example:
        >>> from bytewax import operators as op
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSource, run_main
        >>> flow = Dataflow("alerts")
        >>> alerts = op.input("in", flow, TestingSource([("7", {"customer": 7, "city": "Ōsaka", "raw": b"\x00"})]))
        >>> op.output("out", alerts, JsonLinesSink())
        >>> run_main(flow)
        {"customer": 7, "city": "Ōsaka", "raw": "\\x00"}
    """

    def __init__(self, file: str | Path | None = None) -> None:
        self.file = None if file is None else local_path(file)

    def __repr__(self) -> str:
        return f"JsonLinesSink({'' if self.file is None else repr(str(self.file))})"

    def list_parts(self) -> list[str]:
        """One."""
        return ["jsonl"]

    def part_fn(self, item_key: str) -> int:
        """Every key goes to the single partition."""
        return 0

    def build_part(self, step_id: str, for_part: str, resume_state: None) -> _Lines:
        """Open the file.

        Raises:
            SinkError: It can't be written.
        """
        return _StandardOutput() if self.file is None else _File(self.file)


class _Lines(StatefulSinkPartition[Item, None]):
    def write_batch(self, values: list[Item]) -> None:
        for item in values:
            for chunk in _lines(item):
                self.write(chunk)

    def write(self, text: str) -> None:
        raise NotImplementedError


class _StandardOutput(_Lines):
    def write(self, text: str) -> None:
        with explained("can't write to", Path("/dev/stdout")):
            # JSON is UTF-8, whatever the encoding of standard output. A notebook's has no buffer of bytes.
            if (buffer := getattr(sys.stdout, "buffer", None)) is not None:
                sys.stdout.flush()
                buffer.write(_encoded(text))
            else:
                sys.stdout.write(text)
            sys.stdout.flush()

    def snapshot(self) -> None:
        return None


class _File(_Lines):
    def __init__(self, path: Path) -> None:
        self.path = path
        with explained("can't write to", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file: BinaryIO = path.open("ab+")
            need_file(self.file.fileno())
            _cut(self.file)

    def write(self, text: str) -> None:
        with explained("can't write to", self.path):
            self.file.write(_encoded(text))

    def snapshot(self) -> None:
        with explained("can't sync", self.path):
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        with explained("can't write to", self.path):
            self.file.close()


def _cut(file: BinaryIO) -> None:
    """Remove an incomplete last line."""
    end = file.seek(0, os.SEEK_END)
    at = end
    while at:
        start = max(0, at - _TAIL)
        file.seek(start)
        found = file.read(at - start).rfind(b"\n")
        if found >= 0:
            at = start + found + 1
            break
        at = start
    if at < end:
        file.truncate(at)


def _lines(item: Item) -> Iterator[str]:
    """The lines of an item, a few thousand at a time."""
    try:
        match item:
            case ChangeBatch():
                yield from map(_text, _changes(item))
            case ChangeEvent():
                yield item.model_dump_json() + "\n"
            case pa.RecordBatch() | pa.Table():
                for batch in [item] if isinstance(item, pa.RecordBatch) else item.to_batches():
                    for part in _parts(batch):
                        yield _text(_rows(part.schema.names, part.columns, part.num_rows, {}))
            case Mapping():
                yield exact_json.dumps(dict(item)) + "\n"
            case _:
                raise SinkError(
                    f"a line of JSON can be made of a batch, an event or a dict, not of {type(item).__name__}",
                    hint="map it to a dict before this step",
                )
    except (TypeError, ValueError) as e:
        raise SinkError(f"a value has no form in JSON: {e}", hint="map it to one that has, before this step") from e


def _parts(data: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for start in range(0, data.num_rows, _TOGETHER):
        yield data.slice(start, _TOGETHER)


def _rows(names: Sequence[str], columns: Sequence[pa.Array], length: int, known: Mapping[str, Column]) -> list[_Texts]:
    """Rows as the JSON text of each value. `known` describes a table's columns beyond what their Arrow types say."""
    texts = [
        list(map(exact_json.dumps, to_python(column, known.get(name), parsed=False)))
        for name, column in zip(names, columns, strict=True)
    ]
    return rows(names, texts, length)


def _changes(batch: ChangeBatch) -> Iterator[list[_Texts]]:
    own, metadata = {column.name: column for column in batch.schema.columns}, batch.schema.metadata_names
    for part in _parts(batch.data):
        names = [name for name in part.schema.names if name != metadata.before]
        found = _rows(names, [part.column(name) for name in names], part.num_rows, own)
        for name in {metadata.unchanged, metadata.raw} & set(names):
            for i in np.flatnonzero(part.column(name).is_null().to_numpy(zero_copy_only=False)).tolist():
                del found[i][name]
        if metadata.unchanged in names:
            unchanged = part.column(metadata.unchanged)
            for i in np.flatnonzero(unchanged.is_valid().to_numpy(zero_copy_only=False)).tolist():
                for name in unchanged[i].as_py():
                    found[i].pop(name, None)
        if metadata.before in part.schema.names:
            before = part.column(metadata.before)
            # Unless the replica identity is FULL, an old row has only the key. Other columns are absent, not NULL.
            sent = [field.name for field in before.type if field.name in own and own[field.name].key]
            there = np.flatnonzero(before.is_valid().to_numpy(zero_copy_only=False)).tolist()
            olds = before.drop_null()
            olds_sent = _rows(sent, [olds.field(name) for name in sent], len(olds), own)
            for i, old in zip(there, olds_sent, strict=True):
                found[i][metadata.before] = _object(old)
        yield found


def _object(row: _Texts) -> str:
    return "{" + ", ".join([f"{_name(name)}: {text}" for name, text in row.items()]) + "}"


def _text(found: Iterable[_Texts]) -> str:
    return "".join([_object(row) + "\n" for row in found])


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        raise SinkError("a text has half of a surrogate pair, which is not Unicode", hint="repair it before") from e
