"""`Walsender`: one replication connection, from START_REPLICATION to its end.

What streams from a slot over time is a `replication.ReplicationStream`; it takes a new one of these after each loss,
for a walsender streams only once. libpq's calls hold Python's interpreter lock, so nothing here waits inside them: the
connection is in non-blocking mode, and whoever reads waits in `poll()` of the operating system.
https://www.postgresql.org/docs/current/protocol-replication.html
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Final, NamedTuple

import psycopg
from psycopg import pq, sql

from pgoutput_source.errors import ConnectionFailed, PgOutputError, PublicationError, ServerError, SlotError, SlotInUse
from pgoutput_source.postgres import checks
from pgoutput_source.postgres.connection import ONE_PROCESS, Connection, connect, quote_name, server_error
from pgoutput_source.postgres.publications import binary_option
from pgoutput_source.postgres.slots import slot_state
from pgoutput_source.protocol.wire import Lsn, StandbyStatus, pg_now

logger = logging.getLogger(__name__)

# libpq reads as much at a time as its buffer holds, which begins with 16 KB and grows with the largest message.
_READ_BUFFER: Final = 1_000_000
_NOTHING: Final = (0, b"")
_NOTICE_INTERVAL: Final = 60.0
_ENDING: Final = 5.0

_noticed: dict[str, float] = {}


class Lost(Exception):
    """The connection is gone, and trying again may help."""


class Backend(NamedTuple):
    """A server process: its number alone may belong to another one soon."""

    pid: int
    started: str


class Walsender:
    """A connection that streams from the slot's own position, in COPY BOTH mode.

    It is not for two threads at once.

    Args:
        dsn: A libpq connection string.
        slot: The slot's name.
        publications: Names of the publications.
        options: pgoutput's other options.
        binary: "on", "off", or "auto", which asks the catalogue on this connection.
        previous: The process of a former connection of ours, which may still hold the slot: it is terminated.
        admit: Called with the opened walsender before it streams; it may refuse the server by raising.

    Attributes:
        system_id, timeline, wal_end: What IDENTIFY_SYSTEM said before the stream began.
        confirmed: Where the slot stood then; None if there is no such slot.
        standby: Whether it was a standby then.
        server: When the server was started, which tells it from others.
        server_version: As libpq says it: 180006.
        timeout: The server's wal_sender_timeout in seconds.
        backend: The walsender's process.
        socket: To wait on.
        fatal: What the server warned of and must not be ignored.
        sent_flush, sent_at: The position last acknowledged, and when (`time.monotonic()`).

    Raises:
        ConnectionFailed, NotConfigured, SlotError: It can't be had.
    """

    def __init__(
        self,
        dsn: str,
        *,
        slot: str,
        publications: Sequence[str],
        options: Mapping[str, str],
        binary: str = "off",
        previous: Backend | None = None,
        admit: Callable[[Walsender], None] = lambda _: None,
    ) -> None:
        self.slot = slot
        self.publications = publications
        self.fatal: PgOutputError | None = None
        self.sent_flush = Lsn(0)
        self.sent_at = 0.0
        conn = connect(dsn, replication=True)
        try:
            if previous is not None:
                conn.execute(
                    "SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity"
                    " WHERE pid = %s AND backend_start::text = %s",
                    previous,
                )
            self._identify(conn)
            # While another process holds the slot, it may still move: where the stream would begin is not known yet.
            if held := self._held(conn):
                raise held
            admit(self)
            if conn.info.parameter_status("server_encoding") == "SQL_ASCII":
                # Bytes are of no known encoding there. As UTF8 the first that isn't would end the stream for ever.
                conn.execute("SET client_encoding = 'SQL_ASCII'")
            # With 16 KB a read, a fast server is waited for sixty thousand times a gigabyte.
            conn.execute(f"SELECT repeat(' ', {_READ_BUFFER})".encode())
            conn.add_notice_handler(self._note_notice)
            listed = {"publication_names": ",".join(map(quote_name, publications))}
            self._start(conn, listed | binary_option(conn, binary, publications) | dict(options))
        except psycopg.Error as e:
            conn.close()
            raise server_error(e, slot=slot) from e
        except BaseException:
            conn.close()
            raise
        self._conn = conn
        self._pgconn = conn.pgconn
        self._pgconn.nonblocking = 1
        self._get = partial(self._pgconn.get_copy_data, 1)
        self.consume: Callable[[], None] = self._pgconn.consume_input
        """Read what is in the socket; raises psycopg.OperationalError when the server is gone."""
        self.socket = self._pgconn.socket

    def _identify(self, conn: Connection) -> None:
        row = conn.execute("IDENTIFY_SYSTEM").fetchone()
        assert row is not None, "IDENTIFY_SYSTEM gives one row"
        self.system_id, self.timeline, self.wal_end = str(row[0]), int(row[1]), Lsn(str(row[2]))
        self.server_version = conn.info.server_version
        row = conn.execute(
            "SELECT (SELECT setting::bigint FROM pg_settings WHERE name = 'wal_sender_timeout'),"
            " pid, backend_start::text, (SELECT confirmed_flush_lsn::text FROM pg_replication_slots"
            " WHERE slot_name = %s), pg_is_in_recovery(), pg_postmaster_start_time()::text"
            " FROM pg_stat_activity WHERE pid = pg_backend_pid()",
            [self.slot],
        ).fetchone()
        assert row is not None, "a session sees itself"
        self.timeout = row[0] / 1000 or 60.0  # 0 switches the server's patience off, then this is ours
        self.backend = Backend(row[1], row[2])
        self.confirmed = None if row[3] is None else Lsn(row[3])
        self.standby, self.server = bool(row[4]), str(row[5])

    def _start(self, conn: Connection, options: Mapping[str, str]) -> None:
        listed = sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(name), sql.Literal(value)) for name, value in options.items()
        )
        # 0/0 is where the slot stands. A higher position would make the server skip what is before it.
        command = sql.SQL("START_REPLICATION SLOT {} LOGICAL 0/0 ({})").format(sql.Identifier(self.slot), listed)
        try:
            conn.execute(command)
        except psycopg.Error as e:
            raise self._start_error(conn, e) from e

    def _start_error(self, conn: Connection, error: psycopg.Error) -> PgOutputError:
        """Why the server does not start the stream; for 55000 there are many reasons, and the catalogue knows which."""
        result = server_error(error, slot=self.slot, publications=self.publications)
        if isinstance(result, SlotInUse):
            return self._held(conn) or result
        if isinstance(result, SlotError):
            try:
                checks.check_server(conn)
                state = slot_state(conn, self.slot)
                if state is not None:
                    checks.check_slot(conn, state)
            except ServerError as e:
                return e
        return result

    def _held(self, conn: Connection) -> SlotInUse | None:
        """Who holds the slot, as an error; None if nobody does."""
        row = conn.execute(
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
        """PostgreSQL 18 only warns when a publication did not exist yet, and leaves its rows out."""
        message = notice.message_primary or ""
        if (
            notice.severity_nonlocalized == "WARNING"
            and notice.sqlstate == "55000"
            and "synchronized_standby_slots" not in message
            and any(f'"{name}"' in message for name in self.publications)
        ):
            error = PublicationError(
                f"slot {self.slot!r}: {message}: its changes would be left out",
                hint="a publication must be older than the slot: make the slot anew (what it holds is lost). "
                f"{notice.message_hint or ''}".rstrip(),
            )
            error.sqlstate = notice.sqlstate
            self.fatal = error
            return
        # A slot that waits for a standby is told so several times a second.
        now = time.monotonic()
        if now - _noticed.get(message, -_NOTICE_INTERVAL) >= _NOTICE_INTERVAL:
            _noticed[message] = now
            logger.warning("slot %r: the server says: %s", self.slot, message)

    def take(self, count: int) -> tuple[list[tuple[int, memoryview]], Exception | None]:
        """Up to `count` messages that libpq has, each with its length, and what went wrong after them.

        A length of -1 says that the server has ended the stream: see `end`.
        """
        chunk: list[tuple[int, memoryview]] = []
        try:
            # islice and iter loop in C. list() would lose what it has when an error comes; extend() leaves it.
            chunk.extend(islice(iter(self._get, _NOTHING), count))
        except psycopg.OperationalError as e:
            # libpq says once that the stream ended, and after that fails.
            return chunk, None if chunk and chunk[-1][0] < 0 else e
        return chunk, None

    def send_status(self, write: Lsn, flush: Lsn, *, reply: bool = False) -> None:
        """Report positions. What the kernel can't take now stays in libpq's buffer, and goes with the next."""
        self._pgconn.put_copy_data(StandbyStatus(write, flush, flush, pg_now(), reply).encode())
        self._pgconn.flush()
        self.sent_flush, self.sent_at = flush, time.monotonic()

    def end(self) -> PgOutputError:
        """After a length of -1: the server's error. If it only stopped, or may come back, that is a `Lost`.

        Raises:
            Lost: The connection should be made again.
        """
        result = self._drain()
        if result is None:
            raise Lost("the server ended the stream")
        error = server_error(
            psycopg.errors.error_from_result(result), slot=self.slot, publications=self.publications, streaming=True
        )
        if isinstance(error, ConnectionFailed) and error.transient:
            raise Lost(error.message)
        return error

    def finish(self, deadline: float) -> bool:
        """End the stream, and whether the server confirmed it by `deadline`: it reads in order, so all we sent."""
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
            self.consume()
        return False

    def close(self) -> None:
        """Close the connection, whatever its state."""
        self._conn.close()

    def _drain(self) -> pq.abc.PGresult | None:
        """The error that ended the stream, None if it was ended in order. All results are read: there are several."""
        error = None
        try:
            for result in self._results():
                if result.status in (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_BOTH):
                    self._pgconn.put_copy_end()  # the server ended it first
                    self._pgconn.flush()
                elif result.status == pq.ExecStatus.FATAL_ERROR:
                    error = error or result
        except psycopg.OperationalError:
            # After a fatal error the server closes the connection; the error says more than that.
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
                    raise Lost("the server ended the stream without a word")
                self.consume()
            result = self._pgconn.get_result()
            if result is None:
                return
            yield result


def timeline_end(dsn: str, timeline: int, current: int) -> Lsn | None:
    """Where the history of the server's `current` timeline left `timeline`; None if it never was on it.

    https://www.postgresql.org/docs/current/protocol-replication.html (TIMELINE_HISTORY)
    """
    with connect(dsn, replication=True) as conn:
        try:
            row = conn.execute(f"TIMELINE_HISTORY {current:d}".encode()).fetchone()
        except psycopg.errors.UndefinedFile:
            return None  # the first timeline has no history
        except psycopg.Error as e:
            raise server_error(e) from e
    assert row is not None, "TIMELINE_HISTORY gives one row"
    content = row[1] if isinstance(row[1], str) else bytes(row[1]).decode()
    for line in content.splitlines():
        fields = line.split()
        if fields and fields[0] == str(timeline):
            return Lsn(fields[1])
    return None
