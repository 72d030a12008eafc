"""Checks whether a stream can run, one function for each precondition. A finding is an error with its remedy as SQL.

Everything here runs over an ordinary connection, at the start or on request.
"""

from __future__ import annotations

import logging
from typing import Final

from pgoutput_source.errors import (
    ConfigurationError,
    NotConfigured,
    PublicationError,
    SlotLost,
    SlotMismatch,
    SlotNotFound,
)
from pgoutput_source.postgres.connection import Connection, one_row
from pgoutput_source.postgres.publications import find_publications, publication_names, text_columns
from pgoutput_source.postgres.remedies import missing_publication_hint, missing_slot_hint, quote_name, resync_hint
from pgoutput_source.postgres.slots import PLUGIN, SlotState, slot_state
from pgoutput_source.settings import SourceSettings

logger = logging.getLogger(__name__)

_INVALIDATIONS: Final = {
    "wal_removed": "max_slot_wal_keep_size limits how much WAL a slot may keep",
    "idle_timeout": "idle_replication_slot_timeout limits how long a slot may stay unused",
    "rows_removed": "on a standby, hot_standby_feedback with a physical slot on the primary keeps the rows it needs",
    "conflict with recovery": "on a standby, hot_standby_feedback with a physical slot on the primary prevents it",
    "wal_level_insufficient": "the primary's wal_level must stay 'logical'",
}
"""How to prevent it next time, by the reason of the invalidation."""


def check(conn: Connection, settings: SourceSettings) -> SlotState:
    """Check that a stream can run with these settings, and return its slot.

    A slot in use by another process is not an error here: that may pass. A publication without tables is a warning in
    the log.

    Raises:
        NotConfigured: wal_level is not logical, or the role may not replicate.
        SlotNotFound, SlotMismatch, SlotLost: The slot is missing, unsuitable for this reader, or invalidated.
        PublicationError: A publication is missing.
        ConfigurationError: The server is too old for an option.
    """
    check_server(conn)
    check_options(conn, settings)
    slot = slot_state(conn, settings.slot)
    if slot is None:
        every = publication_names(conn)
        missing = [name for name in settings.publication if name not in every]
        raise SlotNotFound(
            f"there is no replication slot {settings.slot!r} on {settings.server}",
            hint=missing_slot_hint(settings.slot, missing, every),
        )
    check_slot(conn, slot)
    check_publications(conn, settings)
    return slot


def check_publications(conn: Connection, settings: SourceSettings) -> None:
    """Check that the publications exist; the slot does already. One without tables is a warning in the log.

    Raises:
        PublicationError: Some don't; the hint names those that do.
    """
    found = find_publications(conn, settings.publication)
    if missing := [name for name in settings.publication if name not in found]:
        raise PublicationError(
            f"there is no publication {', '.join(map(repr, missing))} in database "
            f"{one_row(conn, 'SELECT current_database()::text')[0]!r}",
            hint=missing_publication_hint(settings.slot, missing, publication_names(conn)),
        )
    for name, has_tables in found.items():
        if not has_tables:
            logger.warning("publication %r has no table yet: ALTER PUBLICATION … ADD TABLE …", name)


def check_server(conn: Connection) -> None:
    """Check that the server supports logical decoding, and that this role may use it.

    Raises:
        NotConfigured: wal_level is not logical, or the role may not replicate.
    """
    # From PostgreSQL 19 on, a logical slot raises the effective level by itself.
    standby, level, effective, role, may_replicate = one_row(
        conn,
        """
        SELECT pg_is_in_recovery(),
               current_setting('wal_level'), current_setting('effective_wal_level', true), current_user::text,
               (SELECT rolsuper OR rolreplication FROM pg_roles WHERE rolname = current_user)
               OR coalesce((SELECT pg_has_role(oid, 'member') FROM pg_roles WHERE rolname = 'rds_replication'), false)
        """,
    )
    if standby and conn.info.server_version < 160_000:
        raise NotConfigured(
            f"this server is a standby of PostgreSQL {conn.info.server_version // 10_000}, and does not decode",
            hint="connect to the primary: target_session_attrs=read-write; standbys decode from PostgreSQL 16 on",
        )
    if "logical" not in (level, effective) and not (effective and level == "replica"):
        raise NotConfigured(
            f"the server's wal_level is {level!r}, and logical replication needs 'logical'",
            hint="ALTER SYSTEM SET wal_level = 'logical'; then restart the server",
        )
    if not may_replicate:
        raise NotConfigured(
            f"role {role!r} may not replicate",
            hint=f"as a superuser: ALTER ROLE {quote_name(role)} REPLICATION; "
            "on Amazon RDS: GRANT rds_replication TO …",
        )


def check_options(conn: Connection, settings: SourceSettings) -> None:
    """Check that the server is new enough for the options of the stream.

    Raises:
        ConfigurationError: It is not. The error names the version needed, and what to do instead.
    """
    for option, value, since, instead in (
        ("streaming", "parallel", 16, "streaming='on' gives the same changes"),
        ("origin", "none", 16, "without it, use a publication without the tables that are replicated here"),
    ):
        if getattr(settings, option) == value and conn.info.server_version < since * 10_000:
            raise ConfigurationError(
                f"{option}={value!r} needs PostgreSQL {since}, and {settings.server} runs "
                f"{conn.info.server_version // 10_000}",
                hint=f"leave it out; {instead}",
            )
    if settings.binary == "on" and (columns := text_columns(conn, settings.publication)):
        raise ConfigurationError(
            f"binary='on': these columns can be read as text only: {'; '.join(columns)}",
            hint="leave it out, or use binary='auto'; or leave the columns out of the publication (PostgreSQL 15)",
        )


def check_slot(conn: Connection, slot: SlotState) -> None:
    """Check that this reader can use the slot in this database. Its position is not checked.

    Raises:
        SlotMismatch: It is physical, of another plugin or database, two-phase, or a copy of another server's slot.
        SlotLost: It was invalidated.
    """
    database, standby = one_row(conn, "SELECT current_database()::text, pg_is_in_recovery()")
    name = f"slot {slot.name!r}"
    other = "name another slot, or drop this one if nobody needs it"
    if slot.slot_type != "logical":
        raise SlotMismatch(f"{name} is a {slot.slot_type} slot, and changes need a logical one", hint=other)
    if slot.plugin != PLUGIN:
        raise SlotMismatch(f"{name} uses the plugin {slot.plugin!r}, and this reader needs {PLUGIN!r}", hint=other)
    if slot.database != database:
        raise SlotMismatch(
            f"{name} belongs to database {slot.database!r}, and this connection is to {database!r}",
            hint=f"connect with dbname={slot.database}, or name another slot",
        )
    if slot.two_phase:
        raise SlotMismatch(
            f"{name} is two-phase: it sends prepared transactions before they are committed",
            hint=f"use a slot without it: SELECT pg_create_logical_replication_slot('…', '{PLUGIN}')",
        )
    if slot.invalidation:
        raise SlotLost(
            f"{name} was invalidated by the server ({slot.invalidation}): the changes that it held are lost",
            hint=f"{resync_hint(slot.name)}; {_INVALIDATIONS.get(slot.invalidation, 'the server log has the reason')}",
        )
    if slot.synced and standby:
        raise SlotMismatch(
            f"{name} is a copy that this standby keeps of the primary's slot",
            hint="connect to the primary; the copy can be used once this standby is promoted",
        )
