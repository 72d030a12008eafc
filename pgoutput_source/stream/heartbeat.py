"""A heartbeat: while nothing changes in the publication, a few bytes of WAL that the slot can move over.

It is optional, and most need none: the slot of a stream releases the WAL of all else, other databases included, by
the server's keepalives alone. What keepalives can't do is move where there is no WAL. Where nobody writes a slot
stands still, and its position and age look like those of a slot whose reader hangs. With a heartbeat it moves, and so
does all that follows the WAL: standbys, archives, slots on standbys that wait for a record to begin at.

It is a logical decoding message, over a connection of its own: no table, nothing in the publication, no privilege but
to connect. It is not transactional: that would take a transaction number each time, and bring nothing but a fifth of a
second, after which the server flushes such a message by itself. It never comes out as a message of the stream. When it
fails, the log has a warning, and the stream continues.

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
    """Writes a message whenever there was no change for a while, in a thread, until it is closed.

    Args:
        dsn: A libpq connection string.
        slot: The slot's name, for the log and as the message's content.
        seconds: How long without a change; None never writes anything.
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
        """There was a change."""
        self._changed = time.monotonic()

    def close(self) -> None:
        """Write nothing more."""
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
