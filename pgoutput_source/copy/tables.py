"""Finds what to copy: the tables of the publications, with the rows and columns that the stream has of them.

https://www.postgresql.org/docs/current/view-pg-publication-tables.html
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pgoutput_source.changes.schema import TableName, TableSchema
from pgoutput_source.copy.keys import CollatedColumn, comparable
from pgoutput_source.copy.ledger import Signature
from pgoutput_source.decode.relations import Relations
from pgoutput_source.errors import NotConfigured
from pgoutput_source.postgres.connection import Connection
from pgoutput_source.postgres.refusals import explained
from pgoutput_source.postgres.remedies import quote_name
from pgoutput_source.protocol import messages

# Column lists and row filters exist from PostgreSQL 15 on. As keys of the row's JSON they may be absent. A publication
# without inserts has no rows to copy. A partition is left out if its root is published instead.
_PUBLISHED = """
WITH published AS (
    SELECT c.oid, to_jsonb(p) AS p
      FROM pg_publication_tables AS p
      JOIN pg_publication AS o ON o.pubname = p.pubname AND o.pubinsert
      JOIN pg_namespace AS n ON n.nspname = p.schemaname
      JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = p.tablename
     WHERE p.pubname = ANY(%s)
)
SELECT oid::bigint, (array_agg(p -> 'attnames'))[1],
       CASE WHEN bool_and(p ->> 'rowfilter' IS NOT NULL) THEN array_agg(DISTINCT p ->> 'rowfilter') END
  FROM published AS t
 WHERE NOT EXISTS (SELECT FROM pg_partition_ancestors(t.oid) AS a (root)
                    WHERE root <> t.oid AND root IN (SELECT oid FROM published))
 GROUP BY oid ORDER BY oid
"""

_TABLE = """
SELECT n.nspname::text, c.relname::text, c.relkind = 'p', c.relreplident::text, greatest(c.reltuples, 0)::bigint,
       pg_relation_size(c.oid), row_security_active(c.oid), has_table_privilege(c.oid, 'SELECT'),
       pg_snapshot_xmax(pg_current_snapshot())::text::bigint & 4294967295, c.relfilenode::bigint
  FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
 WHERE c.oid = %s
"""

# The key is what the stream sends for an old row: the index of the replica identity, or the primary key.
_COLUMNS = """
SELECT a.attnum, a.attname::text, a.atttypid::bigint, a.atttypmod, a.attgenerated <> '', t.typsend <> 0,
       pg_catalog.format_type(a.atttypid, -1),
       coalesce((SELECT format('%%I.%%I', n.nspname, l.collname) FROM pg_collation AS l
                   JOIN pg_namespace AS n ON n.oid = l.collnamespace WHERE l.oid = a.attcollation), ''),
       (SELECT k.place FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k (attnum, place)
         WHERE k.attnum = a.attnum AND k.place <= i.indnkeyatts),
       a.xmin::text
  FROM pg_class AS c
  JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
  JOIN pg_type AS t ON t.oid = a.atttypid
  LEFT JOIN pg_index AS i ON i.indrelid = c.oid
       AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END
 WHERE c.oid = %s ORDER BY a.attnum
"""


# The statistics of a partitioned table are seldom there; those of its partitions are.
_NAMES = """
SELECT c.oid::bigint, n.nspname::text, c.relname::text,
       greatest(c.reltuples, 0, (SELECT sum(l.reltuples) FROM pg_partition_tree(c.oid) AS t
                                   JOIN pg_class AS l ON l.oid = t.relid AND t.isleaf))::bigint
  FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
 WHERE c.oid = ANY(%s::bigint[])
"""


@dataclass(frozen=True, slots=True)
class Published:
    """What the publications publish of a table: its columns (None for all that are not generated), and which rows."""

    relation_id: int
    columns: tuple[str, ...] | None
    row_filter: str | None


@dataclass(frozen=True, slots=True)
class SourceColumn:
    """A column to read: with `as_text` its values come as PostgreSQL's text, otherwise from its send function."""

    number: int
    name: str
    type_oid: int
    typmod: int
    as_text: bool


@dataclass(frozen=True, slots=True)
class SourceTable:
    """One version of a table, as the catalogue describes it now.

    Attributes:
        schema: As the stream would announce it.
        sql_name: Its name in SQL; with ONLY, unless it stands for its partitions.
        columns: The published columns.
        key: The columns of the key in the key's order; empty if the table can only be read as a whole.
        row_filter: An SQL condition for the published rows; None for all.
        rows: The server's estimate of the number of rows.
        row_bytes: The approximate size of a row on the server's disk.
    """

    schema: TableSchema
    sql_name: str
    columns: tuple[SourceColumn, ...]
    key: tuple[CollatedColumn, ...]
    row_filter: str | None
    rows: int
    row_bytes: int

    @property
    def lock_name(self) -> str:
        """The name without ONLY."""
        return self.sql_name.removeprefix("ONLY ")

    @property
    def signature(self) -> Signature:
        """What distinguishes this version from others."""
        return tuple((c.number, c.name, c.type_oid, c.typmod) for c in self.columns)


def published(conn: Connection, publications: Iterable[str]) -> dict[int, Published]:
    """The current tables of these publications, by OID."""
    with explained():
        rows = conn.execute(_PUBLISHED, [list(publications)]).fetchall()
    return {
        oid: Published(
            oid,
            None if columns is None else tuple(columns),
            " OR ".join(f"({f})" for f in filters) if filters else None,
        )
        for oid, columns, filters in rows
    }


def named(conn: Connection, relations: Iterable[int]) -> list[tuple[int, TableName, int]]:
    """Those of these relations that there are, with their names, and about how many rows they have."""
    with explained():
        rows = conn.execute(_NAMES, [list(relations)]).fetchall()
    return [(relation, TableName(schema, name), count) for relation, schema, name, count in rows]


Described: TypeAlias = dict[int, tuple[Any, SourceTable]]
"""The versions that `describe` found, by relation, and what the catalogue said of them."""


def describe(
    conn: Connection, wanted: Published, relations: Relations, described: Described | None = None
) -> SourceTable | None:
    """A table as it is now; None if it is gone.

    Args:
        conn: An ordinary connection. Within a transaction, the table is as the transaction sees it.
        wanted: What is published of it.
        relations: Looks up the types of columns. Don't pass the stream's, which must only learn from the stream.
        described: What earlier calls found. It saves the look-up as long as the catalogue says the same.

    Raises:
        NotConfigured: The role may not read it, or not all of its rows.
    """
    with explained():
        row = conn.execute(_TABLE, [wanted.relation_id]).fetchone()
        columns = conn.execute(_COLUMNS, [wanted.relation_id]).fetchall()
    if row is None or not columns:
        return None
    namespace, name, is_root, identity, count, size, secured, readable, next_xid, file = row
    sql_name = f"{quote_name(namespace)}.{quote_name(name)}"
    _check_readable(conn, f"{namespace}.{name}", sql_name, readable=readable, secured=secured)
    said = (wanted, namespace, name, is_root, identity, file, columns)
    described = {} if described is None else described
    before, version = described.get(wanted.relation_id, (None, None))
    if version is not None and said == before:
        return version
    by_number = conn.info.server_version < 180_000
    live = [
        c
        for c in columns
        if (wanted.columns is None or c[1] in wanted.columns) and not (c[4] and (by_number or wanted.columns is None))
    ]
    place = {c[1]: c[8] for c in columns if c[8] is not None}
    in_identity = {"f": {c[1] for c in live}, "n": set[str]()}.get(identity, set(place))
    announced = tuple(messages.RelationColumn(c[1] in in_identity, c[1], c[2], c[3]) for c in live)
    relations.expect([wanted.relation_id])
    # Everything that this transaction sees in the catalogue was written before the next xid.
    relations.announce(messages.Relation(wanted.relation_id, namespace, name, identity, announced), next_xid)
    schema = relations.current(wanted.relation_id).schema
    arrow = {column.name: column.arrow for column in schema.columns}
    key = [
        CollatedColumn(c[1], c[6], c[7])
        for c in sorted((c for c in columns if c[1] in place), key=lambda c: place[c[1]])
        if c[1] in arrow and comparable(arrow[c[1]])
    ]
    version = SourceTable(
        schema=schema,
        sql_name=sql_name if is_root else f"ONLY {sql_name}",
        columns=tuple(
            SourceColumn(c[0], c[1], c[2], c[3], as_text=_as_text(relations, c[2], sends=c[5])) for c in live
        ),
        key=tuple(key) if len(key) == len(place) else (),
        row_filter=wanted.row_filter,
        rows=count,
        row_bytes=size // count if count else 0,
    )
    described[wanted.relation_id] = said, version
    return version


def _as_text(relations: Relations, oid: int, *, sends: bool) -> bool:
    binary = relations.type_of(oid).binary
    return not sends or binary is None or binary.by_value


def _check_readable(conn: Connection, table: str, sql_name: str, *, readable: bool, secured: bool) -> None:
    role = quote_name(str(conn.info.user))
    if not readable:
        raise NotConfigured(
            "the initial copy can't read it: this role has no SELECT on it",
            table=table,
            hint=f"GRANT SELECT ON {sql_name} TO {role}; or leave the table out of the publication",
        )
    if secured:
        raise NotConfigured(
            "the initial copy can't read all of it: row security hides rows from this role that the stream has",
            table=table,
            hint=f"as a superuser: ALTER ROLE {role} BYPASSRLS; or leave the table out of the publication",
        )


def unreadable(conn: Connection, tables: Sequence[int]) -> list[tuple[str, str]]:
    """The tables of which the role may not read all rows: their names, and SQL that allows it."""
    with explained():
        rows = conn.execute(
            "SELECT format('%%I.%%I', n.nspname, c.relname), has_table_privilege(c.oid, 'SELECT')"
            "  FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace"
            " WHERE c.oid = ANY(%s::bigint[])"
            "   AND (row_security_active(c.oid) OR NOT has_table_privilege(c.oid, 'SELECT'))"
            " ORDER BY 1",
            [list(tables)],
        ).fetchall()
    role = quote_name(str(conn.info.user))
    return [
        (name, f"ALTER ROLE {role} BYPASSRLS;" if readable else f"GRANT SELECT ON {name} TO {role};")
        for name, readable in rows
    ]
