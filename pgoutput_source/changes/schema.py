"""Positions of changes, names of tables, columns, and the versions of a table.

Nothing here holds rows: `batches` has them as columns, `events` one by one.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import pyarrow as pa

from pgoutput_source.errors import ConfigurationError
from pgoutput_source.protocol.wire import Lsn

OPS = ("I", "U", "D", "R", "T")
"""The values of `_op`: insert, update, delete, read by a snapshot, truncate. A batch's dictionary keeps this order."""

OP_CODE = {op: code for code, op in enumerate(OPS)}


class Position(NamedTuple):
    """The place of a change in the total order of all changes, and its identity: a replayed change has the same.

    `commit_lsn` is the start of its transaction's commit record. `seq` counts the changes within the transaction from
    0, in the order in which PostgreSQL sends them.

    >>> Position(Lsn("0/16B3748"), 3) < Position(Lsn("0/16B3900"), 0)
    True
    >>> print(Position(Lsn("0/16B3748"), 3))
    0/16B3748#3
    """

    commit_lsn: Lsn
    seq: int

    def __str__(self) -> str:
        return f"{self.commit_lsn}#{self.seq}"


class TableName(NamedTuple):
    """The name of a table: its schema and its own name. The pair identifies the table; a text may be ambiguous.

    `str()` writes ``schema.name``. A part that a dot or a quote would make ambiguous is quoted as in SQL, and `parse`
    reads exactly what `str()` writes. Parts without quotes are taken literally: upper case stays upper case.

    >>> str(TableName("public", "orders")), str(TableName("a", "b.c"))
    ('public.orders', 'a."b.c"')
    >>> TableName.parse('"a.b".c')
    TableName(namespace='a.b', name='c')
    """

    namespace: str
    name: str

    def __str__(self) -> str:
        return ".".join('"' + part.replace('"', '""') + '"' if _AMBIGUOUS.search(part) else part for part in self)

    @classmethod
    def parse(cls, text: str) -> TableName:
        """The table that `text` names.

        >>> TableName.parse("a.b.c")
        Traceback (most recent call last):
        pgoutput_source.errors.ConfigurationError: table 'a.b.c' can be read in several ways
        hint: quote the part that holds a dot, as in SQL: 'a."b.c"' or '"a.b".c'

        Raises:
            ConfigurationError: It has no schema, or dots that can be read in several ways.
        """
        match = _TABLE_NAME.fullmatch(text)
        if match is not None:
            quoted_schema, schema, quoted_name, name = match.groups()
            return cls(
                schema if quoted_schema is None else quoted_schema.replace('""', '"'),
                name if quoted_name is None else quoted_name.replace('""', '"'),
            )
        if '"' in text:
            raise ConfigurationError(
                f"table {text!r} is not a schema and a name",
                hint="""write each part plain, or in double quotes with a quote inside doubled: 'public."a ""b"" c"'""",
            )
        parts = text.split(".")
        if len(parts) == 1:
            raise ConfigurationError(f"table {text!r} has no schema", hint=f"write 'public.{text}'")
        if not all(parts):
            raise ConfigurationError(
                f"table {text!r} is not a schema and a name", hint="write schema and table: 'public.orders'"
            )
        ways = (cls(".".join(parts[:i]), ".".join(parts[i:])) for i in range(1, len(parts)))
        raise ConfigurationError(
            f"table {text!r} can be read in several ways",
            hint=f"quote the part that holds a dot, as in SQL: {' or '.join(repr(str(way)) for way in ways)}",
        )

    @classmethod
    def of(cls, table: str | tuple[str, str]) -> TableName:
        """A table's name from its text, or from the pair of schema and name."""
        return cls.parse(table) if isinstance(table, str) else cls(*table)

    def written(self, text: str | None) -> bool:
        """Whether a state or file that names its table as `text` may mean this one.

        Version 0.1.0 joined the two parts with a dot, whatever they held.
        """
        return text in (str(self), f"{self.namespace}.{self.name}")


_AMBIGUOUS = re.compile(r'[."]|^$')
_PART = r'(?:"((?:[^"]|"")+)"|([^."]+))'
_TABLE_NAME = re.compile(rf"{_PART}\.{_PART}", re.DOTALL)


class Missing(NamedTuple):
    """The value of a column in rows that are older than the column: its text, or None for NULL."""

    text: str | None


@dataclass(frozen=True, slots=True)
class Column:
    """A published column, as in the Relation message, with the Arrow type that holds its values.

    Attributes:
        key: Whether it belongs to the replica identity. With REPLICA IDENTITY FULL every column does.
        metadata: What its type adds to the Arrow field's metadata.
        attnum: The column's number in its table; None if unknown. A renamed column keeps its number, and a column that
            was dropped and added again gets another.
        missing: Its value in rows that are older than the column; None if unknown. PostgreSQL sends no changes for
            these rows when it adds a column.
            https://www.postgresql.org/docs/current/catalog-pg-attribute.html (`attmissingval`)
    """

    name: str
    type_oid: int
    typmod: int
    key: bool
    type_name: str
    arrow: pa.DataType
    metadata: tuple[tuple[str, str], ...] = ()
    attnum: int | None = None
    missing: Missing | None = field(default=None, compare=False)

    @property
    def field(self) -> pa.Field:
        """The Arrow field: always nullable, with `pg.oid`, `pg.type` and `pg.typmod` as metadata.

        If known, `pg.attnum` and `pg.missing` are there too: see `attnum_of` and `missing_of`.
        """
        meta = {"pg.oid": str(self.type_oid), "pg.type": self.type_name, "pg.typmod": str(self.typmod)}
        if self.attnum is not None:
            meta["pg.attnum"] = str(self.attnum)
        if self.missing is not None:
            meta["pg.missing"] = json.dumps(self.missing.text, ensure_ascii=False)
        return pa.field(self.name, self.arrow, nullable=True, metadata=meta | dict(self.metadata))


def attnum_of(field: pa.Field) -> int | None:
    """A column's number in its table, from its Arrow field; None if the field does not have it.

    >>> attnum_of(Column("id", 20, -1, True, "bigint", pa.int64(), attnum=1).field)
    1
    """
    found = (field.metadata or {}).get(b"pg.attnum")
    return None if found is None else int(found)


def missing_of(field: pa.Field) -> Missing | None:
    """A column's value in older rows, from its Arrow field; None if the field does not have it.

    >>> missing_of(Column("n", 23, -1, False, "integer", pa.int32(), missing=Missing("42")).field)
    Missing(text='42')
    """
    found = (field.metadata or {}).get(b"pg.missing")
    return None if found is None else Missing(json.loads(found))


class MetadataNames(NamedTuple):
    """The names of the columns that follow a table's own in every batch, file and frame.

    They begin with the option `metadata_prefix`, which is "_" by default. Take the names from a `TableSchema` or, with
    `of`, from an Arrow schema: these know their prefix.

    >>> MetadataNames.with_prefix("pg_").op, MetadataNames.of(pa.schema([])).op
    ('pg_op', '_op')
    """

    op: str
    commit_lsn: str
    seq: str
    lsn: str
    xid: str
    commit_ts: str
    before: str
    unchanged: str
    raw: str

    @classmethod
    def with_prefix(cls, prefix: str) -> MetadataNames:
        """The names that begin with `prefix`."""
        return _names(prefix)

    @classmethod
    def of(cls, schema: pa.Schema) -> MetadataNames:
        """The names that an Arrow schema uses. A schema without a prefix in its metadata uses "_"."""
        return _names((schema.metadata or {}).get(_PREFIX_KEY, _PREFIX.encode()).decode())

    @property
    def prefix(self) -> str:
        """What each name begins with."""
        return self.op.removesuffix("op")

    @property
    def said(self) -> dict[str, str]:
        """The entry for the prefix in the metadata of an Arrow schema; none if the prefix is "_"."""
        return {} if self.prefix == _PREFIX else {_PREFIX_KEY.decode(): self.prefix}

    def say(self, data: pa.RecordBatch) -> pa.RecordBatch:
        """`data` with the prefix in the metadata of its schema, if it is needed and missing."""
        if self == MetadataNames.of(data.schema):
            return data
        return data.replace_schema_metadata({**(data.schema.metadata or {}), _PREFIX_KEY: self.prefix})

    @property
    def old(self) -> str:
        """What a column's name begins with where `raw` means its value in `before`: ``_before.``"""
        return f"{self.before}."

    @property
    def remedy(self) -> str:
        """What to do if a table has a column of such a name."""
        if self.prefix == _PREFIX:
            return 'metadata_prefix="cdc_" gives the metadata columns other names'
        return "choose another metadata_prefix, which begins the names of the metadata columns"

    def clash(self, columns: Iterable[str]) -> tuple[str, ...]:
        """Which of these columns of a table have the name of a metadata column."""
        return tuple(name for name in columns if name in self)

    def unclear(self, name: str, columns: Iterable[str]) -> bool:
        """Whether an entry `name` of `raw` may be of a column, or of another one's value in `before`.

        >>> MetadataNames.with_prefix("_").unclear("_before.id", ["id", "_before.id"])
        True
        """
        return name.startswith(self.old) and name in columns


@functools.cache
def _names(prefix: str) -> MetadataNames:
    return MetadataNames(*(prefix + name for name in MetadataNames._fields))


_PREFIX: Final = "_"
_PREFIX_KEY: Final = b"pg.metadata_prefix"


def metadata_fields(table: pa.DataType, prefix: str = _PREFIX) -> list[pa.Field]:
    """The fields that follow a table's own columns in each batch; `table` is the struct of these columns."""
    names = _names(prefix)
    return [
        pa.field(names.op, pa.dictionary(pa.int8(), pa.utf8()), nullable=False),
        pa.field(names.commit_lsn, pa.uint64(), nullable=False),
        pa.field(names.seq, pa.uint64(), nullable=False),
        pa.field(names.lsn, pa.uint64(), nullable=False),
        pa.field(names.xid, pa.uint32(), nullable=False),
        pa.field(names.commit_ts, pa.timestamp("us", "UTC"), nullable=False),
        pa.field(names.before, table),
        pa.field(names.unchanged, pa.list_(pa.utf8())),
        pa.field(names.raw, pa.map_(pa.utf8(), pa.utf8())),
    ]


METADATA_COLUMNS = tuple(_names(_PREFIX))
"""The names of the metadata columns with the default prefix; see `MetadataNames` for others."""


@dataclass(frozen=True)
class TableSchema:
    """One version of one table, as a Relation message describes it.

    `replica_identity` is PostgreSQL's letter: 'd' default (the primary key), 'f' full, 'i' index, 'n' nothing.
    `origin` names the source (`system`, `database`, `slot`) and is written into the metadata of each batch, so that
    files tell whose changes they have. `metadata_prefix` begins the names of the metadata columns. Two versions are
    equal if and only if their `fingerprint` is.

    Example:
        >>> columns = (Column("id", 20, -1, True, "bigint", pa.int64()), Column("v", 25, -1, False, "text", pa.utf8()))
        >>> orders = TableSchema(16401, "public", "orders", "d", columns)
        >>> orders.table, orders.key, orders.row_type
        ('public.orders', ('id',), StructType(struct<id: int64, v: string>))
    """

    relation_id: int
    namespace: str
    name: str
    replica_identity: str
    columns: tuple[Column, ...]
    origin: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    metadata_prefix: str = field(default=_PREFIX, compare=False)

    @functools.cached_property
    def full_name(self) -> TableName:
        """Schema and name, which identify the table."""
        return TableName(self.namespace, self.name)

    @functools.cached_property
    def table(self) -> str:
        """Schema and name as text: ``public.orders``, or ``a."b.c"`` when a dot would be ambiguous."""
        return str(self.full_name)

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """The identity of a version. A Relation that is sent again without a real change has the same one."""
        return (self.relation_id, self.namespace, self.name, self.replica_identity, self.columns)

    @property
    def key(self) -> tuple[str, ...]:
        """Names of the columns of the replica identity."""
        return tuple(c.name for c in self.columns if c.key)

    @property
    def metadata_names(self) -> MetadataNames:
        """The names of the columns that follow the table's own."""
        return _names(self.metadata_prefix)

    @functools.cached_property
    def row_type(self) -> pa.StructType:
        """The table's own columns as an Arrow struct: the type of `_before`."""
        return pa.struct([c.field for c in self.columns])

    @functools.cached_property
    def arrow(self) -> pa.Schema:
        """The schema of this version's batches: the table's columns, then the metadata columns.

        Raises:
            ConfigurationError: A column of the table has the name of a metadata column.
        """
        clash = self.metadata_names.clash(c.name for c in self.columns)
        if clash:
            raise ConfigurationError(
                f"column {clash[0]!r} has the name of a metadata column",
                table=self.table,
                column=clash[0],
                hint=self.metadata_names.remedy,
            )
        meta = {
            "pg.table": self.table,
            "pg.namespace": self.namespace,
            "pg.name": self.name,
            "pg.relation_id": str(self.relation_id),
            "pg.identity": self.replica_identity,
        } | self.metadata_names.said
        meta |= {f"pg.{k}": v for k, v in self.origin}
        fields = [c.field for c in self.columns] + metadata_fields(self.row_type, self.metadata_prefix)
        return pa.schema(fields, metadata=meta)
