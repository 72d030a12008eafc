"""`InitialCopy`: delivers the rows that exist already, interleaved with the changes of the stream.

The slot is created first and streams all the time, so no WAL piles up. A session alternates: some changes of the stream
(`judge`), then a chunk (`step`). While a chunk is decoded and the stream has its turn, the next chunk is read on a
thread (`ahead`). It counts as unread, and is read again if it turns out to lack a change that was dropped. So a change
never has to be held back until a chunk is complete. A table without a key is read as a whole, and the stream waits
until that is done.

The ledger records the progress and is part of the resume state. A crash costs only the chunk that was being read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import numpy as np
from psycopg import sql

from pgoutput_source.changes.batches import ChangeBatch, ChangeSet, Message
from pgoutput_source.changes.schema import TableName
from pgoutput_source.copy.ahead import ReadAhead
from pgoutput_source.copy.chunks import Busy, Chunk, ChunkReader, Fetched, TooLarge, exactly
from pgoutput_source.copy.judge import judge
from pgoutput_source.copy.keys import Keys
from pgoutput_source.copy.ledger import MOST_UNSETTLED, Ledger, Signature, TableCopy
from pgoutput_source.copy.progress import Progress
from pgoutput_source.copy.requests import REQUEST, prefixes
from pgoutput_source.copy.rows import batch_of, columns_of, truncate_of
from pgoutput_source.copy.sizes import ChunkSizes
from pgoutput_source.copy.tables import Published, SourceTable, named, published, unreadable
from pgoutput_source.decode.copied import Tuples
from pgoutput_source.decode.relations import LookUp, Relations
from pgoutput_source.errors import ConfigurationError, ConnectionFailed, NotConfigured
from pgoutput_source.postgres.definitions import Definitions
from pgoutput_source.postgres.refusals import explained
from pgoutput_source.postgres.system import System
from pgoutput_source.settings import SourceSettings
from pgoutput_source.types import types_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

CHUNK_ROWS = 100_000
"""The most rows of a chunk."""

_PATIENCE: Final = 0.01  # seconds to wait, while the stream pauses, for a snapshot that shows what was streamed
_PAUSE: Final = 0.02  # seconds until the next attempt
_TURN: Final = 0.05  # seconds to wait for a chunk that is read ahead before the stream has its turn
_RECONNECT: Final = 0.5  # seconds
_LIST_EVERY: Final = 10.0  # seconds; to find tables that were added to a publication and don't change
_MOST_UNPROVEN: Final = 1000


class InitialCopy:
    """The copy of the tables of one slot, and the judge of the changes that the slot streams meanwhile.

    Only one thread may use it at a time, taking turns with the stream.

    Args:
        dsn: A libpq connection string.
        settings: Which slot and publications.
        origin: Written into the metadata of each batch, as for the stream.
        look_up: Describes types that the database defines.
        state: What `state` returned before; None for none.
        everything: Whether to copy every published table from its start, unless `state` says that all were copied.
            Otherwise the copy continues from `state`, and copies what is requested.

    Raises:
        NotConfigured: The role may not read a table. The hint has the SQL to allow it.
        StateError: `state` is of another version.
    """

    def __init__(
        self,
        dsn: str,
        settings: SourceSettings,
        *,
        origin: tuple[tuple[str, str], ...] = (),
        look_up: LookUp | None = None,
        server_version: int = 180_000,
        state: dict[str, Any] | None = None,
        everything: bool = False,
    ) -> None:
        self._settings = settings
        self._relations = Relations(
            origin, look_up, types=types_of(server_version), metadata_prefix=settings.metadata_prefix
        )
        self._chunks = ChunkReader(dsn, self._relations, application_name=f"pgoutput_source copy {settings.slot}")
        self._ahead = ReadAhead(self._chunks)
        self._keys: dict[int, Keys] = {}
        self._sizes = ChunkSizes(min(CHUNK_ROWS, settings.snapshot_rows_per_second or CHUNK_ROWS))
        self._names: dict[int, str] = {}  # of published tables
        self._former: dict[int, str] = {}  # names before a rename that the catalogue showed
        self._awaited: dict[int, tuple[str, Signature]] = {}  # versions for which the copy waited for the stream
        self._leaving: dict[int, int] = {}  # done and no longer published: kept until the stream passes this position
        self._published: dict[int, Published] = {}
        self._whole: Iterator[ChangeBatch] | None = None
        self._not_before = 0.0
        self._lost_at = 0.0
        self._listed_at = 0.0
        self.ledger = Ledger() if state is None else Ledger.from_state(state)
        self._progress = Progress(settings.slot, self.ledger)
        if everything and (state is None or self.ledger.copying):
            self.ledger.begin()
            try:
                self._list()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Close the connection. A chunk that is being read counts as unread."""
        self._whole = None
        self._ahead.close()
        self._chunks.close()
        self._progress.end()

    def reconnected(self) -> None:
        """The stream has a new connection, perhaps to another server: drop what was read ahead from the old one."""
        self._ahead.drop()

    @property
    def _reader(self) -> ChunkReader:
        """The reader, when it reads nothing ahead."""
        self._ahead.wait()
        return self._chunks

    def state(self) -> dict[str, Any] | None:
        """The part of the resume state; None if nothing was ever copied."""
        if not self.ledger:
            return None
        if any(copy.unproven for copy in self.ledger.copying.values()):
            self._prove()
        return self.ledger.state()

    @property
    def pending(self) -> bool:
        """Whether some table is incomplete, so that not every change of it is delivered yet."""
        return bool(self.ledger.copying)

    @property
    def due(self) -> bool:
        """Whether there may be something to read."""
        if time.monotonic() < self._not_before:
            return False
        if self.reading or (self.ledger.all and time.monotonic() - self._listed_at > _LIST_EVERY):
            return True
        return any(not copy.read for copy in self.ledger.copying.values())

    @property
    def reading(self) -> bool:
        """Whether a table is being read as a whole, so that the stream must wait."""
        return self._whole is not None

    # -- the stream -------------------------------------------------------------------------------------------------

    def judge(self, changes: ChangeSet) -> ChangeSet:
        """The part of these changes to deliver. Pass every change, in the order of the stream.

        Raises:
            ServerError: The server can't be asked for the order of keys.
        """
        wanted = prefixes(self._settings.slot)
        requests = [m for m in changes.messages if m.prefix in wanted]
        if not self.ledger and not requests:
            return changes
        # The order of requests and changes within the set does not matter: dropped changes are in what is read later.
        batches: list[ChangeBatch] = []
        for batch in changes.batches:
            relation = batch.schema.relation_id
            if self.ledger.all and not self.ledger.knows(relation):
                self._register(relation, batch.table)
            copy = self.ledger.copying.get(relation)
            if copy is not None:
                batches += self._judge(batch, copy)
                continue
            batches.append(batch)
            if self.ledger.all:
                self.ledger.filled.add(batch.table)
        for request in requests:
            self._requested(request)
        if not requests and batches == list(changes.batches):
            return changes
        emptied = (
            {lsn for batch in batches for lsn in batch.metadata("lsn").to_numpy()[_is_truncate(batch)].tolist()}
            if changes.truncates
            else set()
        )
        return ChangeSet(
            tuple(sorted(batches, key=lambda batch: batch.first)),
            tuple(m for m in changes.messages if m.prefix not in wanted),
            tuple(t for t in changes.truncates if int(t.lsn) in emptied),
        )

    def _judge(self, batch: ChangeBatch, copy: TableCopy) -> list[ChangeBatch]:
        if batch.table != copy.name and batch.table != self._former.get(copy.relation_id):
            self.ledger.rename(copy, batch.table)
        self._ahead.streamed(copy, batch.schema)
        try:
            found = judge(batch, copy, self._keys_of(copy) if copy.key else None)
        except KeyError:
            # The key has other columns now, so it no longer separates what was read from what was not.
            copy.restart(partial=copy.delivered)
            found = judge(batch, copy, None)
        if len(copy.unproven) > _MOST_UNPROVEN:
            self._prove()
        if copy.delivered:
            self.ledger.filling(copy)
        return found

    def passed(self, safe: int) -> None:
        """Note that every transaction that committed before `safe` was judged, and the result delivered."""
        for copy in self.ledger.settle(safe):
            logger.info("slot %s: %s is copied, %d rows", self._settings.slot, copy.name, copy.rows)
            self._let_go(copy.relation_id)
            self._progress.publish()
            if not self.ledger.copying:
                self._progress.end()
                logger.info("slot %s: the initial copy is complete", self._settings.slot)

        for relation in [relation for relation, at in self._leaving.items() if at <= safe]:
            del self._leaving[relation]
            self.ledger.forget([relation])

    def _let_go(self, relation_id: int) -> None:
        for known in (self._keys, self._former, self._awaited):
            known.pop(relation_id, None)
        self._sizes.forget(relation_id)

    def _prove(self) -> None:
        """Forget unproven transactions that every later snapshot shows."""
        try:
            now = self._reader.snapshot()
        except ConnectionFailed as e:
            logger.debug("slot %s: %s", self._settings.slot, e.message)
            self._reader.close()
            return  # forgetting is only an optimization
        for copy in self.ledger.copying.values():
            if copy.unproven:
                xids = np.array(sorted(copy.unproven), np.uint32)
                copy.unproven = set(xids[~now.shows(xids)].tolist())

    def _keys_of(self, copy: TableCopy) -> Keys:
        keys = self._keys.get(copy.relation_id)
        if keys is None or keys.columns != copy.key:
            keys = self._keys[copy.relation_id] = Keys(copy.key, self._ask)
        return keys

    def _ask(self, query: sql.Composed, parameters: list[list[str]]) -> list[int]:
        """Numbers from the server."""

        def numbers() -> list[int]:
            with explained():
                return [n for (n,) in self._reader.connection.execute(query, parameters).fetchall()]

        return self._patiently(numbers)

    def _patiently(self, question: Callable[[], T]) -> T:
        """What the server answers to something that the stream needs to know. It is waited for while it restarts."""
        deadline = time.monotonic() + self._settings.reconnect_seconds
        while True:
            try:
                return question()
            except ConnectionFailed as e:
                self._reader.close()
                if not e.transient or time.monotonic() > deadline:
                    raise
                time.sleep(_RECONNECT)

    def _requested(self, request: Message) -> None:
        asked = request.content.decode(errors="replace").strip()
        try:
            self._patiently(self._list)
            name = str(TableName.parse(asked))
        except NotConfigured as e:
            logger.warning("slot %s: a copy of %r was asked for. %s", self._settings.slot, asked, e)
            return
        except ConfigurationError:
            name = ""
        found = [relation for relation, known in self._names.items() if known == name]
        if not found:
            logger.warning("slot %s: a copy of %r was requested, but it is not published", self._settings.slot, asked)
        # Any client may ask, so a request never ends the flow.
        for table, allow in unreadable(self._reader.connection, found):
            logger.warning(
                "slot %s: a copy of %s was requested, but this role can't read it. Run: %s",
                self._settings.slot,
                table,
                allow,
            )
            return
        for relation in found:
            self.again(relation)

    def again(self, relation_id: int) -> None:
        """Copy a table again. A truncate is delivered first, so that deleted rows disappear downstream too."""
        copy = self._register(relation_id, self._names[relation_id])
        copy.partial = copy.delivered = True

    def _register(self, relation_id: int, name: str) -> TableCopy:
        logger.info("slot %s: %s will be copied", self._settings.slot, name)
        self._let_go(relation_id)
        return self.ledger.register(relation_id, name, self._patiently(self._reader.snapshot).xmax)

    def _list(self) -> None:
        """List the tables that are published now. New ones enter the copy."""
        conn = self._reader.connection
        self._published = published(conn, self._settings.publication)
        self._listed_at = time.monotonic()
        names = named(conn, self._published)
        self._names = {relation: str(name) for relation, name, _ in names}
        self._progress.estimates = {relation: rows for relation, _, rows in names}
        new = [r for r in self._names if not self.ledger.knows(r)] if self.ledger.all else []
        refused = unreadable(conn, new)
        if refused:
            raise NotConfigured(
                f"the initial copy can't read all rows of {', '.join(name for name, _ in refused)}",
                hint="as owner or superuser: " + " ".join(dict.fromkeys(allow for _, allow in refused)),
            )
        absent = [r for r in self.ledger.done if r not in self._names and r not in self._leaving]
        if not new and not absent:
            return
        now = self._reader.snapshot()
        self._leaving |= dict.fromkeys(absent, now.high)
        for relation in new:
            copy = self.ledger.register(relation, self._names[relation], now.xmax)
            # The changes of the table that had this name before come first.
            copy.wait = now.high if copy.delivered else 0

    # -- chunks -----------------------------------------------------------------------------------------------------

    def step(self, safe: int) -> ChangeSet:
        """Rows of the next chunk, if one can be read now.

        Args:
            safe: Every transaction that committed before it was judged, and no later one has come.

        Raises:
            NotConfigured: The role may not read a table.
            ServerError: The connection was lost, or the server refuses.
            DecodeError: A value is invalid for its column's type.
        """
        now = time.monotonic()
        if now < self._not_before or self.ledger.behind(safe):
            return ChangeSet(())
        try:
            found = self._stepped(safe, now)
        except ConnectionFailed as e:
            if not e.transient:
                raise
            if not self._lost_at:
                self._lost_at = now
                logger.warning("slot %s: the copy lost its connection, and connects again", self._settings.slot)
            if now - self._lost_at > self._settings.reconnect_seconds:
                raise
            self._whole = None
            self._reader.close()
            self._not_before = now + _RECONNECT
            return ChangeSet(())
        self._lost_at = 0.0
        return found

    def _stepped(self, safe: int, now: float) -> ChangeSet:
        if self._whole is not None:
            return self._piece()
        if self.ledger.all and now - self._listed_at > _LIST_EVERY:
            self._list()
        for copy in list(self.ledger.copying.values()):
            if copy.wait > safe or copy.unsettled >= MOST_UNSETTLED:
                continue
            if copy.read:
                continue
            found = self._chunk(copy, safe)
            if found is not None:
                return found
        self._not_before = time.monotonic() + _PAUSE
        return ChangeSet(())

    def _chunk(self, copy: TableCopy, safe: int) -> ChangeSet | None:
        relation = copy.relation_id
        if relation not in self._published:
            self._list()
            if relation not in self._published:
                self._missing(copy)
                return None
        if copy.gone:
            # It is published again, but what happened meanwhile was not streamed.
            self.again(relation)
            return None
        ahead = self._ahead.of(copy)
        if ahead is not None:
            if not self._ahead.wait(_TURN):
                return ChangeSet(())  # the stream's turn
            try:
                fetched = self._ahead.take(self._keys_of(copy), self._published[relation])
            except TooLarge:
                self._sizes.shrink(ahead)
                return None
            if fetched is not None:
                return self._add(copy, fetched, safe)
        chunk = self._opened(copy)
        if chunk is None:
            return None
        try:
            if chunk.table is None:
                self._reader.abandon()
                self._published.pop(relation, None)
                return None
            return self._read(copy, chunk, chunk.table, safe)
        except BaseException:
            self._reader.abandon()
            raise

    def _missing(self, copy: TableCopy) -> None:
        """The table was dropped, or is no longer published: forget it after its last changes were judged."""
        if not copy.gone:
            copy.gone, copy.wait = True, self._reader.snapshot().high
            return
        logger.warning(
            "slot %s: %s was dropped or is no longer published: its copy ends", self._settings.slot, copy.name
        )
        self._let_go(copy.relation_id)
        self.ledger.forget([copy.relation_id])

    def _opened(self, copy: TableCopy) -> Chunk | None:
        """A transaction whose snapshot may be used to read the table's next chunk."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                chunk = self._reader.open(self._published[copy.relation_id])
            except Busy:
                return None
            if copy.refuses(chunk.snapshot) is None:
                return chunk
            self._reader.abandon()
            if time.monotonic() > deadline:
                return None
            time.sleep(0.0005)

    def _read(self, copy: TableCopy, chunk: Chunk, table: SourceTable, safe: int) -> ChangeSet | None:
        name, version = table.schema.table, (table.schema.table, table.signature)
        if (
            copy.columns
            and version != (copy.name, copy.columns)
            and copy.delivered
            and self._awaited.get(copy.relation_id) != version
        ):
            # The table was altered: no row of the new version may come before the last change of the old version.
            self._awaited[copy.relation_id], copy.wait = version, chunk.snapshot.high
            self._reader.abandon()
            return None
        if name != copy.name:
            self._former[copy.relation_id] = copy.name
            self.ledger.rename(copy, name)
        if copy.begun and table.key != copy.key:
            copy.restart(partial=copy.delivered)
        if copy.partial and copy.delivered:
            # It is delivered by itself: what is read after it may fail, and be read again.
            copy.partial = copy.delivered = False
            at = self.ledger.position(safe, 1)
            self._reader.abandon()
            return ChangeSet((truncate_of(table.schema, position=at, lsn=chunk.snapshot.high, taken=chunk.taken),))
        copy.key, copy.columns, copy.wait, copy.partial = table.key, table.signature, 0, False
        copy.unproven.clear()  # this snapshot shows them
        if not table.key:
            self._reader.without_limit()
            self._reader.flushed(chunk.snapshot)
            self._whole = self._as_a_whole(copy, chunk, table, safe)
            return self._piece()
        try:
            if copy.ranges and copy.ranges[-1].end is None:
                return self._read_holes(copy, chunk, table, safe)
            return self._add(copy, self._reader.fetch(chunk, table, copy.next_key, self._sizes.rows(table)), safe)
        except TooLarge:
            self._sizes.shrink(table)
            self._reader.abandon()
            return None

    def _read_holes(self, copy: TableCopy, chunk: Chunk, table: SourceTable, safe: int) -> ChangeSet:
        holes = [key for key, snapshot in copy.holes.items() if snapshot is None]
        self._reader.without_limit()
        pieces = list(self._reader.read(table, exactly(table, holes)))
        self._reader.commit(chunk.snapshot)
        copy.holes |= dict.fromkeys(holes, chunk.snapshot)
        return self._given(copy, self._batches(chunk, table, pieces, safe))

    def _add(self, copy: TableCopy, fetched: Fetched, safe: int) -> ChangeSet:
        """The rows of the table's next chunk, which was read. The chunk after it begins to be read."""
        copy.add(fetched.upper, fetched.chunk.snapshot)
        if self._settings.snapshot_rows_per_second is None:
            table = fetched.table
            self._ahead.begin(copy, self._published[copy.relation_id], table, self._sizes.rows(table))
        begun = time.monotonic()
        batches = self._batches(fetched.chunk, fetched.table, fetched.pieces, safe)
        self._sizes.learn(fetched.table, batches, fetched.seconds + time.monotonic() - begun)
        return self._given(copy, batches)

    def _batches(self, chunk: Chunk, table: SourceTable, pieces: list[Tuples], safe: int) -> list[ChangeBatch]:
        """All rows of a chunk, which is delivered as a unit. The pieces are used up."""
        batches = []
        while pieces:
            arrays, raw = columns_of(pieces.pop(0), table, self._relations, on_misfit=self._settings.on_misfit)
            if len(raw):
                at = self.ledger.position(safe, len(raw))
                batches.append(
                    batch_of(table.schema, arrays, raw, position=at, lsn=chunk.snapshot.high, taken=chunk.taken)
                )
        return batches

    def _as_a_whole(self, copy: TableCopy, chunk: Chunk, table: SourceTable, safe: int) -> Iterator[ChangeBatch]:
        """A table without a key, piece by piece. An interrupted read can't be continued: it begins with a truncate."""
        for copied in self._reader.read(table, sql.SQL("true")):
            arrays, raw = columns_of(copied, table, self._relations, on_misfit=self._settings.on_misfit)
            if len(raw):
                copy.partial = True
                at = self.ledger.position(safe, len(raw))
                yield batch_of(table.schema, arrays, raw, position=at, lsn=chunk.snapshot.high, taken=chunk.taken)
        self._reader.commit(chunk.snapshot)
        copy.partial = False
        copy.add(None, chunk.snapshot)

    def _piece(self) -> ChangeSet:
        assert self._whole is not None
        try:
            batch = next(self._whole, None)
        except BaseException:
            self._whole = None
            self._reader.abandon()
            raise
        if batch is None:
            self._whole = None
            return ChangeSet(())
        return self._given(self.ledger.copying[batch.schema.relation_id], [batch])

    def _given(self, copy: TableCopy, batches: list[ChangeBatch]) -> ChangeSet:
        rows = sum(len(batch) for batch in batches if not _is_truncate(batch).any())
        copy.rows += rows
        if rows:
            self.ledger.filling(copy)
        self._progress.read(copy, rows)
        if self._settings.snapshot_rows_per_second is not None:
            self._not_before = time.monotonic() + rows / self._settings.snapshot_rows_per_second
        return ChangeSet(tuple(batches))


def copy_of(
    dsn: str, settings: SourceSettings, system: System, saved: dict[str, Any] | None, *, resumed: bool
) -> InitialCopy:
    """The copy of a session that starts.

    Args:
        dsn: A libpq connection string.
        settings: The session's settings.
        system: The database system that was found at the start.
        saved: What `InitialCopy.state` of an earlier session returned, if one copied anything.
        resumed: Whether the session continues the stream of an earlier one.

    Raises:
        ConfigurationError: snapshot="never" now, and an earlier run with another value has not completed the copy.
    """
    copy = InitialCopy(
        dsn,
        settings,
        origin=(("system", system.system_id), ("database", system.database), ("slot", settings.slot)),
        look_up=Definitions(dsn),
        server_version=system.server_version,
        state=saved,
        everything=settings.snapshot != "never" and not resumed,
    )
    ledger = copy.ledger
    if settings.snapshot == "never" and ledger.all:
        if ledger.copying:
            raise ConfigurationError(
                f"snapshot='never': the initial copy of {len(ledger.copying)} tables is not complete, and changes that "
                "it would have shown were left out",
                hint="use snapshot='initial' until the copy is complete, or start afresh with a new recovery folder",
            )
        ledger.all = False
    if settings.snapshot != "never" and resumed and not ledger.all:
        logger.warning(
            "slot %s: this run resumes one that began without an initial copy, and continues without it; to copy a "
            "table: SELECT pg_logical_emit_message(true, '%s', 'schema.table')",
            settings.slot,
            REQUEST,
        )
    return copy


def _is_truncate(batch: ChangeBatch) -> np.ndarray[Any, np.dtype[np.bool_]]:
    column = batch.metadata("op")
    index = column.dictionary.to_pylist().index("T") if "T" in column.dictionary.to_pylist() else -1
    found: np.ndarray[Any, np.dtype[np.bool_]] = column.indices.to_numpy() == index
    return found
