"""`PeekedFrames`: what a slot holds now, read by SQL without moving the slot.

https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION
"""

from __future__ import annotations

import psycopg

from pgoutput_source.postgres.connection import connect
from pgoutput_source.postgres.publications import binary_option
from pgoutput_source.postgres.refusals import server_error
from pgoutput_source.postgres.remedies import quote_name
from pgoutput_source.protocol.wire import Lsn, XLogData
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream.walsender import Backend

_PIECE = 32_768  # how many frames are decoded together


class PeekedFrames:
    """The `FrameSource` that shows a slot's changes without consuming them, and ends after the last.

    Args:
        dsn: A libpq connection string or URL.
        settings: Which slot and which publications.
        timeline: The server's.
        limit: After this many messages the server begins no further transaction. It always shows whole transactions.
    """

    generation = 0
    confirmed = sent = received = acknowledged = Lsn(0)
    standby = False
    server = ""
    backend: Backend | None = None

    def __init__(self, dsn: str, settings: SourceSettings, *, timeline: int, limit: int) -> None:
        self.slot = settings.slot
        self.timeline = timeline
        self.exhausted = False
        self._dsn = dsn
        self._settings = settings
        self._limit = limit

    def start(self, seen: Lsn) -> None:
        """Read what the slot holds.

        Raises:
            SlotInUse: Another process streams from it now.
            ServerError: The server can't decode it.
        """
        settings = self._settings
        names = ",".join(map(quote_name, settings.publication))
        options = {"proto_version": "1", "publication_names": names, "messages": "true"}
        with connect(self._dsn) as connection:
            options |= binary_option(connection, settings.binary, settings.publication)
        # This connection only decodes: changes of tables that it opened before would be decoded with today's columns.
        self._connection = connect(self._dsn)
        try:
            if self._connection.info.parameter_status("server_encoding") == "SQL_ASCII":
                self._connection.execute("SET client_encoding = 'SQL_ASCII'")  # as in `walsender`
            self._cursor = psycopg.Cursor(self._connection)
            self._cursor.execute(
                "SELECT lsn - '0/0'::pg_lsn, data FROM pg_logical_slot_peek_binary_changes"
                "(%s, NULL, %s, VARIADIC %s::text[])",
                [self.slot, self._limit, [word for option in options.items() for word in option]],
                binary=True,
            )
        except psycopg.Error as e:
            self.close()
            raise self._error(e) from e

    def poll(self, *, max_frames: int, max_bytes: int, timeout: float, whole: bool) -> list[bytes]:
        """The next frames."""
        try:
            rows = self._cursor.fetchmany(min(max_frames, _PIECE))
        except psycopg.Error as e:
            raise self._error(e) from e
        self.exhausted = not rows
        return [XLogData(Lsn(int(lsn)), Lsn(int(lsn)), 0, data).encode() for lsn, data in rows]

    def acknowledge(self, lsn: Lsn) -> None:
        """Do nothing: a peek consumes nothing."""

    def close(self, *, graceful: bool = False) -> None:
        """Close the connection."""
        self._connection.close()

    def _error(self, error: psycopg.Error) -> Exception:
        return server_error(error, slot=self.slot, publications=self._settings.publication, streaming=True)
