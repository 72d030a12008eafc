"""From the spool to the destination: parts become jobs, in order and once, and what a table can't take is parked.

One thread does this, and each of its failures has a way:

    the destination is away     the same jobs are tried again
    it refuses one table        with on_table_error="park" the others are applied without it, and its parts are moved to
                                `ParkedParts`, with all that come after
    the next start              tries what is parked, table by table, before anything else
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, Literal, TypeAlias

import pyarrow as pa

from pgoutput_source import metrics
from pgoutput_source.changes.schema import TableName
from pgoutput_source.destinations.base import Destination, Job, Refused
from pgoutput_source.destinations.parked import ParkedParts
from pgoutput_source.destinations.relations import Relations
from pgoutput_source.destinations.spool import Portion, Spool
from pgoutput_source.destinations.targets import Target, Targets
from pgoutput_source.errors import ServerError, SinkError
from pgoutput_source.postgres.refusals import passing

logger = logging.getLogger(__name__)

MOST_BYTES: Final = 128 << 20
"""Of parts that become jobs at once."""

_PAUSE: Final = 5.0  # seconds, the longest between two attempts

OnTableError: TypeAlias = Literal["stop", "park"]
Part: TypeAlias = tuple[Portion, pa.Table]


class Delivery:
    """Applies epochs of a spool. One thread calls it.

    Args:
        destination: The store.
        targets: Which tables are taken, and where each goes.
        spool: What waits.
        parked: What was refused.
        keys: By table, the columns that identify a row.
        retry: Seconds for which a destination that is away is tried again.
        on_table_error: What happens when the destination refuses a table.
        stopping: Whether there is no time to try again.
    """

    def __init__(
        self,
        destination: Destination,
        targets: Targets,
        spool: Spool,
        parked: ParkedParts,
        *,
        keys: Mapping[TableName, tuple[str, ...]],
        retry: float,
        on_table_error: OnTableError,
        stopping: Callable[[], bool],
    ) -> None:
        self.destination, self.targets, self.spool, self.parked = destination, targets, spool, parked
        self.keys, self.retry, self.on_table_error, self.stopping = keys, retry, on_table_error, stopping
        self.refused: set[Target] = set()  # what comes of these is parked
        self.doubt: set[Target] = set()  # these may not be ours
        self._tried = False
        mirror = destination.mode == "mirror" and not destination.follows_renames
        self._relations = Relations(spool.folder) if mirror else None
        for part in spool.waiting():
            if (target := targets.of(part.table)) is not None:
                self.doubt.add(target)

    def apply(self, tokens: Sequence[str]) -> None:
        """Apply these epochs, which end with a transaction, and take them from the spool.

        The first call tries what is parked, with what the epochs have of it. It may come without epochs.

        Raises:
            SinkError: They can't be applied; nothing is lost, and the next start goes on with it.
        """
        if not self._tried:
            self._try_parked(tokens)
            self._tried = True
        while tokens:
            heads = [part for token in tokens for part in self.spool.parts(token)]
            try:
                self._apply([p for p in heads if self._goes(p)], lambda: self._spooled(tokens, self._goes))
                break
            except Refused as e:
                self._refuse(e)
        if self.refused:
            self._park(tokens)
        if self._relations is not None:
            self._relations.save()
        for token in tokens:
            self.spool.drop(token)
        logger.debug("%s: %d epochs applied", self.destination, len(tokens))

    def _spooled(self, tokens: Sequence[str], wanted: Callable[[Portion], bool]) -> Iterator[Part]:
        for token in tokens:
            yield from self.spool.read(token, wanted)

    def _goes(self, part: Portion) -> bool:
        return self._target(part) not in self.refused

    def _target(self, part: Portion) -> Target:
        target = self.targets.of(part.table)
        if target is None:
            raise SinkError(
                f"the spool {self.spool.folder} holds changes of {part.table}, which is not taken any more",
                hint="take the table once more, until what is spooled of it is applied",
            )
        return target

    def _apply(self, heads: Iterable[Portion], parts: Callable[[], Iterable[Part]]) -> None:
        """Apply parts, and try again while the destination is away."""
        begun, pause = time.monotonic(), 0.1
        targets = {self._target(part) for part in heads}
        while True:
            try:
                for target in targets & self.doubt:
                    self.destination.reached(target)
                    self.doubt.discard(target)
                self.destination.apply(self._jobs(parts()))
                return
            except ServerError as e:
                if not passing(e) or time.monotonic() - begun > self.retry or self.stopping():
                    raise
                logger.warning("%s: %s; trying again", self.destination, e.message)
                self.destination.close()
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE)

    # -- parts become jobs ------------------------------------------------------------------------------------------

    def _jobs(self, parts: Iterable[Part]) -> Iterator[Job]:
        """What these parts are for the destination. No more than some are in memory."""
        last: dict[Target, int] = {}
        some: list[Part] = []
        size = 0
        for part, changes in parts:
            target = self._target(part)
            if part.number <= last.get(target, 0):
                continue  # it is parked, and in the spool still
            last[target] = part.number
            some.append((replace(part, key=self._key(part, target, changes.schema)), changes))
            size += part.size
            if size > MOST_BYTES:
                yield from self._grouped(some)
                some, size = [], 0
        yield from self._grouped(some)

    def _grouped(self, parts: Iterable[Part]) -> list[Job]:
        """A job for each version, in order, so that what a table was before it was renamed comes first."""
        found: dict[Target, list[list[Part]]] = {}
        for part, changes in parts:
            groups = found.setdefault(self._target(part), [])
            last = groups[-1][-1] if groups else None
            if last is not None and last[0].key == part.key and last[1].schema.equals(changes.schema, True):
                groups[-1].append((part, changes))
            else:
                groups.append([(part, changes)])
        inorder = sorted(
            ((group[0][0].first, target, group) for target, versions in found.items() for group in versions),
            key=lambda version: version[0],
        )
        jobs = [Job.of(target, group) for _, target, group in inorder]
        if self._relations is not None:
            for job in jobs:
                self._relations.check(job)
        return jobs

    def _key(self, part: Portion, target: Target, schema: pa.Schema) -> tuple[str, ...]:
        if self.destination.mode != "mirror":
            return ()
        key = self.keys.get(part.table) or part.key
        if not key or not set(schema.names).issuperset(key):
            raise no_key(self.destination, part.table, target, key, schema.names)
        return key

    # -- tables that the destination refuses ------------------------------------------------------------------------

    def _refuse(self, error: Refused) -> None:
        if self.on_table_error == "stop" or error.target in self.refused:
            raise error
        self.refused.add(error.target)
        logger.warning(
            "%s: table %s is parked: its changes wait in %s, and the other tables go on. Mend the cause and start "
            "again: each start tries them first. %s",
            self.destination,
            error.target,
            self.parked.folder,
            str(error).replace("\n", "; "),
        )

    def _park(self, tokens: Sequence[str]) -> None:
        tables = set()
        for part, changes in self._spooled(tokens, lambda part: not self._goes(part)):
            self.parked.put(part, changes)
            tables.add(part.table)
        for table in tables:
            self._measure(table)

    def _measure(self, table: TableName) -> None:
        _, changes = next(self.parked.read(table))
        slot = (changes.schema.metadata or {}).get(b"pg.slot", b"").decode()
        metrics.PARKED_BEFORE.labels(slot, str(table)).set(self.parked.rows(table))

    def _try_parked(self, tokens: Sequence[str]) -> None:
        for table in self.parked.tables():
            self._measure(table)
            target = self.targets.of(table)
            if target is None:
                logger.warning(
                    "%s is not taken any more, and parked changes of it stay in %s", table, self.parked.folder
                )
                continue
            self.doubt.add(target)
            try:
                self._apply(self.parked.parts(table), functools.partial(self._parked_and, tokens, table))
            except Refused as e:
                self._refuse(e)
                continue
            if self._relations is not None:
                self._relations.save()
            rows = self.parked.rows(table)
            self.parked.drop(table)
            logger.info("%s: %d parked changes of table %s are applied", self.destination, rows, table)

    def _parked_and(self, tokens: Sequence[str], table: TableName) -> Iterator[Part]:
        """All parts of a table: those that are parked, and then those in the spool."""
        yield from self.parked.read(table)
        yield from self._spooled(tokens, lambda part: part.table == table)


def no_key(
    destination: Destination, table: TableName, target: Target, key: Sequence[str], names: Iterable[str]
) -> Refused:
    """The error for a table whose rows a mirror can't tell apart."""
    missing = f"has no column {next(n for n in key if n not in set(names))!r}" if key else "sends no key"
    return Refused.at(
        target,
        f"{destination}: table {table} {missing}, and a mirror needs one",
        table=table,
        hint=f"ALTER TABLE {table} REPLICA IDENTITY DEFAULT (with a primary key) or USING INDEX …; or name the columns "
        f"that identify a row: key={{{str(table)!r}: 'id'}}; or exclude={[str(table)]}",
    )
