"""`TableSink`: the tables of a publication into one store, whatever the store is.

What an epoch brings goes into a spool first, and is durable there. A thread of its own takes what is committed from the
spool and applies it to the destination: so a slow destination holds up neither the source nor the gate, and epochs that
have waited for a while become one commit.
"""

from __future__ import annotations

import pgoutput_source.dataflow.needs_bytewax  # noqa: F401

# isort: split
import json
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeAlias, get_args

import pyarrow as pa

from pgoutput_source.changes.batches import ChangeBatch, ChangeSet
from pgoutput_source.changes.schema import MetadataNames, TableName
from pgoutput_source.dataflow.run import gate
from pgoutput_source.destinations.base import Destination, Reached, Refused
from pgoutput_source.destinations.delivery import MOST_BYTES, Delivery, OnTableError, no_key
from pgoutput_source.destinations.parked import ParkedParts
from pgoutput_source.destinations.spool import COMMITTED, STAGED, Point, Portion, Spool
from pgoutput_source.destinations.targets import Target, Targets
from pgoutput_source.destinations.waiting import note
from pgoutput_source.errors import ConfigurationError, PgOutputError, ServerError, SinkError
from pgoutput_source.parquet.folder import FolderInUse
from pgoutput_source.postgres.refusals import passing
from pgoutput_source.sinks.base import State, TwoPhaseSink

logger = logging.getLogger(__name__)

Item: TypeAlias = ChangeSet | ChangeBatch

_PATIENCE: Final = 20.0  # seconds; the source must soon answer its server again
_NOTES: Final = 0.2  # seconds between two notes of how far the destination is
_FULL: Final = 1 << 30  # bytes in the spool from which on sources wait for the destination

Keys: TypeAlias = Mapping[str, str | Sequence[str]]


class TableSink(TwoPhaseSink[Item]):
    """All tables of a stream into one destination, exactly once with recovery (``-r``).

    It takes the `ChangeSet`s of a source, or batches of single tables, straight from the source: in position order. A
    table is created when its first change comes.

    Args:
        destination: The store.
        targets: Which tables are taken, and where each goes.
        spool: A folder beside the recovery folder, for this sink alone. Without it nothing can be resumed: losing it is
            found, and is an error.
        max_age: How long what is committed may wait, to be applied together with what comes.
        key: In mode "mirror", by table, the columns that identify a row, where that is not the replica identity.
        retry: How long to try again while the destination is away.
        on_table_error: What happens when the destination refuses a table: "stop" stops the flow; "park" keeps what
            comes of the table in the spool, goes on with the others, and tries the table again at each start.

    Raises:
        ConfigurationError: An option has no meaning.
    """

    def __init__(
        self,
        destination: Destination,
        targets: Targets,
        *,
        spool: str | Path,
        max_age: timedelta = timedelta(0),
        key: Keys | None = None,
        retry: timedelta = timedelta(minutes=5),
        on_table_error: OnTableError = "stop",
    ) -> None:
        if on_table_error not in get_args(OnTableError):
            raise ConfigurationError(
                f"on_table_error={on_table_error!r} has no meaning", hint="choose 'stop' or 'park'"
            )
        self.destination, self.targets = destination, targets
        self.folder = spool
        self.max_age, self.retry = max_age.total_seconds(), retry.total_seconds()
        self.on_table_error: OnTableError = on_table_error
        self.keys = {
            TableName.parse(table): (names,) if isinstance(names, str) else tuple(names)
            for table, names in (key or {}).items()
        }
        if self.keys and destination.mode != "mirror":
            raise ConfigurationError("key= is for mode 'mirror'", hint="leave it out: history keeps every change")
        self._spool: Spool | None = None
        self._parked: ParkedParts | None = None
        self._flusher: _Flusher | None = None
        self._receipts: dict[str, dict[str, int]] = {}
        self._points: dict[Target, Point] = {}
        self._numbers: dict[Target, int] = {}
        self._fresh: dict[Target, Point] = {}
        self._resumed = False

    def build_part(self, step_id: str, for_part: str, resume_state: State | None) -> Any:
        """Go on as the resume state says.

        Raises:
            StateError: The resume state is of another version.
            SinkError: An epoch of the resume state is neither in the spool nor at the destination.
        """
        self._resumed = resume_state is not None
        return super().build_part(step_id, for_part, resume_state)

    def _settle(self) -> None:
        try:
            super()._settle()
        except FolderInUse:
            if self._built:
                raise  # otherwise another process of the cluster has the part

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of the tables that it takes, as they were given."""
        return self.targets.patterns.tables

    # -- what a sink in two phases does -----------------------------------------------------------------------------

    def stage(self, token: str, items: list[Item]) -> None:
        """Write the parts of the epoch into the spool, with numbers."""
        spool, flusher = self._opened()
        flusher.check()
        versions = _by_version(items, self.targets)
        parts = [part for first, batches in versions if (part := self._part(first, batches)) is not None]
        continues = isinstance(items[-1], ChangeSet) and items[-1].continues
        spool.put(token, parts, continues=continues)
        there = {token, *spool.tokens(COMMITTED), *spool.tokens(STAGED)}
        self._receipts = {name: receipt for name, receipt in self._receipts.items() if name in there}
        self._receipts[token] = self._receipt([part for part, _ in parts])
        flusher.measure()

    def publish(self, token: str) -> None:
        """From now on the destination may have it."""
        spool, flusher = self._opened()
        spool.commit(token)
        flusher.wake()
        flusher.check()

    def discard(self, token: str) -> None:
        """Its items come again."""
        spool, _ = self._opened()
        spool.drop(token)

    def staged(self) -> Iterable[str]:
        """The epochs in the spool that are not committed."""
        return self._opened()[0].tokens(STAGED)

    def waiting(self) -> Iterable[str]:
        """The epochs that are committed and not applied."""
        return self._opened()[0].tokens(COMMITTED)

    def receipt(self, token: str) -> dict[str, int] | None:
        """By target, the number of the last part of the epoch."""
        return self._receipts.get(token)

    def proven(self, token: str, receipt: dict[str, int] | None) -> bool | None:
        """Whether the epoch waits in the spool, or each of its parts is parked or at the destination."""
        if token in self.waiting():
            return True
        if receipt is None:
            return None
        parked = self._parked_numbers()  # first: what leaves it meanwhile is at the destination
        for name, number in receipt.items():
            target = Target(*json.loads(name))
            if number in parked.get(target, ()):
                continue
            reached = self._reached(target)
            if reached is None or reached.number < number:
                return False
        return True

    def list_parts(self) -> list[str]:
        """One partition. Its name never changes: it is the key of the resume state."""
        parts = super().list_parts()
        gate.expect(self, self._settle, self._complete)
        return parts

    def _complete(self, origin: tuple[str, ...], lsn: int) -> None:
        if self._spool is not None and self._flusher is not None:
            self._flusher.complete = (origin, lsn, max(self._spool.tokens(COMMITTED), default=""))

    def drain(self) -> None:
        """Apply all that is committed, now."""
        if self._flusher is not None:
            self._flusher.drain()

    def close(self) -> None:
        """Stop; what is committed and not applied is applied by the next start."""
        if self._flusher is not None:
            self._flusher.stop()
        for folder in (self._parked, self._spool):
            if folder is not None:
                folder.close()
        self.destination.close()
        self._spool = self._parked = self._flusher = None

    # -- parts ------------------------------------------------------------------------------------------------------

    def _opened(self) -> tuple[Spool, _Flusher]:
        if self._spool is None or self._flusher is None:
            self._spool = Spool(self.folder)
            self._points, self._numbers, self._fresh = {}, {}, {}
            there = (*self._spool.tokens(COMMITTED), *self._spool.tokens(STAGED))
            self._receipts = {token: self._receipt(self._spool.parts(token)) for token in there}
            self._parked = ParkedParts(self._spool)
            self._flusher = _Flusher(self, self._parked)
            self._flusher.start()
        return self._spool, self._flusher

    def _parked_numbers(self) -> dict[Target, set[int]]:
        assert self._parked is not None
        found: dict[Target, set[int]] = {}
        for table in self._parked.tables():
            if (target := self.targets.of(table)) is not None:
                found.setdefault(target, set()).update(part.number for part in self._parked.parts(table))
        return found

    def _receipt(self, parts: Iterable[Portion]) -> dict[str, int]:
        found = [(self.targets.of(part.table), part.number) for part in parts]
        return {json.dumps(target): number for target, number in found if target is not None}

    def _part(self, first: ChangeBatch, batches: list[pa.RecordBatch]) -> tuple[Portion, list[pa.RecordBatch]] | None:
        schema = first.schema
        target = self.targets.of(schema.full_name)
        assert target is not None
        key = self._key(first)
        if target not in self._numbers:
            self._learn(target, batches[0])
        batches = self._new(target, schema.table, batches)
        if not batches:
            return None
        self._numbers[target] += 1
        begin, end = _points(batches[0])[0], _points(batches[-1])[1]
        rows = sum(len(batch) for batch in batches)
        identity = schema.replica_identity
        return Portion(self._numbers[target], schema.full_name, identity, key, begin, end, rows), batches

    def _key(self, batch: ChangeBatch) -> tuple[str, ...]:
        schema = batch.schema
        if self.destination.mode != "mirror":
            return ()
        key = self.keys.get(schema.full_name) or (() if schema.replica_identity == "f" else schema.key)
        names = [column.name for column in schema.columns]
        if key and set(names).issuperset(key):
            return key
        if self.on_table_error == "park":
            return ()  # the destination will refuse it
        target = self.targets.of(schema.full_name)
        assert target is not None
        raise no_key(self.destination, schema.full_name, target, key, names)

    def _learn(self, target: Target, batch: pa.RecordBatch) -> None:
        """How far the target is, with all that waits in the spool."""
        # In the order in which parts move, so that none is missed.
        spool, flusher = self._opened()
        assert self._parked is not None
        waiting = [part for part in spool.waiting() if self.targets.of(part.table) == target]
        for table in self._parked.tables():
            if self.targets.of(table) == target:
                waiting += self._parked.parts(table)
        try:
            reached = self._reached(target)
        except Refused:
            if self.on_table_error == "stop":
                raise
            reached = None
            flusher.delivery.doubt.add(target)  # so it is asked again, and parks the table
        self._check_origin(target, reached, batch)
        number, point = (0, (0, -1)) if reached is None else (reached.number, reached.point)
        for part in waiting:
            if part.number > number:
                number, point = part.number, part.last
        self._numbers[target], self._points[target] = number, point
        self._fresh[target] = point

    def _reached(self, target: Target) -> Reached | None:
        """How far the target is; asked again for a while if the destination is away."""
        deadline = time.monotonic() + min(_PATIENCE, self.retry)
        while True:
            try:
                return self.destination.reached(target)
            except ServerError as e:
                if not passing(e) or time.monotonic() > deadline:
                    raise
                logger.warning("%s: %s; asking again", self.destination, e.message)
            time.sleep(0.5)

    def _check_origin(self, target: Target, reached: Reached | None, batch: pa.RecordBatch) -> None:
        metadata = batch.schema.metadata or {}
        origin = tuple(metadata.get(name, b"").decode() for name in (b"pg.system", b"pg.database", b"pg.slot"))
        if reached is not None and reached.origin != origin:
            system, database, slot = reached.origin
            raise SinkError(
                f"{target} in {self.destination} holds changes of database {database!r}, slot {slot!r}, system "
                f"{system}; these are of database {origin[1]!r}, slot {origin[2]!r}, system {origin[0]}",
                hint="give each database and slot targets of its own, or drop the old table and its row in the "
                "destination's table of what is published",
            )

    def _new(self, target: Target, table: str, batches: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
        """The rows after the last one of the target.

        Without a resume state PostgreSQL sends again what was applied and not acknowledged. With one it never does.
        """
        out = []
        for batch in batches:
            begin, end = _points(batch)
            known = self._points[target]
            if begin <= known:
                if self._resumed or known > self._fresh[target]:
                    raise SinkError(
                        f"{target} in {self.destination} is ahead: it has changes up to {known}, and {begin} comes",
                        table=table,
                        hint="the changes must come straight from the source, in its order; or an old recovery folder "
                        "was restored: start afresh with a new destination, recovery folder and slot",
                    )
                names = MetadataNames.of(batch.schema)
                lsn, seq = (batch.column(name).to_numpy() for name in (names.commit_lsn, names.seq))
                fresh = (lsn > known[0]) | ((lsn == known[0]) & (seq.astype("i8") > known[1]))
                batch = batch.filter(pa.array(fresh))
                if not len(batch):
                    continue
            self._points[target] = end
            out.append(batch)
        return out


def _by_version(items: list[Item], targets: Targets) -> list[tuple[ChangeBatch, list[pa.RecordBatch]]]:
    """The batches of each version of a table that is taken, one after the other."""
    found: dict[TableName, list[tuple[ChangeBatch, list[pa.RecordBatch]]]] = {}
    for item in items:
        for batch in item.batches if isinstance(item, ChangeSet) else [item]:
            if not isinstance(batch, ChangeBatch):
                raise SinkError(
                    f"a sink of tables takes ChangeSet and ChangeBatch, not {type(batch).__name__}",
                    hint="pass it the stream of the source, or of cdc.table(…)",
                )
            if targets.of(batch.schema.full_name) is None:
                continue  # its values may be undecodable, which concerns only those who take it
            versions = found.setdefault(batch.schema.full_name, [])
            if versions and versions[-1][1][0].schema.equals(batch.data.schema, check_metadata=True):
                versions[-1][1].append(batch.data)
            else:
                versions.append((batch, [batch.data]))
    return [version for versions in found.values() for version in versions]


def _points(batch: pa.RecordBatch) -> tuple[Point, Point]:
    names = MetadataNames.of(batch.schema)
    lsn, seq = batch.column(names.commit_lsn), batch.column(names.seq)
    last = len(batch) - 1
    return (lsn[0].as_py(), seq[0].as_py()), (lsn[last].as_py(), seq[last].as_py())


class _Flusher(threading.Thread):
    """Applies what is committed, in order. What goes wrong is raised by the next `check`."""

    def __init__(self, sink: TableSink, parked: ParkedParts) -> None:
        super().__init__(name="pgoutput-destination", daemon=True)
        assert sink._spool is not None
        self.sink = sink
        self.delivery = Delivery(
            sink.destination,
            sink.targets,
            sink._spool,
            parked,
            keys=sink.keys,
            retry=sink.retry,
            on_table_error=sink.on_table_error,
            stopping=lambda: self.stopping,
        )
        self.changed = threading.Condition()
        self.stopping = self.draining = False
        self.begun = False  # what is parked was tried
        self.applying = False  # there is something that it may apply
        self.complete: tuple[tuple[str, ...], int, str] | None = None  # what is so once a token is applied
        self.noted = 0.0
        self.error: PgOutputError | None = None
        self.since = time.monotonic()

    # -- called by the sink -----------------------------------------------------------------------------------------

    def wake(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def measure(self) -> None:
        """Hold the sources if too much waits for a destination that can't keep up."""
        assert self.sink._spool is not None
        # What can't be applied yet, like the beginning of a mirror's large transaction, must not wait for its end.
        if self.applying and self.sink._spool.size() > _FULL:
            gate.hold(self.sink)
        else:
            gate.let_go(self.sink)

    def drain(self) -> None:
        with self.changed:
            self.draining = True
            self.changed.notify_all()
            while self.draining and self.error is None and self.is_alive():
                self.changed.wait(0.1)
        self.check()

    def stop(self) -> None:
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        if self is not threading.current_thread():
            self.join()

    # -- the thread -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            while not self.stopping:
                tokens = self._due()
                self.applying = bool(tokens)
                self.measure()
                if tokens or (not self.begun and not self._committed()):
                    self.begun = True
                    self.delivery.apply(tokens)
                    self._note()
                    continue
                self._note()
                with self.changed:
                    if self.draining and not self._due():
                        self.draining = False
                        self.changed.notify_all()
                    elif not self.stopping:
                        self.changed.wait(0.05 if self.complete is not None or self._committed() else 1.0)
        except PgOutputError as e:
            self.error = e
        except Exception as e:
            self.error = SinkError(f"{self.sink.destination}: {type(e).__name__}: {e}")
            self.error.__cause__ = e
        finally:
            gate.let_go(self.sink)
            self.wake()

    def _note(self) -> None:
        """Say how far the destination is, for those who wait."""
        complete = self.complete
        if complete is None or not (self.draining or time.monotonic() - self.noted > _NOTES):
            return
        origin, lsn, last = complete
        if any(token <= last for token in self._committed()):
            return
        assert self.sink._spool is not None
        try:
            self.sink.destination.complete(origin, lsn)
        except ServerError as e:
            if not passing(e):
                raise
            self.sink.destination.close()  # the next one comes
        note(self.sink._spool.folder, origin, lsn)
        self.noted = time.monotonic()
        if self.complete == complete:
            self.complete = None

    def _committed(self) -> list[str]:
        assert self.sink._spool is not None
        return self.sink._spool.tokens(COMMITTED)

    def _due(self) -> list[str]:
        spool = self.sink._spool
        assert spool is not None
        tokens = self._committed()
        if not tokens:
            return []
        age = time.time() - spool.age(tokens[0])
        if not (self.draining or age >= self.sink.max_age or spool.size() > MOST_BYTES):
            return []
        size, whole = 0, 0
        for count, token in enumerate(tokens, 1):
            size += sum(part.size for part in spool.parts(token))
            # A mirror shows no part of a transaction.
            if self.sink.destination.mode == "history" or not spool.continues(token):
                whole = count
                if size > MOST_BYTES:
                    break
        return tokens[:whole]
