"""`Timeline`: the timeline of the last delivered change, over reconnects, failovers and promotions.

A server that is promoted starts a new timeline. What was delivered must lie on one line of history with what comes
next; that is checked after each reconnect. A standby that is promoted while a stream reads from it says nothing and
streams on, so it has to be asked.

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
    """The timeline of a stream that has been started.

    Args:
        dsn: A libpq connection string.
        stream: The stream.
        patience: For how many seconds to ask a server again that is away.

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
        """A new connection: perhaps to a standby that was promoted. `position` is the last that was delivered.

        Raises:
            StateError: The server never had all that was delivered, or that the former one was told to forget.
            ServerError: The server can't be asked.
        """
        stream, was = self._stream, self.number
        # A server that has not been stopped since has one history, whatever it was promoted to.
        if stream.server != self._server:
            durable = on_timeline(
                self._dsn, was, stream.timeline, position, stream.acknowledged, patience=self._patience
            )
            if durable < stream.acknowledged:
                raise StateError(
                    f"timeline {stream.timeline} left timeline {was} at {durable}, and the former server was told to "
                    f"forget up to {stream.acknowledged}",
                    hint="nothing is lost: start again, and the run resumes where the timelines part",
                )
        self._took_over()

    def of(self, position: Position | None) -> int:
        """The timeline of `position`, the last that was delivered. A standby is asked whether it was promoted."""
        if self._standby and position != self._asked:
            try:
                now = ask(self._dsn, self._promoted, patience=self._left)
            except PgOutputError as e:
                logger.warning("slot %s: can't ask the standby whether it was promoted: %s", self._slot, e.message)
                self._left = 0.0  # what is still away is not waited for again
                return self.number
            self._asked, self._left = position, self._patience
            if now is not None:
                logger.warning("slot %s: the standby was promoted, and is on timeline %d now", self._slot, now)
                self.number, self._standby = now, False
        return self.number

    def _promoted(self, connection: Connection) -> int | None:
        """The new timeline of the server that streams to us, if it was promoted."""
        # Where the DSN names several hosts, this may be another one than the one that streams.
        row = connection.execute(
            "SELECT ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int"
            "  FROM pg_stat_activity WHERE pid = %s AND backend_start::text = %s AND NOT pg_is_in_recovery()",
            self._stream.backend,
        ).fetchone()
        return None if row is None else int(row[0])
