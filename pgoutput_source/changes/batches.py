"""The nouns: batches of changes, sets of batches, and logical messages.

They hold the arrays that `decode` makes. Nothing here reads bytes or touches a server. A change is one row's insert,
update, delete or snapshot read, or one table's truncate.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from pgoutput_source.changes.events import ChangeEvent, Facts, events_from
from pgoutput_source.changes.schema import (
    Position,
    TableName,
    TableSchema,
    metadata_fields,
)
from pgoutput_source.errors import ConfigurationError, PgOutputError
from pgoutput_source.protocol.wire import Lsn

if TYPE_CHECKING:
    import datetime


@dataclass(frozen=True, slots=True)
class ChangeBatch:
    """Changes of one version of one table, in position order, as one Arrow record batch.

    It supports the Arrow PyCapsule interface: ``pl.DataFrame(batch)``, ``duckdb.from_arrow(batch)`` and
    ``pa.record_batch(batch)`` accept it directly. See `metadata_fields` for the columns after the table's own.

    Example:
        >>> from pgoutput_source.testing import batch
        >>> made = batch("public.orders", [("I", {"id": 1, "amount": 5}), ("U", {"id": 1, "amount": 7})])
        >>> made.table, len(made), made.data["amount"].to_pylist()
        ('public.orders', 2, [5, 7])
        >>> pa.record_batch(made).num_rows
        2
    """

    schema: TableSchema
    data: pa.RecordBatch

    def __len__(self) -> int:
        return int(self.data.num_rows)

    @property
    def nbytes(self) -> int:
        """The size of its arrays in bytes."""
        return int(self.data.nbytes)

    def metadata(self, name: str) -> pa.Array:
        """A column that is known without the table's own values, by its name in `MetadataNames`.

        These are `op`, `commit_lsn`, `seq`, `lsn`, `xid` and `commit_ts`.
        """
        return self.data.column(getattr(self.schema.metadata_names, name))

    def __arrow_c_schema__(self) -> object:
        return self.data.schema.__arrow_c_schema__()

    def __arrow_c_array__(self, requested_schema: object = None) -> object:
        return self.data.__arrow_c_array__(requested_schema)

    @property
    def table(self) -> str:
        """Schema and table: ``public.orders``."""
        return self.schema.table

    @property
    def first(self) -> Position:
        """The position of the first change."""
        return self._position(0)

    @property
    def last(self) -> Position:
        """The position of the last change."""
        return self._position(-1)

    def _position(self, row: int) -> Position:
        row %= len(self)
        return Position(Lsn(self.metadata("commit_lsn")[row].as_py()), self.metadata("seq")[row].as_py())

    def events(self) -> Iterator[ChangeEvent]:
        """Each change as an event, in position order. Rows become objects a few thousand at a time."""
        return events_of([self])

    def replace(self, data: pa.RecordBatch) -> ChangeBatch:
        """A batch of the same table with other rows or columns: `data`."""
        return ChangeBatch(self.schema, self.schema.metadata_names.say(data))


class UndecodedBatch(ChangeBatch):
    """Changes whose values can't be decoded, and the reason. Only a consumer of these changes gets the error.

    The position and operation of each change are known: `len()`, `first`, `last` and `metadata` work. Everything that
    needs `data` raises `error`.

    Args:
        schema: The version of the table.
        metadata: The columns of `ChangeBatch.metadata`, one row per change: see `known_fields`.
        error: Why the values can't be decoded. Its traceback and its cause are not kept.

    Example:
        >>> from pgoutput_source.testing import batch
        >>> made = batch("public.orders", [("I", {"id": 1}), ("D", {"id": 1})])
        >>> known = made.data.select([field.name for field in known_fields()])
        >>> unreadable = UndecodedBatch(made.schema, known, ConfigurationError("no such luck"))
        >>> len(unreadable), unreadable.last == made.last
        (2, True)
        >>> unreadable.data
        Traceback (most recent call last):
        pgoutput_source.errors.ConfigurationError: no such luck
    """

    __slots__ = ("_metadata", "error")

    error: PgOutputError
    _metadata: pa.RecordBatch

    def __init__(self, schema: TableSchema, metadata: pa.RecordBatch, error: PgOutputError) -> None:
        # The traceback of a raised error would keep all bytes of the poll alive.
        for name, value in (("schema", schema), ("_metadata", metadata), ("error", copy.copy(error))):
            object.__setattr__(self, name, value)

    @property
    def data(self) -> pa.RecordBatch:
        """Raises `error`."""
        raise copy.copy(self.error)

    def __len__(self) -> int:
        return int(self._metadata.num_rows)

    @property
    def nbytes(self) -> int:
        """The size of its arrays in bytes."""
        return int(self._metadata.nbytes)

    def metadata(self, name: str) -> pa.Array:
        """A column that is known: see `ChangeBatch.metadata`."""
        return self._metadata.column(getattr(self.schema.metadata_names, name))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, UndecodedBatch):
            return NotImplemented
        return self.schema == other.schema and bool(self._metadata.equals(other._metadata))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"UndecodedBatch({self.table!r}, {len(self)} changes, {self.error.message!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return UndecodedBatch, (self.schema, self._metadata, self.error)


class ParkedBatch(UndecodedBatch):
    """An `UndecodedBatch` that has its changes as PostgreSQL sent them: `raw`, see `decode.raw`."""

    __slots__ = ("raw",)

    raw: pa.RecordBatch

    def __init__(self, batch: UndecodedBatch, raw: pa.RecordBatch) -> None:
        super().__init__(batch.schema, batch._metadata, batch.error)
        object.__setattr__(self, "raw", raw)


def known_fields(prefix: str = "_") -> list[pa.Field]:
    """The fields of the metadata columns of an `UndecodedBatch`: those without values of the table's own columns."""
    return metadata_fields(pa.struct([]), prefix)[:_KNOWN]


_KNOWN: Final = 6
"""`_op`, `_commit_lsn`, `_seq`, `_lsn`, `_xid` and `_commit_ts`, of which `_before` is the first that is not."""


def events_of(batches: Iterable[ChangeBatch], facts: Facts | None = None) -> Iterator[ChangeEvent]:
    """The changes of all batches as events, in the order of their positions.

    Args:
        batches: Batches, each with its rows in position order, such as a `ChangeSet`.
        facts: Called once per batch; returns what the catalogue knows about its table.
    """
    return events_from(((b.schema, b.data) for b in batches), facts)


HEARTBEAT: Final = "pgoutput_source"
"""The prefix of our own heartbeats (`heartbeat`), which are not delivered."""


@dataclass(frozen=True, slots=True)
class Message:
    """A logical decoding message: what ``pg_logical_emit_message(transactional, prefix, content)`` wrote.

    `messages.Message` is the same on the wire, before its transaction is known.
    `commit_lsn`, `xid` and `commit_ts` are None for a message that is not transactional.
    """

    lsn: Lsn
    prefix: str
    content: bytes
    transactional: bool
    commit_lsn: Lsn | None = None
    xid: int | None = None
    commit_ts: datetime.datetime | None = None


@dataclass(frozen=True, slots=True)
class Truncate:
    """One TRUNCATE as PostgreSQL sends it: the published tables that it emptied, and its options.

    Each of `tables` also has a row with `_op` T in its own batch; `position` is that of the first of these rows. A
    table that CASCADE emptied is named only if it is published. `messages.Truncate` is the same on the wire, with OIDs.
    """

    position: Position
    lsn: Lsn
    tables: tuple[str, ...]
    cascade: bool
    restart_identity: bool


@dataclass(frozen=True, slots=True)
class ChangeSet:
    """The result of one poll: consecutive transactions, columnar by table. The last may continue in the next set.

    `batches` has one `ChangeBatch` per version of a table, ordered by their first change. `truncates` are the
    statements of the rows with `_op` T. `messages` are the logical decoding messages.

    `continues` says that the transaction of the last change has not ended yet. The next set goes on with it, or is
    empty and says that it has ended.

    A batch whose values can't be decoded is an `UndecodedBatch`. A loop over all batches finds it. Its error is raised
    when it is used: by `of`, `table` and `events`, and by the batch's own `data`.

    Example:
        >>> from pgoutput_source.testing import batch
        >>> found = ChangeSet((batch("public.orders", [("I", {"id": 1})]), batch("public.items", [("I", {"id": 7})])))
        >>> found.tables, len(found), found.table("public.items")["id"].to_pylist()
        (('public.orders', 'public.items'), 2, [7])
    """

    batches: tuple[ChangeBatch, ...]
    messages: tuple[Message, ...] = ()
    truncates: tuple[Truncate, ...] = ()
    continues: bool = False

    def __len__(self) -> int:
        return sum(map(len, self.batches))

    def __iter__(self) -> Iterator[ChangeBatch]:
        return iter(self.batches)

    @property
    def tables(self) -> tuple[str, ...]:
        """The names of the changed tables, in the order of their first change."""
        return tuple(dict.fromkeys(b.table for b in self.batches))

    def table(self, name: str) -> pa.Table:
        """All changes of a table as one Arrow table. A column that a version lacks is null in its rows.

        Args:
            name: Schema and table: ``public.orders``, or ``a."b.c"`` when a dot would be ambiguous.

        Raises:
            ConfigurationError: The table has no changes, or the type of a column changed.
            DecodeError, ConfigurationError, SchemaChanged: Its changes can't be decoded.
        """
        versions = [pa.Table.from_batches([b.data]) for b in self.of(name)]
        if not versions:
            changed = ", ".join(self.tables) or "none"
            raise ConfigurationError(f"there are no changes of table {name!r}", hint=f"tables with changes: {changed}")
        try:
            return pa.concat_tables(versions, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as e:
            raise ConfigurationError(
                f"columns of table {name!r} changed their types", hint=f"take its batches one by one: of({name!r})"
            ) from e

    def events(self) -> Iterator[ChangeEvent]:
        """Each change of all tables as an event, in the exact order in which PostgreSQL sent them.

        Raises:
            DecodeError, ConfigurationError, SchemaChanged: The changes of a table can't be decoded.
        """
        return events_of(self.batches)

    def of(self, table: str | tuple[str, str]) -> tuple[ChangeBatch, ...]:
        """The batches of `table`: none if it did not change, several if its schema changed within the set.

        Raises:
            DecodeError, ConfigurationError, SchemaChanged: Its changes can't be decoded.
        """
        try:
            name = TableName.of(table)
        except ConfigurationError:
            return ()  # no table has such a name
        found = tuple(b for b in self.batches if b.schema.full_name == name)
        for batch in found:
            if isinstance(batch, UndecodedBatch):
                raise copy.copy(batch.error)
        return found

    @property
    def first(self) -> Position | None:
        """The position of the first change; None if there is none."""
        return min((b.first for b in self.batches), default=None)

    @property
    def last(self) -> Position | None:
        """The position of the last change; None if there is none."""
        return max((b.last for b in self.batches), default=None)
