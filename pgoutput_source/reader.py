"""Reads a slot in plain Python, without Bytewax: `PgOutputReader` and `peek`.

The caller decides what PostgreSQL may forget: only what `ack` was called for. An acknowledgement waits for the end of a
transaction, because the server knows no smaller unit: it sends a transaction again from its beginning or not at all.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import numpy as np
from pydantic import BaseModel

from pgoutput_source.changes.batches import ChangeSet, events_of
from pgoutput_source.changes.events import ChangeEvent, TableFacts, row_model
from pgoutput_source.changes.schema import Position, TableSchema
from pgoutput_source.decode.relations import Relations
from pgoutput_source.embedded import connection_string
from pgoutput_source.errors import ConfigurationError, PgOutputError
from pgoutput_source.postgres.connection import Connection, ask
from pgoutput_source.postgres.definitions import Definitions
from pgoutput_source.postgres.table_facts import table_facts, table_schema
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream.frame_source import FrameSource
from pgoutput_source.stream.peeked import PeekedFrames
from pgoutput_source.stream.session import SlotSession
from pgoutput_source.stream.start import Start

logger = logging.getLogger(__name__)

Acknowledged: TypeAlias = ChangeEvent | ChangeSet | Position
"""What `ack` takes. Everything up to and including it was processed."""

_WAIT = 0.2  # seconds that stop() may go unnoticed
_SETTLE = 1.0  # seconds
_NOTHING = Position(Lsn(0), -1)
_PIECE = 32_768  # messages of a peek that are decoded together


class PgOutputReader:
    """The committed changes of a publication, in commit order: one by one, or columnar with `sets()`.

    Delivery is at least once: a new reader resumes after what the last one acknowledged. Changes come again if they
    were not acknowledged, or if their transaction was not acknowledged to its end. No change is ever lost. While the
    body of the loop runs, the server's keepalives are answered.

    Args:
        dsn: A libpq connection string or URL; "" leaves everything to libpq's environment variables, and None stands
            for the embedded server.
        slot: The replication slot's name.
        publication: One name or several.
        create: Whether to create the publication (for all tables) and then the slot if they are missing.
        until: None reads for ever; "current" ends once everything committed before the start was delivered; an LSN
            such as "0/16B3748" ends there.
        options: The other fields of `SourceSettings`.

    Raises:
        ConfigurationError: An option is unknown or invalid. The reader does not connect before it is entered or
            iterated.

    Example:
        >>> from pgoutput_source.embedded import shop
        >>> from pgoutput_source.embedded import Server
        >>> with Server() as server:
        ...     shop.create(server.dsn())
        ...     with PgOutputReader(server.dsn(), slot="orders", publication="shop", create=True, until="current") as r:
        ...         for change in r:
        ...             r.ack(change)
    """

    def __init__(
        self,
        dsn: str | None = None,
        *,
        slot: str,
        publication: str | Iterable[str],
        create: bool = False,
        until: str | None = None,
        **options: Any,
    ) -> None:
        self.settings = SourceSettings.of(
            dsn=dsn, slot=slot, publication=publication, create=create, until=until, **options
        )
        self._stopping = False
        self._closed = False
        self._failure: Exception | None = None
        self._polling = threading.Lock()  # the stream has one owner: the thread that polls or closes
        self._poller: int | None = None
        self._session: SlotSession | None = None
        self._set: ChangeSet | None = None  # fetched, but not yet taken
        self._rest: Iterator[ChangeEvent] = iter(())  # of the set that is being delivered as events
        self._begun = 0  # how many sets were, or are being, delivered as events
        self._beginning = threading.Lock()
        self._given: ChangeEvent | Position = _NOTHING
        self._by_set: bool | None = None
        self._facts: dict[TableSchema, TableFacts | None] = {}
        # The following is for acknowledgements, which may come from any thread.
        self._acknowledging = threading.Lock()
        self._acked = _NOTHING
        self._ends: deque[tuple[int, int]] = deque()  # the last position of each unacknowledged transaction
        self._fetched = Lsn(0)  # everything before it was fetched, and is in `_ends` until it is acknowledged
        self._done = True  # all that was delivered is acknowledged

    # -- start and end --------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect, check slot and publication, and start to stream. Entering or iterating the reader calls it.

        Raises:
            ServerError: The slot, the publication or the server can't be used; each with its remedy.
        """
        if self._session is not None or self._closed:
            return
        self._session = SlotSession(self._address(), self.settings)

    def _address(self) -> str:
        return connection_string(self.settings.dsn)

    def stop(self) -> None:
        """End the iteration before the next change, from another thread or a signal handler. Nothing is lost."""
        self._stopping = True

    def close(self, *, graceful: bool = True) -> None:
        """End the stream and free the slot. With `graceful`, the server has then read the last acknowledgement."""
        self._stopping = self._closed = True
        if self._poller == threading.get_ident():
            return  # called by a signal handler during a poll: the iteration closes the stream when it ends
        with self._polling:
            if self._session is None:
                return
            if graceful:
                self._settle(self._session)
            self._session.close(graceful=graceful)
            self._session = None

    def _settle(self, session: SlotSession) -> None:
        """If the last change of a transaction was acknowledged, wait for its commit, so that all of it is."""
        deadline = time.monotonic() + _SETTLE
        try:
            while self._ends and self._ends[0] <= self._acked and time.monotonic() < deadline:
                self._poll(session)  # later changes are not delivered, so they will come again
        except PgOutputError as e:
            logger.warning("slot %s: the last acknowledgement is lost: %s", self.settings.slot, e.message)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # If the server is gone, a graceful end would raise an error that hides the one that matters.
        self.close(graceful=not isinstance(error, PgOutputError))

    # -- changes --------------------------------------------------------------------------------------------------

    def __iter__(self) -> Self:
        """Each change as an event. A new loop continues where the last one ended."""
        return self

    def __next__(self) -> ChangeEvent:
        while not self._stopping:
            with self._failing():
                begun = self._begun
                event = next(self._rest, None)
                if event is not None:
                    self._given, self._done = event, False
                    return event
                if not self._begin_after(begun):
                    break
        self._end()
        raise StopIteration

    def __aiter__(self) -> Self:
        """Each change as an event; the event loop is free while a thread waits for the next ones."""
        return self

    async def __anext__(self) -> ChangeEvent:
        while not self._stopping:
            with self._failing():
                begun = self._begun
                event = next(self._rest, None)
                if event is not None:
                    self._given, self._done = event, False
                    return event
                if not await asyncio.to_thread(self._begin_after, begun):
                    break
        self._end()
        raise StopAsyncIteration

    def sets(self) -> Iterator[ChangeSet]:
        """Each `ChangeSet`: what one poll brought, columnar by table, with logical decoding messages.

        Raises:
            ConfigurationError: The reader is already iterated by events.
        """
        while True:
            with self._failing():
                if not self._fetch(by_set=True):
                    break
            changes, self._set = self._set, None
            assert changes is not None
            self._given, self._done = _position(_last_positions(changes, messages=True)[-1]), False
            yield changes
        self._end()

    def _begin(self) -> bool:
        """Wait for the next set and begin to deliver it as events; False at the end."""
        if not self._fetch(by_set=False):
            return False
        assert self._set is not None
        self._rest = events_of(self._set, self._facts_of)
        self._set = None
        self._begun += 1
        return True

    def _begin_after(self, begun: int) -> bool:
        """`_begin`, unless another set has begun since: the thread of a cancelled task runs to its end."""
        # Nobody receives the error of such a thread, so it is kept for the next caller.
        with self._beginning, self._failing():
            return self._begun != begun or self._begin()

    def _fetch(self, *, by_set: bool) -> bool:
        """Wait until there is a set in `_set`; False at the end."""
        if self._by_set not in (None, by_set):
            raise ConfigurationError(
                "this reader is iterated by events and sets at once",
                hint="iterate it either by events or with sets(); set.events() returns the events of a set",
            )
        self._by_set = by_set
        self.open()
        while self._set is None and not self._stopping:
            with self._polling:
                session = self._session
                if session is None:
                    break
                self._poller = threading.get_ident()
                try:
                    changes = self._poll(session)
                finally:
                    self._poller = None
            if len(changes) or (by_set and changes.messages):
                self._set = changes
            elif session.ended:
                break
        return self._set is not None and not self._stopping

    def _poll(self, session: SlotSession) -> ChangeSet:
        replaying = session.replaying
        changes = session.next(_WAIT)
        if self.settings.on_table_error == "park":
            session.snapshot()  # what was parked is synced before anything is acknowledged
        # Replayed changes stand before the slot's position, which acknowledges them already.
        found = [] if replaying else _last_positions(changes, messages=bool(self._by_set))
        with self._acknowledging:
            if self._done and not session.replaying:
                session.durable()
            if found and self._ends and self._ends[-1][0] == found[0][0]:
                self._ends.pop()  # the transaction continues
            self._ends.extend(found)
            self._fetched = max(self._fetched, session.safe_lsn)
            self._acknowledge()
        return changes

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """An error ends the reader: resuming after it would skip changes. Later calls raise it again."""
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except Exception as e:
            self._failure = e
            raise

    def _end(self) -> None:
        if self._closed:
            self.close()

    # -- acknowledging --------------------------------------------------------------------------------------------

    def ack(self, what: Acknowledged) -> None:
        """Everything up to and including `what` was processed: PostgreSQL may forget it and will not send it again.

        In the middle of a transaction only earlier transactions are acknowledged. The rest follows with the
        transaction's last change.

        Args:
            what: An event, a set or a position that this reader has delivered.

        Raises:
            ConfigurationError: The reader has not delivered it.
        """
        match what:
            case ChangeEvent():
                position = what.position
            case ChangeSet():
                position = _position(max(_last_positions(what, messages=True), default=_NOTHING))
            case _:
                position = what
        if what is not self._given:
            given = self._given.position if isinstance(self._given, ChangeEvent) else self._given
            if position > given:
                raise ConfigurationError(
                    f"position {position} was not delivered by this reader",
                    hint="acknowledge what this reader has returned",
                )
        with self._acknowledging:
            self._acked = max(self._acked, position)
            given = self._given.position if isinstance(self._given, ChangeEvent) else self._given
            self._done = what is self._given or position == given
            self._acknowledge()
            if self._done and self._session is not None and not self._session.replaying:
                self._session.durable()

    def _acknowledge(self) -> None:
        done = 0
        # Once a transaction's commit record was fetched, its last position is final.
        while self._ends and self._ends[0] <= self._acked and self._ends[0][0] < self._fetched:
            done, _ = self._ends.popleft()
        if not self._ends:
            lsn = self._fetched
        elif done:
            # The server sends a transaction if its commit record begins at or after the acknowledged position.
            lsn = Lsn(done + 1)
        else:
            return
        if self._session is not None:
            self._session.acknowledge(lsn)

    # -- tables ---------------------------------------------------------------------------------------------------

    def model(self, table: str) -> type[BaseModel]:
        """A pydantic model of the rows of a table as it is now; see `events.row_model`.

        Args:
            table: Schema and table: ``public.orders``.

        Raises:
            ConfigurationError: There is no such table.
        """
        dsn, patience = self._address(), self.settings.reconnect_seconds
        relations = Relations((), Definitions(dsn, patience), metadata_prefix=self.settings.metadata_prefix)

        def described(connection: Connection) -> type[BaseModel]:
            schema = table_schema(connection, table, relations)
            return row_model(schema, table_facts(connection, schema))

        return ask(dsn, described, patience=patience)

    def _facts_of(self, schema: TableSchema) -> TableFacts | None:
        if schema not in self._facts:
            patience = self.settings.reconnect_seconds
            self._facts[schema] = ask(self._address(), lambda conn: table_facts(conn, schema), patience=patience)
        return self._facts[schema]


def _position(pair: tuple[int, int]) -> Position:
    return Position(Lsn(pair[0]), pair[1])


def _last_positions(changes: ChangeSet, *, messages: bool) -> list[tuple[int, int]]:
    """The last position of each transaction in a set, in order. A message counts as the beginning of its transaction.

    They are plain pairs of numbers, because there may be one for every row.
    """
    if not changes.batches and not (messages and changes.messages):
        return []
    lsns = [b.metadata("commit_lsn").to_numpy() for b in changes.batches]
    seqs = [b.metadata("seq").to_numpy() for b in changes.batches]
    if messages and changes.messages:
        lsns.append(np.array([m.lsn if m.commit_lsn is None else m.commit_lsn for m in changes.messages], np.uint64))
        seqs.append(np.zeros(len(changes.messages), np.uint64))
    lsn, seq = np.concatenate(lsns), np.concatenate(seqs)
    order = np.lexsort((seq, lsn))
    lsn, seq = lsn[order], seq[order]
    last = np.append(lsn[1:] != lsn[:-1], True)
    return list(zip(lsn[last].tolist(), seq[last].tolist(), strict=True))


# -- without consuming ----------------------------------------------------------------------------------------------


def peek(
    dsn: str | None = None,
    *,
    slot: str,
    publication: str | Iterable[str],
    limit: int = 100_000,
    snapshot: Literal["never", "only"] = "never",
    binary: str = "off",
    metadata_prefix: str = "_",
) -> ChangeSet:
    """What a slot holds now, or what the tables hold now, as one `ChangeSet`; nothing is consumed.

    ``peek(…).table("public.orders")`` is an Arrow table, which Polars and DuckDB accept directly.
    https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION

    Args:
        dsn: A libpq connection string or URL; "" leaves everything to libpq's environment variables, and None stands
            for the embedded server.
        slot: The replication slot's name.
        publication: One name or several.
        limit: After this many messages the server begins no further transaction. It always shows whole transactions.
            With snapshot="only": after this many rows no further chunk is read.
        snapshot: "never" shows the changes that the slot holds; "only" shows the rows that the tables have, as in
            `SourceSettings`. Then the slot is a temporary one, and there may be none of its name.
        binary: How values are sent, as in `SourceSettings`.
        metadata_prefix: What the names of the metadata columns begin with, as in `SourceSettings`.

    Raises:
        SlotNotFound: There is no such slot; the hint has the SQL to create it.
        SlotInUse: Another process streams from it now.
        ServerError: Server, slot or publication can't be used.

    Example:
        >>> from pgoutput_source.embedded import shop
        >>> from pgoutput_source.embedded import Server
        >>> with Server() as server:
        ...     shop.create(server.dsn())
        ...     with PgOutputReader(server.dsn(), slot="explore", publication="shop", create=True):
        ...         pass  # it made the slot
        ...     peek(server.dsn(), slot="explore", publication="shop").tables
        ()
    """
    settings = SourceSettings.of(
        dsn=dsn,
        slot=slot,
        publication=publication,
        snapshot=snapshot,
        binary=binary,
        metadata_prefix=metadata_prefix,
    )

    def frames(dsn: str, settings: SourceSettings, start: Start) -> FrameSource:
        return PeekedFrames(dsn, settings, timeline=start.system.timeline, limit=limit)

    only = snapshot == "only"
    session = SlotSession(connection_string(dsn), settings, frames=None if only else frames)
    with closing(session):
        sets: list[ChangeSet] = []
        while not session.ended and not (only and sum(map(len, sets)) >= limit):
            sets.append(session.next(0.1 if only else 0.0))
    return ChangeSet(
        tuple(b for s in sets for b in s.batches),
        tuple(m for s in sets for m in s.messages),
        tuple(t for s in sets for t in s.truncates),
    )
