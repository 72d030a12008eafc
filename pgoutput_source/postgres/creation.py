"""Creating the publications and the slot that a stream needs, in the order that matters: the slot is the younger."""

from __future__ import annotations

from collections.abc import Iterable

from pgoutput_source.postgres.checks import check_server
from pgoutput_source.postgres.connection import Connection
from pgoutput_source.postgres.publications import create_publications
from pgoutput_source.postgres.slots import create_slot, slot_state
from pgoutput_source.settings import SourceSettings


def create(conn: Connection, settings: SourceSettings) -> None:
    """Create the publications (for all tables) and then the slot, as far as they are missing.

    A publication that is missing while the slot is there is left alone: it would be younger than the slot, which
    `check` then explains.
    """
    if slot_state(conn, settings.slot) is None:
        check_server(conn)
        create_publication_and_slot(conn, slot=settings.slot, publications=settings.publication)


def create_publication_and_slot(
    conn: Connection, *, slot: str, publications: Iterable[str], tables: Iterable[str] | None = None
) -> None:
    """Create what is missing of the publications, then the slot: the stream fails if the slot is the older one.

    Creating a slot waits for all transactions that write at this moment; the log says so every few seconds.

    Args:
        conn: In autocommit mode.
        slot: Its name.
        publications: Their names.
        tables: Tables of new publications, as SQL wants them (``public.orders``, ``"We Ird"``); None for all tables,
            which needs a superuser.

    Raises:
        NotConfigured: The role may not do this, or all slots are in use.
    """
    create_publications(conn, publications, tables)
    if slot_state(conn, slot) is None:
        create_slot(conn, slot)
