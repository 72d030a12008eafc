"""Replication slots: what `pg_replication_slots` shows, and how to create one.

https://www.postgresql.org/docs/current/view-pg-replication-slots.html
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from psycopg.rows import dict_row

from pgoutput_source.errors import ServerError
from pgoutput_source.postgres.connection import Connection, one_row
from pgoutput_source.postgres.refusals import explained
from pgoutput_source.protocol.wire import Lsn

logger = logging.getLogger(__name__)


PLUGIN: Final = "pgoutput"

_DUPLICATE_OBJECT: Final = "42710"


_WAITS: Final = {
    False: "creating slot %r waits for the transactions that are running: "
    "SELECT pid, xact_start, state, query FROM pg_stat_activity WHERE backend_xid IS NOT NULL",
    True: "creating slot %r waits for the primary to log its running transactions. Run there: "
    "SELECT pg_log_standby_snapshot()",
}
"""The log line while a slot is being created, by whether the server is a standby."""


_LOG_EVERY = 5.0  # seconds


@dataclass(frozen=True, slots=True)
class SlotState:
    """A replication slot as `pg_replication_slots` shows it. Columns that the server's version lacks are None.

    `invalidation` is why the slot can't be used any more, such as "wal_removed" or "idle_timeout".
    """

    name: str
    slot_type: str
    plugin: str | None
    database: str | None
    temporary: bool
    active: bool
    active_pid: int | None
    restart_lsn: Lsn | None
    confirmed_flush_lsn: Lsn | None
    wal_status: str | None
    safe_wal_size: int | None
    two_phase: bool | None
    invalidation: str | None
    failover: bool | None
    synced: bool | None

    @classmethod
    def _of(cls, row: dict[str, Any]) -> SlotState:
        def lsn(name: str) -> Lsn | None:
            return None if row.get(name) is None else Lsn(str(row[name]))

        # 17 names the reason. 16 only tells whether it was a recovery conflict. Before 16 only lost WAL invalidates.
        invalidation = row.get("invalidation_reason")
        if invalidation is None and row.get("conflicting"):
            invalidation = "conflict with recovery"
        elif invalidation is None and row.get("wal_status") == "lost":
            invalidation = "wal_removed"
        return cls(
            name=row["slot_name"],
            slot_type=row["slot_type"],
            plugin=row["plugin"],
            database=row["database"],
            temporary=row["temporary"],
            active=row["active"],
            active_pid=row["active_pid"],
            restart_lsn=lsn("restart_lsn"),
            confirmed_flush_lsn=lsn("confirmed_flush_lsn"),
            wal_status=row.get("wal_status"),
            safe_wal_size=row.get("safe_wal_size"),
            two_phase=row.get("two_phase"),
            invalidation=invalidation,
            failover=row.get("failover"),
            synced=row.get("synced"),
        )


def slot_state(conn: Connection, slot: str) -> SlotState | None:
    """The slot; None if there is none of this name."""
    with conn.cursor(row_factory=dict_row) as cursor, explained(slot):
        row = cursor.execute("SELECT * FROM pg_replication_slots WHERE slot_name = %s", [slot]).fetchone()
    return None if row is None else SlotState._of(row)


def create_slot(conn: Connection, slot: str, *, failover: bool = False) -> None:
    """Create the slot, unless one of this name exists.

    Args:
        conn: In autocommit mode.
        slot: Its name.
        failover: Whether to synchronize it to standbys; from PostgreSQL 17 on.

    Raises:
        NotConfigured: The role may not do this, or all slots are in use.
    """
    try:
        with explained(slot), waiting(slot, standby=one_row(conn, "SELECT pg_is_in_recovery()")[0]):
            row = conn.execute(
                "SELECT lsn::text FROM pg_create_logical_replication_slot(%s, %s"
                + (", failover => true)" if failover else ")"),
                [slot, PLUGIN],
            ).fetchone()
    except ServerError as e:
        if e.sqlstate == _DUPLICATE_OBJECT:
            return
        raise
    logger.info("created replication slot %r at %s", slot, row[0] if row else "?")


@contextmanager
def waiting(slot: str, *, standby: bool) -> Iterator[None]:
    """Log every few seconds what the creation of a slot in the body waits for."""
    done = threading.Event()

    def say() -> None:
        while not done.wait(_LOG_EVERY):
            logger.info(_WAITS[standby], slot)

    thread = threading.Thread(target=say, name="pgoutput-patience", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
