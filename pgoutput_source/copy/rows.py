"""Turns tuples of a binary COPY into batches of rows with `_op` R."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.changes.batches import ChangeBatch, UndecodedBatch, known_fields
from pgoutput_source.changes.schema import OP_CODE, OPS, TableSchema
from pgoutput_source.copy.tables import SourceTable
from pgoutput_source.decode.copied import CopiedColumn, Tuples, decode_copied
from pgoutput_source.decode.relations import Relations
from pgoutput_source.errors import ConfigurationError, DecodeError

_NAMES = pa.array(OPS, pa.utf8())


def columns_of(
    tuples: Tuples, table: SourceTable, relations: Relations, *, on_misfit: str
) -> tuple[list[pa.Array] | DecodeError, pa.MapArray]:
    """The columns of the table, and the exact texts of their misfits; see `decode.copied`.

    If a value is invalid for its type or, with on_misfit="error", doesn't fit its Arrow type, the result has the error
    instead of the columns.

    Raises:
        ProtocolError: The tuples do not match these columns.
    """
    columns = [
        CopiedColumn(column, relations.type_of(column.type_oid), source.as_text)
        for source, column in zip(table.columns, table.schema.columns, strict=True)
    ]
    try:
        found = decode_copied(tuples, columns, table.schema.table, on_misfit=on_misfit)
        _check_clear(found.raw, table.schema)
        return found
    except DecodeError as e:
        return e, pa.nulls(len(tuples), pa.map_(pa.utf8(), pa.utf8()))


def _check_clear(raw: pa.MapArray, schema: TableSchema) -> None:
    metadata, names = schema.metadata_names, [column.name for column in schema.columns]
    odd = [name for name in names if metadata.unclear(name, names)]
    for name in odd if raw.null_count < len(raw) else ():
        if pc.map_lookup(raw, pa.scalar(name), "first").null_count < len(raw):
            raise DecodeError(
                f"a value that its Arrow type can't hold, and {name!r} in {metadata.raw} may be two things",
                table=schema.table,
                column=name,
                hint=metadata.remedy,
            )


def batch_of(
    schema: TableSchema,
    arrays: Sequence[pa.Array] | DecodeError,
    raw: pa.MapArray,
    *,
    position: tuple[int, int],
    lsn: int,
    taken: datetime,
    op: str = "R",
) -> ChangeBatch:
    """A batch of copied rows.

    Args:
        schema: The version of the table.
        arrays: Its columns, or the reason why they can't be decoded: then the result is an `UndecodedBatch`.
        raw: The column `_raw`.
        position: The position of the first row. The others count up.
        lsn: The WAL position that was read after the snapshot, for `_lsn`.
        taken: When the snapshot was taken, for `_commit_ts`.
        op: `_op` of all rows.
    """
    size = len(raw)
    fields = known_fields(schema.metadata_prefix)
    moment = int((taken - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1_000_000)
    known = [
        pa.DictionaryArray.from_arrays(pa.array(np.full(size, OP_CODE[op], np.int8)), _NAMES),
        pa.array(np.full(size, position[0], np.uint64)),
        pa.array(np.arange(position[1], position[1] + size, dtype=np.uint64)),
        pa.array(np.full(size, lsn, np.uint64)),
        pa.array(np.zeros(size, np.uint32)),
        pa.array(np.full(size, moment, np.int64)).view(pa.timestamp("us", "UTC")),
    ]
    try:
        if isinstance(arrays, DecodeError):
            raise arrays
        names, kinds = schema.metadata_names, schema.arrow
    except (DecodeError, ConfigurationError) as e:
        return UndecodedBatch(schema, pa.RecordBatch.from_arrays(known, schema=pa.schema(fields)), e)
    old = [pa.nulls(size, kinds.field(name).type) for name in (names.before, names.unchanged)]
    return ChangeBatch(schema, pa.RecordBatch.from_arrays([*arrays, *known, *old, raw], schema=kinds))


def truncate_of(schema: TableSchema, *, position: tuple[int, int], lsn: int, taken: datetime) -> ChangeBatch:
    """A truncate made by the copy: it empties the table downstream before the table is copied again."""
    arrays = [pa.nulls(1, column.arrow) for column in schema.columns]
    raw = pa.nulls(1, pa.map_(pa.utf8(), pa.utf8()))
    return batch_of(schema, arrays, raw, position=position, lsn=lsn, taken=taken, op="T")
