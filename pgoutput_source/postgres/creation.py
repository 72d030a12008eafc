"""Creates the publications and then the slot: a slot must be younger than its publications."""

from __future__ import annotations

from collections.abc import Iterable

from pgoutput_source.postgres.checks import check_server
from pgoutput_source.postgres.connection import Connection
from pgoutput_source.postgres.publications import create_publications
from pgoutput_source.postgres.slots import create_slot, slot_state
from pgoutput_source.settings import SourceSettings


def create(conn: Connection, settings: SourceSettings) -> None:
    """Create the publications (for all tables) and then the slot, if the slot is missing.

    If the slot exists, a missing publication is not created: it would be younger than the slot. `check` explains that.
    """
    if slot_state(conn, settings.slot) is None:
        check_server(conn)
        create_publication_and_slot(conn, slot=settings.slot, publications=settings.publication)


def create_publication_and_slot(
    conn: Connection, *, slot: str, publications: Iterable[str], tables: Iterable[str] | None = None
) -> None:
    """Create the missing publications, then the slot: the stream fails if the slot is older than a publication.

    Creating a slot waits for all transactions that are writing at that moment. The log says so every few seconds.

    Args:
        conn: In autocommit mode.
        slot: Its name.
        publications: Their names.
        tables: The tables of new publications, as SQL writes them (``public.orders``, ``"We Ird"``); None for all
            tables, which needs a superuser.

    Raises:
        NotConfigured: The role may not do this, or all slots are in use.
    """
    create_publications(conn, publications, tables)
    if slot_state(conn, slot) is None:
        create_slot(conn, slot)
