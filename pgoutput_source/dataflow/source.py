"""`PgOutputSource`: a replication slot as a Bytewax source of `ChangeSet`s, one partition per slot.

The one thing that this file is about is *when PostgreSQL may forget*. Bytewax calls `next_batch()`, or the next
`snapshot()`, only once the epoch that the last `snapshot()` closed is durable on every worker: its state is in the
recovery store and its output is staged. This moment is the gate. So

    snapshot()     stages the position up to which everything was given out, and returns the resume state;
    the gate       lets the sinks of this process publish, and only then acknowledges the staged position.

Nothing is acknowledged in `snapshot()` itself (the epoch may never become durable) and nothing in `close()` (which
Bytewax also calls on errors, and at the end of a run before the last commit).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from bytewax.inputs import AbortExecution, FixedPartitionedSource, StatefulSourcePartition

from pgoutput_source import metrics
from pgoutput_source.changes.batches import ChangeSet
from pgoutput_source.dataflow import gate, recovery, shutdown
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.decode.in_progress import streamed
from pgoutput_source.embedded import connection_string
from pgoutput_source.postgres.connection import connect
from pgoutput_source.postgres.creation import create
from pgoutput_source.postgres.definitions import Definitions
from pgoutput_source.postgres.system import identify
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream import start
from pgoutput_source.stream.heartbeat import Heartbeat
from pgoutput_source.stream.history import History
from pgoutput_source.stream.replication import ReplicationStream
from pgoutput_source.stream.start import STATE_VERSION, State
from pgoutput_source.stream.timeline import Timeline
from pgoutput_source.types import types_of

logger = logging.getLogger(__name__)

_IDLE = timedelta(milliseconds=10)  # far less would cost a core, far more would keep epochs from closing
_EPOCH_BYTES = 256 << 20  # with several workers queues are unbounded within an epoch; a single one has no queues


class PgOutputSource(FixedPartitionedSource[ChangeSet, State]):
    """The committed changes of a publication, from a replication slot, as `ChangeSet`s in commit order.

    Partitions are replication slots: there is one, named like the slot. With recovery (`-r`) the run resumes at the
    exact change, also in the middle of a transaction. Without it the slot is the only memory and delivery is at least
    once. PostgreSQL may forget what an epoch brought as soon as this epoch is durable, and not before.

    Nothing is read and nothing is connected before Bytewax builds the partition; only the recovery folder, if
    ``python -m bytewax.run`` has one, is rid of states that are void (`store`).

    Args:
        dsn: A libpq connection string or URL; "" leaves all to libpq's own environment variables.
        slot: The replication slot's name.
        publication: One name or several.
        create: Create the publication (for all tables) and then the slot where they are missing.
        until: None runs for ever; "current" stops once everything committed before the start is published; an LSN
            such as "0/16B3748" stops there.
        options: The other fields of `SourceSettings`.

    Raises:
        ConfigurationError: An option has no meaning or a wrong value.

    Example:
        >>> PgOutputSource("postgresql://localhost/shop", slot="orders", publication="shop", until="current")
        PgOutputSource(slot='orders', publication=('shop',))
        >>> PgOutputSource("postgresql://localhost/shop", slot="Orders!", publication="shop")
        Traceback (most recent call last):
        pgoutput_source.errors.ConfigurationError: ...
    """

    def __init__(
        self,
        dsn: str,
        *,
        slot: str,
        publication: str | Iterable[str],
        create: bool = False,
        until: str | None = None,
        **options: Any,
    ) -> None:
        settings = SourceSettings.of(dsn=dsn, slot=slot, publication=publication, create=create, until=until, **options)
        self._settings: Callable[[], SourceSettings] = lambda: settings
        self._shown: SourceSettings | None = settings
        shutdown.catch_signals()
        recovery.clear()

    @classmethod
    def from_env(cls, **overrides: Any) -> PgOutputSource:
        """A source that is configured by the environment when the dataflow starts, never at import.

        `PGOUTPUT_DSN` (or libpq's own `PGHOST`, `PGSERVICE` …), `PGOUTPUT_SLOT`, `PGOUTPUT_PUBLICATION`,
        `PGOUTPUT_CREATE`, `PGOUTPUT_UNTIL` and the rest of `SourceSettings`. `overrides` win over the environment.
        With no connection configured at all the source runs on an embedded PostgreSQL with a small shop in it.
        """
        source = cls.__new__(cls)
        resolved: list[SourceSettings] = []

        def settings() -> SourceSettings:
            if not resolved:
                resolved.append(SourceSettings.from_env(**overrides))
            return resolved[0]

        source._settings = settings
        source._shown = None
        shutdown.catch_signals()
        recovery.clear()
        return source

    def __repr__(self) -> str:
        if self._shown is None:
            return "PgOutputSource.from_env()"
        return f"PgOutputSource(slot={self._shown.slot!r}, publication={self._shown.publication!r})"

    def list_parts(self) -> list[str]:
        """The slot's name, which keys the resume state as well."""
        shutdown.joined()
        return [self._settings().slot]

    def build_part(self, step_id: str, for_part: str, resume_state: State | None) -> _Partition:
        """Connect, compare the slot with the resume state, and start to stream."""
        shutdown.catch_signals()  # once more, because a notebook's kernel sets its own handlers for each cell
        return _Partition(self._settings(), resume_state)


class _Partition(StatefulSourcePartition[ChangeSet, State]):
    def __init__(self, settings: SourceSettings, state: State | None) -> None:
        shutdown.show_log()
        self.settings = settings
        self.slot = settings.slot
        dsn = self.dsn = connection_string(settings.dsn, shop=True)
        with start.connect(dsn, settings) as conn:
            if settings.create and state is None:
                create(conn, settings)
            slot = start.check(conn, dsn, settings, state)
            system = identify(conn)
            self.until = start.stop_at(conn, settings)
        position, acknowledged = start.reconcile(state, settings, slot, system)
        if state is not None:
            acknowledged = start.on_timeline(dsn, state["timeline"], system.timeline, position, acknowledged)
        self.system = system
        origin = (("system", str(system.system_id)), ("database", system.database), ("slot", self.slot))
        self.assembler = Assembler(
            origin,
            skip_until=position,
            on_misfit=settings.on_misfit,
            look_up=Definitions(dsn),
            streamed=streamed(settings),
            types=types_of(system.server_version),
            known_tables=None if settings.on_schema_change == "evolve" else (state or {}).get("tables", {}),
        )
        self.stream = ReplicationStream.of(dsn, settings)
        self.stream.start(Lsn(0) if state is None else acknowledged)
        acknowledged = max(acknowledged, self.stream.acknowledged)
        self.history = History(settings, state)
        self.history.connected(self.stream.confirmed)
        self.timeline = Timeline(dsn, self.stream)
        self.acknowledged = acknowledged
        self.staged: Lsn | None = None
        self.final = False  # the last snapshot covers all that this partition will give out
        self.done = False  # … and it is durable
        self.left = False
        self.reached = False
        self.bytes_in_epoch = 0
        self.generation = self.stream.generation
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        self._awake: datetime | None = None
        shutdown.began(self)
        self.open = True
        self.watchdog = shutdown.Watchdog(self.slot, self._behind, settings.stall_seconds)
        self.heartbeat = Heartbeat(dsn, self.slot, settings.heartbeat_seconds)
        gate.source_opened(self.slot)
        logger.info(
            "slot %s: streaming from %s%s", self.slot, acknowledged, f" until {self.until}" if self.until else ""
        )

    # -- Bytewax calls these ------------------------------------------------------------------------------------

    def next_batch(self) -> list[ChangeSet]:
        self.watchdog.called()
        self._gate()
        if self.done:
            return self._leave()
        if self._ending() or self._full():
            self._awake = datetime.now(UTC) + _IDLE
            return []
        limits = {"max_frames": self.settings.max_frames, "max_bytes": self.settings.max_bytes}
        # A streamed transaction that has committed comes out piece by piece, and the server waits meanwhile.
        frames = [] if self.assembler.pending else self.stream.poll(**limits, timeout=0.0, whole=self.assembler.whole)
        if self.stream.generation != self.generation:
            self.generation = self.stream.generation
            self.timeline.reconnected(self.assembler.position)
            self.history.connected(self.stream.confirmed)
            self.assembler.reconnected()
            metrics.RECONNECTS.labels(self.slot).inc()
        self.history.look(frames, self.stream.sent)
        if not frames and not self.assembler.pending:
            self._awake = datetime.now(UTC) + _IDLE
            return []
        self._awake = None
        changes = self.assembler.feed(frames)
        self._count(changes)
        return [changes] if len(changes) or changes.messages else []

    def next_awake(self) -> datetime | None:
        return self._awake

    def snapshot(self) -> State:
        self.watchdog.called()
        self._gate()
        self.final = self._ending()
        self.staged = self._safe()
        self.bytes_in_epoch = 0
        position, known = self.assembler.position, self.assembler.relations.known
        return {
            "v": STATE_VERSION,
            "system": self.system.system_id,
            "timeline": self.timeline.of(position),
            "slot": self.slot,
            "commit_lsn": None if position is None else int(position.commit_lsn),
            "seq": None if position is None else position.seq,
            **self.history.state(),
            "lsn": int(self.staged),
            **({} if known is None else {"tables": dict(known)}),
        }

    def close(self) -> None:
        if self.open:
            self.open = False
            self.watchdog.close()
            self.heartbeat.close()
            self.timeline.close()
            shutdown.closed(self)
            gate.source_closed(self.slot)
        self.stream.close()
        self.assembler.close()

    # -- positions ----------------------------------------------------------------------------------------------

    def _safe(self) -> Lsn:
        """Up to here everything was given out: what may be acknowledged once the epoch is durable.

        While no transaction is open that is what the server has looked through, even if it sent nothing of it:
        otherwise a quiet publication would keep the WAL of a busy database for ever.
        """
        end = max(self.acknowledged, self.assembler.end_lsn)
        return end if self.assembler.in_transaction else max(end, self.stream.keepalive_lsn)

    def _gate(self) -> None:
        """What the last snapshot staged is durable now: publish, then acknowledge, in this order."""
        if self.staged is None:
            return
        lsn, self.staged = self.staged, None
        gate.opened(self.slot)
        metrics.GATE_TIME.labels(self.slot).set(time.time())
        self.done = self.done or self.final
        self.acknowledged = max(self.acknowledged, lsn)
        # Not what only the state knows: this server may turn out to be a copy that was restored from a backup.
        if not self.history.pending:
            self.stream.acknowledge(min(self.acknowledged, self.stream.received))
        metrics.ACKNOWLEDGED.labels(self.slot).set(self.acknowledged)
        metrics.LAG.labels(self.slot).set(max(0, self.stream.received - self.acknowledged))

    def _ending(self) -> bool:
        """Whether nothing more is to be given out: a signal came, or the position to stop at was reached."""
        if self.until is not None and not self.reached and not self.assembler.in_transaction:
            self.reached = self._safe() >= self.until
        return self.reached or shutdown.stopping()

    def _full(self) -> bool:
        return not self.in_main_thread and self.bytes_in_epoch > _EPOCH_BYTES

    def _leave(self) -> list[ChangeSet]:
        """Everything is durable and acknowledged: end the stream, so that the server surely knows it, and the run."""
        if not self.left:
            self.left = True
            self.stream.close(graceful=True)
            logger.info("slot %s: stopped, all up to %s is published and acknowledged", self.slot, self.acknowledged)
        if self.reached:
            gate.drain()
            gate.source_finished(self.slot)
            raise StopIteration
        if not shutdown.left(self):
            self._awake = datetime.now(UTC) + _IDLE
            return []
        gate.drain()
        # StopIteration would close all windows and keep them closed in the recovery store. An abort leaves the state
        # of the last epoch, which is all there is; in a cluster only an interrupt reaches the other workers.
        raise AbortExecution if self.in_main_thread else shutdown.Drained

    def _behind(self) -> bool:
        with connect(self.dsn) as conn:
            return identify(conn).lsn > self.acknowledged

    def _count(self, changes: ChangeSet) -> None:
        size = sum(b.data.nbytes for b in changes.batches) if not self.in_main_thread else 0
        self.bytes_in_epoch += size
        metrics.CHANGES.labels(self.slot).inc(len(changes))
        metrics.RECEIVED.labels(self.slot).set(self.stream.received)
        if changes.batches:
            self.heartbeat.changed()
            self.history.given(changes)
            metrics.COMMIT_TIME.labels(self.slot).set((self.history.commit_ts or 0) / 1_000_000)
        if self.assembler.skipped:
            metrics.SKIPPED.labels(self.slot).inc(self.assembler.skipped)
            self.assembler.skipped = 0
