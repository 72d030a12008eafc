"""Connections to PostgreSQL that pin every setting that correctness rests on, and raise the package's errors.

The stream, the initial copy and the queries of the catalogue all connect here. So they get identical text for a value
and the same warnings, and they raise the same error for a wrong password.
"""

from __future__ import annotations

import logging
import os
import random
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Self, TypeVar

import psycopg
from psycopg import pq
from psycopg.abc import Params, Query
from psycopg.conninfo import make_conninfo
from psycopg.rows import Row

from pgoutput_source.errors import ConfigurationError, NotConfigured, ServerError
from pgoutput_source.postgres.refusals import connect_error, explained, passing
from pgoutput_source.postgres.remedies import NO_POOLER

logger = logging.getLogger(__name__)

Connection = psycopg.Connection[Any]

T = TypeVar("T")

VERIFIED: Final = {
    "DateStyle": "ISO,YMD",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "search_path": "",
    "quote_all_identifiers": "off",
    "standard_conforming_strings": "on",
    "client_min_messages": "warning",
}
"""How values look, how our SQL is parsed, and that warnings arrive. Each connection is checked for these.

PostgreSQL 18 only warns when a publication is missing, and leaves its rows out.
"""

PINNED: Final = VERIFIED | {
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "default_transaction_read_only": "off",
}
"""Settings in the startup packet, which override those of role, database and server. No timeout ends our sessions.

https://www.postgresql.org/docs/current/runtime-config-client.html
"""

# libpq sends PGTZ and PGDATESTYLE as separate parameters, which the server applies after all options.
_ENVIRONMENT_WINS: Final = ("TimeZone", "DateStyle")

# To notice a peer that vanished silently. DSN, service file and environment override these.
_DEFAULTS: Final = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",  # milliseconds
    "fallback_application_name": "pgoutput_source",
}

_PAUSE: Final = 2.0  # seconds, at most, between two attempts


class _Cursor(psycopg.ClientCursor[Row]):
    """Raises the package's errors, so that no caller can forget to.

    It quotes parameters on the client's side, because a walsender takes none.
    """

    def execute(
        self, query: Any, params: Params | None = None, *, prepare: bool | None = None, binary: bool | None = None
    ) -> Self:
        with explained():
            return super().execute(query, params, prepare=prepare, binary=binary)

    @contextmanager
    def copy(self, statement: Query, params: Params | None = None, **options: Any) -> Iterator[psycopg.Copy]:
        with explained(), super().copy(statement, params, **options) as copy:
            yield copy


_open: Final[weakref.WeakSet[Connection]] = weakref.WeakSet()


def _forked() -> None:
    # A child's copy of the socket would keep the session alive after this process ends, and with it the slot in use.
    nothing = os.open(os.devnull, os.O_RDWR)
    for connection in list(_open):
        if not connection.closed:
            os.dup2(nothing, connection.fileno(), inheritable=False)
    os.close(nothing)


os.register_at_fork(after_in_child=_forked)


def connect(dsn: str, *, replication: bool = False, beside: Connection | None = None) -> Connection:
    """A connection in autocommit mode, with `PINNED` set and `VERIFIED` checked.

    Its cursors raise errors of this package. It speaks the simple query protocol.

    Args:
        dsn: A libpq connection string or URL; "" leaves everything to libpq's environment variables.
        replication: Whether to connect as a walsender.
        beside: For a walsender that will decode: a connection with the same DSN. The walsender connects to the same
            server, and learns from it what would otherwise take SQL.

    Raises:
        ConnectionFailed: No server, no database, no access, or no TLS; `transient` says whether a retry may help.
        NotConfigured: The role may not stream, no walsender is free, the server is older than PostgreSQL 14, or the
            peer ignores the settings.
        ConfigurationError: The DSN can't be parsed.
    """
    try:
        # prepare_threshold: a walsender refuses prepared statements, and psycopg prepares after the fifth execution.
        connection = psycopg.connect(
            _conninfo(dsn, replication, beside), autocommit=True, prepare_threshold=None, cursor_factory=_Cursor
        )
    except psycopg.ProgrammingError:
        raise ConfigurationError(
            "dsn: not a connection string that libpq can read", hint="check it with SourceSettings(dsn=…)"
        ) from None
    except psycopg.Error as e:
        raise connect_error(e, dsn) from e
    _open.add(connection)
    try:
        _verify(connection, replication)
    except BaseException:
        connection.close()
        raise
    return connection


def ask(dsn: str, question: Callable[[Connection], T], *, patience: float = 0.0, replication: bool = False) -> T:
    """Ask a question over a new connection, again and again while the server is away.

    Args:
        dsn: A libpq connection string or URL.
        question: Reads from the connection. It may be called several times.
        patience: For how many seconds to retry.
        replication: Whether the question is one for a walsender.

    Raises:
        ServerError: What `connect` and `question` raise, if it does not pass in time.
    """
    deadline = time.monotonic() + patience
    pause = 0.1
    while True:
        try:
            with connect(dsn, replication=replication) as connection:
                return question(connection)
        except ServerError as e:
            if not passing(e) or time.monotonic() + pause > deadline:
                raise
            if pause == 0.1:
                logger.warning("%s; asking again for up to %.0f s", e.message, patience)
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, _PAUSE)


def one_row(conn: Connection, query: str) -> tuple[Any, ...]:
    """The single row of a query. Text is always str: psycopg returns bytes when the encoding is SQL_ASCII."""
    row = conn.execute(query.encode()).fetchone()
    assert row is not None, "a query of one row"
    return tuple(value.decode(errors="replace") if isinstance(value, bytes) else value for value in row)


def _conninfo(dsn: str, replication: bool, beside: Connection | None) -> str:
    given = _given(dsn)
    parameters: dict[str, Any] = {name: given.get(name) or value for name, value in _DEFAULTS.items()}
    parameters["client_encoding"] = "UTF8"
    pinned = PINNED
    if replication:
        parameters["replication"] = "database"
    if beside is not None:
        info = beside.info
        # Several hosts, or several addresses of one, may be several servers.
        parameters |= {"host": info.host, "hostaddr": info.hostaddr, "port": str(info.port)}
        if info.server_version >= 170000:
            # Decoding runs within transactions, and a large one takes long. Older servers don't know the setting.
            pinned = pinned | {"transaction_timeout": "0"}
        if info.parameter_status("server_encoding") == "SQL_ASCII":
            # The encoding of the bytes is unknown. With UTF8, the first invalid ones would block the stream for good.
            parameters["client_encoding"] = "SQL_ASCII"
    # The last option of a name wins.
    options = [given.get("options") or "", *(f"-c {name}={value}" for name, value in pinned.items())]
    return make_conninfo(dsn, **parameters, options=" ".join(filter(None, options)))


def _given(dsn: str) -> dict[str, str]:
    """The parameters from DSN, service file and environment, as libpq reads them. It connects to nothing."""
    nowhere = pq.PGconn.connect_start(make_conninfo(dsn, host="/", hostaddr="").encode())
    try:
        return {option.keyword.decode(): option.val.decode() for option in nowhere.info if option.val}
    finally:
        nowhere.finish()


def _verify(connection: Connection, replication: bool) -> None:
    """Check that the settings are those of the startup packet.

    A walsender's relation cache must stay empty until it decodes (see `walsender`). SHOW and SET read no table.
    """
    status = connection.info.parameter_status
    for name in _ENVIRONMENT_WINS:
        if _plain(status(name)) != VERIFIED[name]:
            connection.execute(f"SET {name} = '{VERIFIED[name]}'".encode())
    unreported = [name for name in VERIFIED if status(name) is None]
    if replication:  # a walsender takes one command at a time
        values = [one_row(connection, f"SHOW {name}")[0] for name in unreported]
    else:
        settings = ", ".join(f"current_setting('{name}')" for name in unreported)
        query = f"SELECT {settings}"
        if connection.info.server_version >= 170000:
            query = f"SET transaction_timeout = 0; {query}"  # older servers don't know it
        cursor = connection.execute(query.encode())
        while cursor.description is None:
            cursor.nextset()
        values = list(cursor.fetchone() or ())
    shown = dict(zip(unreported, values, strict=True))
    for name, wanted in VERIFIED.items():
        found = _plain(shown.get(name, status(name)))
        if found != wanted:
            raise NotConfigured(
                f"{name} is {found!r} on a connection that asked for {wanted!r}: the peer ignores settings",
                hint=NO_POOLER,
            )


def _plain(value: str | None) -> str:
    """A setting without the spaces and quotes that SHOW writes.

    >>> _plain("ISO, YMD"), _plain('""')
    ('ISO,YMD', '')
    """
    return (value or "").replace(" ", "").strip('"')
