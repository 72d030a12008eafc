"""What Parquet makes of an Arrow schema: leaves that go by dotted paths, and no struct without a field.

A path is not unique: the column ``a.b`` and the field ``b`` of the struct ``a`` have the same. Parquet can't hold a
struct without fields, such as `_before` of a table without published columns, so it is stored with one field that is
always null; `read` and `current` give the type without it.

https://parquet.apache.org/docs/file-format/nestedencoding/
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import pyarrow as pa

NOTHING: Final = pa.field("nothing", pa.null())
"""The one field of a struct that has none. No column or attribute of PostgreSQL's has a type without values."""


class Leaf(NamedTuple):
    """A column of a Parquet file: its path, its type, the column of the table that it is in, and if it is in a list."""

    path: str
    kind: pa.DataType
    column: str
    in_list: bool


def leaves(schema: pa.Schema) -> Iterator[Leaf]:
    """The leaves of a schema, in the order of a Parquet file.

    >>> [leaf.path for leaf in leaves(pa.schema([("a", pa.struct([("b", pa.int8())])), ("c", pa.list_(pa.int8()))]))]
    ['a.b', 'c.list.element']
    """
    for field in schema:
        yield from _leaves(field.name, field.type, field.name, False)


def _leaves(path: str, kind: pa.DataType, column: str, in_list: bool) -> Iterator[Leaf]:
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_struct(kind):
        for child in kind:
            yield from _leaves(f"{path}.{child.name}", child.type, column, in_list)
    elif pa.types.is_map(kind):
        yield from _leaves(f"{path}.key_value.key", kind.key_type, column, True)
        yield from _leaves(f"{path}.key_value.value", kind.item_type, column, True)
    elif pa.types.is_nested(kind):
        yield from _leaves(f"{path}.list.element", kind.value_type, column, True)
    else:
        yield Leaf(path, kind, column, in_list)


def stored(schema: pa.Schema) -> pa.Schema:
    """The schema as Parquet can hold it.

    >>> stored(pa.schema([("a", pa.struct([]))])).field("a").type
    StructType(struct<nothing: null>)
    """
    return _with_structs(schema, lambda fields: fields or [NOTHING])


def restored(schema: pa.Schema) -> pa.Schema:
    """The schema that `stored` was made of."""
    return _with_structs(schema, lambda fields: [] if [(f.name, f.type) for f in fields] == [_NOTHING] else fields)


_NOTHING: Final = (NOTHING.name, NOTHING.type)
_Fields = list[pa.Field]


def _with_structs(schema: pa.Schema, change: Callable[[_Fields], _Fields]) -> pa.Schema:
    fields = [_changed(field, change) for field in schema]
    same = all(new is old for new, old in zip(fields, schema, strict=True))
    return schema if same else pa.schema(fields, metadata=schema.metadata)


def _changed(field: pa.Field, change: Callable[[_Fields], _Fields]) -> pa.Field:
    kind = _type(field.type, change)
    return field if kind.equals(field.type) else field.with_type(kind)


def _type(kind: pa.DataType, change: Callable[[_Fields], _Fields]) -> pa.DataType:
    if pa.types.is_struct(kind):
        return pa.struct(change([_changed(child, change) for child in kind]))
    if pa.types.is_list(kind):
        return pa.list_(_changed(kind.value_field, change))
    if pa.types.is_large_list(kind):
        return pa.large_list(_changed(kind.value_field, change))
    if pa.types.is_map(kind):
        return pa.map_(_changed(kind.key_field, change), _changed(kind.item_field, change))
    return kind
