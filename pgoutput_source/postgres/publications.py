"""Publications: which ones exist, what they publish, whether it can come in binary, and how to create them.

https://www.postgresql.org/docs/current/logical-replication-publication.html
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

from psycopg import sql

from pgoutput_source.errors import NotConfigured, ServerError
from pgoutput_source.postgres.connection import Connection
from pgoutput_source.postgres.remedies import quote_name
from pgoutput_source.types import TYPES
from pgoutput_source.types.catalogue import FACTS, TypeFacts, from_catalogue

logger = logging.getLogger(__name__)

_DUPLICATE_OBJECT: Final = "42710"
_INSUFFICIENT_PRIVILEGE: Final = "42501"


def find_publications(conn: Connection, names: Iterable[str]) -> dict[str, bool]:
    """Which of these publications exist now, and whether each has any table in this database."""
    rows = conn.execute(
        "SELECT pubname::text, EXISTS (SELECT FROM pg_publication_tables t WHERE t.pubname = p.pubname)"
        "  FROM pg_publication p WHERE pubname = ANY(%s)",
        [list(names)],
    ).fetchall()
    return dict(rows)


def publication_names(conn: Connection) -> tuple[str, ...]:
    """The publications of this database."""
    return tuple(name for (name,) in conn.execute("SELECT pubname::text FROM pg_publication ORDER BY 1").fetchall())


def create_publications(conn: Connection, names: Iterable[str], tables: Iterable[str] | None = None) -> None:
    """Create the publications that are missing.

    Args:
        conn: In autocommit mode.
        names: Their names.
        tables: Their tables, as SQL writes them (``public.orders``, ``"We Ird"``); None for all tables, which needs a
            superuser.

    Raises:
        NotConfigured: The role may not do this.
    """
    wanted = list(names)
    found = find_publications(conn, wanted)
    what = "ALL TABLES" if tables is None else f"TABLE {', '.join(tables)}"
    for name in wanted:
        if name in found:
            continue
        try:
            # Tables are SQL on purpose: ONLY, column lists and row filters are allowed.
            conn.execute(sql.SQL("CREATE PUBLICATION {} FOR ").format(sql.Identifier(name)) + sql.SQL(what))
        except ServerError as e:
            if e.sqlstate == _DUPLICATE_OBJECT:
                continue
            if e.sqlstate != _INSUFFICIENT_PRIVILEGE:
                raise
            raise NotConfigured(
                f"publication {name!r} can't be created: {e.message}",
                hint=f"as the tables' owner with CREATE on the database: CREATE PUBLICATION {quote_name(name)} "
                "FOR TABLE …; FOR ALL TABLES needs a superuser",
            ) from e
        logger.info("created publication %r for %s", name, what.lower() if tables is None else what)


def published_tables(conn: Connection, names: Iterable[str]) -> tuple[str, ...]:
    """The tables that these publications have now, with their schemas, quoted as in SQL."""
    rows = conn.execute(
        "SELECT DISTINCT format('%%I.%%I', schemaname, tablename) AS name"
        "  FROM pg_publication_tables WHERE pubname = ANY(%s) ORDER BY name",
        [list(names)],
    ).fetchall()
    return tuple(name for (name,) in rows)


def text_columns(conn: Connection, names: Iterable[str], *, by_value: bool = False) -> list[str]:
    """The columns of these publications, with their types, that can only be read as text.

    With `by_value` it also lists columns whose binary values are read one by one, which is slower than reading text.
    A type without a send function is always sent as text, and not listed.
    """
    # pg_publication_tables has attnames from PostgreSQL 15 on. As a key of the row's JSON it may be absent.
    columns = conn.execute(
        """
        SELECT DISTINCT p.schemaname || '.' || p.tablename || '.' || a.attname, a.atttypid::bigint,
               pg_catalog.format_type(a.atttypid, NULL)
          FROM pg_publication_tables AS p
          JOIN pg_namespace AS n ON n.nspname = p.schemaname
          JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = p.tablename
          JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
          JOIN pg_type AS t ON t.oid = a.atttypid AND t.typsend <> 0
         WHERE p.pubname = ANY(%s) AND coalesce((to_jsonb(p) -> 'attnames') ? a.attname, a.attgenerated = '')
         ORDER BY 1
        """,
        [list(names)],
    ).fetchall()
    defined = sorted({oid for _, oid, _ in columns} - TYPES.keys())
    facts = conn.execute(FACTS, {"oids": defined}).fetchall() if defined else []
    rows = TYPES | from_catalogue((TypeFacts(*fact) for fact in facts), TYPES)
    readers = {oid: row.binary for oid, row in rows.items()}
    return [
        f"{column} {name}"
        for column, oid, name in columns
        if (reader := readers.get(oid)) is None or (by_value and reader.by_value)
    ]


def binary_option(conn: Connection, binary: str, names: Iterable[str]) -> dict[str, str]:
    """The option `binary` for pgoutput; empty when values come as text."""
    if binary == "auto" and conn.info.parameter_status("server_encoding") == "SQL_ASCII":
        binary = "off"  # a binary array does not tell which of its elements is not UTF-8
    if binary == "auto" and (columns := text_columns(conn, names, by_value=True)):
        logger.info(
            "values come as text, because some can't be read, or only slowly, in binary: %s", "; ".join(columns)
        )
        binary = "off"
    return {} if binary == "off" else {"binary": "true"}
