"""The nouns: batches of changes, sets of batches and logical messages.

In come arrays that `decode.columns` decoded; out goes what users hold. Nothing here reads bytes or
touches a server. A change is one row's insert, update, delete or snapshot read, or one table's truncate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pyarrow as pa

from pgoutput_source.changes.events import ChangeEvent, Facts, events_from
from pgoutput_source.changes.schema import (
    Position,
    TableName,
    TableSchema,
)
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.protocol.wire import Lsn

if TYPE_CHECKING:
    import datetime


@dataclass(frozen=True, slots=True)
class ChangeBatch:
    """Changes of one version of one table, in position order, as one Arrow record batch.

    It speaks the Arrow PyCapsule interface: ``pl.DataFrame(batch)``, ``duckdb.from_arrow(batch)`` and
    ``pa.record_batch(batch)`` take it as it is. See `metadata_fields` for the columns after the table's own.

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
        """Position of the first change."""
        return self._position(0)

    @property
    def last(self) -> Position:
        """Position of the last change."""
        return self._position(-1)

    def _position(self, row: int) -> Position:
        row %= len(self)
        return Position(Lsn(self.data.column("_commit_lsn")[row].as_py()), self.data.column("_seq")[row].as_py())

    def events(self) -> Iterator[ChangeEvent]:
        """Each change as an event, in position order; rows become objects some thousand at a time."""
        return events_of([self])

    def replace(self, data: pa.RecordBatch) -> ChangeBatch:
        """The same table with other rows or columns, as `data`."""
        return ChangeBatch(self.schema, data)


def events_of(batches: Iterable[ChangeBatch], facts: Facts | None = None) -> Iterator[ChangeEvent]:
    """The changes of all batches as events, in the order of their positions.

    Args:
        batches: Batches whose rows are in position order each, such as a `ChangeSet`.
        facts: Asked once per batch for what the catalogue knows of its table.
    """
    return events_from(((b.schema, b.data) for b in batches), facts)


HEARTBEAT: Final = "pgoutput_source"
"""The prefix of messages that are heartbeats of ours (`heartbeat`): they are not delivered."""


@dataclass(frozen=True, slots=True)
class Message:
    """A logical decoding message: what ``pg_logical_emit_message(transactional, prefix, content)`` wrote.

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
    """One TRUNCATE, as PostgreSQL sends it: the published tables that it emptied, and how it was said.

    Each of `tables` has a row with `_op` T in its own batch as well; `position` is the first of these rows'. A table
    that CASCADE emptied is named only if it is published.
    """

    position: Position
    lsn: Lsn
    tables: tuple[str, ...]
    cascade: bool
    restart_identity: bool


@dataclass(frozen=True, slots=True)
class ChangeSet:
    """What one poll brought: consecutive transactions, columnar by table; the last may continue in the next set.

    `batches` holds one `ChangeBatch` per version of a table, ordered by their first change. `truncates` says of rows
    with `_op` T what the statement was; `messages` are the logical decoding messages.

    Example:
        >>> from pgoutput_source.testing import batch
        >>> found = ChangeSet((batch("public.orders", [("I", {"id": 1})]), batch("public.items", [("I", {"id": 7})])))
        >>> found.tables, len(found), found.table("public.items")["id"].to_pylist()
        (('public.orders', 'public.items'), 2, [7])
    """

    batches: tuple[ChangeBatch, ...]
    messages: tuple[Message, ...] = ()
    truncates: tuple[Truncate, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.batches))

    def __iter__(self) -> Iterator[ChangeBatch]:
        return iter(self.batches)

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables that changed, in order of their first change."""
        return tuple(dict.fromkeys(b.table for b in self.batches))

    def table(self, name: str) -> pa.Table:
        """All changes of a table as one Arrow table; a column that only some of its versions have is null in others.

        Args:
            name: Schema and table: ``public.orders``, or ``a."b.c"`` where a dot would be ambiguous.

        Raises:
            ConfigurationError: The table did not change, or the type of a column did.
        """
        versions = [pa.Table.from_batches([b.data]) for b in self.of(name)]
        if not versions:
            changed = ", ".join(self.tables) or "none"
            raise ConfigurationError(f"there are no changes of table {name!r}", hint=f"tables with changes: {changed}")
        try:
            return pa.concat_tables(versions, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as e:
            raise ConfigurationError(
                f"the columns of table {name!r} changed their types", hint=f"take its batches one by one: of({name!r})"
            ) from e

    def events(self) -> Iterator[ChangeEvent]:
        """Each change of all tables as an event, in the exact order in which PostgreSQL sent them."""
        return events_of(self.batches)

    def of(self, table: str) -> tuple[ChangeBatch, ...]:
        """The batches of `table`: none if it did not change, several if its schema changed within the set."""
        try:
            name = TableName.parse(table)
        except ConfigurationError:
            return ()  # no table is written like this
        return tuple(b for b in self.batches if b.schema.full_name == name)

    @property
    def first(self) -> Position | None:
        """Position of the first change, None if there is none."""
        return min((b.first for b in self.batches), default=None)

    @property
    def last(self) -> Position | None:
        """Position of the last change, None if there is none."""
        return max((b.last for b in self.batches), default=None)
