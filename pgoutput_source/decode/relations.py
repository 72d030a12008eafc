"""Relation messages → versioned table schemas.

PostgreSQL sends a Relation message before the first change of a table on each connection, and again whenever its
catalogue entry was invalidated: a changed column, but an ANALYZE or a new index as well. Only a changed fingerprint
makes a new version. Type messages give names to the types that the type table does not know.

PostgreSQL 14 and 15 do not announce tables again when their schema is renamed: until the next connection they keep the
old name. That can't be seen before another table takes it; then the catalogue is asked what the first is called now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pgoutput_source.changes.batches import Column, TableSchema
from pgoutput_source.errors import ProtocolError, SchemaChanged
from pgoutput_source.protocol import messages
from pgoutput_source.types import OPAQUE, TYPES, PgType


class Version(NamedTuple):
    """What begins with a Relation message: a version of a table, and which was valid before.

    `schema` is None for a table whose name is not known any more, `before` for one that was not announced before.
    """

    relation_id: int
    before: TableSchema | None
    schema: TableSchema | None


class LookUp(Protocol):
    """What is asked of the database's catalogue, which may be newer than the changes."""

    def __call__(self, oids: Sequence[int]) -> Mapping[int, PgType]:
        """Rows for the types that the database defines itself, by OID."""
        ...

    def table_name(self, relation_id: int) -> tuple[str, str] | None:
        """The schema and the name of a table; None if it is gone."""
        ...


class Relations:
    """The current `TableSchema` of every relation that was announced.

    `origin` (name, value pairs such as system, database and slot) is written into the metadata of each batch.
    `look_up` is asked once for each type that the type table lacks; without it such a type is its text. `known`
    describes the tables that must stay as they are, by relation, and grows with each table that comes; None lets all
    of them change. `types` is the type table of the server that the relations are of.
    """

    def __init__(
        self,
        origin: tuple[tuple[str, str], ...] = (),
        look_up: LookUp | None = None,
        known: Mapping[str, Sequence[str]] | None = None,
        types: Mapping[int, PgType] = TYPES,
    ) -> None:
        self.origin = origin
        self.known = None if known is None else {relation: list(lines) for relation, lines in known.items()}
        self._table = types
        self._look_up = look_up
        self._types: dict[int, PgType] = {}
        self._current: dict[int, TableSchema] = {}
        self._holder: dict[str, int] = {}  # which relation a table's name was announced for last
        self._nameless: dict[int, TableSchema] = {}
        self._type_names: dict[int, str] = {}

    def current(self, relation_id: int) -> TableSchema:
        """The version that is valid now.

        Raises:
            ProtocolError: No Relation message announced it.
            SchemaChanged: Another table has its name now, and nobody knows its own.
        """
        try:
            return self._current[relation_id]
        except KeyError:
            if relation_id in self._nameless:
                raise nameless(self._nameless[relation_id]) from None
            raise ProtocolError(f"a change of relation {relation_id}, which no Relation message announced") from None

    def find(self, relation_id: int) -> TableSchema | None:
        """The version that is valid now, None if no Relation message announced it."""
        return self._current.get(relation_id)

    def announce(self, relation: messages.Relation) -> list[Version]:
        """Take note of a Relation message; the versions that begin with it, none if nothing has changed.

        Raises:
            SchemaChanged: It is not what is known of it, and must be.
        """
        self._learn([column.type_oid for column in relation.columns])
        schema = TableSchema(
            relation_id=relation.relation_id,
            namespace=relation.namespace or "pg_catalog",  # the protocol's way to save a few bytes
            name=relation.name,
            replica_identity=relation.replica_identity,
            columns=tuple(map(self._column, relation.columns)),
            origin=self.origin,
        )
        known = self._current.get(schema.relation_id)
        if known is not None and known.fingerprint == schema.fingerprint:
            return []
        return self._begin(schema)

    def _begin(self, schema: TableSchema) -> list[Version]:
        if self.known is not None:
            _compare(self.known, schema)
        begun = [Version(schema.relation_id, self._current.get(schema.relation_id), schema)]
        holder = self._holder.get(schema.table, schema.relation_id)
        self._current[schema.relation_id] = schema
        self._holder[schema.table] = schema.relation_id
        self._nameless.pop(schema.relation_id, None)
        if holder != schema.relation_id:
            begun += self._rename(holder, schema.table)
        return begun

    def _rename(self, relation_id: int, taken: str) -> list[Version]:
        """Another relation has the name `taken` now, so this one, if it is still called so, is not."""
        known = self._current.get(relation_id)
        if known is None or known.table != taken or self._look_up is None:
            return []
        name = self._look_up.table_name(relation_id)
        if name is None:
            # Mostly a table that was dropped and made again, of which nothing more comes.
            self._nameless[relation_id] = self._current.pop(relation_id)
            return [Version(relation_id, known, None)]
        schema = replace(known, namespace=name[0], name=name[1])
        return [] if schema.table == taken else self._begin(schema)

    def name_type(self, message: messages.Type) -> None:
        """Take note of a Type message. A domain's carries the domain's OID with its base type's name."""
        self._type_names[message.type_oid] = f"{message.namespace or 'pg_catalog'}.{message.name}"

    def type_of(self, oid: int) -> PgType:
        """The row that decodes a type: the type table's, the database's own, or its text."""
        return self._table.get(oid) or self._types.get(oid, OPAQUE)

    def defined(self, oid: int) -> bool:
        """Whether the database defines the type itself: then its catalogue may be newer than a value."""
        return oid in self._types

    def older(self, oid: int, xids: NDArray[np.uint32]) -> NDArray[np.bool_] | None:
        """Which of these transactions may have written a type's values before it was altered; None stands for none."""
        changed = self.type_of(oid).changed
        if not changed:
            return None
        older: NDArray[np.bool_] = (xids - np.uint32(changed)).view(np.int32) <= 0  # transaction numbers wrap around
        return older if older.any() else None

    def _learn(self, oids: list[int]) -> None:
        # What was learned is kept: a type that is dropped later still decodes, and a column keeps its Arrow type.
        new = [oid for oid in dict.fromkeys(oids) if oid not in self._table and oid not in self._types]
        if new and self._look_up:
            self._types.update(dict.fromkeys(new, OPAQUE) | dict(self._look_up(new)))

    def _column(self, column: messages.RelationColumn) -> Column:
        kind = self.type_of(column.type_oid)
        name = self._type_names.get(column.type_oid, f"oid {column.type_oid}") if kind is OPAQUE else kind.name
        metadata = tuple(kind.metadata(column.typmod).items()) if kind.metadata else ()
        arrow = kind.arrow(column.typmod)
        return Column(column.name, column.type_oid, column.typmod, column.key, name, arrow, metadata)


def nameless(schema: TableSchema, lsn: int | None = None) -> SchemaChanged:
    """A change has come of a table that `schema` describes, and its name is another table's."""
    return SchemaChanged(
        "another table has this name now, and the catalogue does not know any more what this one was called",
        table=schema.table,
        lsn=lsn,
        hint="PostgreSQL 14 and 15 do not announce that a schema is renamed, and the table was dropped since; start "
        "again: a new connection is told the names as they were",
    )


def _compare(known: dict[str, list[str]], schema: TableSchema) -> None:
    now = [schema.table, f"replica identity {schema.replica_identity!r}"]
    for c in schema.columns:
        typmod = "" if c.typmod < 0 else f"({c.typmod})"
        now.append(f"column {c.name!r} {c.type_name}{typmod}{' in the replica identity' if c.key else ''}")
    # A table that was dropped and made again has another number and the same name.
    of_name = next((lines for lines in known.values() if lines[0] == schema.table), now)
    before = known.setdefault(str(schema.relation_id), of_name)
    if before != now:
        parts = [f"no more {line}" for line in before if line not in now]
        parts += [f"now {line}" for line in now if line not in before]
        raise SchemaChanged(
            f"the table has changed: {', '.join(parts) or 'its columns stand in another order'}",
            table=before[0],
            hint="see to what reads the output, then go on with on_schema_change='evolve', or with a fresh start",
        )
