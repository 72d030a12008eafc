"""`Walsender`: one replication connection, from START_REPLICATION to its end.

A `replication.ReplicationStream` makes a new `Walsender` after each loss, because a walsender streams only once. Calls
of libpq hold Python's global interpreter lock, so nothing here waits inside them: the connection is non-blocking, and
the reader waits in `poll()` of the operating system.

**A connection that decodes runs no SQL.** When a walsender begins to decode, it keeps its cache of tables and uses it
for old WAL. If a query has opened a user table before, as `pg_publication_tables` does, changes from before an ALTER
TABLE are decoded with the table's current columns: the values are garbage, or the server crashes. So every query runs
on an ordinary connection beside the walsender. The walsender itself only gets IDENTIFY_SYSTEM, SHOW, START_REPLICATION,
and SET where the environment overrides a setting. None of them reads a table.

https://www.postgresql.org/docs/current/protocol-replication.html
"""

from __future__ import annotations

import logging
import re
import select
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Final, NamedTuple

import psycopg
from psycopg import pq, sql

from pgoutput_source.errors import (
    ConnectionFailed,
    NotConfigured,
    PgOutputError,
    PublicationError,
    ServerError,
    SlotError,
    SlotInUse,
    SlotNotFound,
)
from pgoutput_source.postgres.checks import check_server, check_slot
from pgoutput_source.postgres.connection import Connection, ask, connect, one_row
from pgoutput_source.postgres.publications import binary_option
from pgoutput_source.postgres.refusals import explained, server_error
from pgoutput_source.postgres.remedies import NO_POOLER, ONE_PROCESS, newer_publication_hint, quote_name
from pgoutput_source.postgres.slots import PLUGIN, slot_state, waiting
from pgoutput_source.protocol.wire import Lsn, StandbyStatus

logger = logging.getLogger(__name__)

# libpq reads as much at once as its buffer holds. The initial 16 KB would mean sixty thousand reads per gigabyte from a
# fast server. The buffer doubles when libpq is told to read more before its messages are taken.
_LONG_READ: Final = 8192
_BUFFER_IS_LARGE: Final = 500_000
_NOTHING: Final = (0, b"")
_NOTICE_INTERVAL: Final = 60.0
_ENDING: Final = 5.0
_UNDEFINED_FILE: Final = "58P01"
_UNITS: Final = {"": 0.001, "ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}

_noticed: dict[str, float] = {}


class Lost(Exception):
    """The connection is gone, and a new one may help."""


class Backend(NamedTuple):
    """A server process. Its pid alone is not enough, because the system uses it again."""

    pid: int
    started: str


class Walsender:
    """A connection that streams from the slot's own position, in COPY BOTH mode.

    Only one thread may use it at a time.

    Args:
        dsn: A libpq connection string.
        slot: The slot's name.
        publications: Names of the publications.
        options: pgoutput's other options.
        binary: "on", "off", or "auto", which asks the catalogue.
        temporary: Whether to create the slot first, for as long as the connection lasts.
        previous: The server process of our last connection. If it still holds the slot, it is terminated.
        admit: Called with the opened walsender before anything is read from it or sent to it. It raises to refuse the
            server.

    Attributes:
        system_id, timeline, wal_end: From IDENTIFY_SYSTEM, before the stream began.
        confirmed: The slot's position.
        standby: Whether the server is a standby.
        server: When the server was started. It distinguishes servers.
        server_version: In libpq's form: 180006.
        timeout: The server's wal_sender_timeout in seconds.
        backend: The walsender's process.
        socket: The socket to wait on.
        fatal: A warning of the server that must not be ignored.

    Raises:
        ConnectionFailed, NotConfigured, SlotError: The stream can't be started.
    """

    def __init__(
        self,
        dsn: str,
        *,
        slot: str,
        publications: Sequence[str],
        options: Mapping[str, str],
        binary: str = "off",
        temporary: bool = False,
        previous: Backend | None = None,
        admit: Callable[[Walsender], None] = lambda _: None,
    ) -> None:
        self.slot = slot
        self.publications = publications
        self.fatal: PgOutputError | None = None
        with connect(dsn) as beside, explained(slot):
            if previous is not None:
                beside.execute(
                    "SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity"
                    " WHERE pid = %s AND backend_start::text = %s",
                    previous,
                )
            if held := self._held(beside):
                raise held
            standby, server = one_row(beside, "SELECT pg_is_in_recovery(), pg_postmaster_start_time()::text")
            self.standby, self.server = bool(standby), str(server)
            listed = {"publication_names": ",".join(map(quote_name, publications))}
            listed |= binary_option(beside, binary, publications) | dict(options)
            conn = connect(dsn, replication=True, beside=beside)
            try:
                self._identify(conn)
                conn.add_notice_handler(self._note_notice)
                backend = self._find_backend(conn, beside)
                if temporary:
                    self._create(conn)
                self._start(conn, beside, listed)
                self._own_slot(beside, backend)
                admit(self)
            except BaseException:
                conn.close()
                raise
        self._conn = conn
        self._pgconn = conn.pgconn
        self._pgconn.nonblocking = 1
        self._get = partial(self._pgconn.get_copy_data, 1)
        self._consume = self._pgconn.consume_input
        self._buffer_is_large = False
        self.socket = self._pgconn.socket

    def _identify(self, conn: Connection) -> None:
        try:
            row = one_row(conn, "IDENTIFY_SYSTEM")
        except ServerError as e:
            if e.sqlstate == "42601":  # the command was parsed as SQL
                raise NotConfigured(f"the peer is not a walsender: {e.message}", hint=NO_POOLER) from e
            raise
        self.system_id, self.timeline, self.wal_end = str(row[0]), int(row[1]), Lsn(str(row[2]))
        self.server_version = conn.info.server_version
        # 0 disables the server's timeout. Ours remains.
        self.timeout = _seconds(one_row(conn, "SHOW wal_sender_timeout")[0]) or 60.0

    def _create(self, conn: Connection) -> None:
        # The slot is ready once the transactions that are running now have ended.
        command = sql.SQL("CREATE_REPLICATION_SLOT {} TEMPORARY LOGICAL {} NOEXPORT_SNAPSHOT").format(
            sql.Identifier(self.slot), sql.Identifier(PLUGIN)
        )
        with explained(self.slot), waiting(self.slot, standby=self.standby):
            conn.execute(command)

    def _start(self, conn: Connection, beside: Connection, options: Mapping[str, str]) -> None:
        listed = sql.SQL(", ").join(
            # A replication command is not SQL: a backslash has no meaning, and E'…' is not a string.
            sql.SQL("{} ").format(sql.Identifier(name)) + sql.SQL("'" + value.replace("'", "''") + "'")
            for name, value in options.items()
        )
        # 0/0 starts at the slot's position. A higher position would make the server skip what is before it.
        command = sql.SQL("START_REPLICATION SLOT {} LOGICAL 0/0 ({})").format(sql.Identifier(self.slot), listed)
        try:
            with explained(self.slot):
                conn.execute(command)
        except SlotInUse as e:
            raise self._held(beside) or e from e
        except SlotError as e:
            # 55000 has many reasons. The catalogue tells which one it is.
            check_server(beside)
            state = slot_state(beside, self.slot)
            if state is not None:
                check_slot(beside, state)
                if isinstance(e, SlotNotFound):
                    raise self._elsewhere("the stream finds no such slot, and another connection does") from e
            raise e

    def _find_backend(self, conn: Connection, beside: Connection) -> Backend | None:
        """The walsender's process, if both connections lead to the same server, with nothing in between."""
        row = beside.execute(
            "SELECT pid, backend_start::text FROM pg_stat_activity WHERE pid = %s AND backend_type = 'walsender'",
            [conn.info.backend_pid],
        ).fetchone()
        return None if row is None else Backend(row[0], row[1])

    def _own_slot(self, beside: Connection, backend: Backend | None) -> None:
        """Look up the slot's position and the process that holds it, now that nobody else can move it."""
        row = beside.execute(
            "SELECT s.confirmed_flush_lsn::text, a.pid, a.backend_start::text FROM pg_replication_slots s"
            " LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid WHERE s.slot_name = %s",
            [self.slot],
        ).fetchone()
        # The stream may already have ended with an error, which frees the slot.
        found = Backend(row[1], row[2]) if row is not None and row[1] is not None else backend
        if row is None or found is None:
            raise self._elsewhere("the stream has begun, but another connection sees nobody stream")
        self.backend, self.confirmed = found, Lsn(row[0] or 0)

    def _elsewhere(self, found: str) -> NotConfigured:
        return NotConfigured(f"slot {self.slot!r}: {found}. The same DSN led to different servers", hint=NO_POOLER)

    def _held(self, beside: Connection) -> SlotInUse | None:
        """An error that says who holds the slot; None if nobody does."""
        row = beside.execute(
            "SELECT a.pid, a.application_name, host(a.client_addr) FROM pg_replication_slots s"
            " JOIN pg_stat_activity a ON a.pid = s.active_pid WHERE s.slot_name = %s",
            [self.slot],
        ).fetchone()
        if row is None:
            return None
        holder = f"process {row[0]} ({row[1] or 'no application_name'}, {row[2] or 'local'})"
        error = SlotInUse(f"slot {self.slot!r} is in use by {holder}", hint=ONE_PROCESS)
        error.sqlstate = "55006"
        return error

    def _note_notice(self, notice: psycopg.errors.Diagnostic) -> None:
        """PostgreSQL 18 only warns when a publication did not exist yet, and leaves its rows out.

        The text is in the server's language, so SQLSTATE and the server's function identify the warning. The only other
        warning of this kind says that a standby of synchronized_standby_slots is missing.
        """
        message = notice.message_primary or ""
        standby = notice.source_function == "StandbySlotsHaveCaughtup" or "synchronized_standby_slots" in message
        if notice.severity_nonlocalized == "WARNING" and notice.sqlstate == "55000" and not standby:
            error = PublicationError(
                f"slot {self.slot!r}: {message}: its changes would be left out",
                hint=newer_publication_hint(self.slot),
            )
            error.sqlstate = notice.sqlstate
            self.fatal = error
            return
        # While a slot waits for a standby, the warning comes several times a second.
        now = time.monotonic()
        if now - _noticed.get(message, -_NOTICE_INTERVAL) >= _NOTICE_INTERVAL:
            _noticed[message] = now
            logger.warning("slot %r: the server says: %s", self.slot, message)

    def read(self, taken: int) -> None:
        """Have libpq read from the socket.

        Args:
            taken: The bytes taken since the last read. Take everything that libpq has before: otherwise its buffer
                keeps growing.

        Raises:
            Lost: The server is gone.
        """
        try:
            self._consume()
            if taken > _LONG_READ and not self._buffer_is_large:
                self._consume()
                self._buffer_is_large = taken > _BUFFER_IS_LARGE
        except psycopg.Error as e:
            raise Lost(_one_line(e)) from e

    def take(self, count: int) -> tuple[list[tuple[int, memoryview]], Lost | None]:
        """Up to `count` messages that libpq has, each with its length, and the error after them, if any.

        A length of -1 means that the server ended the stream: see `end`.
        """
        chunk: list[tuple[int, memoryview]] = []
        try:
            # islice and iter loop in C. On an error list() would lose its items; extend() keeps them.
            chunk.extend(islice(iter(self._get, _NOTHING), count))
        except psycopg.Error as e:
            # libpq reports the end of the stream once, and fails after that.
            return chunk, None if chunk and chunk[-1][0] < 0 else Lost(_one_line(e))
        return chunk, None

    def send(self, status: StandbyStatus) -> None:
        """Report positions. What the kernel can't take now stays in libpq's buffer, and goes out with the next report.

        Raises:
            Lost: The server is gone.
        """
        try:
            self._pgconn.put_copy_data(status.encode())
            self._pgconn.flush()
        except psycopg.Error as e:
            raise Lost(_one_line(e)) from e

    def end(self) -> PgOutputError:
        """The server's error, after a length of -1. If the server only stopped, or may come back, this raises `Lost`.

        Raises:
            Lost: The connection should be replaced.
        """
        try:
            result = self._drain()
        except psycopg.Error as e:
            raise Lost(_one_line(e)) from e
        if result is None:
            raise Lost("the server ended the stream")
        error = server_error(
            psycopg.errors.error_from_result(result), slot=self.slot, publications=self.publications, streaming=True
        )
        if isinstance(error, ConnectionFailed) and error.transient:
            raise Lost(error.message.removeprefix(f"slot {self.slot!r}: "))
        return error

    def finish(self, deadline: float) -> bool:
        """End the stream, and return whether the server confirmed that by `deadline`.

        The server reads in order, so it has read everything that we sent.

        Raises:
            Lost: The server is gone.
        """
        try:
            return self._finish(deadline)
        except psycopg.Error as e:
            raise Lost(_one_line(e)) from e

    def _finish(self, deadline: float) -> bool:
        self._pgconn.put_copy_end()
        poll = select.poll()
        poll.register(self.socket, select.POLLIN | select.POLLOUT)
        while (left := deadline - time.monotonic()) > 0:
            if self._pgconn.flush() == 0:
                poll.modify(self.socket, select.POLLIN)
            while (got := self._get()[0]) > 0:
                pass
            if got < 0:
                return self._drain() is None
            poll.poll(left * 1000)
            self._consume()
        return False

    def close(self) -> None:
        """Close the connection, whatever its state."""
        self._conn.close()

    def _drain(self) -> pq.abc.PGresult | None:
        """The error that ended the stream; None if it ended in order. It reads all results, as there are several."""
        error = None
        try:
            for result in self._results():
                if result.status in (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_BOTH):
                    self._pgconn.put_copy_end()  # the server ended it first
                    self._pgconn.flush()
                elif result.status == pq.ExecStatus.FATAL_ERROR:
                    error = error or result
        except psycopg.OperationalError:
            # After a fatal error the server closes the connection. The error tells more than the closing.
            if error is None:
                raise
        return error

    def _results(self) -> Iterator[pq.abc.PGresult]:
        deadline = time.monotonic() + _ENDING
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        while True:
            while self._pgconn.status == pq.ConnStatus.OK and self._pgconn.is_busy():
                if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    raise Lost("the server ended the stream without an error")
                self._consume()
            result = self._pgconn.get_result()
            if result is None:
                return
            yield result


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _seconds(setting: str) -> float:
    """Seconds from a duration as SHOW writes it.

    >>> [_seconds(text) for text in ("1min", "1500ms", "0", "30s")]
    [60.0, 1.5, 0.0, 30.0]
    """
    number, unit = re.fullmatch(r"(\d+)([a-z]*)", setting).groups()  # type: ignore[union-attr]
    return int(number) * _UNITS[unit]


def timeline_end(dsn: str, timeline: int, current: int, *, patience: float = 0.0) -> Lsn | None:
    """Where the history of the server's `current` timeline left `timeline`; None if it was never on it.

    While the server is away it retries for `patience` seconds.
    https://www.postgresql.org/docs/current/protocol-replication.html (TIMELINE_HISTORY)
    """

    def history(conn: Connection) -> str:
        try:
            return str(one_row(conn, f"TIMELINE_HISTORY {current:d}")[1])
        except ServerError as e:
            if e.sqlstate == _UNDEFINED_FILE:
                return ""  # the first timeline has no history
            raise

    for line in ask(dsn, history, patience=patience, replication=True).splitlines():
        fields = line.split()
        if fields and fields[0] == str(timeline):
            return Lsn(fields[1])
    return None
