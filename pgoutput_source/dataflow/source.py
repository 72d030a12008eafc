"""`PgOutputSource`: a replication slot as a Bytewax source of `ChangeSet`s, one partition per slot.

This module is about one thing: *when PostgreSQL may forget*. Bytewax calls `next_batch()`, or the next `snapshot()`,
only once the epoch that the last `snapshot()` closed is durable on every worker: its state is in the recovery store and
its output is staged. This moment is the gate. So

    snapshot()     stages the position up to which everything was delivered, and returns the resume state;
    the gate       lets the sinks of this process publish, and only then acknowledges the staged position.

`snapshot()` itself acknowledges nothing, because the epoch may never become durable. Nor does `close()`, which Bytewax
also calls after errors, and at the end of a run before the last commit.
"""

from __future__ import annotations

import pgoutput_source.dataflow.needs_bytewax  # noqa: F401

# isort: split
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from bytewax.inputs import AbortExecution, FixedPartitionedSource, StatefulSourcePartition

from pgoutput_source import metrics
from pgoutput_source.changes.batches import ChangeSet
from pgoutput_source.dataflow.run import gate, open_store, shutdown
from pgoutput_source.dataflow.shutdown import Drained, show_log
from pgoutput_source.dataflow.taken import made, taken_from
from pgoutput_source.dataflow.watchdog import Watchdog
from pgoutput_source.embedded import connection_string
from pgoutput_source.postgres.connection import connect
from pgoutput_source.postgres.system import identify
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream.session import SlotSession
from pgoutput_source.stream.start import State

logger = logging.getLogger(__name__)

_IDLE = timedelta(milliseconds=10)  # much less would cost a core, much more would keep epochs from closing
_EPOCH_BYTES = 256 << 20  # with several workers queues are unbounded within an epoch; a single one has no queues


class PgOutputSource(FixedPartitionedSource[ChangeSet, State]):
    """The committed changes of a publication, from a replication slot, as `ChangeSet`s in commit order.

    A partition is a replication slot. There is one, named like the slot. With recovery (`-r`) the run resumes at the
    exact change, even in the middle of a transaction. Without it only the slot knows the position, and delivery is at
    least once. PostgreSQL may forget the changes of an epoch once the epoch is durable, and not before.

    The source does not read or connect before Bytewax builds the partition. Only the void states in the recovery folder
    of ``python -m bytewax.run`` are dropped earlier, before Bytewax opens it (`recovery.drop_void`).

    Args:
        dsn: A libpq connection string or URL; "" leaves everything to libpq's environment variables.
        slot: The replication slot's name.
        publication: One name or several.
        create: Whether to create the publication (for all tables) and then the slot if they are missing.
        until: None runs for ever; "current" stops once everything committed before the start is published; an LSN
            such as "0/16B3748" stops there.
        options: The other fields of `SourceSettings`.

    Raises:
        ConfigurationError: An option is unknown or invalid.

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
        made(self)
        shutdown.catch_signals()
        open_store()

    @classmethod
    def from_env(cls, *, defaults: Mapping[str, Any] | None = None, **overrides: Any) -> PgOutputSource:
        """A source that reads its configuration from the environment when the dataflow starts, never at import.

        The variables are `PGOUTPUT_DSN` (or libpq's own `PGHOST`, `PGSERVICE` …), `PGOUTPUT_SLOT`,
        `PGOUTPUT_PUBLICATION`, `PGOUTPUT_CREATE`, `PGOUTPUT_UNTIL` and the rest of `SourceSettings`. `overrides`
        override the environment, and `defaults` are for what it does not say. Without any connection the source runs on
        an embedded PostgreSQL with a small shop.
        """
        source = cls.__new__(cls)
        resolved: list[SourceSettings] = []

        def settings() -> SourceSettings:
            if not resolved:
                resolved.append(SourceSettings.from_env(defaults=defaults, **overrides))
            return resolved[0]

        source._settings = settings
        source._shown = None
        made(source)
        shutdown.catch_signals()
        open_store()
        return source

    @property
    def metadata_prefix(self) -> str | None:
        """What the names of the metadata columns begin with; None if the environment says it when the flow starts."""
        return None if self._shown is None else self._shown.metadata_prefix

    def __repr__(self) -> str:
        if self._shown is None:
            return "PgOutputSource.from_env()"
        return f"PgOutputSource(slot={self._shown.slot!r}, publication={self._shown.publication!r})"

    @property
    def tables(self) -> set[tuple[str, str]]:
        """The tables that steps take with `cdc.table`, as schema and name."""
        return taken_from(self)[0]

    def list_parts(self) -> list[str]:
        """The slot's name, which is also the key of the resume state."""
        shutdown.joined()
        return [self._settings().slot]

    def build_part(
        self, step_id: str, for_part: str, resume_state: State | None
    ) -> StatefulSourcePartition[ChangeSet, State]:
        """Connect, compare the slot with the resume state, and start to stream."""
        shutdown.catch_signals()  # again, because a notebook's kernel installs its own handlers for each cell
        settings = self._settings()
        try:
            with shutdown.building(settings.slot):
                return _SlotPartition(settings, resume_state, *taken_from(self))
        except Drained:
            return _Interrupted(resume_state)


class _SlotPartition(StatefulSourcePartition[ChangeSet, State]):
    """A `SlotSession` driven by Bytewax: when it delivers, when it acknowledges, and when it leaves."""

    def __init__(
        self,
        settings: SourceSettings,
        state: State | None,
        tables: Iterable[tuple[str, str]] = (),
        patterns: Iterable[str] = (),
    ) -> None:
        show_log()
        self.settings = settings
        self.slot = settings.slot
        self.dsn = connection_string(settings.dsn, shop=True)
        self.session = SlotSession(self.dsn, settings, state, tables=tables, patterns=patterns)
        self.staged: Lsn | None = None
        self.complete: tuple[tuple[str, ...], int] | None = None  # what is known once the last snapshot is durable
        self.final = False  # whether the last snapshot covers everything that this partition will deliver
        self.done = False  # whether that snapshot is durable
        self.left = False
        self.bytes_in_epoch = 0
        self.continues = self.session.unfinished  # what the last set said
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        self._awake: datetime | None = None
        self.open = True
        self.watchdog = Watchdog(self.slot, self._behind, settings.stall_seconds)
        gate.source_opened(self.slot, state)

    # -- Bytewax calls these ------------------------------------------------------------------------------------

    def next_batch(self) -> list[ChangeSet]:
        self.watchdog.called()
        self._gate()
        if self.done:
            return self._leave()
        if self._ending() or self._full() or gate.held:
            self._awake = datetime.now(UTC) + _IDLE
            return []
        changes = self.session.next()
        self._awake = datetime.now(UTC) + _IDLE if self.session.idle else None
        if not self.in_main_thread:
            self.bytes_in_epoch += sum(batch.nbytes for batch in changes.batches)
        ended = self.continues and not changes.continues
        self.continues = changes.continues
        return [changes] if len(changes) or changes.messages or ended else []

    def next_awake(self) -> datetime | None:
        return self._awake

    def snapshot(self) -> State:
        self.watchdog.called()
        self._gate()
        self.final = self._ending()
        self.bytes_in_epoch = 0
        state = self.session.snapshot()
        self.staged = Lsn(state["lsn"])
        whole = not (self.session.copying or self.session.replaying)
        system = self.session.system
        self.complete = ((system.system_id, system.database, self.slot), self.staged) if whole else None
        return {**state, "epochs": gate.epochs(self.slot)}

    def close(self) -> None:
        if self.open:
            self.open = False
            self.watchdog.close()
            shutdown.closed(self.slot)
            gate.source_closed(self.slot)
        self.session.close()

    # -- the gate -----------------------------------------------------------------------------------------------

    def _gate(self) -> None:
        """Publish and then acknowledge, in this order: what the last snapshot staged is durable now."""
        if self.staged is None:
            return
        lsn, self.staged = self.staged, None
        gate.opened(self.slot, self.complete)
        metrics.GATE_TIME.labels(self.slot).set(time.time())
        self.done = self.done or self.final
        self.session.durable()
        self.session.acknowledge(lsn)

    def _ending(self) -> bool:
        """Whether to deliver nothing more: a signal came, or the position to stop at was reached."""
        return self.session.ended or shutdown.stopping()

    def _full(self) -> bool:
        return not self.in_main_thread and self.bytes_in_epoch > _EPOCH_BYTES

    def _leave(self) -> list[ChangeSet]:
        """Everything is durable and acknowledged: end the stream, with the server's confirmation, and the run."""
        if not self.left:
            self.left = True
            self.session.close(graceful=True)
            acknowledged = self.session.acknowledged
            logger.info("slot %s: stopped, everything up to %s is published and acknowledged", self.slot, acknowledged)
        if self.session.ended:
            gate.drain()
            gate.source_finished(self.slot)
            raise StopIteration
        if not shutdown.left(self.slot):
            self._awake = datetime.now(UTC) + _IDLE
            return []
        gate.drain()
        # StopIteration would close all windows and keep them closed in the recovery store. An abort leaves the state of
        # the last epoch, which is complete. In a cluster only an interrupt reaches the other workers.
        raise _abort()

    def _behind(self) -> bool:
        with connect(self.dsn) as conn:
            return identify(conn).lsn > self.session.acknowledged


class _Interrupted(StatefulSourcePartition[ChangeSet, State]):
    """Ends the run in place of a partition that was still being built when a signal came."""

    def __init__(self, state: State | None) -> None:
        self.state = state

    def next_batch(self) -> list[ChangeSet]:
        raise _abort()

    def snapshot(self) -> State:
        return self.state  # type: ignore[return-value]


def _abort() -> BaseException:
    """The exception that ends a run quietly. In a cluster only an interrupt reaches the other workers."""
    return AbortExecution() if threading.current_thread() is threading.main_thread() else Drained()
