"""`Timeline`: of which timeline what was given out is, over reconnects, failovers and promotions.

A server that is promoted starts a new timeline. What was given out lies on one line of history with what comes next, or
there is an error: that is looked at after each reconnect. A standby that is promoted while a stream reads from it says
nothing and streams on, so it has to be asked.

https://www.postgresql.org/docs/current/continuous-archiving.html#BACKUP-TIMELINES
"""

from __future__ import annotations

import logging

from pgoutput_source.changes.schema import Position
from pgoutput_source.errors import PgOutputError, StateError
from pgoutput_source.postgres.connection import Connection, connect
from pgoutput_source.stream.frame_source import FrameSource
from pgoutput_source.stream.start import on_timeline

logger = logging.getLogger(__name__)


class Timeline:
    """The timeline of a stream that has been started.

    Args:
        dsn: A libpq connection string.
        stream: The stream.

    Attributes:
        number: The timeline, as far as it is known.
    """

    def __init__(self, dsn: str, stream: FrameSource) -> None:
        self._dsn = dsn
        self._stream = stream
        self._slot = stream.slot
        self._conn: Connection | None = None
        self._took_over()

    def _took_over(self) -> None:
        self._server, self._standby = self._stream.server, self._stream.standby
        self.number = self._stream.timeline
        self._asked: Position | None = None
        self.close()

    def reconnected(self, position: Position | None) -> None:
        """A new connection: perhaps to a standby that was promoted. `position` is the last that was given out.

        Raises:
            StateError: The server never had all that was given out, or that the former one was told to forget.
        """
        stream, was = self._stream, self.number
        # A server that has not been stopped since has one history, whatever it was promoted to.
        if stream.server != self._server:
            durable = on_timeline(self._dsn, was, stream.timeline, position, stream.acknowledged)
            if durable < stream.acknowledged:
                raise StateError(
                    f"timeline {stream.timeline} left timeline {was} at {durable}, and the former server was told to "
                    f"forget up to {stream.acknowledged}",
                    hint="nothing is lost: start again, and the run goes on from where the timelines part",
                )
        self._took_over()

    def of(self, position: Position | None) -> int:
        """The timeline that `position`, the last that was given out, is of: a standby is asked if it was promoted."""
        if self._standby and position != self._asked:
            try:
                now = self._ask()
            except PgOutputError as e:
                logger.warning("slot %s: can't ask the standby whether it was promoted: %s", self._slot, e.message)
                return self.number
            self._asked = position
            if now is not None:
                logger.warning("slot %s: the standby was promoted, and is on timeline %d now", self._slot, now)
                self.number, self._standby = now, False
        return self.number

    def _ask(self) -> int | None:
        """The new timeline of the server that streams to us, if it was promoted."""
        self._conn = self._conn or connect(self._dsn)
        try:
            # Where the DSN names several hosts, this may be another one than the one that streams.
            row = self._conn.execute(
                "SELECT ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int"
                "  FROM pg_stat_activity WHERE pid = %s AND backend_start::text = %s AND NOT pg_is_in_recovery()",
                self._stream.backend,
            ).fetchone()
        except PgOutputError:
            self.close()
            raise
        return None if row is None else int(row[0])

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._conn is not None:
            self._conn.close()
            self._conn = None
