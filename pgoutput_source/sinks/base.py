"""`TwoPhaseSink`: what an exactly-once destination of your own is made of, four methods.

Two phases, because an epoch whose rows were written may still be lost, and then they come again. At the end of an epoch
its items are *staged*: durable at the destination, invisible to its readers. Behind the gate, when the epoch is durable
in the whole cluster, they are *published*. A crash leads back to one of these:

    before the epoch is durable       its token is not in the resume state: discarded, its items come again
    durable, not yet published        its token is in the resume state: published
    published                         it is staged no more: nothing is left to do
    no resume state                   PostgreSQL has not forgotten what was staged under the gate: discarded
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Final, Generic, TypeAlias, TypeVar

from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition

from pgoutput_source.dataflow.run import gate
from pgoutput_source.errors import check_version

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
State: TypeAlias = dict[str, Any]

STATE_VERSION: Final = 1

_UNPROVEN: Final = "-unproven"  # ends a token of a process without a gate


class TwoPhaseSink(FixedPartitionedSink[Item, State], ABC, Generic[Item]):
    """A base for exactly-once sinks: with recovery (``-r``) every item is published once, whatever crashes when.

    Without recovery nothing that came from the source is lost, and items may be published twice after a crash. There is
    no parallelism: one partition writes. Items wait in memory for the end of their epoch (``-s``).

    An epoch has a *token*: a short text of letters, digits and dashes, never used twice, that sorts behind those of
    earlier epochs. Write four methods that put its items away under the token, and find them again:

    - `stage` makes them durable, where readers don't look;
    - `publish` shows them, all or none; published once more, it does nothing;
    - `discard` removes them; so does `discard` of what is half staged;
    - `staged` lists the tokens that are staged and neither published nor discarded.

    The methods are called one at a time, but by different threads, and `publish` also after the flow has ended: a
    connection that belongs to a thread is opened anew in each. What they raise stops the flow, nothing is acknowledged,
    and the next start continues here. A destination belongs to one sink of one running flow.

    Example:
        Rows into SQLite, and their number after a crash that came before the gate:

        >>> import contextlib, os, sqlite3, tempfile
        >>> class SqliteSink(TwoPhaseSink[tuple]):
        ...     def __init__(self, file):
        ...         self.file = file
        ...         with self.database() as db:
        ...             db.execute("CREATE TABLE IF NOT EXISTS staging (token, id, status)")
        ...             db.execute("CREATE TABLE IF NOT EXISTS orders (id, status)")
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
        ...
        ...     def discard(self, token):
        ...         with self.database() as db:
        ...             db.execute("DELETE FROM staging WHERE token = ?", [token])
        ...
        ...     def staged(self):
        ...         with self.database() as db:
        ...             return [token for (token,) in db.execute("SELECT DISTINCT token FROM staging")]
        >>> sink = SqliteSink(os.path.join(tempfile.mkdtemp(), "orders.db"))
        >>> sink.stage("a-1", [(1, "new")])
        >>> sink.publish("a-1"); sink.publish("a-1")
        >>> sink.stage("a-2", [(2, "new")])
        >>> sink.discard("a-2")
        >>> with sink.database() as db:
        ...     db.execute("SELECT * FROM orders").fetchall(), sink.staged()
        ([(1, 'new')], [])
    """

    @abstractmethod
    def stage(self, token: str, items: list[Item]) -> None:
        """Make `items`, which are in order and at least one, durable under `token`, invisible to readers."""

    @abstractmethod
    def publish(self, token: str) -> None:
        """Show what was staged under `token`, all or none; a second time does nothing."""

    @abstractmethod
    def discard(self, token: str) -> None:
        """Remove what was staged under `token`: its items come again."""

    @abstractmethod
    def staged(self) -> Iterable[str]:
        """The tokens of all that is staged, whole or in part, and neither published nor discarded."""

    def list_parts(self) -> list[str]:
        """One, always of this name: it keys the resume state."""
        return ["two-phase"]

    def part_fn(self, item_key: str) -> int:
        """Every key goes to the one partition."""
        return 0

    def build_part(self, step_id: str, for_part: str, resume_state: State | None) -> _Partition[Item]:
        """Settle what an earlier run left staged.

        Raises:
            StateError: The resume state is of another version.
        """
        return _Partition(self, step_id, resume_state)


class _Partition(StatefulSinkPartition[Item, State]):
    """Knows which epochs are staged and not yet published. What the gate looks at changes only under its lock."""

    def __init__(self, sink: TwoPhaseSink[Item], step_id: str, resume: State | None) -> None:
        if resume is not None:
            check_version(resume, STATE_VERSION, f"step {step_id!r}")
        self.sink = sink
        # Of each run another: the state of an epoch that never became durable may be given to a later run as the last
        # before its own, and must not list a token that was used again.
        before = 0 if resume is None else int(resume["lineage"], 16)
        self.lineage: str = f"{max(time.time_ns(), before + 1):016x}"
        self.next: int = 1
        self.items: list[Item] = []
        self.tokens: list[str] = []  # of the last snapshot
        self._settle(None if resume is None else set(resume["tokens"]))
        gate.register(self)

    def _settle(self, durable: set[str] | None) -> None:
        """Publish what may have been acknowledged, and discard what comes again."""
        for token in sorted(self.sink.staged()):
            # Without a gate, and without a resume state, nobody knows whether PostgreSQL has been told to forget it.
            if token.endswith(_UNPROVEN) if durable is None else token in durable:
                logger.info("publishing %s, which an earlier run left staged", token)
                self.sink.publish(token)
            else:
                self.sink.discard(token)

    # -- Bytewax calls these ------------------------------------------------------------------------------------

    def write_batch(self, values: list[Item]) -> None:
        self.items += values

    def snapshot(self) -> State:
        with gate.lock:
            # A snapshot proves the one before. With a gate in this process that was published already.
            self.committed()
            if self.items:
                token = f"{self.lineage}-{self.next:08d}{'' if gate.hosted() else _UNPROVEN}"
                self.next += 1
                self.sink.stage(token, self.items)
                self.items = []
                self.tokens.append(token)
            gate.staged(self)
            return {"v": STATE_VERSION, "lineage": self.lineage, "tokens": list(self.tokens)}

    def close(self) -> None:
        with gate.lock:
            if self.tokens and not self.items and gate.finishing():
                # The last epoch is not durable yet: it is published when the run has returned.
                gate.ended(self)
            else:
                gate.unregister(self)

    # -- the gate calls these -----------------------------------------------------------------------------------

    def committed(self) -> None:
        while self.tokens:
            self.sink.publish(self.tokens[0])
            del self.tokens[0]

    def drain(self) -> None:
        """Nothing: what is committed is published already."""
