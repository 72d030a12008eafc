"""The hot path: many Insert, Update and Delete frames of one version of one table → one `ChangeBatch`.

All frames of a poll lie joined in one buffer (`frames`). Their tuples are walked column by column (`tuples`). Arrow
gathers a column's values in one C++ pass, and the type's decoder parses them as a whole. No row ever becomes a Python
object.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgoutput_source.changes.batches import ChangeBatch, UndecodedBatch, known_fields
from pgoutput_source.changes.schema import OP_CODE, OPS, Column, TableSchema
from pgoutput_source.decode.cells import BadValue, decoded
from pgoutput_source.decode.frames import Bools, Frames, Ints
from pgoutput_source.decode.relations import ColumnType, TableVersion
from pgoutput_source.decode.transactions import Rows
from pgoutput_source.decode.tuples import BINARY, TEXT, UNCHANGED, TupleColumn, read_tuples
from pgoutput_source.errors import ConfigurationError, DecodeError
from pgoutput_source.protocol.wire import PG_EPOCH_US
from pgoutput_source.types.base import Sent, exact_text

_CODE = np.zeros(256, np.int8)
for _op, _code in OP_CODE.items():
    _CODE[ord(_op)] = _code
_OPS = pa.array(OPS, pa.utf8())

_SHOWN = 32  # characters of an undecodable value that an error may show
_TEXT_INSTEAD = 'binary="off" has the server send text, which can always be read'


def decode(frames: Frames, rows: Rows, version: TableVersion, *, on_misfit: str = "raw") -> ChangeBatch:
    """Rows of one table version as a batch; its columns are described in `changes.metadata_fields`.

    It is an `UndecodedBatch` if the version can't be decoded at all, if a value is not one of its column's type or,
    with on_misfit="error", doesn't fit its Arrow type.

    Raises:
        ProtocolError: A frame doesn't hold the tuples that its message must have.
    """
    schema = version.schema
    tag = frames.tag[rows.frame]
    new, old, old_rows = read_tuples(frames, rows.frame, tag, schema)
    known = [
        pa.DictionaryArray.from_arrays(pa.array(_CODE[tag]), _OPS),
        pa.array(rows.commit_lsn),
        pa.array(rows.seq),
        pa.array(frames.integers(">u8", frames.start[rows.frame] + 1)),
        pa.array(rows.xid),
        pa.array(rows.commit_ts + PG_EPOCH_US).view(pa.timestamp("us", "UTC")),
    ]
    error = version.error
    if error is None:
        decoder = _Decoder(frames, rows, version, on_misfit)
        try:
            arrays = [decoder.column(order, cells, None) for order, cells in enumerate(new)]
            before = _before(decoder, schema, old, old_rows, len(rows))
            arrays += [*known, before, _unchanged(schema, new, len(rows)), decoder.raw_column()]
            return ChangeBatch(schema, pa.RecordBatch.from_arrays(arrays, schema=schema.arrow))
        except (DecodeError, ConfigurationError) as e:
            error = e
    if error.lsn is None:
        error = copy.copy(error)
        error.lsn = int(known[3][0].as_py())
    metadata = pa.RecordBatch.from_arrays(known, schema=pa.schema(known_fields(schema.metadata_prefix)))
    return UndecodedBatch(schema, metadata, error)


@dataclass(slots=True)
class _ColumnCells:
    """The `TupleColumn` of one column of the table, in new or old tuples. `order` is the column's place.

    `rows` maps them to rows of the batch when they are the old tuples'.
    """

    column: Column
    type: ColumnType
    kind: NDArray[np.uint8]
    start: Ints
    length: Ints
    rows: Ints | None
    order: int


class _Decoder:
    """Decodes one table version's columns and collects the values that their Arrow type can't hold."""

    def __init__(self, frames: Frames, rows: Rows, version: TableVersion, on_misfit: str) -> None:
        self.frames, self.rows, self.on_misfit = frames, rows, on_misfit
        self.schema, self.types = version.schema, version.types
        self.misfits: dict[int, list[tuple[int, str, str]]] = {}

    def column(self, order: int, found: TupleColumn, rows: Ints | None) -> pa.Array:
        """One column's values. `rows` maps the values to rows of the batch when they are the old tuples'."""
        column, column_type = self.schema.columns[order], self.types[order]
        kind, start, length = found
        if not len(kind):
            return pa.nulls(0, column.arrow)
        cells = _ColumnCells(column, column_type, kind, start, length, rows, order)
        sent = kind == TEXT
        every = bool(sent.all())
        binary = None if every else kind == BINARY
        if binary is not None and binary.any():
            values = self._mixed(cells, sent, binary)
            sent |= binary
        elif every or sent.any():
            text = self.frames.slices(start, length, None if every else sent)
            values = self._decoded(cells, column_type.pg_type.decode, text, None)
        else:
            return pa.nulls(len(kind), column.arrow)
        older = column_type.older(self.rows.xid if rows is None else self.rows.xid[rows])
        if older is not None:
            values = values.take(pa.array(np.arange(len(values)), mask=older))
        if values.null_count != len(kind) - np.count_nonzero(sent):
            self._keep(cells, values, sent)
        return values

    def _mixed(self, cells: _ColumnCells, text: Bools, binary: Bools) -> pa.Array:
        """A column with values in binary: PostgreSQL decides for each one how it is sent."""
        pg_type = cells.type.pg_type
        if pg_type.binary is None:
            bad = int(np.argmax(binary))
            raise self._error(cells, bad, "a value in binary, which can't be read of this type", _TEXT_INSTEAD)
        at = np.flatnonzero(binary)
        sent = Sent(self.frames.raw, cells.start[at], cells.length[at])
        values = self._decoded(cells, pg_type.binary.decode, sent, at)
        if len(at) == len(binary):
            return values
        index = np.cumsum(binary) - 1
        if text.any():
            at = np.flatnonzero(text)
            texts = self.frames.slices(cells.start[at], cells.length[at], None)
            index[at] = len(values) + np.arange(len(at))
            values = pa.concat_arrays([values, self._decoded(cells, pg_type.decode, texts, at)])
        return values.take(pa.array(index, mask=~(text | binary)))

    def _decoded(
        self,
        cells: _ColumnCells,
        decode_part: Callable[[Any, pa.DataType], pa.Array],
        values: pa.BinaryArray | Sent,
        at: Ints | None,
    ) -> pa.Array:
        """`values` decoded; these are the cells `at`, all if it is None."""
        try:
            return decoded(values, cells.type.pg_type, decode_part, cells.column.arrow, defined=cells.type.defined)
        except BadValue as e:
            bad = e.index if at is None else int(at[e.index])
            raise self._error(cells, bad, "not a value of its type") from e

    def _keep(self, cells: _ColumnCells, values: pa.Array, sent: Bools) -> None:
        column, rows = cells.column, cells.rows
        metadata = self.schema.metadata_names
        name = column.name if rows is None else metadata.old + column.name
        for i in np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False) & sent):
            if self.on_misfit == "error":
                raise self._error(cells, int(i), f"a value that {column.arrow} can't hold")
            if metadata.unclear(name, [c.name for c in self.schema.columns]):
                problem = f"a value that {column.arrow} can't hold, and {name!r} in {metadata.raw} may be two things"
                raise self._error(cells, int(i), problem, metadata.remedy)
            row = int(i) if rows is None else int(rows[i])
            text = exact_text(self._text(cells, int(i)))
            place = cells.order if rows is None else cells.order + len(self.schema.columns)
            self.misfits.setdefault(row, []).append((place, name, text))

    def _text(self, cells: _ColumnCells, index: int) -> bytes:
        """PostgreSQL's exact text of one value."""
        value = self._bytes(cells, index)
        binary = cells.type.pg_type.binary
        if cells.kind[index] == TEXT or binary is None:
            return value
        try:
            return binary.text(value)
        except ValueError as e:
            raise self._error(cells, index, "not a value of its type") from e

    def _bytes(self, cells: _ColumnCells, index: int) -> bytes:
        return self.frames.raw[cells.start[index] : cells.start[index] + cells.length[index]]

    def _error(self, cells: _ColumnCells, index: int, problem: str, hint: str | None = None) -> DecodeError:
        column, rows = cells.column, cells.rows
        row = index if rows is None else int(rows[index])
        frame = self.rows.frame[row : row + 1]
        value, shown = self._bytes(cells, index), ""
        if cells.kind[index] == TEXT:
            shown = repr(value[:_SHOWN].decode(errors="replace") + ("…" if len(value) > _SHOWN else ""))
        else:
            shown = f"{len(value)} bytes in binary"
            hint = hint or _TEXT_INSTEAD
        return DecodeError(
            f"{problem}: {shown}",
            table=self.schema.table,
            column=column.name,
            type_name=column.type_name,
            lsn=int(self.frames.integers(">u8", self.frames.start[frame] + 1)[0]),
            hint=hint,
        )

    def raw_column(self) -> pa.MapArray:
        """`_raw`: the exact text of the values that were left null, by column."""
        kind = pa.map_(pa.utf8(), pa.utf8())
        if not self.misfits:
            return pa.nulls(len(self.rows), kind)
        found = {row: [(name, text) for _, name, text in sorted(items)] for row, items in self.misfits.items()}
        return pa.array([found.get(i) for i in range(len(self.rows))], kind)


def _before(decoder: _Decoder, schema: TableSchema, old: list[TupleColumn], old_rows: Ints, n: int) -> pa.Array:
    """`_before`: the old tuples as structs, null in rows that have none."""
    if not len(old_rows):
        return pa.nulls(n, schema.row_type)
    children = [decoder.column(order, cells, old_rows) for order, cells in enumerate(old)]
    if children:
        rows = pa.StructArray.from_arrays(children, fields=list(schema.row_type))
    else:
        rows = pa.array([{}] * len(old_rows), schema.row_type)
    if len(old_rows) == n:
        return rows
    index = np.zeros(n, np.int64)
    index[old_rows] = np.arange(len(old_rows))
    missing = np.ones(n, np.bool_)
    missing[old_rows] = False
    return rows.take(pa.array(index, mask=missing))


def _unchanged(schema: TableSchema, new: list[TupleColumn], n: int) -> pa.ListArray:
    """`_unchanged`: the columns whose value PostgreSQL did not send, null where it sent them all."""
    masks = [cells.kind == UNCHANGED for cells in new]
    if not any(m.any() for m in masks):
        return pa.nulls(n, pa.list_(pa.utf8()))
    table = np.stack(masks, axis=1)
    offsets = np.zeros(n + 1, np.int32)
    np.cumsum(table.sum(axis=1), out=offsets[1:])
    names = pa.array([c.name for c in schema.columns], pa.utf8())
    values = names.take(pa.array(np.nonzero(table)[1]))
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(~table.any(axis=1)))
