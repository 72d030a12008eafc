"""Arrow columns as DuckDB holds them: every Arrow type of the type table has a type there, and takes it from Arrow.

https://duckdb.org/docs/stable/sql/data_types/overview
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.changes.schema import MetadataNames
from pgoutput_source.types.written import written

TEXTS: Final = "MAP(VARCHAR, VARCHAR)"
TYPES: Final[dict[pa.DataType, str]] = {
    pa.bool_(): "BOOLEAN",
    pa.int8(): "TINYINT",
    pa.int16(): "SMALLINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.uint8(): "UTINYINT",
    pa.uint16(): "USMALLINT",
    pa.uint32(): "UINTEGER",
    pa.uint64(): "UBIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
    pa.utf8(): "VARCHAR",
    pa.large_utf8(): "VARCHAR",
    pa.binary(): "BLOB",
    pa.large_binary(): "BLOB",
    pa.date32(): "DATE",
    pa.time64("us"): "TIME",
    pa.timestamp("us"): "TIMESTAMP",
    pa.timestamp("us", "UTC"): "TIMESTAMP WITH TIME ZONE",
}
METADATA: Final = MetadataNames(
    op="VARCHAR",
    commit_lsn="UBIGINT",
    seq="UBIGINT",
    lsn="UBIGINT",
    xid="UINTEGER",
    commit_ts="TIMESTAMP WITH TIME ZONE",
    before=TEXTS,
    unchanged="VARCHAR[]",
    raw=TEXTS,
)
"""The types of the metadata columns."""

_INFINITY: Final = 2**63 - 1  # DuckDB's infinity; to PostgreSQL a microsecond of the year 294247


def type_for(kind: pa.DataType) -> str:
    """DuckDB's type for an Arrow type.

    >>> type_for(pa.list_(pa.struct([("lower", pa.int32()), ("b c", pa.decimal128(10, 2))])))
    'STRUCT("lower" INTEGER, "b c" DECIMAL(10, 2))[]'

    Raises:
        TypeError: The type table gives no such Arrow type.
    """
    if isinstance(kind, pa.BaseExtensionType):
        return type_for(kind.storage_type)
    if (name := TYPES.get(kind)) is not None:
        return name
    if pa.types.is_dictionary(kind):
        return type_for(kind.value_type)
    if pa.types.is_decimal128(kind):
        return f"DECIMAL({kind.precision}, {kind.scale})"
    if pa.types.is_map(kind):
        return f"MAP({type_for(kind.key_type)}, {type_for(kind.item_type)})"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"{type_for(kind.value_type)}[]"
    if pa.types.is_fixed_size_list(kind):
        return f"{type_for(kind.value_type)}[{kind.list_size}]"
    if pa.types.is_struct(kind):
        return f"STRUCT({', '.join(f'{quoted(field.name)} {type_for(field.type)}' for field in kind)})"
    raise TypeError(f"no DuckDB type is known for Arrow's {kind}")


def quoted(name: str) -> str:
    """An identifier in SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text in SQL."""
    return "'" + text.replace("'", "''") + "'"


def held(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch without the moment that DuckDB takes for infinity; its text is in `_raw`."""
    raw_name = MetadataNames.of(batch.schema).raw
    texts: dict[int, dict[str, str]] = {}
    for i, field in enumerate(batch.schema):
        if not pa.types.is_timestamp(field.type) or pc.max(batch.column(i).view(pa.int64())).as_py() != _INFINITY:
            continue
        column = batch.column(i)
        infinite = pc.fill_null(pc.equal(column.view(pa.int64()), _INFINITY), False)
        rows = np.flatnonzero(infinite.to_numpy(zero_copy_only=False))
        for row, text in zip(rows.tolist(), written(column.take(pa.array(rows))).to_pylist(), strict=True):
            texts.setdefault(row, {})[field.name] = text
        batch = batch.set_column(i, field, pc.if_else(infinite, pa.scalar(None, field.type), column))
    if texts:
        at = batch.schema.get_field_index(raw_name)
        raws: list[Any] = batch.column(at).to_pylist()
        for row, more in texts.items():
            raws[row] = list({**dict(raws[row] or ()), **more}.items())
        batch = batch.set_column(at, batch.schema.field(at), pa.array(raws, batch.schema.field(at).type))
    return batch
