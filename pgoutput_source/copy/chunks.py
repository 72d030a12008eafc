"""Reads a chunk: one short transaction, one snapshot, one COPY.

    BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY
    LOCK TABLE … IN ACCESS SHARE MODE          before the snapshot: a TRUNCATE in between would leave an empty table
    SELECT pg_current_snapshot(), …            what the rows will show
    COPY (SELECT … WHERE key >= … AND key < …) TO STDOUT (FORMAT binary)
    COMMIT

https://www.postgresql.org/docs/current/sql-copy.html
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from psycopg import pq, sql

from pgoutput_source.copy.copy_out import copy_out, new_buffer
from pgoutput_source.copy.keys import Key
from pgoutput_source.copy.tables import Described, Published, SourceTable, describe
from pgoutput_source.copy.visibility import Snapshot
from pgoutput_source.decode.copied import TEXT_OF, Tuples
from pgoutput_source.decode.relations import Relations
from pgoutput_source.errors import ConnectionFailed, NotConfigured, ServerError
from pgoutput_source.postgres.connection import Connection, connect
from pgoutput_source.postgres.refusals import explained
from pgoutput_source.protocol.wire import Lsn

logger = logging.getLogger(__name__)

MOST_BYTES: Final = 64 << 20
"""Of one chunk, which is delivered as a unit: with more it is read in smaller ones, unless it is a single row."""

_LONGEST = 30.0  # seconds; a longer transaction would keep the server from vacuuming
_QUERY_CANCELED: Final = "57014"
_BUSY: Final = ("55P03", "42P01")  # lock_not_available, undefined_table
_INSUFFICIENT_PRIVILEGE: Final = "42501"
_LOCK: Final = "SET LOCAL lock_timeout = '20ms'; LOCK TABLE {} IN ACCESS SHARE MODE; SET LOCAL lock_timeout = 0"
_FLUSH_WAIT: Final = 30.0  # seconds


class TooLarge(Exception):
    """A chunk has more bytes than may be held, or takes too long."""


class Busy(Exception):
    """Try again later: another session holds, or waits for, a lock that blocks readers."""


@dataclass(slots=True)
class Chunk:
    """A transaction that reads a table, and its snapshot.

    `table` is None if the table is gone.
    """

    table: SourceTable | None
    snapshot: Snapshot
    taken: datetime


@dataclass(slots=True)
class Fetched:
    """All rows of a chunk of a table with a key, whose transaction has ended.

    Attributes:
        chunk: The transaction.
        table: The table's version.
        upper: The end of the chunk's keys, exclusive; None is the end of all keys.
        pieces: The rows.
        seconds: How long it took.
    """

    chunk: Chunk
    table: SourceTable
    upper: Key | None
    pieces: list[Tuples]
    seconds: float


class ChunkReader:
    """Reads chunks on its own connection, one at a time.

    Args:
        dsn: A libpq connection string.
        relations: Looks up the types of columns.
        application_name: Of the connection.
    """

    def __init__(self, dsn: str, relations: Relations, *, application_name: str) -> None:
        self._dsn, self._relations, self._application_name = dsn, relations, application_name
        self._connection: Connection | None = None
        self._page = 8192
        self._encrypted, self._buffer = True, new_buffer()
        self._reading = False  # a COPY that has not come to its end
        self._described: Described = {}

    @property
    def connection(self) -> Connection:
        """The connection, in autocommit mode, unless a chunk is open."""
        if self._connection is None or self._connection.closed:
            self._connection = connect(self._dsn)
            with explained():
                self._connection.execute("SELECT set_config('application_name', %s, false)", [self._application_name])
                self._connection.execute("SET row_security = off")
                row = self._connection.execute(
                    "SELECT current_setting('wal_block_size')::int, pg_is_in_recovery(),"
                    "       (SELECT encrypted FROM pg_stat_gssapi WHERE pid = pg_backend_pid())"
                ).fetchone()
            assert row is not None
            self._page, self._reading = row[0], False
            self._encrypted = self._connection.pgconn.ssl_in_use or row[2] is not False
            if row[1]:
                self.close()
                raise NotConfigured(
                    "the initial copy can't read from a standby: its snapshots don't show which transactions run",
                    hint="use snapshot='initial' on the primary, or leave it out",
                )
        return self._connection

    @property
    def connected(self) -> bool:
        """Whether the connection is there."""
        return self._connection is not None and not self._connection.closed

    def interrupt(self) -> None:
        """Make another thread's call fail with `ConnectionFailed`. The connection can only be closed after that."""
        if self.connected:
            assert self._connection is not None
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as peer:
                peer.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; a transaction is rolled back."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def snapshot(self) -> Snapshot:
        """The snapshot of a transaction that begins now."""
        return self._taken()[0]

    def open(self, wanted: Published) -> Chunk:
        """Begin a transaction that can read a table. The server cancels statements that take longer than 30 seconds.

        Raises:
            Busy: The table's lock is not available at once.
            NotConfigured: The role may not read the table, or not all of its rows.
            ServerError: The server refuses.
        """
        conn = self.connection
        with explained():
            row = conn.execute("SELECT %s::bigint::oid::regclass::text", [wanted.relation_id]).fetchone()
            assert row is not None
            name = str(row[0])
        try:
            # Use the index in any case: without statistics the planner might read the whole table.
            conn.execute(
                "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;"
                f"SET LOCAL statement_timeout = '{_LONGEST * 1000:.0f}ms'; SET LOCAL enable_seqscan = off;"
                f"{'' if name.isdigit() else _LOCK.format(name)}".encode()
            )
            snapshot, taken = self._taken()
            return Chunk(describe(conn, wanted, self._relations, self._described), snapshot, taken)
        except BaseException as e:
            self.abandon()
            if isinstance(e, ServerError) and e.sqlstate in _BUSY:
                # A wait here could queue behind a TRUNCATE that waits for other sessions, so try again later.
                raise Busy from e
            if isinstance(e, ServerError) and e.sqlstate == _INSUFFICIENT_PRIVILEGE:
                describe(conn, wanted, self._relations, self._described)  # says what is missing
            raise

    def without_limit(self) -> None:
        """Let the statements of this transaction take as long as they need."""
        with explained():
            self.connection.execute("SET LOCAL statement_timeout = 0")

    def fetch(self, chunk: Chunk, table: SourceTable, lower: Key | None, rows: int) -> Fetched:
        """Read a chunk of this many rows, and end its transaction.

        Raises:
            TooLarge: It takes too long, or has too many bytes. The transaction is still open.
        """
        begun = time.monotonic()
        with self._in_time(rows):
            upper = self.upper_bound(table, lower, rows)
            pieces = self._pieces(table, between(table, lower, upper), rows)
        self.commit(chunk.snapshot)
        return Fetched(chunk, table, upper, pieces, time.monotonic() - begun)

    def _pieces(self, table: SourceTable, where: sql.Composable, rows: int) -> list[Tuples]:
        pieces: list[Tuples] = []
        size = 0
        for piece in self.read(table, where):
            pieces.append(piece)
            size += len(piece.raw)
            if size > MOST_BYTES and rows > 1:
                raise TooLarge
        return pieces

    @contextlib.contextmanager
    def _in_time(self, rows: int) -> Iterator[None]:
        try:
            yield
        except ServerError as e:
            if e.sqlstate != _QUERY_CANCELED or rows == 1:
                raise
            raise TooLarge from e

    def _taken(self) -> tuple[Snapshot, datetime]:
        with explained():
            # The snapshot is taken before the first expression is evaluated, so the position is from after it.
            row = self.connection.execute(
                "SELECT pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text, transaction_timestamp()"
            ).fetchone()
        assert row is not None
        return Snapshot.of(row[0], self._start_of_record(Lsn(row[1]))), row[2]

    def _start_of_record(self, position: int) -> int:
        """Skip a page's header: the insert position is there while the page is empty, but no record begins there."""
        offset = position % self._page
        return position - offset if offset in (24, 40) else position

    def upper_bound(self, table: SourceTable, lower: Key | None, rows: int) -> Key | None:
        """The key that is `rows` keys after `lower`; None if there are fewer."""
        names = sql.SQL(", ").join(sql.Identifier(c.name) for c in table.key)
        # The subquery makes the server convert only this key to text. Otherwise it would convert all keys before it.
        query = sql.SQL("SELECT {} FROM (SELECT {} FROM {} WHERE {} ORDER BY {} OFFSET {} LIMIT 1) AS k").format(
            sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(c.name)) for c in table.key),
            names,
            sql.SQL(table.sql_name),
            _range(table, lower, None),
            names,
            sql.Literal(rows),
        )
        with explained():
            row = self.connection.execute(query).fetchone()
        return None if row is None else tuple(row)

    def read(self, table: SourceTable, where: sql.Composable) -> Iterator[Tuples]:
        """The rows of a table that fulfil a condition, in pieces of a few megabytes."""
        condition = sql.SQL(" AND ").join(
            [where, *([sql.SQL("({})").format(sql.SQL(table.row_filter))] if table.row_filter else [])]
        )
        values = [sql.SQL(TEXT_OF if c.as_text else "{}").format(sql.Identifier(c.name)) for c in table.columns]
        query = sql.SQL("COPY (SELECT {} FROM {} WHERE {}) TO STDOUT (FORMAT binary)").format(
            sql.SQL(", ").join(values), sql.SQL(table.sql_name), condition
        )
        connection = self.connection
        self._reading = True
        try:
            yield from copy_out(
                connection,
                query.as_string(connection),
                len(table.columns),
                encrypted=self._encrypted,
                buffer=self._buffer,
            )
        except ServerError as e:
            self._reading = isinstance(e, ConnectionFailed)
            raise
        self._reading = False

    def flushed(self, snapshot: Snapshot) -> None:
        """Wait until everything that the snapshot shows is flushed to the server's disk.

        A transaction with synchronous_commit=off is visible before it is flushed, and a crash of the server can undo
        it. Rows that show it must not be delivered earlier.
        """
        deadline = time.monotonic() + _FLUSH_WAIT
        with explained():
            while True:
                row = self.connection.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
                assert row is not None
                if Lsn(row[0]) >= snapshot.high:
                    return
                if time.monotonic() > deadline:
                    raise ConnectionFailed("the server does not flush its WAL", hint="see the server's log and disk")
                time.sleep(0.002)

    def commit(self, snapshot: Snapshot) -> None:
        """End the transaction after everything was read. Only then does it count: this may fail, too."""
        self.flushed(snapshot)
        with explained():
            self.connection.execute("COMMIT")

    def abandon(self) -> None:
        """End the transaction. What was read doesn't count."""
        connection = self._connection
        if connection is None or connection.closed:
            return
        status = connection.pgconn.transaction_status
        if self._reading or status not in (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR):
            self.close()
            return
        with explained():
            connection.execute("ROLLBACK")


def between(table: SourceTable, lower: Key | None, upper: Key | None) -> sql.Composable:
    """The condition for keys from `lower` up to, but not including, `upper`."""
    return _range(table, lower, upper)


def exactly(table: SourceTable, keys: Sequence[Key]) -> sql.Composable:
    """The condition for these keys."""
    names = sql.SQL(", ").join(sql.Identifier(c.name) for c in table.key)
    return sql.SQL("({}) IN ({})").format(
        names, sql.SQL(", ").join(sql.SQL("({})").format(_values(table, k)) for k in keys)
    )


def _range(table: SourceTable, lower: Key | None, upper: Key | None) -> sql.Composable:
    names = sql.SQL(", ").join(sql.Identifier(c.name) for c in table.key)
    conditions = [
        sql.SQL("({}) " + operator + " ({})").format(names, _values(table, key))
        for operator, key in ((">=", lower), ("<", upper))
        if key is not None
    ]
    return sql.SQL(" AND ").join(conditions) if conditions else sql.SQL("true")


def _values(table: SourceTable, key: Key) -> sql.Composable:
    return sql.SQL(", ").join(
        sql.SQL("{}::" + column.type_name).format(sql.Literal(text))
        for column, text in zip(table.key, key, strict=True)
    )
