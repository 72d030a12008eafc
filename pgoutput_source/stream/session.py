"""`SlotSession`: one slot, from the checks at the start to the last acknowledgement.

Whatever reads a slot uses a session: the Bytewax source (one session per slot), the plain reader, and `peek`. A session
owns the path of a change:

    FrameSource    frames as the server sends them
    History        checks that the server has the changes that were delivered before
    Assembler      frames → change sets; repeats are skipped
    `_deliver`     the last step before the caller: what passes here counts as delivered

It also owns the way back: `safe_lsn` is what may be acknowledged once everything delivered is durable, and
`acknowledge` tells the server. The caller decides when.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from pgoutput_source import metrics
from pgoutput_source.changes.batches import ChangeBatch, ChangeSet, UndecodedBatch
from pgoutput_source.changes.schema import Position
from pgoutput_source.copy.initial import InitialCopy, copy_of
from pgoutput_source.copy.requests import prefixes
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.decode.in_progress import StreamedTransactions
from pgoutput_source.decode.relations import Relations
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.postgres.definitions import Definitions
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream.frame_source import FrameSource
from pgoutput_source.stream.heartbeat import Heartbeat
from pgoutput_source.stream.history import History
from pgoutput_source.stream.parking import Parking
from pgoutput_source.stream.replication import ReplicationStream
from pgoutput_source.stream.start import STATE_VERSION, Start, State, begin, last_delivered
from pgoutput_source.stream.timeline import Timeline
from pgoutput_source.types import types_of

logger = logging.getLogger(__name__)

_COPYING = 0.02  # seconds to wait for the stream while there are rows to copy


class SlotSession:
    """The changes of one slot, in commit order, from where an earlier session stopped.

    The constructor connects, checks and starts to read. Call the methods from one thread at a time, except
    `acknowledge`, which any thread may call.

    Args:
        dsn: A libpq connection string or URL.
        settings: Which slot, which publications, and how to read them.
        state: What `snapshot` of an earlier session returned. None if there is none; then only the slot knows the
            position.
        tables: The tables that the caller takes, as schema and name, if known. If one can't come, the start fails.
        patterns: Patterns of the tables that it takes. If one matches none, the start warns.
        frames: Makes the source of frames from the connection string, the settings and the `Start`.

    Attributes:
        settings: As given.
        system: The database system that was found at the start.
        until: Where a bounded run ends; None if it has no end.
        frames: The source of frames.
        acknowledged: Everything before it was delivered and is durable.
        idle: Whether the last `next` found nothing to do.

    Raises:
        ServerError: The server, the slot or a publication can't be used; each with its remedy.
        StateError, SlotAhead: `state` does not fit the slot.
    """

    def __init__(
        self,
        dsn: str,
        settings: SourceSettings,
        state: State | None = None,
        *,
        tables: Iterable[tuple[str, str]] = (),
        patterns: Iterable[str] = (),
        frames: Callable[[str, SourceSettings, Start], FrameSource] | None = None,
    ) -> None:
        self._tables = sorted(set(tables))
        self._only = settings.snapshot == "only"
        start = begin(dsn, settings, state, self._tables, patterns)
        copied = None if state is None else state.get("copy")
        if self._only:
            state = None
        self.settings, self.system, self.until = settings, start.system, start.until
        self._assembler = _assembler(dsn, settings, start, state)
        self.frames: FrameSource = (frames or _stream)(dsn, settings, start)
        self.frames.start(Lsn(0) if state is None else start.acknowledged)
        self._copy: InitialCopy | None = None
        try:
            # After the slot: transactions that ran before its creation are not streamed, and must end before a chunk is
            # read.
            if frames is None:
                self._copy = copy_of(dsn, settings, start.system, copied, resumed=state is not None)
            # As late, because another process may still park changes of the slot until then.
            self._was_parked = (state or {}).get("parked")
            self._parking = _parking(settings, start, state, self._assembler.relations.fresh())
            self._assembler.parked = self._parking
            if self._parking is not None and self._copy is not None and self._copy.pending:
                raise ConfigurationError(
                    'on_table_error="park" while tables are being copied', hint="park once the copy is complete"
                )
        except BaseException:
            self.frames.close()
            raise
        self.acknowledged = max(start.acknowledged, self.frames.acknowledged)
        self._generation = self.frames.generation
        self._looked_through = Lsn(0)
        self._reached = False
        self.idle = True
        self._history = History(settings, state)
        self._history.connected(self.frames.confirmed)
        self._timeline = Timeline(dsn, self.frames, settings.reconnect_seconds)
        self._heartbeat = Heartbeat(dsn, settings.slot, settings.heartbeat_seconds)
        self._streamed = False
        self._undecoded: set[str] = set()
        bound = f" until {self.until}" if self.until else ""
        logger.info("slot %s: streaming from %s%s", settings.slot, self.acknowledged, bound)

    def close(self, *, graceful: bool = False) -> None:
        """End the session. Closing twice is allowed.

        Args:
            graceful: Wait until the server confirms the end, so that it knows what is acknowledged.
        """
        if self._copy is not None:
            self._copy.close()
        self._heartbeat.close()
        if self._parking is not None:
            self._parking.close()
        self.frames.close(graceful=graceful)
        self._assembler.close()

    # -- changes ----------------------------------------------------------------------------------------------------

    def next(self, timeout: float = 0.0) -> ChangeSet:
        """The next changes in commit order; empty if nothing came, or nothing with changes.

        Args:
            timeout: Seconds to wait for the first change.

        Raises:
            ServerError: The connection was lost and can't be restored, or the server can't continue.
            StateError: The server is not the one whose changes were delivered.
            ProtocolError, SchemaChanged, SpillError: See `Assembler.feed`.
        """
        if self._parking is not None and self._parking.replaying:
            # Before anything of the stream, which may go on with the same tables.
            replayed = self._parking.replay()
            self.idle = False
            metrics.CHANGES.labels(self.settings.slot).inc(len(replayed))
            return replayed
        copy = self._copy
        if copy is not None and (copy.reading or (self._streamed and self._copy_is_due)):
            # The copy and the stream take turns. A table without a key is read to its end.
            self._streamed = False
            rows = copy.step(self.safe_lsn)
            if rows.batches:
                self.idle = False
                self._warn(rows.batches)
                metrics.CHANGES.labels(self.settings.slot).inc(len(rows))
                return rows
            if copy.reading:
                self.idle = True
                time.sleep(min(timeout, _COPYING))
                return rows
        self._streamed = True
        # While a committed transaction that was streamed is delivered piece by piece, nothing is read from the server.
        received: Sequence[bytes | memoryview] = ()
        if not self._assembler.pending:
            if self.copying:
                timeout = 0.0 if self._copy_is_due else min(timeout, _COPYING)
            received = self._poll(timeout)
        nothing = not received and not self._assembler.pending
        self.idle = nothing and not self._copy_is_due
        return self._deliver(ChangeSet(()) if nothing else self._assembler.feed(received))

    @property
    def _copy_is_due(self) -> bool:
        if self._copy is None or self.in_transaction or not self._copy.due:
            return False
        # A session that resumes, or reconnects, within a transaction waits for the rest of it: rows of the copy stand
        # before it, and what was delivered of it may have emptied the table.
        return not self.unfinished

    def _poll(self, timeout: float) -> Sequence[bytes | memoryview]:
        settings, frames = self.settings, self.frames
        received = frames.poll(
            max_frames=settings.max_frames, max_bytes=settings.max_bytes, timeout=timeout, whole=self._assembler.whole
        )
        if frames.generation != self._generation:
            self._generation = frames.generation
            self._looked_through = Lsn(0)
            self._timeline.reconnected(
                last_delivered(self.position, 0 if self._copy is None else self._copy.ledger.reach)
            )
            self._history.connected(frames.confirmed)
            self._assembler.reconnected()
            if self._copy is not None:
                self._copy.reconnected()
            metrics.RECONNECTS.labels(settings.slot).inc()
        self._history.look(received, frames.sent)
        return received

    def _deliver(self, changes: ChangeSet) -> ChangeSet:
        slot = self.settings.slot
        if not self.in_transaction:
            # WAL that the server read without sending anything counts too. Otherwise a quiet publication would keep
            # the WAL of a busy database for ever.
            self._looked_through = max(self._looked_through, self.frames.sent)
        metrics.RECEIVED.labels(slot).set(self.frames.received)
        if changes.batches:
            self._heartbeat.changed()
            self._history.delivered(changes)
            metrics.COMMIT_TIME.labels(slot).set((self._history.commit_ts or 0) / 1_000_000)
            if self._parking is None:
                self._warn(changes.batches)
            else:
                changes = self._parking.take(changes)
        if self._parking is not None and any(m.prefix in prefixes(slot) for m in changes.messages):
            logger.warning('slot %s: no table is copied with on_table_error="park"; a request is ignored', slot)
            changes = replace(changes, messages=tuple(m for m in changes.messages if m.prefix not in prefixes(slot)))
        if self._assembler.skipped:
            metrics.SKIPPED.labels(slot).inc(self._assembler.skipped)
            self._assembler.skipped = 0
        if self._copy is not None:
            changes = self._copy.judge(changes)
            self._copy.passed(self.safe_lsn)
        metrics.CHANGES.labels(slot).inc(len(changes))
        return replace(changes, continues=True) if self.unfinished else changes

    def _warn(self, batches: Iterable[ChangeBatch]) -> None:
        """Warn once per table that its changes can't be decoded. If nobody takes the table, nothing else reports it."""
        for batch in batches:
            if isinstance(batch, UndecodedBatch) and batch.table not in self._undecoded:
                self._undecoded.add(batch.table)
                logger.warning(
                    "slot %s: changes of %s can't be decoded. A step that takes this table gets the error; others "
                    "ignore it: %s",
                    self.settings.slot,
                    batch.table,
                    str(batch.error).replace("\n", "; "),
                )

    @property
    def position(self) -> Position | None:
        """The last delivered change, of this session or of the one that it resumes."""
        return self._assembler.position

    @property
    def unfinished(self) -> bool:
        """Whether the transaction of the last delivered change has not ended yet, as far as this session knows."""
        return self.position is not None and self.position.commit_lsn >= self.safe_lsn

    @property
    def in_transaction(self) -> bool:
        """Whether a committed transaction was received but not yet delivered to its end."""
        return self._assembler.in_transaction

    @property
    def copying(self) -> bool:
        """Whether the initial copy is incomplete. Until it is complete, not every change is delivered."""
        return self._copy is not None and self._copy.pending

    @property
    def replaying(self) -> bool:
        """Whether parked changes are being replayed, before anything of the stream."""
        return self._parking is not None and self._parking.replaying

    @property
    def ended(self) -> bool:
        """Whether nothing more will be delivered: the run or its copy has ended, or the source has no more frames."""
        if not self._reached and not self.in_transaction and not self.copying and not self.replaying:
            self._reached = (
                self._only or self.frames.exhausted or (self.until is not None and self.safe_lsn >= self.until)
            )
        return self._reached

    # -- positions --------------------------------------------------------------------------------------------------

    @property
    def safe_lsn(self) -> Lsn:
        """Everything before it was delivered. It may be acknowledged once all that is durable."""
        return max(self.acknowledged, self._assembler.end_lsn, self._looked_through)

    def acknowledge(self, lsn: Lsn) -> None:
        """Everything before `lsn` is durable: PostgreSQL may forget it.

        Args:
            lsn: A position from `safe_lsn`, or one after the last change of a transaction and before the next.
        """
        slot = self.settings.slot
        self.acknowledged = max(self.acknowledged, lsn)
        # Not positions that only the state knows: this server may turn out to be restored from a backup.
        if not self._history.pending:
            self.frames.acknowledge(min(self.acknowledged, self.frames.received))
        metrics.ACKNOWLEDGED.labels(slot).set(self.acknowledged)
        metrics.LAG.labels(slot).set(max(0, self.frames.received - self.acknowledged))

    def durable(self) -> None:
        """What the last `snapshot` returned is durable, and so is all that was delivered before it."""
        if self._parking is not None:
            self._parking.durable()

    def snapshot(self) -> State:
        """The resume state. A session that starts with it continues after the last change of this one.

        Its "lsn" is `safe_lsn`, to be acknowledged when the state is durable.
        """
        position, known = self.position, self._assembler.relations.known
        copy = None if self._copy is None else self._copy.state()
        parked = self._was_parked if self._parking is None else self._parking.state()
        return {
            "v": STATE_VERSION,
            "system": self.system.system_id,
            "timeline": self._timeline.of(position),
            "slot": self.settings.slot,
            "commit_lsn": None if position is None else int(position.commit_lsn),
            "seq": None if position is None else position.seq,
            **self._history.state(),
            "lsn": int(self.safe_lsn),
            **({} if known is None else {"tables": dict(known)}),
            **({"taken": [list(table) for table in self._tables]} if self._tables else {}),
            **({} if copy is None else {"copy": copy}),
            **({} if parked is None else {"parked": parked}),
            **({"only": True} if self._only else {}),
        }


def _stream(dsn: str, settings: SourceSettings, start: Start) -> FrameSource:
    return ReplicationStream.of(dsn, settings)


def _parking(settings: SourceSettings, start: Start, state: State | None, relations: Relations) -> Parking | None:
    kept = (state or {}).get("parked")
    if settings.on_table_error == "stop" or settings.park_folder is None:
        if kept is not None and kept["tables"]:
            names = ", ".join(table["names"][0] for table in kept["tables"].values())
            raise ConfigurationError(
                f"changes of {names} are parked, and later ones would be delivered before them",
                hint='keep on_table_error="park" until they are replayed',
            )
        return None
    return Parking(
        settings.park_folder,
        slot=settings.slot,
        system=start.system.system_id,
        relations=relations,
        on_misfit=settings.on_misfit,
        state=None if state is None else kept or {"next": 0, "tables": {}, "replay": None},
        resumed=start.position,
    )


def _assembler(dsn: str, settings: SourceSettings, start: Start, state: State | None) -> Assembler:
    system = start.system
    return Assembler(
        (("system", system.system_id), ("database", system.database), ("slot", settings.slot)),
        skip_until=start.position,
        on_misfit=settings.on_misfit,
        look_up=Definitions(dsn, settings.reconnect_seconds),
        streamed=_streamed(settings),
        types=types_of(system.server_version),
        metadata_prefix=settings.metadata_prefix,
        known_tables=None if settings.on_schema_change == "evolve" else (state or {}).get("tables", {}),
    )


def _streamed(settings: SourceSettings) -> StreamedTransactions | None:
    """What goes between a stream and its assembler: nothing without streaming."""
    if settings.streaming == "off":
        return None
    return StreamedTransactions(
        memory=settings.streaming_memory,
        piece=settings.max_bytes,
        parallel=settings.streaming == "parallel",
        on_spill=metrics.SPILLED.labels(settings.slot).inc,
    )
