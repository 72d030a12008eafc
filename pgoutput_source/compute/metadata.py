"""Reads the metadata columns of a batch: `_op`, `_unchanged` and `_raw`, as masks and spans."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pgoutput_source.changes.schema import OP_CODE, MetadataNames

Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

INSERT, UPDATE, DELETE, READ, TRUNCATE = (OP_CODE[op] for op in "IUDRT")


class Span(NamedTuple):
    """Rows between truncates; `truncated` tells whether a truncate comes right before."""

    truncated: bool
    start: int
    end: int


class MisfitTexts(NamedTuple):
    """The exact texts of one column's misfits, and their rows."""

    rows: Ints
    texts: list[str]

    def column(self, length: int) -> pa.Array:
        """The texts as a column; null where the cell has the value."""
        index = np.full(length, -1, np.int64)
        index[self.rows] = np.arange(len(self.rows))
        return pa.array(self.texts, pa.utf8()).take(pa.array(index, mask=index < 0))


def own_columns(schema: pa.Schema) -> list[str]:
    """Names of the table's own columns."""
    metadata = MetadataNames.of(schema)
    return [name for name in schema.names if name not in metadata]


def operations(data: pa.RecordBatch) -> NDArray[np.int8]:
    """`_op` of each row as its index in `OPS`. Don't write to it: it may be the batch's own memory."""
    column = data.column(MetadataNames.of(data.schema).op)
    indices = column.indices.to_numpy()
    codes = [OP_CODE[op] for op in column.dictionary.to_pylist()]
    same = codes == list(range(len(codes)))  # the dictionary is `OPS`, as in every batch of ours
    found: NDArray[np.int8] = indices.astype(np.int8, copy=False) if same else np.array(codes, np.int8)[indices]
    return found


def of_operations(data: pa.RecordBatch, ops: Collection[str]) -> pa.RecordBatch:
    """The rows with one of these operations."""
    column = data.column(MetadataNames.of(data.schema).op)
    wanted = np.array([op in ops for op in column.dictionary.to_pylist()])[column.indices.to_numpy()]
    return data if wanted.all() else data.filter(pa.array(wanted))


def spans(ops: NDArray[np.int8]) -> Iterator[Span]:
    """Spans of rows between truncates. A final truncate is followed by an empty span."""
    start = 0
    for end in [*np.flatnonzero(ops == TRUNCATE).tolist(), len(ops)]:
        if end > start or (start and end == len(ops)):
            yield Span(start > 0, start, end)
        start = end + 1


def unsent(data: pa.RecordBatch, columns: Sequence[str]) -> dict[str, Bools]:
    """By column, the rows whose value PostgreSQL did not send: unchanged TOAST."""
    unchanged = data.column(MetadataNames.of(data.schema).unchanged)
    if unchanged.null_count == len(unchanged):
        return {}
    rows = pc.list_parent_indices(unchanged).to_numpy()
    names = pc.list_flatten(unchanged).dictionary_encode()
    masks: dict[str, Bools] = {}
    for code, name in enumerate(names.dictionary.to_pylist()):
        if name in columns:
            mask = np.zeros(len(data), np.bool_)
            mask[rows[names.indices.to_numpy() == code]] = True
            masks[name] = mask
    return masks


def texts(raw: pa.Array | None) -> dict[str, MisfitTexts]:
    """A `_raw` column by the names in it, old rows' under ``_before.name``."""
    if raw is None or raw.null_count == len(raw):
        return {}
    rows = np.flatnonzero(raw.is_valid().to_numpy(zero_copy_only=False))
    found: dict[str, tuple[list[int], list[str]]] = {}
    for row, known in zip(rows.tolist(), raw.drop_null().to_pylist(), strict=True):
        for name, text in known:
            at, values = found.setdefault(name, ([], []))
            at.append(row)
            values.append(text)
    return {name: MisfitTexts(np.array(at, np.int64), values) for name, (at, values) in found.items()}


def row_texts(raw: pa.Array, old: str) -> pa.Array:
    """A `_raw` column without the entries of old rows, which begin with `old`."""
    if raw.null_count == len(raw):
        return raw
    cells = [
        None if known is None else [(name, text) for name, text in known if not name.startswith(old)] or None
        for known in raw.to_pylist()
    ]
    return pa.array(cells, raw.type)


def renamed(
    column: pa.ChunkedArray, names: Mapping[str, str], *, old: str = "", now: str | None = None
) -> pa.ChunkedArray:
    """`_unchanged` or `_raw` with the current names of columns. Columns that are gone are left out.

    Args:
        column: The column.
        names: The current names of columns by their names in it.
        old: What the entries of old rows begin with in `_raw`; empty if there are none.
        now: What they begin with in the result, if it is something else.
    """
    if column.null_count == len(column):
        return column
    cells: list[Any] = []
    for cell in column.to_pylist():
        if cell is None:
            cells.append(None)
        elif pa.types.is_map(column.type):
            texts = [(*_split(name, old, now), text) for name, text in cell]
            cells.append([(prefix + names[name], text) for prefix, name, text in texts if name in names] or None)
        else:
            cells.append([names[name] for name in cell if name in names] or None)
    return pa.chunked_array([pa.array(cells, column.type)])


def _split(name: str, old: str, now: str | None) -> tuple[str, str]:
    if not old or not name.startswith(old):
        return "", name
    return old if now is None else now, name.removeprefix(old)
