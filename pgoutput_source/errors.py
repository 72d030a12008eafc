"""All errors that this package raises on purpose, in one tree.

::

    PgOutputError                 what went wrong, where, and what to do next
    ├── ConfigurationError        an option, an environment variable or a combination of them
    │   └── BytewaxMissing        a part that needs Bytewax, on a Python without it; also an ImportError
    ├── ServerError               PostgreSQL, or the connection to it
    │   ├── ConnectionFailed      no server, wrong password, no such database, TLS, a lost connection
    │   ├── NotConfigured         wal_level, privileges, limits of the server
    │   ├── SlotError             the replication slot
    │   │   ├── SlotNotFound
    │   │   ├── SlotInUse         another process streams from it
    │   │   ├── SlotLost          invalidated: the WAL that it needs is gone
    │   │   ├── SlotMismatch      another plugin, database, kind, or two_phase
    │   │   └── SlotAhead         it was moved past what this consumer has durably seen
    │   ├── PublicationError      missing now, or missing at the position in the WAL
    │   └── EmbeddedError         the server in the box
    ├── ProtocolError             bytes that violate the protocol
    ├── DecodeError               bytes that are not a value of their column's type
    ├── SchemaChanged             a table changed its shape, with on_schema_change="fail"
    ├── SpillError                a temporary file of a transaction in progress
    ├── StateError                a resume state or recovery folder that can't be used
    └── SinkError                 a destination

Each has a `hint`, which says what to do next, and tells where: `lsn`, `table`, `column`, `type_name`, as far as known.
Row values never appear in a message, except for the first characters of a value that could not be decoded.
"""

from __future__ import annotations


class PgOutputError(Exception):
    """The base of all errors. `str()` has what happened, where, and the hint on a separate line.

    >>> print(SlotNotFound('replication slot "orders" does not exist', hint="create it: SELECT …"))
    replication slot "orders" does not exist
    hint: create it: SELECT …
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        lsn: int | None = None,
        table: str | None = None,
        column: str | None = None,
        type_name: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.lsn = lsn
        self.table = table
        self.column = column
        self.type_name = type_name

    def __str__(self) -> str:
        where = [
            f"{name} {value}"
            for name, value in (
                ("table", self.table),
                ("column", self.column),
                ("type", self.type_name),
                ("LSN", None if self.lsn is None else f"{self.lsn >> 32:X}/{self.lsn & 0xFFFFFFFF:X}"),
            )
            if value is not None
        ]
        text = f"{self.message} (at {', '.join(where)})" if where else self.message
        return f"{text}\nhint: {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[object, ...]:
        # In clusters, errors cross process boundaries. Keyword-only arguments need help to be pickled.
        return _rebuild, (type(self), self.message, {k: v for k, v in self.__dict__.items() if k != "message"})


def _rebuild(kind: type[PgOutputError], message: str, fields: dict[str, object]) -> PgOutputError:
    error = kind(message)
    error.__dict__.update(fields)
    return error


class ConfigurationError(PgOutputError):
    """An option, an environment variable, or a combination of them, that can't be used."""


class BytewaxMissing(ConfigurationError, ImportError):
    """A dataflow part was imported on a Python without Bytewax, such as 3.13. It is also an `ImportError`.

    >>> issubclass(BytewaxMissing, ImportError)
    True
    """


class ServerError(PgOutputError):
    """PostgreSQL refused, or could not be reached. `sqlstate` is the server's code, if libpq passes it on."""

    sqlstate: str | None = None


class ConnectionFailed(ServerError):
    """No server, wrong password, no such database, TLS refused, or a lost connection.

    `transient` tells whether a retry may help (the server restarts) or not (the password is wrong).
    """

    transient: bool = False


class NotConfigured(ServerError):
    """The server lacks something that logical replication needs: wal_level, a privilege, a free slot or sender."""


class SlotError(ServerError):
    """The replication slot can't be used."""


class SlotNotFound(SlotError):
    """There is no such slot."""


class SlotInUse(SlotError):
    """Another process streams from the slot."""


class SlotLost(SlotError):
    """The slot was invalidated: WAL that it needs is gone, and changes may be lost with it."""


class SlotMismatch(SlotError):
    """This reader can't use the slot: it has another plugin, database or kind."""


class SlotAhead(SlotError):
    """The slot was moved past what this consumer has durably seen: somebody else consumed it, or state was lost."""


class PublicationError(ServerError):
    """A publication is missing now, or did not exist yet at the slot's position in the WAL."""


class EmbeddedError(ServerError):
    """The embedded server could not be downloaded, started or reached."""


class ProtocolError(PgOutputError):
    """Bytes that violate the protocol. `lsn` is their position in the WAL; nothing after it was used."""


class DecodeError(PgOutputError):
    """Bytes that are not a value of their column's type or, with on_misfit="error", a value that it can't hold."""


class SchemaChanged(PgOutputError):
    """With on_schema_change="fail": a table changed its name, its columns or its replica identity.

    Nothing of the table was delivered after the change. `lsn` is the commit of the transaction in which it was found.
    """


class SpillError(PgOutputError):
    """A transaction in progress exceeded its memory, and a temporary file can't be written or read back."""


class StateError(PgOutputError):
    """A resume state or recovery folder that is corrupt, of another version, or of another database system."""


class SinkError(PgOutputError):
    """A destination can't be written, or contains something that must not be mixed with this run's output."""


class NotReached(PgOutputError, TimeoutError):
    """A destination did not get as far as it was waited for, in time."""


def check_version(state: object, version: int, whose: str) -> None:
    """Check the version of a resume state, which is under ``"v"``.

    Raises:
        StateError: It is another version.
    """
    if not isinstance(state, dict) or state.get("v") != version:
        raise StateError(
            f"the state of {whose} is of another version",
            hint="run the version that wrote it, or start afresh with a new recovery folder",
        )
