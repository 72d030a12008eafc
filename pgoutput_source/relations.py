"""Relation messages → versioned table schemas.

PostgreSQL sends a Relation message before the first change of a table on each connection, and again whenever its
catalogue entry was invalidated: a changed column, but an ANALYZE or a new index as well. Only a changed fingerprint
makes a new version. Type messages give names to the types that the type table does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pgoutput_source import messages
from pgoutput_source.changes import Column, TableSchema
from pgoutput_source.errors import ProtocolError, SchemaChanged
from pgoutput_source.types import OPAQUE, TYPES, PgType

LookUp: TypeAlias = Callable[[Sequence[int]], Mapping[int, PgType]]
"""Rows for the types that a database defines itself, by OID, from its catalogue."""


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
        self._type_names: dict[int, str] = {}

    def current(self, relation_id: int) -> TableSchema:
        """The version that is valid now.

        Raises:
            ProtocolError: No Relation message announced it.
        """
        try:
            return self._current[relation_id]
        except KeyError:
            raise ProtocolError(f"a change of relation {relation_id}, which no Relation message announced") from None

    def find(self, relation_id: int) -> TableSchema | None:
        """The version that is valid now, None if no Relation message announced it."""
        return self._current.get(relation_id)

    def announce(self, relation: messages.Relation) -> TableSchema | None:
        """Take note of a Relation message; the new version, or None if nothing has changed.

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
            return None
        if self.known is not None:
            _compare(self.known, schema)
        self._current[schema.relation_id] = schema
        return schema

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
