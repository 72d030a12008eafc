"""Relation messages → versioned table schemas.

PostgreSQL sends a Relation message before the first change of a table on each connection, and again whenever its
catalogue entry was invalidated: by a changed column, but also by an ANALYZE or a new index. Only a changed fingerprint
makes a new version. Type messages name the types that the type table does not have.

PostgreSQL 14 and 15 do not announce tables again when their schema is renamed: they use the old name until the next
connection. That goes unnoticed until another table takes the name. Then the catalogue is asked what the first table is
called.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgoutput_source.changes.schema import Column, TableName, TableSchema
from pgoutput_source.decode.attributes import Attributes
from pgoutput_source.errors import DecodeError, PgOutputError, ProtocolError, SchemaChanged, ServerError
from pgoutput_source.protocol import messages
from pgoutput_source.types import OPAQUE, TYPES, PgType

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ColumnType:
    """What decodes a column. `defined`: the database defines the type, so the catalogue may be newer than the values.

    >>> ColumnType(TYPES[23]).older(np.array([700], np.uint32)) is None
    True
    """

    pg_type: PgType
    defined: bool = False

    def older(self, xids: NDArray[np.uint32]) -> NDArray[np.bool_] | None:
        """Which of these transactions may have written values before the type was altered; None stands for none."""
        changed = self.pg_type.changed
        if not changed:
            return None
        older: NDArray[np.bool_] = (xids - np.uint32(changed)).view(np.int32) <= 0  # transaction numbers wrap around
        return older if older.any() else None


@dataclass(frozen=True, slots=True)
class TableVersion:
    """A version of a table, with what decodes each of its columns; `error` says why its changes can't be decoded.

    `announced` is the Relation message that announced it, and `xid` that message's transaction.
    """

    schema: TableSchema
    types: tuple[ColumnType, ...]
    error: PgOutputError | None = None
    announced: bytes = b""
    xid: int | None = None


class Beginning(NamedTuple):
    """What begins with a Relation message: a version of a table, which replaces the one `before`.

    `version` is None for a table whose name is no longer known, `before` for one that was not announced before.
    """

    relation_id: int
    before: TableVersion | None
    version: TableVersion | None


class LookUp(Protocol):
    """Queries of the database's catalogue, which may be newer than the changes."""

    def __call__(self, oids: Sequence[int]) -> Mapping[int, PgType]:
        """Rows for the types that the database defines itself, by OID."""
        ...

    def table_name(self, relation_id: int) -> tuple[str, str] | None:
        """The schema and the name of a table; None if it is gone."""
        ...

    def attributes(self, relation_ids: Collection[int]) -> Mapping[int, Attributes]:
        """All columns of these tables, by relation; without the tables that are gone."""
        ...


class Relations:
    """The current `TableVersion` of every relation that was announced.

    Args:
        origin: Name and value pairs (system, database, slot) that are written into the metadata of each batch.
        look_up: Asked once for each type that the type table lacks, and for the columns of each table that is
            announced. Without it such a type is its text, and columns have no numbers.
        known: Describes the tables that must stay as they are, by relation, and grows with each table that comes.
            None lets all of them change.
        types: The type table of the server that the relations are of.
        metadata_prefix: What the names of the metadata columns begin with.
    """

    def __init__(
        self,
        origin: tuple[tuple[str, str], ...] = (),
        look_up: LookUp | None = None,
        known: Mapping[str, Sequence[str]] | None = None,
        types: Mapping[int, PgType] = TYPES,
        metadata_prefix: str = "_",
    ) -> None:
        self.origin = origin
        self.known = None if known is None else {relation: list(lines) for relation, lines in known.items()}
        self.metadata_prefix = metadata_prefix
        self._table = types
        self._look_up = look_up
        self._types: dict[int, PgType] = {}
        self._current: dict[int, TableVersion] = {}
        self._holder: dict[TableName, int] = {}  # the relation that a table's name was last announced for
        self._nameless: dict[int, TableSchema] = {}
        self._type_names: dict[int, str] = {}
        self._type_messages: dict[int, bytes] = {}
        self._attributes: Mapping[int, Attributes] = {}
        self._unreadable: DecodeError | None = None  # of the relation that is announced
        self._looked: dict[int, Attributes] = {}  # what the last look at each table found

    def fresh(self) -> Relations:
        """The same, before any message came."""
        return Relations(self.origin, self._look_up, self.known, self._table, self.metadata_prefix)

    def current(self, relation_id: int) -> TableVersion:
        """The version that is valid now.

        Raises:
            ProtocolError: No Relation message announced it.
            SchemaChanged: Another table has its name now, and its own is unknown.
        """
        try:
            return self._current[relation_id]
        except KeyError:
            if relation_id in self._nameless:
                raise nameless(self._nameless[relation_id]) from None
            raise ProtocolError(f"a change of relation {relation_id}, which no Relation message announced") from None

    def find(self, relation_id: int) -> TableSchema | None:
        """The schema that is valid now; None if no Relation message announced it."""
        version = self._current.get(relation_id)
        return None if version is None else version.schema

    def expect(self, relation_ids: Collection[int]) -> None:
        """Look up the columns of tables that will be announced next, all at once."""
        self._attributes = {}
        if self._look_up is None or not relation_ids:
            return
        try:
            found = self._look_up.attributes(relation_ids)
        except ServerError as e:
            # Without numbers columns are told apart by name. That is no reason to stop.
            logger.warning("columns are told apart by name alone, as the catalogue can't be read: %s", e.message)
            return
        self._attributes = {
            relation_id: now.following(self._looked.get(relation_id, now)) for relation_id, now in found.items()
        }
        self._looked |= self._attributes

    def announce(self, relation: messages.Relation, xid: int | None = None, message: bytes = b"") -> list[Beginning]:
        """Take note of a Relation message in transaction `xid`; the versions that begin with it, if anything changed.

        `message` is its bytes, which the version keeps. If the table must stay as it is, a version that differs has the
        error, and those who take the table get it.

        Raises:
            SchemaChanged: The table must stay as it is and has another name: those who take it would not notice.
        """
        self._unreadable = None
        self._learn([column.type_oid for column in relation.columns])
        schema = TableSchema(
            relation_id=relation.relation_id,
            namespace=relation.namespace or "pg_catalog",  # the protocol's way to save a few bytes
            name=relation.name,
            replica_identity=relation.replica_identity,
            columns=self._columns(relation, xid),
            origin=self.origin,
            metadata_prefix=self.metadata_prefix,
        )
        known = self._current.get(schema.relation_id)
        if known is not None and known.schema.fingerprint == schema.fingerprint:
            return []
        return self._begin(schema, message, xid)

    def _begin(self, schema: TableSchema, message: bytes, xid: int | None) -> list[Beginning]:
        error: PgOutputError | None = None if self.known is None else _changed(self.known, schema)
        if self._unreadable is not None:
            error = self._unreadable
            error.table = schema.table
        types = tuple(ColumnType(self.type_of(c.type_oid), c.type_oid in self._types) for c in schema.columns)
        version = TableVersion(schema, types, error, message, xid)
        begun = [Beginning(schema.relation_id, self._current.get(schema.relation_id), version)]
        holder = self._holder.get(schema.full_name, schema.relation_id)
        self._current[schema.relation_id] = version
        self._holder[schema.full_name] = schema.relation_id
        self._nameless.pop(schema.relation_id, None)
        if holder != schema.relation_id:
            begun += self._rename(holder, schema.full_name)
        return begun

    def _rename(self, relation_id: int, taken: TableName) -> list[Beginning]:
        """Another relation has the name `taken` now, so this one needs another if it was still called that."""
        known = self._current.get(relation_id)
        if known is None or known.schema.full_name != taken or self._look_up is None:
            return []
        name = self._look_up.table_name(relation_id)
        if name is None:
            # Mostly a table that was dropped and recreated, and no more changes of the old one will come.
            self._nameless[relation_id] = self._current.pop(relation_id).schema
            return [Beginning(relation_id, known, None)]
        schema = replace(known.schema, namespace=name[0], name=name[1])
        return [] if schema.full_name == taken else self._begin(schema, known.announced, known.xid)

    def name_type(self, kind: messages.Type, message: bytes = b"") -> None:
        """Take note of a Type message, and its bytes. A domain's has the domain's OID with its base type's name."""
        self._type_names[kind.type_oid] = f"{kind.namespace or 'pg_catalog'}.{kind.name}"
        self._type_messages[kind.type_oid] = message

    def type_messages(self, schema: TableSchema) -> list[bytes]:
        """The Type messages that named the types of a table's columns."""
        oids = dict.fromkeys(column.type_oid for column in schema.columns)
        return [self._type_messages[oid] for oid in oids if self._type_messages.get(oid)]

    def type_of(self, oid: int) -> PgType:
        """The row that decodes a type: the type table's, the database's own, or its text."""
        return self._table.get(oid) or self._types.get(oid, OPAQUE)

    def _learn(self, oids: list[int]) -> None:
        # What was learned is kept: a type that is dropped later still decodes, and a column keeps its Arrow type.
        new = [oid for oid in dict.fromkeys(oids) if oid not in self._table and oid not in self._types]
        if new and self._look_up:
            self._types.update(dict.fromkeys(new, OPAQUE) | dict(self._look_up(new)))

    def _columns(self, relation: messages.Relation, xid: int | None) -> tuple[Column, ...]:
        attributes = self._attributes.get(relation.relation_id)
        if attributes is None or xid is None:
            return tuple(map(self._column, relation.columns))
        numbers = attributes.numbers(relation.columns, xid)
        return tuple(
            column if number is None else replace(column, attnum=number, missing=attributes.missing(number))
            for column, number in zip(map(self._column, relation.columns), numbers, strict=True)
        )

    def _column(self, column: messages.RelationColumn) -> Column:
        kind = self.type_of(column.type_oid)
        name = self._type_names.get(column.type_oid, f"oid {column.type_oid}") if kind is OPAQUE else kind.name
        try:
            metadata = tuple(kind.metadata(column.typmod).items()) if kind.metadata else ()
            arrow = kind.arrow(column.typmod)
        except (ValueError, pa.ArrowException):
            problem = f"{column.typmod} is not a modifier of its type"
            self._unreadable = DecodeError(problem, column=column.name, type_name=name)
            metadata, arrow = (), pa.utf8()
        return Column(column.name, column.type_oid, column.typmod, column.key, name, arrow, metadata)


def nameless(schema: TableSchema, lsn: int | None = None) -> SchemaChanged:
    """The error for a change of a table that `schema` describes, whose name another table has now."""
    return SchemaChanged(
        "another table has this name now, and the catalogue does not know any more what this one was called",
        table=schema.table,
        lsn=lsn,
        hint="PostgreSQL 14 and 15 do not announce that a schema is renamed, and the table was dropped since; start "
        "again: a new connection is told the names as they were",
    )


def _changed(known: dict[str, list[str]], schema: TableSchema) -> SchemaChanged | None:
    """The error for a table that is not what it was; it is raised if the table's name has changed."""
    now = [schema.table, f"replica identity {schema.replica_identity!r}"]
    for c in schema.columns:
        typmod = "" if c.typmod < 0 else f"({c.typmod})"
        now.append(f"column {c.name!r} {c.type_name}{typmod}{' in the replica identity' if c.key else ''}")
    # A table that was dropped and recreated has another number and the same name.
    of_name = next((lines for lines in known.values() if schema.full_name.written(lines[0])), now)
    before = known.setdefault(str(schema.relation_id), of_name)
    if schema.full_name.written(before[0]):
        before = [now[0], *before[1:]]
    if before == now:
        return None
    parts = [f"no more {line}" for line in before if line not in now]
    parts += [f"now {line}" for line in now if line not in before]
    error = SchemaChanged(
        f"the table has changed: {', '.join(parts) or 'its columns stand in another order'}",
        table=before[0],
        hint="see to what reads the output, then go on with on_schema_change='evolve', or with a fresh start",
    )
    if before[0] != now[0]:
        raise error
    return error
