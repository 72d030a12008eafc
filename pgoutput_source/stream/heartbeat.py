"""A heartbeat writes a few bytes of WAL while nothing changes in the publication, so that the slot can advance.

It is optional, and most flows need none: the server's keepalives alone let a slot release the WAL of everything else,
other databases included. But they can't advance a slot when there is no new WAL. On an idle server the position and age
of a slot look as if its reader hung. A heartbeat advances the slot, and everything else that follows the WAL: standbys,
archives, and slots on standbys that wait for a record to start at.

It is a logical decoding message, sent over a separate connection. It needs no table, nothing in the publication, and no
privilege except to connect. It is not transactional: that would take an xid each time, only to flush the message a
fifth of a second earlier. It is never delivered as a message of the stream. If it fails, the log has a warning and the
stream continues.

https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION
"""

from __future__ import annotations

import logging
import threading
import time

from pgoutput_source.changes.batches import HEARTBEAT
from pgoutput_source.errors import PgOutputError
from pgoutput_source.postgres.connection import Connection, connect

logger = logging.getLogger(__name__)


class Heartbeat:
    """A thread that writes a message whenever there was no change for a while.

    Args:
        dsn: A libpq connection string.
        slot: The slot's name, for the log and as the message's content.
        seconds: Write after this long without a change; None never writes.
    """

    def __init__(self, dsn: str, slot: str, seconds: float | None) -> None:
        self._dsn = dsn
        self._slot = slot
        self._changed = time.monotonic()
        self._closed = threading.Event()
        self._failed = False
        if seconds is not None:
            threading.Thread(target=self._run, args=(seconds,), name=f"pgoutput-heartbeat-{slot}", daemon=True).start()

    def changed(self) -> None:
        """Note that there was a change."""
        self._changed = time.monotonic()

    def close(self) -> None:
        """Stop writing."""
        self._closed.set()

    def _run(self, seconds: float) -> None:
        connection: Connection | None = None
        wait = seconds
        while not self._closed.wait(wait):
            wait = self._changed + seconds - time.monotonic()
            if wait > 0:
                continue
            wait = seconds
            try:
                connection = connection or connect(self._dsn)
                self._write(connection)
            except PgOutputError as e:
                if not self._failed:
                    logger.warning("slot %s: no heartbeat: %s; trying again every %g s", self._slot, e.message, seconds)
                self._failed = True
                if connection is not None:
                    connection.close()
                    connection = None
        if connection is not None:
            connection.close()

    def _write(self, connection: Connection) -> None:
        connection.execute("SELECT pg_logical_emit_message(false, %s, %s)", [HEARTBEAT, self._slot])
        if self._failed:
            self._failed = False
            logger.info("slot %s: the heartbeat is back", self._slot)
