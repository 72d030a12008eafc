"""Turns what PostgreSQL and libpq refuse into errors of this package.

When a command fails, its SQLSTATE decides. When a connection attempt fails there is none, because libpq keeps it to
itself. But the text shows who refused: a server's message follows its severity and two spaces (``FATAL:  …``), and no
text of libpq does. So there are two tables. Patterns match from the beginning of the text: names of hosts, users and
databases come later in it and never decide.

https://www.postgresql.org/docs/current/errcodes-appendix.html
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import psycopg
from psycopg.conninfo import conninfo_to_dict

from pgoutput_source.errors import (
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
from pgoutput_source.postgres.remedies import (
    NO_POOLER,
    ONE_PROCESS,
    missing_slot_hint,
    newer_publication_hint,
    resync_hint,
    skip_hint,
)
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.settings import describe

# -- no connection --------------------------------------------------------------------------------------------------


class _Refusal(NamedTuple):
    """Why a connection attempt failed, recognized by how its text begins."""

    pattern: str
    hint: str
    transient: bool = False
    kind: type[ServerError] = ConnectionFailed
    sqlstate: str | None = None


_CHECK_PASSWORD: Final = "check user name and password (in the DSN, PGPASSWORD or ~/.pgpass)"

# The first match counts. Servers translate their messages, so a text that matches nothing counts as transient.
_BY_SERVER: Final = (
    _Refusal(
        r"the database system is |terminating connection ",
        "wait until the server is up",
        transient=True,
        sqlstate="57P03",
    ),
    _Refusal(r'("?\w+"? )?authentication failed for user |invalid authorization ', _CHECK_PASSWORD, sqlstate="28P01"),
    _Refusal(
        r"no pg_hba\.conf entry |pg_hba\.conf rejects ",
        "add a line to pg_hba.conf for this user, database and address, then SELECT pg_reload_conf(); logical "
        "replication matches the database's name, not the word replication",
        sqlstate="28000",
    ),
    _Refusal(r"(no such )?database(:|.* does not exist$)", "name an existing database: dbname=…", sqlstate="3D000"),
    _Refusal(
        r"role .* (does not exist|is not permitted to log in)$", "name a role that may log in: user=…", sqlstate="28000"
    ),
    _Refusal(
        r"(must be superuser or replication role|permission denied) to start (walsender|WAL sender)",
        "as a superuser: ALTER ROLE {user} REPLICATION",
        kind=NotConfigured,
        sqlstate="42501",
    ),
    _Refusal(
        r"number of requested standby connections exceeds |all replication slots|.*\bmax_wal_senders\b",
        "no walsender is free: end another replication client, or raise max_wal_senders and restart the server",
        transient=True,
        kind=NotConfigured,
        sqlstate="53300",
    ),
    _Refusal(
        r"sorry, too many clients|too many connections for |remaining connection slots are reserved",
        "end other sessions, or raise max_connections and restart the server",
        transient=True,
        sqlstate="53300",
    ),
    _Refusal(r"unsupported startup parameter", NO_POOLER, kind=NotConfigured, sqlstate="08P01"),
    _Refusal(
        r'unrecognized configuration parameter "idle_session_timeout"',
        "use PostgreSQL 14 or newer",
        kind=NotConfigured,
        sqlstate="42704",
    ),
    _Refusal(
        r"unrecognized configuration parameter |permission denied to set parameter |parameter .* cannot be ",
        "check options in the DSN, its service and PGOPTIONS",
        kind=NotConfigured,
        sqlstate="42704",
    ),
)
_BY_LIBPQ: Final = (
    _Refusal(
        r"could not translate host name|failed to resolve host|\[Errno ",
        "check the host's name: host=…",
        transient=True,
    ),
    # A server that is shutting down, or a proxy without its server, hangs up during the handshake.
    _Refusal(
        r"SSL SYSCALL error|SSL connection has been closed|SSL error: unexpected eof|server closed the connection|"
        r"could not (receive data|send)|lost synchronization",
        "the server, or a proxy in front of it, hung up. See its log",
        transient=True,
    ),
    _Refusal(r"fe_sendauth: |SCRAM|SASL|channel binding|password ", _CHECK_PASSWORD, sqlstate="28P01"),
    _Refusal(
        r"SSL error|server does not support SSL|(root |server )?certificate|could not .*(certificate|private key|SSL)|"
        r"private key|host name must be specified for a verified SSL",
        "check sslmode, sslrootcert and what the server offers (its setting ssl, and hostssl lines of pg_hba.conf)",
    ),
    _Refusal(r"Connection refused", "is the server running, and is this its port: port=…?", transient=True),
    _Refusal(
        r"No such file or directory",
        "no server has its Unix socket there: is it running? Give its socket's folder or its address: host=…",
        transient=True,
    ),
    _Refusal(
        r"(connection )?timeout expired|Connection timed out|Network is unreachable|No route to host",
        "check the address, and that nothing between here and there drops packets",
        transient=True,
    ),
    _Refusal(r"definition of service|service file|syntax error in service file", "check the service file: service=…"),
)
_UNKNOWN: Final = _Refusal("", "check the DSN and the server's log", transient=True)

_ATTEMPT: Final = re.compile(
    r"^(- host: .*?, hostaddr: (?:None|'[^']*'): )?(connection (failed|is bad): )?"
    r'(connection to server (at "[^"]*"( \([^)]*\))?, port \S+|on socket "[^"]*") failed: )?'
)
_SEVERITY: Final = re.compile(r"^[^\s:]+ ?:  ")


def connect_error(error: psycopg.Error, dsn: str) -> ServerError:
    """The error for a failed connection attempt.

    Several hosts or addresses mean several attempts. The whole is transient if one of them is. A server's answer is
    reported rather than the absence of another server.
    """
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    refusals = list(_refusals(line for line in lines if not line.startswith("Multiple connection attempts")))
    answered = [each for each in refusals if each in _BY_SERVER]
    refusal = (answered or refusals or [_UNKNOWN])[0]
    user = "…"
    if "{user}" in refusal.hint:
        named = conninfo_to_dict(dsn).get("user") or os.environ.get("PGUSER")
        user = f'"{named}"' if named else user
    said = re.sub(r"^connection (failed|is bad): ", "", " ".join(line.strip() for line in lines))
    result = refusal.kind(f"can't connect to {describe(dsn)}: {said}", hint=refusal.hint.replace("{user}", user))
    result.sqlstate = refusal.sqlstate
    if isinstance(result, ConnectionFailed):
        result.transient = any(each.transient for each in refusals) or not refusals
    return result


def _refusals(lines: Iterable[str]) -> Iterator[_Refusal]:
    """One refusal per attempt. A line that names no attempt and matches nothing is libpq's advice on the last one."""
    for number, line in enumerate(lines):
        said = _ATTEMPT.sub("", line)
        refusal = _refusal(said)
        if number == 0 or said != line or refusal is not _UNKNOWN:
            yield refusal


def _refusal(said: str) -> _Refusal:
    severity = _SEVERITY.match(said)
    table, words = (_BY_SERVER, said[severity.end() :]) if severity else (_BY_LIBPQ, said)
    return next((each for each in table if re.match(each.pattern, words)), _UNKNOWN)


# -- a command, and the stream --------------------------------------------------------------------------------------


class _Complaint(NamedTuple):
    """What a SQLSTATE means, in the answer to a command or within the stream."""

    kind: type[ServerError]
    hint: str | None = None


_COMPLAINTS: Final = {
    "42501": _Complaint(NotConfigured, "the role needs the REPLICATION attribute (ALTER ROLE … REPLICATION)"),
    "53300": _Complaint(NotConfigured, "end other sessions, or raise max_connections or max_wal_senders"),
    "53400": _Complaint(NotConfigured, "drop an unused slot, or raise max_replication_slots and restart the server"),
    "55006": _Complaint(SlotInUse, ONE_PROCESS),
    "25006": _Complaint(NotConfigured, "a standby is read-only: do this on the primary, and the standby will follow"),
    "55000": _Complaint(SlotError, None),
    "58P01": _Complaint(SlotLost),
}

_UNDECODABLE: Final = {
    "22021": "the database holds bytes that are not text in its encoding, and the server can't send them",
    "XX000": "if a value is larger than 512 MB, text can't carry it, but binary='on' can",
}
"""Why a server fails to decode, by SQLSTATE."""

_FAILING_FILTER: Final = "a row filter of the publication probably fails on a row"
"""The reason when the server names none: no other code of the user runs during decoding."""

_GONE: Final = ("08", "57P")
"""For any command: the connection or the server is going away."""

_STREAM_BROKE: Final = ("40", "53", "57")
"""For the stream too: a standby's recovery conflict, lack of resources, an operator's intervention."""


def server_error(
    error: psycopg.Error, *, slot: str | None = None, publications: Iterable[str] = (), streaming: bool = False
) -> ServerError | ProtocolError:
    """The error for the server's answer to a command or, with `streaming`, for an error within the stream.

    A lost connection is a `ConnectionFailed` with `transient` set.
    """
    code = error.sqlstate
    said = error.diag.message_primary or " ".join(str(error).split())
    # "… in the change callback, associated LSN 0/16B3748", in the server's language.
    where = re.findall(r"\b[0-9A-F]{1,8}/[0-9A-F]{1,8}\b", error.diag.context or "")
    lsn = Lsn(where[-1]) if where else None
    of_slot = f"slot {slot!r}: " if slot else ""
    if code == "08P01":
        return ProtocolError(f"{of_slot}the server did not understand the request: {said}", lsn=lsn)
    if code is None or code.startswith(_GONE) or (streaming and code.startswith(_STREAM_BROKE)):
        lost = ConnectionFailed(f"{of_slot}the connection was lost: {said}", hint="see the server's log", lsn=lsn)
        lost.sqlstate, lost.transient = code, True
        return lost
    if code == "42704" and streaming:
        complaint = _Complaint(PublicationError, newer_publication_hint(slot))
    elif code == "42704" and slot:
        complaint = _Complaint(SlotNotFound, missing_slot_hint(slot, publications))
    elif code == "0A000" and streaming:
        complaint = _Complaint(PublicationError, "give the table the same column list in all publications")
    elif streaming and code not in _COMPLAINTS:
        complaint = _Complaint(ServerError, f"{_UNDECODABLE.get(code, _FAILING_FILTER)}; {skip_hint(slot)}")
    else:
        complaint = _COMPLAINTS.get(code, _Complaint(ServerError, _UNDECODABLE.get(code)))
    hint = resync_hint(slot or "…") if complaint.kind is SlotLost else complaint.hint or error.diag.message_hint
    result = complaint.kind(of_slot + said, hint=hint, lsn=lsn)
    result.sqlstate = code
    return result


@contextmanager
def explained(slot: str | None = None) -> Iterator[None]:
    """Raise psycopg's errors as errors of this package.

    Args:
        slot: The slot that the commands concern, for the message.
    """
    try:
        yield
    except psycopg.Error as e:
        raise server_error(e, slot=slot) from e
    except (ServerError, ProtocolError) as e:
        # A cursor explained it already, without knowing the slot.
        cause = e.__cause__
        if slot is not None and isinstance(cause, psycopg.Error) and cause.sqlstate is not None:
            raise server_error(cause, slot=slot) from cause
        raise


def passing(error: Exception) -> bool:
    """Whether trying again later may help: the server is away, busy or starting up."""
    if isinstance(error, ConnectionFailed):
        return error.transient
    # Lack of resources, a deadlock or a lock that others hold, an operator's intervention.
    return isinstance(error, ServerError) and (error.sqlstate or "").startswith(("53", "57", "40", "55P03"))
