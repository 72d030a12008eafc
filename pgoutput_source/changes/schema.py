"""What a change is of and where it stands: positions, columns and the versions of a table.

Nothing here holds rows: those are in `changes`, columnar, and in `events`, one by one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa

from pgoutput_source.errors import ConfigurationError
from pgoutput_source.protocol.wire import Lsn

OPS = ("I", "U", "D", "R", "T")
"""The values of `_op`: insert, update, delete, read by a snapshot, truncate. A batch's dictionary keeps this order."""

OP_CODE = {op: code for code, op in enumerate(OPS)}


class Position(NamedTuple):
    """Where a change stands in the total order of all changes, and its identity: equal under replay.

    `commit_lsn` is the start of its transaction's commit record, `seq` counts the changes within the transaction
    from 0, in the order in which PostgreSQL sends them.

    >>> Position(Lsn("0/16B3748"), 3) < Position(Lsn("0/16B3900"), 0)
    True
    >>> print(Position(Lsn("0/16B3748"), 3))
    0/16B3748#3
    """

    commit_lsn: Lsn
    seq: int

    def __str__(self) -> str:
        return f"{self.commit_lsn}#{self.seq}"


@dataclass(frozen=True, slots=True)
class Column:
    """A published column: what the Relation message says, and the Arrow type that holds its values.

    `key` says whether it belongs to the replica identity (with REPLICA IDENTITY FULL every column does); `metadata` is
    what its type adds to the Arrow field's.
    """

    name: str
    type_oid: int
    typmod: int
    key: bool
    type_name: str
    arrow: pa.DataType
    metadata: tuple[tuple[str, str], ...] = ()

    @property
    def field(self) -> pa.Field:
        """The Arrow field: always nullable, with `pg.oid`, `pg.type` and `pg.typmod` as metadata."""
        meta = {"pg.oid": str(self.type_oid), "pg.type": self.type_name, "pg.typmod": str(self.typmod)}
        return pa.field(self.name, self.arrow, nullable=True, metadata=meta | dict(self.metadata))


def metadata_fields(table: pa.DataType) -> list[pa.Field]:
    """The fields that stand behind a table's own columns in each batch; `table` is the struct of these columns."""
    return [
        pa.field("_op", pa.dictionary(pa.int8(), pa.utf8()), nullable=False),
        pa.field("_commit_lsn", pa.uint64(), nullable=False),
        pa.field("_seq", pa.uint64(), nullable=False),
        pa.field("_lsn", pa.uint64(), nullable=False),
        pa.field("_xid", pa.uint32(), nullable=False),
        pa.field("_commit_ts", pa.timestamp("us", "UTC"), nullable=False),
        pa.field("_before", table),
        pa.field("_unchanged", pa.list_(pa.utf8())),
        pa.field("_raw", pa.map_(pa.utf8(), pa.utf8())),
    ]


METADATA_COLUMNS = tuple(f.name for f in metadata_fields(pa.struct([])))
"""Names of the columns that stand behind a table's own in every batch, file and frame."""


@dataclass(frozen=True)
class TableSchema:
    """One version of one table, as a Relation message describes it.

    `replica_identity` is PostgreSQL's letter: 'd' default (the primary key), 'f' full, 'i' index, 'n' nothing.
    `origin` names where it comes from (`system`, `database`, `slot`) and is written into the metadata of each batch,
    so that files tell whose changes they hold. Two versions are equal if and only if their `fingerprint` is.

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

    @property
    def table(self) -> str:
        """Schema and table: ``public.orders``."""
        return f"{self.namespace}.{self.name}"

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """What makes two versions the same: a Relation that is sent again without a real change has an equal one."""
        return (self.relation_id, self.namespace, self.name, self.replica_identity, self.columns)

    @property
    def key(self) -> tuple[str, ...]:
        """Names of the columns of the replica identity."""
        return tuple(c.name for c in self.columns if c.key)

    @functools.cached_property
    def row_type(self) -> pa.StructType:
        """The table's own columns as an Arrow struct: the type of `_before`."""
        return pa.struct([c.field for c in self.columns])

    @functools.cached_property
    def arrow(self) -> pa.Schema:
        """The schema of this version's batches: the table's columns, then the metadata columns."""
        names = [c.name for c in self.columns]
        clash = sorted(set(names) & set(METADATA_COLUMNS))
        if clash:
            raise ConfigurationError(
                f"column {clash[0]!r} has the name of a metadata column",
                table=self.table,
                column=clash[0],
                hint="leave it out of the publication with a column list (PostgreSQL 15 or newer)",
            )
        meta = {"pg.table": self.table, "pg.relation_id": str(self.relation_id), "pg.identity": self.replica_identity}
        meta |= {f"pg.{k}": v for k, v in self.origin}
        return pa.schema([c.field for c in self.columns] + metadata_fields(self.row_type), metadata=meta)
