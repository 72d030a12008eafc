"""Prepares columns for computing: which types can be grouped, summed and compared, and how.

Everything follows SQL: NaN is greater than every number, both zeros are equal, and text compares as with
``COLLATE "C"``. A value that its Arrow type can't hold is refused, and never counts as NULL.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.changes.schema import MetadataNames
from pgoutput_source.compute.keys import one_zero_one_nan
from pgoutput_source.compute.metadata import Bools, own_columns, texts
from pgoutput_source.errors import ConfigurationError, DecodeError

ROW: Final = "row\0"
"""An extra column. Its name has a zero byte, so no column of a table has such a name."""

_TEXT_NUMERIC: Final = pa.decimal128(38, 18)


def column_of(data: pa.RecordBatch, name: str) -> pa.Array:
    """A column by its name.

    Raises:
        ConfigurationError: There is no such column.
    """
    index = data.schema.get_field_index(name)
    if index < 0:
        raise ConfigurationError(
            f"there is no column {name!r}",
            table=_metadata(data.schema, b"pg.table"),
            column=name,
            hint=f"the table has {', '.join(own_columns(data.schema))}",
        )
    return data.column(index)


def operand(part: str, values: pa.Array, field: pa.Field) -> pa.Array:
    """A column as `part` of a function needs it: sums in the widest type, numerics that came as text as numbers.

    Raises:
        ConfigurationError: Values of this type can't be summed or compared.
        DecodeError: A numeric without declared precision doesn't fit decimal128(38, 18).
    """
    if part == "count":
        return values
    values = numbers(values, field)
    kind = values.type
    if part == "sum":
        if pa.types.is_integer(kind):
            return values.cast(pa.int64())
        if pa.types.is_floating(kind):
            return values.cast(pa.float64())
        if pa.types.is_decimal128(kind):
            return values.cast(pa.decimal128(38, kind.scale))
        if pa.types.is_decimal256(kind):
            return values.cast(pa.decimal256(76, kind.scale))
    elif is_plain(kind):
        return values
    raise ConfigurationError(
        f"no {part} of values of type {_metadata(field, b'pg.type') or kind}",
        column=field.name,
        hint="cdc.map_batches can add a column of another type",
    )


def group_key(values: pa.Array, field: pa.Field) -> pa.Array:
    """A column to group by: values that are equal in PostgreSQL are equal in it.

    Raises:
        ConfigurationError: Values of this type can't be grouped.
    """
    values = numbers(values, field)
    if pa.types.is_floating(values.type) and len(values):
        return one_zero_one_nan(values)
    if is_plain(values.type):
        return values
    raise ConfigurationError(
        f"no grouping by values of type {_metadata(field, b'pg.type') or values.type}",
        column=field.name,
        hint="cdc.map_batches can add a column of another type",
    )


def numbers(values: pa.Array, field: pa.Field) -> pa.Array:
    """A column of `numeric` without declared precision, which comes as text, as decimal128(38, 18). Others unchanged.

    Raises:
        DecodeError: A value has more digits, or is NaN or infinite.
    """
    if not pa.types.is_string(values.type) or _metadata(field, b"pg.type") != "numeric":
        return values
    try:
        return values.cast(_TEXT_NUMERIC)
    except pa.ArrowInvalid as e:
        raise DecodeError(
            "can't compute with a numeric of more than 20 digits before or 18 after the decimal point, NaN or infinity",
            column=field.name,
            type_name="numeric",
            hint="declare the column numeric(p,s), or leave such rows out with where=",
        ) from e


def is_plain(kind: pa.DataType) -> bool:
    """Whether values of this type compare in Arrow as in PostgreSQL."""
    t = pa.types
    return bool(
        t.is_primitive(kind) or t.is_decimal(kind) or t.is_string(kind) or t.is_binary(kind) or t.is_null(kind)
    ) and not t.is_interval(kind)


def referenced(where: pc.Expression | None, schema: pa.Schema) -> tuple[str, ...]:
    """The columns that an expression uses.

    Raises:
        ConfigurationError: It uses a column that does not exist.
    """
    if where is None:
        return ()
    try:
        schema.empty_table().filter(where)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
        raise _does_not_fit(e, schema) from e
    names = []
    for name in schema.names:
        # An expression does not tell which columns it uses, but it fails without one of them.
        try:
            schema.empty_table().drop_columns([name]).filter(where)
        except pa.ArrowInvalid:
            names.append(name)
    return tuple(names)


def filtered(data: pa.RecordBatch, where: pc.Expression) -> pa.RecordBatch:
    """The rows for which an expression is true.

    Raises:
        ConfigurationError: It does not fit the columns.
    """
    try:
        return data.filter(where)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
        raise _does_not_fit(e, data.schema) from e


def matching(rows: pa.Table, where: pc.Expression) -> Bools:
    """Which rows satisfy an expression.

    Raises:
        ConfigurationError: It does not fit the columns.
    """
    numbered = rows.append_column(ROW, pa.array(np.arange(rows.num_rows)))
    try:
        found = numbered.filter(where).column(ROW).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
        raise _does_not_fit(e, rows.schema) from e
    mask = np.zeros(rows.num_rows, np.bool_)
    mask[found] = True
    return mask


def _does_not_fit(error: Exception, schema: pa.Schema) -> ConfigurationError:
    return ConfigurationError(
        f"the condition does not fit the table: {error}",
        table=_metadata(schema, b"pg.table"),
        hint="use columns of the table, and compare each with a value of its own type, a numeric with a Decimal",
    )


def refuse_misfits(data: pa.RecordBatch, columns: Iterable[str], *, old: bool = False) -> None:
    """Refuse misfits: their cells are null, but their values are not NULL.

    Args:
        data: Changes.
        columns: The columns to look at.
        old: Whether to look at old rows instead of new ones.

    Raises:
        DecodeError: One of these columns has a misfit.
    """
    metadata = MetadataNames.of(data.schema)
    prefix = metadata.old if old else ""
    index = data.schema.get_field_index(metadata.raw)
    found = {} if index < 0 else texts(data.column(index))
    for name in columns:
        if prefix + name in found:
            row = int(found[prefix + name].rows[0])
            raise DecodeError(
                f"can't compute with a value that {data.schema.field(name).type} can't hold",
                table=_metadata(data.schema, b"pg.table"),
                column=name,
                lsn=data.column(metadata.lsn)[row].as_py() if metadata.lsn in data.schema.names else None,
                hint="map_batches can give it a value; windows can leave it out: "
                f'where=pc.field("{metadata.raw}").is_null()',
            )


def _metadata(of: Any, name: bytes) -> str | None:
    value = (of.metadata or {}).get(name)
    return None if value is None else value.decode()


def sorted_batch(columns: dict[str, Any], order: Sequence[str], metadata: MetadataNames) -> pa.RecordBatch:
    """Result columns as one record batch, sorted, NULLs last as in PostgreSQL; `metadata` are the stream's names."""
    table = pa.table(columns).replace_schema_metadata(metadata.said or None)
    if order:
        table = table.sort_by([(name, "ascending") for name in order])
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], table.schema)
