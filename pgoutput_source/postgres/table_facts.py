"""What the catalogue knows about a table and the wire does not say: its primary key, and which columns are NOT NULL.

The catalogue shows the present, and a stream lags behind it. So its facts count only for the version of the table that
it still describes.

https://www.postgresql.org/docs/current/catalog-pg-attribute.html
"""

from __future__ import annotations

from pgoutput_source.changes.events import TableFacts
from pgoutput_source.changes.schema import TableName, TableSchema
from pgoutput_source.decode.relations import Relations
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.postgres.connection import Connection
from pgoutput_source.protocol import messages


def table_facts(connection: Connection, schema: TableSchema) -> TableFacts | None:
    """What the catalogue knows about a version of a table; None unless it still describes that version.

    A column list leaves columns out. So the columns of the Relation message must be among those of the catalogue, in
    the same order, and the replica identity must be the same.
    """
    rows = connection.execute(
        "SELECT c.relreplident::text, a.attname::text, a.atttypid::bigint, a.atttypmod, a.attnotnull,"
        "       coalesce(a.attnum = ANY (i.indkey), false)"
        "  FROM pg_catalog.pg_class c"
        "  JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        "  JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
        "  LEFT JOIN pg_catalog.pg_index i ON i.indrelid = c.oid AND i.indisprimary"
        " WHERE c.oid = %s AND n.nspname = %s AND c.relname = %s ORDER BY a.attnum",
        [schema.relation_id, schema.namespace, schema.name],
    ).fetchall()
    live = iter(rows)
    found = all(
        any((column.name, column.type_oid, column.typmod) == row[1:4] for row in live) for column in schema.columns
    )
    if not rows or not found or rows[0][0] != schema.replica_identity:
        return None  # changed or dropped since
    facts = TableFacts(
        primary_key=frozenset(row[1] for row in rows if row[5]),
        not_null=frozenset(row[1] for row in rows if row[4]),
    )
    here = facts.primary_key.intersection(column.name for column in schema.columns)
    return None if schema.replica_identity == "d" and here != frozenset(schema.key) else facts


def table_schema(connection: Connection, table: str, relations: Relations) -> TableSchema:
    """A table as the catalogue describes it now.

    Args:
        connection: An ordinary connection.
        table: Schema and table: ``public.orders``.
        relations: Looks up the types of its columns.

    Raises:
        ConfigurationError: There is no such table.
    """
    namespace, name = TableName.parse(table)
    rows = connection.execute(
        "SELECT c.oid, c.relreplident::text, a.attname::text, a.atttypid, a.atttypmod"
        "  FROM pg_catalog.pg_class c"
        "  JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
        "  JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
        " WHERE n.nspname = %s AND c.relname = %s ORDER BY a.attnum",
        [namespace, name],
    ).fetchall()
    if not rows:
        raise ConfigurationError(f"there is no table {table!r}", hint="write schema and table: 'public.orders'")
    columns = tuple(messages.RelationColumn(False, column, oid, typmod) for _, _, column, oid, typmod in rows)
    relations.announce(messages.Relation(rows[0][0], namespace, name, rows[0][1], columns))
    return relations.current(rows[0][0]).schema
