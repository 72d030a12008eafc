"""Tuples of COPY in binary → a batch of rows with `_op` R.

A tuple is walked column by column, one step for all rows at once, as the stream's are; each column is decoded by the
same row of the type table, so that a copied value and a streamed one are equal.

https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.3.55.9.4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.changes.schema import OP_CODE, OPS, TableSchema
from pgoutput_source.copy.tables import SourceTable
from pgoutput_source.decode.relations import Relations
from pgoutput_source.errors import DecodeError, ProtocolError
from pgoutput_source.types.base import Sent, exact_text, numbers_at, ranges_of

Ints = NDArray[np.int64]

_HEADER = 19  # bytes before the first tuple: signature, flags, and the length of an extension that is never there
_PADDING = bytes(32)
_NAMES = pa.array(OPS, pa.utf8())


@dataclass(slots=True)
class Copied:
    """Tuples of a COPY, one for each of `lengths`; the first piece begins with the header, the last may end with the
    trailer.
    """

    parts: list[bytes]
    lengths: list[int]
    first: bool


def columns_of(
    copied: Copied, table: SourceTable, relations: Relations, *, on_misfit: str
) -> tuple[list[pa.Array], pa.MapArray]:
    """The columns of the table, and the exact texts of values that they can't hold.

    Raises:
        ProtocolError: The tuples are not what COPY sends of these columns.
        DecodeError: A value is not one of its type; or, with on_misfit="error", doesn't fit its Arrow type.
    """
    raw = b"".join([*copied.parts, _PADDING])
    length = np.array(copied.lengths, np.int64)
    end = np.cumsum(length)
    position = end - length
    if copied.first:
        position[0] += _HEADER
    fields = numbers_at(raw, ">i2", position)
    if len(fields) and fields[-1] == -1:  # the trailer
        position, end, fields = position[:-1], end[:-1], fields[:-1]
    _check(fields == len(table.columns), table)
    position = position + 2
    arrays: list[pa.Array] = []
    misfits: dict[int, list[tuple[str, str]]] = {}
    for source, column in zip(table.columns, table.schema.columns, strict=True):
        _check(position + 4 <= end, table)
        size = numbers_at(raw, ">i4", position).astype(np.int64)
        start = position + 4
        null = size < 0
        size = np.where(null, 0, size)
        position = start + size
        _check(position <= end, table)
        cells = _Cells(raw, start, size, null, as_text=source.as_text)
        try:
            values = cells.decode(relations, column.type_oid, column.arrow)
        except (ValueError, pa.ArrowException) as e:
            raise DecodeError(
                "the initial copy read what is not a value of its type",
                table=table.schema.table,
                column=column.name,
                type_name=column.type_name,
                hint="look at the column's values; a column list leaves the column out (PostgreSQL 15 or newer)",
            ) from e
        for row in np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False) & ~null).tolist():
            if on_misfit == "error":
                raise DecodeError(
                    f"a value that {column.arrow} can't hold",
                    table=table.schema.table,
                    column=column.name,
                    type_name=column.type_name,
                )
            misfits.setdefault(row, []).append((column.name, cells.text(row, relations, column.type_oid)))
        arrays.append(values)
    kind = pa.map_(pa.utf8(), pa.utf8())
    texts = (
        pa.nulls(len(position), kind) if not misfits else pa.array([misfits.get(i) for i in range(len(position))], kind)
    )
    return arrays, texts


@dataclass(slots=True)
class _Cells:
    """One column's values: where each lies, and which are NULL."""

    raw: bytes
    start: Ints
    size: Ints
    null: NDArray[np.bool_]
    as_text: bool

    def decode(self, relations: Relations, oid: int, kind: pa.DataType) -> pa.Array:
        pg_type = relations.type_of(oid)
        if not len(self.start):
            return pa.nulls(0, kind)
        if self.as_text:
            return pg_type.decode(
                ranges_of(self.raw, self.start, self.size, ~self.null if self.null.any() else None), kind
            )
        assert pg_type.binary is not None
        if not self.null.any():
            return pg_type.binary.decode(Sent(self.raw, self.start, self.size), kind)
        good = ~self.null
        if not good.any():
            return pa.nulls(len(good), kind)
        values = pg_type.binary.decode(Sent(self.raw, self.start[good], self.size[good]), kind)
        return values.take(pa.array(np.cumsum(good) - 1, mask=self.null))

    def text(self, row: int, relations: Relations, oid: int) -> str:
        value = self.raw[self.start[row] : self.start[row] + self.size[row]]
        binary = relations.type_of(oid).binary
        return exact_text(value if self.as_text or binary is None else binary.text(value))


def _check(fits: NDArray[np.bool_], table: SourceTable) -> None:
    if not fits.all():
        raise ProtocolError(
            "COPY sent what is not a tuple of the table's columns",
            table=table.schema.table,
            hint="please report it with the server's version",
        )


def batch_of(
    schema: TableSchema,
    arrays: Sequence[pa.Array],
    raw: pa.MapArray,
    *,
    position: tuple[int, int],
    lsn: int,
    taken: datetime,
    op: str = "R",
) -> ChangeBatch:
    """A batch of rows that were read.

    Args:
        schema: The version of the table.
        arrays: Its columns.
        raw: The column `_raw`.
        position: Of the first row; the others count up.
        lsn: The position in the WAL that was read after the snapshot: `_lsn`.
        taken: When the snapshot was taken: `_commit_ts`.
        op: `_op` of all rows.
    """
    size = len(raw)
    kinds: dict[str, Any] = {field.name: field.type for field in schema.arrow}
    moment = int((taken - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1_000_000)

    def all_of(name: str, value: int) -> pa.Array:
        return pa.array(np.full(size, value, np.uint64)).cast(kinds[name])

    metadata = [
        pa.DictionaryArray.from_arrays(pa.array(np.full(size, OP_CODE[op], np.int8)), _NAMES),
        all_of("_commit_lsn", position[0]),
        pa.array(np.arange(position[1], position[1] + size, dtype=np.uint64)),
        all_of("_lsn", lsn),
        all_of("_xid", 0),
        pa.array(np.full(size, moment, np.int64)).view(kinds["_commit_ts"]),
        pa.nulls(size, kinds["_before"]),
        pa.nulls(size, kinds["_unchanged"]),
        raw,
    ]
    return ChangeBatch(schema, pa.RecordBatch.from_arrays([*arrays, *metadata], schema=schema.arrow))


def truncate_of(schema: TableSchema, *, position: tuple[int, int], lsn: int, taken: datetime) -> ChangeBatch:
    """A truncate of ours, which empties the table downstream before it is copied again."""
    arrays = [pa.nulls(1, column.arrow) for column in schema.columns]
    raw = pa.nulls(1, pa.map_(pa.utf8(), pa.utf8()))
    return batch_of(schema, arrays, raw, position=position, lsn=lsn, taken=taken, op="T")
