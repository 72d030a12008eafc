"""The published files of a `ParquetSink` as one dataset."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from pgoutput_source.changes.schema import MetadataNames
from pgoutput_source.compute.metadata import renamed
from pgoutput_source.files import local_path
from pgoutput_source.parquet.folder import FOOTER, Asked, published_files, read_index
from pgoutput_source.parquet.leaves import restored

logger = logging.getLogger(__name__)

_FORMAT = ds.ParquetFileFormat()


def read(folder: str | Path, *, table: str | None = None) -> ds.Dataset:
    """The published files of a `ParquetSink` as one dataset, with a schema that fits all versions of the table.

    A column that a file lacks is null in its rows. A column whose type has changed gets a type that holds the values of
    all files: the wider number, or text. If there is none (text became an array), it has the type of the newest file,
    and values of the older type are in a second column, named like ``tags (text)`` after their PostgreSQL type. Files
    with such values are read into memory. So are files that were written with another `metadata_prefix` than the newest
    file: their metadata columns get its names.

    Columns are matched by name. `current` matches them by identity, so that a renamed column keeps its values.

    The dataset is what is published now; call again for more. Only files of the table are opened, and among files that
    the index lists only one per version.

    Args:
        folder: The folder.
        table: Schema and table, to read only its changes. Write ``a."b.c"`` when a dot would be ambiguous. Files that
            version 0.1.0 wrote for such a table don't differ from those for ``"a.b".c``, and match both.

    Raises:
        ConfigurationError: `table` can be read in several ways, and the folder has one of these tables.

    Example:
        >>> read("out/nothing-yet").count_rows()
        0
    """
    schemas = schemas_of(local_path(folder).absolute(), table)
    if not schemas:
        return ds.dataset([], schema=pa.schema([]), format=_FORMAT)
    metadata = MetadataNames.of(list(schemas.values())[-1])
    schema, apart = _together([_under(schema, metadata) for schema in schemas.values()])
    others = {file for file in schemas if MetadataNames.of(schemas[file]) != metadata}
    if not apart and not others:
        return ds.dataset([str(file) for file in schemas], schema=schema, format=_FORMAT)
    if apart:
        logger.warning(
            "%s: the new type of %s can't hold older values: they are in separate columns",
            folder, ", ".join(sorted(apart)),
        )  # fmt: skip
    if others:
        logger.warning(
            "%s: the metadata columns of %d files don't begin with %s: these files are read into memory",
            folder, len(others), metadata.prefix,
        )  # fmt: skip
    children: list[ds.Dataset] = []
    for odd, group in itertools.groupby(schemas, lambda file: file in others or _splits(schemas[file], apart)):
        if odd:
            tables = [_named(pq.ParquetFile(file).read(), metadata) for file in group]
            children.append(ds.dataset(pa.concat_tables([_split(table, apart, schema) for table in tables])))
        else:
            children.append(ds.dataset([str(file) for file in group], schema=schema, format=_FORMAT))
    return ds.dataset(children)


def schemas_of(folder: Path, table: str | None = None) -> dict[Path, pa.Schema]:
    """The published files and their schemas, in the order of their first changes.

    A file in the index need not be opened: files of one version have the same schema.
    """
    listed = {file: (entry.get("table"), entry.get("schema", "")) for file, entry in read_index(folder).items()}
    asked = None if table is None else Asked(table)
    versions: dict[str, pa.Schema] = {}
    found = {}
    for file in published_files(folder):
        named, version = listed.get(file.relative_to(folder).as_posix(), (None, ""))
        if named is not None and asked is not None and not asked.has(named):
            continue
        schema = versions.get(version)
        if schema is None:
            schema = _FORMAT.inspect(str(file), fs.LocalFileSystem())
            metadata = schema.metadata or {}
            schema = restored(schema).with_metadata({k: v for k, v in metadata.items() if k != FOOTER.encode()})
            if version:
                versions[version] = schema
        if asked is None or asked.of(schema):
            found[file] = schema
    return found


# -- metadata columns under other names ------------------------------------------------------------------------------


def _under(schema: pa.Schema, metadata: MetadataNames) -> pa.Schema:
    """A schema with these names of its metadata columns."""
    names = dict(zip(MetadataNames.of(schema), metadata, strict=True))
    fields = [field.with_name(names.get(field.name, field.name)) for field in schema]
    return pa.schema(fields, metadata={**(schema.metadata or {}), **metadata.said})


def _named(table: pa.Table, metadata: MetadataNames) -> pa.Table:
    """A file's rows with these names of its metadata columns."""
    was = MetadataNames.of(table.schema)
    if was == metadata:
        return table
    index = table.schema.get_field_index(was.raw)
    if index >= 0:
        own = {name: name for name in table.column_names}
        texts = renamed(table.column(index), own, old=was.old, now=metadata.old)
        table = table.set_column(index, table.field(index), texts)
    return table.rename_columns(_under(table.schema, metadata).names).replace_schema_metadata(metadata.said or None)


# -- types that changed ---------------------------------------------------------------------------------------------


def common_type(kinds: Iterable[pa.DataType]) -> pa.DataType | None:
    """A type that holds the values of all these types; None if there is none.

    >>> common_type([pa.int32(), pa.int64()]), common_type([pa.int64(), pa.utf8()])
    (DataType(int64), DataType(string))
    >>> common_type([pa.int32(), pa.decimal128(8, 2)]), common_type([pa.int64(), pa.float64()])
    (Decimal128Type(decimal128(12, 2)), DataType(string))
    >>> common_type([pa.utf8(), pa.list_(pa.utf8())]) is None
    True
    """
    kinds = list(dict.fromkeys(kinds))
    if len(kinds) > 1 and all(map(is_number, kinds)):
        return _number(kinds)
    try:
        fields = [pa.schema([pa.field("", kind)]) for kind in kinds]
        found = pa.unify_schemas(fields, promote_options="permissive").field(0).type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return pa.utf8() if all(map(_has_text, kinds)) else None
    return found if all(_holds(found, kind) for kind in kinds) else None


def is_number(kind: pa.DataType) -> bool:
    """Whether values of this type are integers, decimals or floats."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _number(kinds: Sequence[pa.DataType]) -> pa.DataType:
    """The narrowest number that holds all values of these; text if Arrow's own choice would round or overflow."""
    t = pa.types
    exact = [(_digits(kind), kind.scale if t.is_decimal(kind) else 0) for kind in kinds if not t.is_floating(kind)]
    before, scale = (max(part) for part in zip(*exact, strict=True)) if exact else (0, 0)
    if len(exact) < len(kinds):
        return pa.float64() if before + scale <= _DIGITS_OF_DOUBLE else pa.utf8()
    if all(map(t.is_integer, kinds)) and not (pa.uint64() in kinds and any(map(t.is_signed_integer, kinds))):
        fields = [pa.schema([pa.field("", kind)]) for kind in kinds]
        return pa.unify_schemas(fields, promote_options="permissive").field(0).type
    return pa.decimal128(before + scale, scale) if before + scale <= _DIGITS_OF_DECIMAL else pa.utf8()


_DIGITS_OF_DOUBLE: Final = 15
_DIGITS_OF_DECIMAL: Final = 38  # a decimal256 can't be read by Polars, and DuckDB reads it as DOUBLE


def _digits(kind: pa.DataType) -> int:
    """How many digits values have before the point."""
    if pa.types.is_decimal(kind):
        return int(kind.precision - kind.scale)
    return {8: 3, 16: 5, 32: 10}.get(kind.bit_width, 20 if pa.types.is_unsigned_integer(kind) else 19)


def _holds(kind: pa.DataType, part: pa.DataType) -> bool:
    """Whether the numbers in a nested type fit in those of the common type that Arrow chose."""
    t = pa.types
    if t.is_struct(kind) and t.is_struct(part):
        return all(_holds(kind.field(field.name).type, field.type) for field in part)
    if t.is_map(kind) and t.is_map(part):
        return _holds(kind.key_type, part.key_type) and _holds(kind.item_type, part.item_type)
    if t.is_list(kind) and t.is_list(part):
        return _holds(kind.value_type, part.value_type)
    return not (is_number(kind) and is_number(part)) or kind == part or _number([kind, part]) == kind


def _has_text(kind: pa.DataType) -> bool:
    """Whether Arrow can cast values of this type to text without loss."""
    t = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return False
    return bool(
        t.is_string(kind) or t.is_integer(kind) or t.is_floating(kind) or t.is_decimal(kind) or t.is_boolean(kind)
        or t.is_date(kind) or t.is_time(kind) or t.is_timestamp(kind) or t.is_null(kind)
    )  # fmt: skip


def _together(schemas: Sequence[pa.Schema]) -> tuple[pa.Schema, dict[str, pa.DataType]]:
    """A schema for all of these, and the columns without a common type, with their newest types."""
    versions: dict[str, dict[pa.DataType, pa.Field]] = {}
    for schema in schemas:
        for field in schema:
            versions.setdefault(field.name, {}).pop(field.type, None)
            versions[field.name][field.type] = field
    fields, apart, more = [], {}, []
    for name, by_type in versions.items():
        newest = list(by_type.values())[-1]
        kind = common_type(by_type) if len(by_type) > 1 else newest.type
        if kind is None and name == MetadataNames.of(schemas[-1]).before:
            kind = pa.struct(_together([pa.schema(list(old.type)) for old in by_type.values()])[0])
        elif kind is None:
            apart[name], kind = newest.type, newest.type
            more += [old.with_name(second_name(old)) for old in by_type.values() if old.type != newest.type]
        fields.append(newest.with_type(kind))
    return pa.schema([*fields, *more], metadata=schemas[-1].metadata), apart


def second_name(field: pa.Field) -> str:
    """The name of the column for values that the newest type can't hold."""
    name = (field.metadata or {}).get(b"pg.type", str(field.type).encode()).decode()
    return f"{field.name} ({name})"


def _splits(schema: pa.Schema, apart: Mapping[str, pa.DataType]) -> bool:
    return any(name in schema.names and schema.field(name).type != kind for name, kind in apart.items())


def _split(table: pa.Table, apart: Mapping[str, pa.DataType], schema: pa.Schema) -> pa.Table:
    """A file's rows, with values that don't fit the newest type in separate columns."""
    columns = _apart(dict(zip(table.column_names, table.columns, strict=True)), list(table.schema), apart)
    name = MetadataNames.of(schema).before
    if name in columns:
        before = columns[name].combine_chunks()
        children = [before.field(i) for i in range(before.type.num_fields)]
        named = dict(zip([f.name for f in before.type], children, strict=True))
        inner = _apart(named, list(before.type), apart)
        kind = schema.field(name).type
        arrays = [_as(inner.get(f.name), f.type, len(before)) for f in kind]
        columns[name] = pa.StructArray.from_arrays(arrays, fields=list(kind), mask=before.is_null())
    return pa.table([_as(columns.get(f.name), f.type, len(table)) for f in schema], schema=schema)


def _apart(
    columns: dict[str, pa.Array], fields: Sequence[pa.Field], apart: Mapping[str, pa.DataType]
) -> dict[str, pa.Array]:
    odd = {f.name: second_name(f) for f in fields if f.name in apart and f.type != apart[f.name]}
    return {odd.get(name, name): column for name, column in columns.items()}


def _as(column: pa.Array | None, kind: pa.DataType, length: int) -> pa.Array:
    if column is None:
        return pa.nulls(length, kind)
    return column if column.type == kind else column.cast(kind)
