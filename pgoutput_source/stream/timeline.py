"""`Timeline`: the timeline of the last delivered change, across reconnects, failovers and promotions.

A promoted server starts a new timeline. Delivered changes and the ones to come must belong to one history, which is
checked after each reconnect. A standby that is promoted while it streams to us just streams on, so it must be asked.

https://www.postgresql.org/docs/current/continuous-archiving.html#BACKUP-TIMELINES
"""

from __future__ import annotations

import logging

from pgoutput_source.changes.schema import Position
from pgoutput_source.errors import PgOutputError, StateError
from pgoutput_source.postgres.connection import Connection, ask
from pgoutput_source.stream.frame_source import FrameSource
from pgoutput_source.stream.start import on_timeline

logger = logging.getLogger(__name__)


class Timeline:
    """The timeline of a running stream.

    Args:
        dsn: A libpq connection string.
        stream: The stream.
        patience: For how many seconds to retry while the server is away.

    Attributes:
        number: The timeline, as far as it is known.
    """

    def __init__(self, dsn: str, stream: FrameSource, patience: float = 0.0) -> None:
        self._dsn = dsn
        self._stream = stream
        self._slot = stream.slot
        self._patience = self._left = patience
        self._took_over()

    def _took_over(self) -> None:
        self._server, self._standby = self._stream.server, self._stream.standby
        self.number = self._stream.timeline
        self._asked: Position | None = None

    def reconnected(self, position: Position | None) -> None:
        """Check a new connection, which may lead to a promoted standby. `position` is the last delivered change.

        Raises:
            StateError: The server lacks changes that were delivered, or that the former server was told to forget.
            ServerError: The server can't be asked.
        """
        stream, was = self._stream, self.number
        # A server that was not restarted has a single history, even if it was promoted.
        if stream.server != self._server:
            durable = on_timeline(
                self._dsn, was, stream.timeline, position, stream.acknowledged, patience=self._patience
            )
            if durable < stream.acknowledged:
                raise StateError(
                    f"timeline {stream.timeline} left timeline {was} at {durable}, and the former server was told to "
                    f"forget up to {stream.acknowledged}",
                    hint="nothing is lost: start again, and the run resumes where the timelines diverge",
                )
        self._took_over()

    def of(self, position: Position | None) -> int:
        """The timeline of `position`, the last delivered change. A standby is asked whether it was promoted."""
        if self._standby and position != self._asked:
            try:
                now = ask(self._dsn, self._promoted, patience=self._left)
            except PgOutputError as e:
                logger.warning("slot %s: can't ask the standby whether it was promoted: %s", self._slot, e.message)
                self._left = 0.0  # don't wait again for a server that is away
                return self.number
            self._asked, self._left = position, self._patience
            if now is not None:
                logger.warning("slot %s: the standby was promoted, and is on timeline %d now", self._slot, now)
                self.number, self._standby = now, False
        return self.number

    def _promoted(self, connection: Connection) -> int | None:
        """The new timeline of the server that streams to us, if it was promoted."""
        # If the DSN names several hosts, this may be another server than the one that streams.
        row = connection.execute(
            "SELECT ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int"
            "  FROM pg_stat_activity WHERE pid = %s AND backend_start::text = %s AND NOT pg_is_in_recovery()",
            self._stream.backend,
        ).fetchone()
        return None if row is None else int(row[0])
