"""Asking a flow through the database to copy tables again: a logical message, which any client can write.

    SELECT pg_logical_emit_message(true, 'pgoutput_source.copy', 'public.orders');          every flow
    SELECT pg_logical_emit_message(true, 'pgoutput_source.copy.slot', 'public.orders');     that of one slot

The flow reads it in its stream, in order with the changes. One that does not run reads it when it starts again.

https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pgoutput_source.changes.schema import TableName
from pgoutput_source.copy.tables import named, published
from pgoutput_source.errors import NotConfigured, PublicationError
from pgoutput_source.postgres.connection import Connection, one_row
from pgoutput_source.postgres.refusals import explained
from pgoutput_source.settings import SourceSettings

REQUEST: Final = "pgoutput_source.copy"
"""The prefix of a message that asks for a table to be copied again; its content is schema and table."""


def prefixes(slot: str) -> tuple[str, str]:
    """The prefixes of the messages that the flow of a slot obeys."""
    return REQUEST, f"{REQUEST}.{slot}"


def published_names(conn: Connection, publications: Sequence[str]) -> list[TableName]:
    """The tables that can be copied, a partitioned table in place of its partitions if it is published so."""
    return sorted(name for _, name, _ in named(conn, published(conn, publications)))


def request(conn: Connection, settings: SourceSettings, tables: Sequence[TableName]) -> None:
    """Ask the flow of the slot in `settings` to copy these tables again: all of them, or none.

    Raises:
        PublicationError: The publications do not have one of them.
        NotConfigured: The server is a standby, where nothing can be written.
    """
    if one_row(conn, "SELECT pg_is_in_recovery()")[0]:
        raise NotConfigured(
            "the server is a standby, and a request is written to the WAL",
            hint="connect to the primary: target_session_attrs=read-write",
        )
    known = published_names(conn, settings.publication)
    missing = [str(table) for table in tables if table not in known]
    if missing:
        raise PublicationError(
            f"publication {', '.join(settings.publication)} does not have {', '.join(missing)}",
            hint=f"it has {', '.join(map(str, known)) or 'no table'}; to add one: ALTER PUBLICATION … ADD TABLE …",
        )
    with explained(), conn.transaction():
        for table in tables:
            conn.execute("SELECT pg_logical_emit_message(true, %s, %s)", [prefixes(settings.slot)[1], str(table)])
