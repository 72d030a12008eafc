"""`cdc.select`, `cdc.rename` and `cdc.mask`: batches with other columns.

A column occurs in several places of a batch: as itself, in the old row (`_before`), by name in `_unchanged`, and by
name with its text in `_raw`. All of them change together here, so that no trace remains of a column that was left out
or masked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
from bytewax import operators as op
from bytewax.dataflow import Stream, operator

from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.changes.schema import Column, MetadataNames, TableSchema
from pgoutput_source.compute.columns import column_of
from pgoutput_source.compute.metadata import own_columns
from pgoutput_source.errors import ConfigurationError

Mask: TypeAlias = Callable[[pa.Array], pa.Array]
"""Maps the values of a column to other values, one for each, in order."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A column that stays, with its name and its mask. Without `raw` its exact texts are dropped."""

    name: str
    mask: Mask | None = None
    raw: bool = True


@operator
def select(step_id: str, up: Stream[ChangeBatch], *columns: str) -> Stream[ChangeBatch]:
    """Only these columns of the table, in this order; the metadata columns stay.

    Keep the key if you apply the changes somewhere. It costs next to nothing, because no values are copied.

    Args:
        step_id: Unique name of the step.
        up: Batches.
        columns: Names of the table's columns.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from pgoutput_source.testing import batch
        >>> flow, out = Dataflow("shop"), []
        >>> made = batch("public.customers", [("I", {"id": 1, "name": "ann", "email": "ann@example.org"})])
        >>> customers = op.input("customers", flow, TestingSource([made]))
        >>> op.output("out", select("few", customers, "id", "name"), TestingSink(out))
        >>> run_main(flow)
        >>> out[0].data.schema.names[:3], out[0].data.schema.field("_before").type
        (['id', 'name', '_op'], StructType(struct<id: int64, name: string>))

    Raises:
        ConfigurationError: Once batches come: there is no such column.
    """
    return op.map("columns", up, reshaper({name: Kept(name) for name in columns}, others=False))


@operator
def rename(step_id: str, up: Stream[ChangeBatch], names: Mapping[str, str]) -> Stream[ChangeBatch]:
    """Rename columns. It costs next to nothing, because no values are copied.

    Args:
        step_id: Unique name of the step.
        up: Batches.
        names: New names by old ones.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from pgoutput_source.testing import batch
        >>> flow, out = Dataflow("shop"), []
        >>> orders = op.input("orders", flow, TestingSource([batch("public.orders", [("I", {"id": 1})])]))
        >>> op.output("out", rename("names", orders, {"id": "order_id"}), TestingSink(out))
        >>> run_main(flow)
        >>> out[0].data.schema.names[:2], out[0].schema.key
        (['order_id', '_op'], ('order_id',))

    Raises:
        ConfigurationError: Once batches come: there is no such column, or the new name is taken.
    """
    return op.map("columns", up, reshaper({old: Kept(new) for old, new in names.items()}, others=True))


@operator
def mask(step_id: str, up: Stream[ChangeBatch], *columns: str, using: Mask | None = None) -> Stream[ChangeBatch]:
    """Hide the values of columns from all later steps: they become NULL, or what `using` makes of them.

    The old row is masked too, and the exact texts of misfits (`_raw`) are dropped. A value that is NULL, or was not
    sent, stays NULL whatever `using` returns for it. One can still see whether a value was changed and, with `using`,
    which values are equal.

    Args:
        step_id: Unique name of the step.
        up: Batches.
        columns: Names of the table's columns.
        using: Maps an array of values to an array of other values, of any type. Equal values must give equal results.

    Example:
        >>> import hashlib
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from pgoutput_source.testing import batch
        >>> def short_hash(values):
        ...     return pa.array([v and hashlib.sha256(v.encode()).hexdigest()[:8] for v in values.to_pylist()])
        >>> flow, out = Dataflow("shop"), []
        >>> made = batch("public.customers", [("I", {"id": 1, "name": "ann", "email": "ann@example.org"})])
        >>> customers = op.input("customers", flow, TestingSource([made]))
        >>> hidden = mask("name", mask("email", customers, "email"), "name", using=short_hash)
        >>> op.output("out", hidden, TestingSink(out))
        >>> run_main(flow)
        >>> {name: out[0].data.column(name)[0].as_py() for name in ("id", "name", "email")}
        {'id': 1, 'name': '49915e0d', 'email': None}

    Raises:
        ConfigurationError: Once batches come: there is no such column, or `using` returns an array of another length.
    """
    how = nulls if using is None else using
    return op.map("columns", up, reshaper({name: Kept(name, how, raw=False) for name in columns}, others=True))


def nulls(values: pa.Array) -> pa.Array:
    """As many NULLs, of the same type."""
    return pa.nulls(len(values), values.type)


def reshaper(named: Mapping[str, Kept], *, others: bool) -> Callable[[ChangeBatch], ChangeBatch]:
    """A function that gives each batch the columns `named` and, with `others`, all other columns unchanged."""
    schemas: dict[TableSchema, TableSchema] = {}

    def reshape(batch: ChangeBatch) -> ChangeBatch:
        data = batch.data
        for name in named:
            column_of(data, name)
        own = own_columns(data.schema)
        kept = {name: named.get(name, Kept(name)) for name in (own if others else named)}
        names = [column.name for column in kept.values()]
        if len(set(names)) < len(names) or set(names) & set(MetadataNames.of(data.schema)):
            raise ConfigurationError(
                f"the columns would be {', '.join(names)}",
                table=batch.table,
                hint="use each name once, and no name of a metadata column",
            )
        return _reshaped(batch, kept, schemas)

    return reshape


def _reshaped(batch: ChangeBatch, kept: dict[str, Kept], schemas: dict[TableSchema, TableSchema]) -> ChangeBatch:
    data = batch.data
    arrays = {column.name: _masked(data.column(name), column) for name, column in kept.items()}
    schema = schemas.get(batch.schema)
    if schema is None or any(c.arrow != arrays[c.name].type for c in schema.columns):
        old = {c.name: c for c in batch.schema.columns}
        columns = tuple(_column(old[name], c.name, arrays[c.name].type) for name, c in kept.items() if name in old)
        schema = schemas[batch.schema] = dataclasses.replace(batch.schema, columns=columns)
    fields = [_field(data.schema.field(name), schema, c.name, arrays[c.name].type) for name, c in kept.items()]
    named = MetadataNames.of(data.schema)
    metadata = [data.schema.field(name) for name in data.schema.names if name in named]
    for i, field in enumerate(metadata):
        column = data.column(field.name)
        if field.name == named.before:
            column = _before(column, kept, schema)
            metadata[i] = field.with_type(schema.row_type)
        elif field.name == named.unchanged:
            column = _named(column, lambda names: [kept[n].name for n in names if n in kept])
        elif field.name == named.raw:
            column = _named(column, lambda texts: _texts(texts, kept, named.old))
        arrays[field.name] = column
    whole = pa.schema([*fields, *metadata], metadata=data.schema.metadata)
    return ChangeBatch(schema, pa.RecordBatch.from_arrays(list(arrays.values()), schema=whole))


def _masked(values: pa.Array, column: Kept) -> pa.Array:
    if column.mask is None:
        return values
    made = column.mask(values)
    if isinstance(made, pa.ChunkedArray):
        made = made.combine_chunks()
    if len(made) != len(values):
        raise ConfigurationError(
            f"using= returned {len(made)} values for {len(values)}",
            column=column.name,
            hint="return one value for each, in the same order",
        )
    if values.null_count:
        made = pc.if_else(pc.is_valid(values), made, pa.scalar(None, made.type))
    return made


def _column(old: Column, name: str, kind: pa.DataType) -> Column:
    if kind == old.arrow:
        return dataclasses.replace(old, name=name)
    return Column(name, 0, -1, old.key, str(kind), kind)


def _field(old: pa.Field, schema: TableSchema, name: str, kind: pa.DataType) -> pa.Field:
    for column in schema.columns:
        if column.name == name:
            return column.field
    return pa.field(name, kind)


def _before(before: pa.StructArray, kept: dict[str, Kept], schema: TableSchema) -> pa.Array:
    if before.null_count == len(before):
        return pa.nulls(len(before), schema.row_type)
    old_names = {column.name: name for name, column in kept.items()}
    children = []
    for column in schema.columns:
        values = _masked(pc.struct_field(before, [old_names[column.name]]), kept[old_names[column.name]])
        children.append(values.cast(column.arrow) if values.type != column.arrow else values)
    return pa.StructArray.from_arrays(children, fields=list(schema.row_type), mask=pc.is_null(before))


def _named(column: pa.Array, change: Callable[[Any], list[Any]]) -> pa.Array:
    """`_unchanged` or `_raw`, which are null in most rows, with `change` applied to their entries."""
    if column.null_count == len(column):
        return column
    return pa.array([None if names is None else change(names) or None for names in column.to_pylist()], column.type)


def _texts(texts: list[tuple[str, str]], kept: dict[str, Kept], old: str) -> list[tuple[str, str]]:
    out = []
    for name, text in texts:
        prefix = old if name.startswith(old) and name not in kept else ""
        column = kept.get(name.removeprefix(prefix))
        if column is not None and column.raw:
            out.append((prefix + column.name, text))
    return out
