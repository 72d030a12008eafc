"""`TwoPhaseSink`: write five methods, and your destination is exactly-once.

There are two phases because an epoch can still be lost after its rows were written, and then they are delivered again.
At the end of an epoch its items are *staged*: durable at the destination, invisible to its readers. After the gate,
when the epoch is durable in the whole cluster, they are *published*. After a crash the next start finds one of these
cases:

    the epoch never became durable    its items will be delivered again: discard them
    durable, not yet published        its token is in the resume state: publish them
    published                         nothing is staged, and the destination knows the token as published
    token in the state, but neither   somebody removed the staged items: an error
    no resume state                   the source's state tells whether the items will be delivered again: see `gate`
"""

from __future__ import annotations

import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Final, Generic, TypeAlias, TypeVar

from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition

from pgoutput_source.dataflow.run import gate
from pgoutput_source.errors import SinkError, check_version

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
State: TypeAlias = dict[str, Any]

STATE_VERSION: Final = 1

_UNPROVEN: Final = "-unproven"  # suffix of tokens from a process without a gate
_NAMED: Final = re.compile(r"r[0-9a-f]+-\d+")  # the gate's name for an epoch


class TwoPhaseSink(FixedPartitionedSink[Item, State], ABC, Generic[Item]):
    """A base for exactly-once sinks: with recovery (``-r``) every item is published once, whatever crashes and when.

    Without recovery nothing that came from the source is lost, but a crash may publish items twice. There is no
    parallelism: one partition writes. Items wait in memory for the end of their epoch (``-s``).

    Each epoch has a *token*: a short text of letters, digits and dashes. It is never used twice, and sorts after the
    tokens of earlier epochs. Write five methods that store an epoch's items under its token:

    - `stage` makes the items durable where readers don't look;
    - `publish` makes them visible, all or none; called again, it does nothing;
    - `discard` removes them, also if they are only half staged;
    - `staged` lists the tokens that are staged but neither published nor discarded;
    - `published` tells whether a token was published, so that a start can prove that no staged items were lost.

    The methods are called one at a time but from different threads, and `publish` even after the flow has ended. So if
    a connection belongs to a thread, open one in each method. If a method raises, the flow stops, nothing is
    acknowledged, and the next start tries again. A destination belongs to one sink of one running flow.

    Example:
        Rows in SQLite, with a crash before the gate:

        >>> import contextlib, os, sqlite3, tempfile
        >>> class SqliteSink(TwoPhaseSink[tuple]):
        ...     def __init__(self, file):
        ...         self.file = file
        ...         with self.database() as db:
        ...             db.execute("CREATE TABLE IF NOT EXISTS staging (token, id, status)")
        ...             db.execute("CREATE TABLE IF NOT EXISTS orders (id, status)")
        ...             db.execute("CREATE TABLE IF NOT EXISTS published (token PRIMARY KEY)")
        ...
        ...     @contextlib.contextmanager
        ...     def database(self):
        ...         with contextlib.closing(sqlite3.connect(self.file)) as db, db:
        ...             yield db
        ...
        ...     def stage(self, token, items):
        ...         with self.database() as db:
        ...             db.executemany("INSERT INTO staging VALUES (?, ?, ?)", [(token, *item) for item in items])
        ...
        ...     def publish(self, token):
        ...         with self.database() as db:
        ...             db.execute("INSERT INTO orders SELECT id, status FROM staging WHERE token = ?", [token])
        ...             db.execute("DELETE FROM staging WHERE token = ?", [token])
        ...             db.execute("INSERT OR IGNORE INTO published VALUES (?)", [token])
        ...
        ...     def discard(self, token):
        ...         with self.database() as db:
        ...             db.execute("DELETE FROM staging WHERE token = ?", [token])
        ...
        ...     def staged(self):
        ...         with self.database() as db:
        ...             return [token for (token,) in db.execute("SELECT DISTINCT token FROM staging")]
        ...
        ...     def published(self, token):
        ...         with self.database() as db:
        ...             return bool(db.execute("SELECT 1 FROM published WHERE token = ?", [token]).fetchall())
        >>> sink = SqliteSink(os.path.join(tempfile.mkdtemp(), "orders.db"))
        >>> sink.stage("a-1", [(1, "new")])
        >>> sink.publish("a-1"); sink.publish("a-1")
        >>> sink.stage("a-2", [(2, "new")])
        >>> sink.discard("a-2")
        >>> with sink.database() as db:
        ...     db.execute("SELECT * FROM orders").fetchall(), sink.staged(), sink.published("a-1")
        ([(1, 'new')], [], True)
    """

    @abstractmethod
    def stage(self, token: str, items: list[Item]) -> None:
        """Make `items` durable under `token`, invisible to readers. They are in order, and there is at least one."""

    @abstractmethod
    def publish(self, token: str) -> None:
        """Make the items staged under `token` visible, all or none. A second call does nothing."""

    @abstractmethod
    def discard(self, token: str) -> None:
        """Remove the items staged under `token`. They will be delivered again."""

    @abstractmethod
    def staged(self) -> Iterable[str]:
        """The tokens that are staged, wholly or partly, and neither published nor discarded."""

    def published(self, token: str) -> bool | None:
        """Whether `token` was published. The destination must know at least the latest one.

        If a token of the resume state is neither staged nor published, its items were lost, and the flow does not
        start. Without this method, or when it returns None, such a loss goes unnoticed.
        """
        return None

    def waiting(self) -> Iterable[str]:
        """The tokens that are published as far as the flow is concerned, but that the destination does not have yet.

        The resume state lists them as well, so that a start can prove that none was lost.
        """
        return ()

    def receipt(self, token: str) -> Any:
        """What the resume state keeps of a token for `proven`: builtins, or None."""
        return None

    def proven(self, token: str, receipt: Any) -> bool | None:
        """As `published`, with what `receipt` gave when the resume state was written."""
        return self.published(token)

    def drain(self) -> None:
        """The flow stops: finish what `publish` only began."""

    def close(self) -> None:
        """The flow has stopped, or failed: let go of threads, locks and connections."""

    def first(self, token: str) -> tuple[str, tuple[int, int]] | None:
        """The slot and the position of the first change staged under `token`, if known.

        Only needed for what version 0.1.0 staged for a step that has no state.
        """
        return None

    def list_parts(self) -> list[str]:
        """One partition. Its name never changes: it is the key of the resume state."""
        self._built = False
        gate.expect(self, self._settle)
        return ["two-phase"]

    _built = False

    def _settle(self) -> None:
        """Publish what an earlier run left staged before PostgreSQL forgets it, although no item came in this run."""
        if not self._built:
            for token in sorted(self.staged()):
                # Another process, without a gate, staged an unproven token, and may own the sink again.
                if not token.endswith(_UNPROVEN) and _never_again(self, token, None):
                    logger.info("publishing %s, which an earlier run left staged", token)
                    self.publish(token)

    def part_fn(self, item_key: str) -> int:
        """Every key goes to the single partition."""
        return 0

    def build_part(self, step_id: str, for_part: str, resume_state: State | None) -> _TwoPhasePartition[Item]:
        """Publish or discard what an earlier run left staged.

        Raises:
            StateError: The resume state is of another version.
        """
        return _TwoPhasePartition(self, step_id, resume_state)


class _TwoPhasePartition(StatefulSinkPartition[Item, State]):
    """Knows which epochs are staged and not yet published. What the gate reads changes only under its lock."""

    def __init__(self, sink: TwoPhaseSink[Item], step_id: str, resume: State | None) -> None:
        if resume is not None:
            check_version(resume, STATE_VERSION, f"step {step_id!r}")
        self.sink = sink
        sink._built = True
        self.step_id = step_id
        # Each run has its own lineage. A later run may resume from the state of an epoch that never became durable, and
        # that state must not list a token that another epoch used again.
        before = 0 if resume is None else int(resume["lineage"], 16)
        self.lineage: str = f"{max(time.time_ns(), before + 1):016x}"
        self.next: int = 1
        self.items: list[Item] = []
        self.tokens: list[str] = []  # of the last snapshot
        self.listed: list[str] | None = None if resume is None else list(resume["tokens"])
        self.receipts: dict[str, Any] = {} if resume is None else dict(resume.get("receipts", {}))
        self.settled = self.started = self.ended = False
        with gate.lock:
            staged = set(self.sink.staged())
            for token in self.listed or ():
                if token in staged:
                    logger.info("publishing %s, which an earlier run left staged", token)
                    self.sink.publish(token)
            self._settle()
        gate.register(self)

    def _settle(self) -> None:
        """Prove that nothing in the state was lost, and publish or discard everything else that is staged.

        Mostly only the gate can decide that, once the sources are open.
        """
        if self.settled:
            return
        self.settled = gate.hosted() or self.started
        for token in self.listed or () if self.settled else ():
            self._prove(token)
        for token in sorted(self.sink.staged()):
            if not self.settled and not token.endswith(_UNPROVEN):
                continue
            if _never_again(self.sink, token, self.listed):
                logger.info("publishing %s, which an earlier run left staged", token)
                self.sink.publish(token)
            else:
                self.sink.discard(token)

    def _prove(self, token: str) -> None:
        published = self.sink.proven(token, self.receipts.get(token))
        # The state may be of an epoch that never became durable, whose items were delivered again.
        if published or (_NAMED.fullmatch(token) and gate.durable(token) is False):
            return
        if published is None:
            logger.warning("%s can't tell whether %s was published or lost: it has no published()", self.sink, token)
            return
        if token.endswith(_UNPROVEN):
            logger.warning(
                "%s has %s neither staged nor published: it was lost, or its epoch never became durable and its items "
                "were delivered again. Only a process with a source can tell",
                self.sink,
                token,
            )
            return
        raise SinkError(
            f"step {self.step_id!r}: {token} is in the resume state, but neither staged nor published in {self.sink}",
            hint="the staged items were removed, and will not be delivered again. Put them back; or start afresh with "
            "a new destination, recovery folder and slot. If the recovery folder was used with another destination, "
            "give this one a recovery folder of its own, and a slot",
        )

    # -- Bytewax calls these ------------------------------------------------------------------------------------

    def write_batch(self, values: list[Item]) -> None:
        self.items += values

    def snapshot(self) -> State:
        with gate.lock:
            # A snapshot proves that the one before is durable. If this process has a gate, it is published already.
            self.committed()
            if self.items:
                token = self._token()
                self.sink.stage(token, self.items)
                self.items = []
                self.tokens.append(token)
            gate.staged(self)
            tokens = [*self.sink.waiting(), *self.tokens]
            state = {"v": STATE_VERSION, "lineage": self.lineage, "tokens": tokens}
            receipts = {token: receipt for token in tokens if (receipt := self.sink.receipt(token)) is not None}
            return {**state, "receipts": receipts} if receipts else state

    def _token(self) -> str:
        if not gate.hosted():
            token = f"{self.lineage}-{self.next:08d}{_UNPROVEN}"
            self.next += 1
            return token
        run, _, number = gate.epoch().rpartition("-")
        # The gate stops counting once its source has ended.
        self.next = max(self.next, int(number))
        token = f"{run}-{self.next:08d}"
        self.next += 1
        return token

    def close(self) -> None:
        with gate.lock:
            if self.tokens and not self.items and gate.finishing():
                # The last epoch is not durable yet. It is published after the run returns.
                gate.ended(self)
                self.ended = True
            else:
                gate.unregister(self)
                self.sink.close()

    # -- the gate calls these -----------------------------------------------------------------------------------

    def committed(self) -> None:
        self.started = True
        self._settle()
        while self.tokens:
            self.sink.publish(self.tokens[0])
            del self.tokens[0]

    def drain(self) -> None:
        self.sink.drain()
        if self.ended:
            self.sink.close()


def _never_again(sink: TwoPhaseSink[Any], token: str, listed: list[str] | None) -> bool:
    """Whether items staged under a token that is not `listed` in the resume state will not be delivered again."""
    if token.endswith(_UNPROVEN):
        # Without a gate and a resume state, nobody knows whether the items were acknowledged to PostgreSQL.
        return listed is None
    if _NAMED.fullmatch(token):
        durable = gate.durable(token)
    else:
        slot, first = sink.first(token) or (None, None)
        durable = gate.durable(None, first, slot)
    if durable is not None:
        return durable
    if listed is not None:
        return False
    if not gate.hosted():
        return True
    raise SinkError(
        f"{sink} holds {token}, which an earlier run staged, for a step that has no resume state: nothing tells "
        "whether its items will be delivered again",
        hint="if the step or the flow was renamed, start it once under the old name. Otherwise decide what to do with "
        "the staged items, and remove them",
    )
