"""`TwoPhaseSink`: what an exactly-once destination of your own is made of, five methods.

Two phases, because an epoch whose rows were written may still be lost, and then they come again. At the end of an epoch
its items are *staged*: durable at the destination, invisible to its readers. After the gate, when the epoch is durable
in the whole cluster, they are *published*. A crash leads back to one of these:

    before the epoch is durable       its items come again: discarded
    durable, not yet published        its token is in the resume state: published
    published                         it is no longer staged, and the destination says that it was published
    in the state, and neither         somebody removed what was staged: an error
    no resume state                   the source's state says whether its items come again: see `gate`
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

_UNPROVEN: Final = "-unproven"  # ends a token of a process without a gate
_NAMED: Final = re.compile(r"r[0-9a-f]+-\d+")  # the gate's name of an epoch


class TwoPhaseSink(FixedPartitionedSink[Item, State], ABC, Generic[Item]):
    """A base for exactly-once sinks: with recovery (``-r``) every item is published once, whatever crashes when.

    Without recovery nothing that came from the source is lost, and items may be published twice after a crash. There is
    no parallelism: one partition writes. Items wait in memory for the end of their epoch (``-s``).

    An epoch has a *token*: a short text of letters, digits and dashes, never used twice, that sorts after those of
    earlier epochs. Write five methods that put its items away under the token, and find them again:

    - `stage` makes them durable, where readers don't look;
    - `publish` shows them, all or none; published once more, it does nothing;
    - `discard` removes them; so does `discard` of what is half staged;
    - `staged` lists the tokens that are staged and neither published nor discarded;
    - `published` says whether a token was published: then a start proves that nothing of the resume state was lost.

    The methods are called one at a time, but by different threads, and `publish` also after the flow has ended: a
    connection that belongs to a thread is opened in each of them. What they raise stops the flow, nothing is
    acknowledged, and the next start continues here. A destination belongs to one sink of one running flow.

    Example:
        Rows into SQLite, and their number after a crash that came before the gate:

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

    def published(self, token: str) -> bool | None:
        """Whether `token` was published: the latest at least must be known.

        A token of the resume state that is neither staged nor published was lost, and the flow does not start. Without
        this method, or where it returns None, such a loss can't be told from a token that was published.
        """
        return None

    def first(self, token: str) -> tuple[str, tuple[int, int]] | None:
        """The slot and the position of the first change that is staged under `token`, if they can be told.

        It is asked only of what version 0.1.0 staged for a step that has no state.
        """
        return None

    def list_parts(self) -> list[str]:
        """One, always of this name: it keys the resume state."""
        self._built = False
        gate.expect(self, self._settle)
        return ["two-phase"]

    _built = False

    def _settle(self) -> None:
        """Publish what an earlier run left staged, although no item has come in this one: before PostgreSQL forgets."""
        if not self._built:
            for token in sorted(self.staged()):
                # Without a gate it was another process, and may be again.
                if not token.endswith(_UNPROVEN) and _never_again(self, token, None):
                    logger.info("publishing %s, which an earlier run left staged", token)
                    self.publish(token)

    def part_fn(self, item_key: str) -> int:
        """Every key goes to the one partition."""
        return 0

    def build_part(self, step_id: str, for_part: str, resume_state: State | None) -> _TwoPhasePartition[Item]:
        """Settle what an earlier run left staged.

        Raises:
            StateError: The resume state is of another version.
        """
        return _TwoPhasePartition(self, step_id, resume_state)


class _TwoPhasePartition(StatefulSinkPartition[Item, State]):
    """Knows which epochs are staged and not yet published. What the gate looks at changes only under its lock."""

    def __init__(self, sink: TwoPhaseSink[Item], step_id: str, resume: State | None) -> None:
        if resume is not None:
            check_version(resume, STATE_VERSION, f"step {step_id!r}")
        self.sink = sink
        sink._built = True
        self.step_id = step_id
        # Each run has its own: the state of an epoch that never became durable may be given to a later run as the last
        # before its own, and must not list a token that was used again.
        before = 0 if resume is None else int(resume["lineage"], 16)
        self.lineage: str = f"{max(time.time_ns(), before + 1):016x}"
        self.next: int = 1
        self.items: list[Item] = []
        self.tokens: list[str] = []  # of the last snapshot
        self.listed: list[str] | None = None if resume is None else list(resume["tokens"])
        self.settled = self.started = False
        with gate.lock:
            staged = set(self.sink.staged())
            for token in self.listed or ():
                if token in staged:
                    logger.info("publishing %s, which an earlier run left staged", token)
                    self.sink.publish(token)
            self._settle()
        gate.register(self)

    def _settle(self) -> None:
        """Prove that nothing of the state was lost, and decide about all else that is staged.

        Most of it only the gate knows, once the sources are open.
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
        published = self.sink.published(token)
        # The state may be of an epoch that never became durable, whose items have come again.
        if published or (_NAMED.fullmatch(token) and gate.durable(token) is False):
            return
        if published is None:
            logger.warning("%s can't tell whether %s was published or lost: it has no published()", self.sink, token)
            return
        if token.endswith(_UNPROVEN):
            logger.warning(
                "%s has %s neither staged nor published: it was lost, or its epoch never became durable and its items "
                "have come again. Only a process with a source can tell",
                self.sink,
                token,
            )
            return
        raise SinkError(
            f"step {self.step_id!r}: {token} is in the resume state, and neither staged nor published in {self.sink}",
            hint="what was staged was removed, and its items do not come again. Put it back; or start afresh: a new "
            "destination, recovery folder and slot",
        )

    # -- Bytewax calls these ------------------------------------------------------------------------------------

    def write_batch(self, values: list[Item]) -> None:
        self.items += values

    def snapshot(self) -> State:
        with gate.lock:
            # A snapshot proves the one before. With a gate in this process that was published already.
            self.committed()
            if self.items:
                token = self._token()
                self.sink.stage(token, self.items)
                self.items = []
                self.tokens.append(token)
            gate.staged(self)
            return {"v": STATE_VERSION, "lineage": self.lineage, "tokens": list(self.tokens)}

    def _token(self) -> str:
        if not gate.hosted():
            token = f"{self.lineage}-{self.next:08d}{_UNPROVEN}"
            self.next += 1
            return token
        run, _, number = gate.epoch().rpartition("-")
        # Once its source has ended, the gate counts no further.
        self.next = max(self.next, int(number))
        token = f"{run}-{self.next:08d}"
        self.next += 1
        return token

    def close(self) -> None:
        with gate.lock:
            if self.tokens and not self.items and gate.finishing():
                # The last epoch is not durable yet: it is published when the run has returned.
                gate.ended(self)
            else:
                gate.unregister(self)

    # -- the gate calls these -----------------------------------------------------------------------------------

    def committed(self) -> None:
        self.started = True
        self._settle()
        while self.tokens:
            self.sink.publish(self.tokens[0])
            del self.tokens[0]

    def drain(self) -> None:
        """Nothing: what is committed is published already."""


def _never_again(sink: TwoPhaseSink[Any], token: str, listed: list[str] | None) -> bool:
    """Whether items that are staged, under a token that is not `listed` in the resume state, will not come again."""
    if token.endswith(_UNPROVEN):
        # Without a gate, and without a resume state, nobody knows whether PostgreSQL has been told to forget it.
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
        "whether its items come again",
        hint="if the step or the flow was renamed, start it once under the old name. Otherwise decide what is to be "
        "done with what is staged, and remove it",
    )
