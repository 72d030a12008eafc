"""Connections to PostgreSQL with everything pinned that shapes values, and its refusals as errors of ours.

The slot's stream, the snapshot and the catalogue all connect here, so that they give identical text for a value, and a
wrong password reads the same wherever it is noticed. Which error of ours stands for which SQLSTATE, and for which text
where libpq passes no SQLSTATE on, are two tables.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgoutput_source.errors import (
    ConfigurationError,
    ConnectionFailed,
    NotConfigured,
    ProtocolError,
    PublicationError,
    ServerError,
    SlotError,
    SlotInUse,
    SlotLost,
    SlotNotFound,
)
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.settings import describe

logger = logging.getLogger(__name__)

Connection = psycopg.Connection[Any]

PINNED: Final = {
    "DateStyle": "ISO,YMD",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "search_path": "",
    "quote_all_identifiers": "off",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
}
"""Server settings in the startup packet, over those of role and database: what values look like, and no timeouts.

https://www.postgresql.org/docs/current/runtime-config-client.html
"""

# For a peer that vanished without a word. libpq's own environment variable, where there is one, wins as well.
_DEFAULTS: Final = {
    "connect_timeout": ("PGCONNECT_TIMEOUT", "10"),
    "keepalives_idle": (None, "30"),
    "keepalives_interval": (None, "10"),
    "keepalives_count": (None, "3"),
    "tcp_user_timeout": (None, "60000"),  # milliseconds
    "fallback_application_name": (None, "pgoutput_source"),
}


def connect(dsn: str, *, replication: bool = False) -> Connection:
    """A connection in autocommit mode, as a walsender with `replication`.

    It speaks the simple query protocol only, which is all that a walsender understands; parameters are quoted here.

    Raises:
        ConnectionFailed: No server, no database, not let in, or no TLS; `transient` says whether trying again may help.
        NotConfigured: The role may not stream, no walsender is free, or the server is older than PostgreSQL 14.
        ConfigurationError: The DSN can't be read.
    """
    try:
        # prepare_threshold: a statement that is prepared after its fifth execution is refused by a walsender.
        connection = psycopg.connect(
            _conninfo(dsn, replication), autocommit=True, prepare_threshold=None, cursor_factory=psycopg.ClientCursor
        )
    except psycopg.OperationalError as e:
        raise connect_error(str(e), dsn) from e
    except psycopg.ProgrammingError:
        raise ConfigurationError(
            "dsn: not a connection string that libpq can read", hint="check it with SourceSettings(dsn=…)"
        ) from None
    if connection.info.server_version >= 170000:
        # Decoding runs in transactions, and a large one takes its time.
        connection.execute("SET transaction_timeout = 0")
    return connection


def _conninfo(dsn: str, replication: bool) -> str:
    given = conninfo_to_dict(dsn)
    added: dict[str, Any] = {
        name: value
        for name, (variable, value) in _DEFAULTS.items()
        if name not in given and not (variable and os.environ.get(variable))
    }
    # A later option of the same name wins. Once there are options in the string, libpq does not look at PGOPTIONS.
    options = str(given.get("options") or os.environ.get("PGOPTIONS") or "")
    added["options"] = " ".join(filter(None, [options, *(f"-c {name}={value}" for name, value in PINNED.items())]))
    if replication:
        added["replication"] = "database"
    return make_conninfo(dsn, client_encoding="UTF8", **added)


@contextmanager
def explained(slot: str | None = None) -> Iterator[None]:
    """What psycopg raises in here is raised as an error of ours.

    Args:
        slot: The slot that the commands are about, for the message.
    """
    try:
        yield
    except psycopg.Error as e:
        raise server_error(e, slot=slot) from e


def one_row(conn: Connection, query: str) -> tuple[Any, ...]:
    """The one row that a query has."""
    with explained():
        row = conn.execute(query.encode()).fetchone()
    assert row is not None, "a query of one row"
    return tuple(row)


class _Refusal(NamedTuple):
    """What libpq's or the server's text means when a connection could not be made."""

    pattern: str
    hint: str
    transient: bool = False
    kind: type[ServerError] = ConnectionFailed
    sqlstate: str | None = None


# The first that matches counts. The server's texts may be translated: what matches nothing is passed on as it is.
_REFUSALS: Final = (
    _Refusal(
        r"starting up|shutting down|in recovery mode|not (yet )?accepting connections",
        "wait until the server is up",
        transient=True,
        sqlstate="57P03",
    ),
    _Refusal(
        r"password authentication failed|no password supplied|authentication failed|SASL|SCRAM",
        "check user name and password (in the DSN, PGPASSWORD or ~/.pgpass)",
        sqlstate="28P01",
    ),
    _Refusal(
        r"pg_hba\.conf",
        "let this user, database and address in with a line of pg_hba.conf, then SELECT pg_reload_conf(); logical "
        "replication is matched by the database's name, not by the word replication",
        sqlstate="28000",
    ),
    _Refusal(r'database ".*" does not exist', "name an existing database: dbname=…", sqlstate="3D000"),
    _Refusal(r'role ".*" (does not exist|is not permitted)', "name a role that may log in: user=…", sqlstate="28000"),
    _Refusal(
        r"(replication role|permission denied) to start (walsender|WAL sender)|replication role to start",
        "as a superuser: ALTER ROLE {user} REPLICATION",
        kind=NotConfigured,
        sqlstate="42501",
    ),
    _Refusal(
        r"max_wal_senders",
        "no walsender is free: end another replication client, or raise max_wal_senders and restart the server",
        transient=True,
        kind=NotConfigured,
        sqlstate="53300",
    ),
    _Refusal(
        r"too many (clients|connections)|connection slots are reserved",
        "end other sessions, or raise max_connections and restart the server",
        transient=True,
        sqlstate="53300",
    ),
    _Refusal(
        r'unrecognized configuration parameter "idle_session_timeout"',
        "use PostgreSQL 14 or newer",
        kind=NotConfigured,
    ),
    _Refusal(
        r"could not translate host name|failed to resolve host|Name or service not known|[Nn]o address",
        "check the host's name: host=…",
        transient=True,
    ),
    _Refusal(
        r"certificate|SSL|TLS",
        "check sslmode, sslrootcert and what the server offers (its setting ssl, and hostssl lines of pg_hba.conf)",
    ),
    _Refusal(r"Connection refused", "is the server running, and is this its port: port=…?", transient=True),
    _Refusal(
        r"No such file or directory",
        "no server has its unix socket there: is it running? Name its socket's folder or its address: host=…",
        transient=True,
    ),
    _Refusal(
        r"timeout expired|timed out|unreachable|No route to host",
        "check the address, and that nothing between here and there drops packets",
        transient=True,
    ),
)


def connect_error(text: str, dsn: str) -> ServerError:
    """The error for a connection that could not be made, from libpq's text: it passes no SQLSTATE on."""
    # With several hosts or addresses psycopg lists one line for each; the first line of each says it all.
    said = " ".join(line.strip() for line in text.splitlines() if line.strip())
    said = re.sub(r"^connection failed: ", "", said)
    for refusal in _REFUSALS:
        if re.search(refusal.pattern, said):
            break
    else:
        refusal = _Refusal("", "check the DSN and the server's log", transient=True)
    user = "…"
    if "{user}" in refusal.hint:
        named = conninfo_to_dict(dsn).get("user") or os.environ.get("PGUSER")
        user = f'"{named}"' if named else user
    error = refusal.kind(f"can't connect to {describe(dsn)}: {said}", hint=refusal.hint.replace("{user}", user))
    error.sqlstate = refusal.sqlstate
    if isinstance(error, ConnectionFailed):
        error.transient = refusal.transient
    return error


class _Complaint(NamedTuple):
    """What a SQLSTATE means, of the server's answer to a command or in the midst of the stream."""

    kind: type[ServerError]
    hint: str | None = None


ONE_PROCESS: Final = "only one process can stream from a slot: stop the other one, or use a slot each"
"""The remedy for a slot in use."""

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_COMPLAINTS: Final = {
    "42501": _Complaint(NotConfigured, "the role needs the REPLICATION attribute (ALTER ROLE … REPLICATION)"),
    "53300": _Complaint(NotConfigured, "end other sessions, or raise max_connections or max_wal_senders"),
    "53400": _Complaint(NotConfigured, "drop a slot that nobody uses, or raise max_replication_slots and restart"),
    "55006": _Complaint(SlotInUse, ONE_PROCESS),
    "25006": _Complaint(NotConfigured, "a standby can't write: do this on the primary, and it follows here"),
    "55000": _Complaint(SlotError, None),
    "58P01": _Complaint(SlotLost),
    "22021": _Complaint(
        ServerError,
        "the database holds bytes that are not text in its encoding, and the server can't send them: repair the row, "
        "or skip the transaction with pg_replication_slot_advance()",
    ),
    "XX000": _Complaint(
        ServerError,
        "the server fails to decode this transaction each time. If a value has more than 512 MB, text can't carry "
        "it, and binary='on' can. "
        "pg_replication_slot_advance() skips the transaction, and loses its changes",
    ),
}

# Connection exceptions, a standby's conflict with recovery, lack of resources, an operator or a shutdown.
_STREAM_BROKE: Final = ("08", "40", "53", "57")


def server_error(
    error: psycopg.Error, *, slot: str | None = None, publications: Iterable[str] = (), streaming: bool = False
) -> ServerError | ProtocolError:
    """The error for what the server answered to a command, or with `streaming` said in the midst of the stream.

    `transient` is set on the `ConnectionFailed` that stands for a lost connection.
    """
    code = error.sqlstate
    said = error.diag.message_primary or " ".join(str(error).split())
    where = re.search(r"associated LSN ([0-9A-F]+/[0-9A-F]+)", error.diag.context or "")
    lsn = Lsn(where.group(1)) if where else None
    of_slot = f"slot {slot!r}: " if slot else ""
    if code == "08P01":
        return ProtocolError(f"{of_slot}the server did not understand: {said}", lsn=lsn)
    if code is None or (streaming and code[:2] in _STREAM_BROKE):
        lost = ConnectionFailed(f"{of_slot}the connection was lost: {said}", hint="see the server's log", lsn=lsn)
        lost.sqlstate, lost.transient = code, True
        return lost
    if code == "42704":
        if streaming:
            complaint = _Complaint(PublicationError, missing_publication_hint(slot, publications))
        else:
            complaint = _Complaint(SlotNotFound, missing_slot_hint(slot or "…", publications))
    elif code == "0A000" and streaming:
        complaint = _Complaint(PublicationError, "give the table the same column list in all publications")
    else:
        complaint = _COMPLAINTS.get(code, _Complaint(ServerError))
    hint = resync_hint(slot or "…") if complaint.kind is SlotLost else complaint.hint or error.diag.message_hint
    result = complaint.kind(of_slot + said, hint=hint, lsn=lsn)
    result.sqlstate = code
    return result


def quote_name(name: str) -> str:
    """A name as PostgreSQL's SQL and its list of publications want it."""
    return '"' + name.replace('"', '""') + '"'


def resync_hint(slot: str) -> str:
    """How to go on behind a gap, the same words wherever there is one."""
    return (
        f"python -m pgoutput_source resync --slot {slot} --recovery … says what is missing and how to repair it, and "
        "with --yes has the flow go on behind the gap"
    )


def missing_slot_hint(slot: str, publications: Iterable[str]) -> str:
    """The SQL to run, in the order that matters: the stream fails if the slot is older than the publication."""
    make = [f"CREATE PUBLICATION {quote_name(name)} FOR ALL TABLES;  -- or FOR TABLE …" for name in publications]
    make.append(f"SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput');")
    return "the publication first, then the slot, or use create=True:\n  " + "\n  ".join(make)


def missing_publication_hint(slot: str | None, publications: Iterable[str]) -> str:
    """A publication must have existed at the slot's position: creating it now does not help an older slot."""
    return (
        "a publication must be older than the slot. Create it, then make the slot anew (what it holds is lost):\n  "
        + "\n  ".join(
            [
                *(f"CREATE PUBLICATION {quote_name(name)} FOR ALL TABLES;  -- or FOR TABLE …" for name in publications),
                f"SELECT pg_drop_replication_slot('{slot or '…'}');",
                f"SELECT pg_create_logical_replication_slot('{slot or '…'}', 'pgoutput');",
            ]
        )
    )
