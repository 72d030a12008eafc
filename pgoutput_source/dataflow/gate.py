"""The gate: the moment at which an epoch is known to be durable, and what this process does then.

After a ``snapshot()`` Bytewax calls the source's ``next_batch()``, or its next ``snapshot()``, only once that epoch is
durable in the whole cluster. The source then calls `Gate.opened`, *before* it acknowledges to PostgreSQL, and every
sink part of the process publishes what it staged in that epoch. If a publisher raises, the error reaches the source,
which fails without acknowledging. Sources and sinks live in different worker threads, so everything here runs under
`Gate.lock`.

    source                                       sink part
    ------                                       ---------
                                                 list_parts   expect(self, …), by the sink
    build_part   source_opened("orders")         build_part   register(self)
    next_batch   opened("orders"), acknowledge   snapshot     staged(self)
    StopIteration  source_finished("orders")     close        ended(self) or unregister(self)
    close        source_closed("orders")

**Several sources in one flow.** A gate proves all epochs that its source has closed, but a sink downstream of another
source may already have staged the next epoch. Each source counts its openings. The count is an epoch number, because
all sources start in the same epoch and take one snapshot in each. A publisher's files wait for an opening whose number
proves them. This needs all sources of the flow in one process, or all of them upstream of the sink.

**The end of a bounded run.** After a source's StopIteration, windows still emit, and sinks stage once more and close,
but no gate opens again. These last files are durable only after Bytewax has returned. Then `Gate.finish` publishes
them: `pgoutput_source.run` calls it, or else the interpreter does at exit. The next start publishes whatever is left.

**What an earlier run left staged.** A sink part's own resume state tells which of it is durable. A part without a
state, because its step is new or was renamed, must not conclude that the source has none: the source may be past these
items, and then nobody sends them again. So each epoch has a name, made of a run and a number, which sinks store with
what they stage. The state of each source lists how many epochs of each run were durable, and `Gate.durable` compares.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, TypeAlias

MAX_RUNS: Final = 100
"""How many runs a source's state remembers. `_CUT` among them means that there were more."""

_CUT: Final = ""


Complete: TypeAlias = Callable[[tuple[str, ...], int], None]
"""Told that everything of an origin that committed before a position is published."""


class Publisher(Protocol):
    """A sink part that stages in ``snapshot()`` and publishes after the gate. Both methods run under `Gate.lock`."""

    def committed(self) -> None:
        """Everything up to the last snapshot is durable: remember it, and publish what is due."""

    def drain(self) -> None:
        """Publish everything committed, due or not, because the flow stops."""


class Gate:
    """The gate of the dataflow in this process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held while the gate opens. A sink part holds it while it changes what `Publisher.committed` reads."""
        self.abandon()

    # -- sinks --------------------------------------------------------------------------------------------------

    def expect(self, sink: object, settle: Callable[[], None], complete: Complete | None = None) -> None:
        """Call `settle` once, when the gate first opens: `sink` is part of the dataflow that starts.

        `complete` is called after each opening of a source that knows what is complete; see `opened`.

        Without a resume state Bytewax builds a sink's part only when its first item comes. In `settle` a sink can deal
        with what an earlier run left, or fail, before any data comes.
        """
        with self.lock:
            self._expected[sink] = settle
            if complete is not None:
                self._followers[sink] = complete

    def register(self, publisher: Publisher) -> None:
        """A sink part begins. It is told of each opening from now on."""
        with self.lock:
            self._needs[publisher] = 0

    def unregister(self, publisher: Publisher) -> None:
        """A sink part is gone and has nothing left to publish in this run."""
        with self.lock:
            self._needs.pop(publisher, None)
            self._ended.pop(publisher, None)

    def staged(self, publisher: Publisher) -> None:
        """A sink part has staged its epoch. `Publisher.committed` is next called when an opening proves that epoch."""
        with self.lock:
            # The source upstream of this part has closed the epoch, but can't have opened the gate after it.
            self._needs[publisher] = self._highest + 1

    def ended(self, publisher: Publisher) -> None:
        """A sink part was closed at the end of its input and still has staged files: `finish` will publish them."""
        with self.lock:
            self._ended[publisher] = self._needs.pop(publisher, 0)

    def hold(self, sink: object) -> None:
        """A sink has as much waiting as it takes: until `let_go`, the sources of this process deliver nothing more.

        Epochs go on closing, so what waits can become durable and be published. Takes no lock: any thread may call it.
        """
        self._holding.add(sink)

    def let_go(self, sink: object) -> None:
        """A sink takes more again, or has ended. Takes no lock: any thread may call it."""
        self._holding.discard(sink)

    @property
    def held(self) -> bool:
        """Whether sources are to deliver nothing now."""
        return bool(self._holding)

    def epoch(self) -> str:
        """The name of the epoch that sink parts are closing: letters, digits and a dash. Names sort in order."""
        with self.lock:
            return f"{self._name}-{self._highest + 1:08d}"

    def durable(
        self, epoch: str | None, first: tuple[int, int] | None = None, source: str | None = None
    ) -> bool | None:
        """Whether an epoch that an earlier run staged is durable. Known once the sources of this process are open.

        Args:
            epoch: Its name; None if it has none, because version 0.1.0 staged it.
            first: The position of its first change, if known. An epoch without a name needs it.
            source: The source of its changes, if known. An epoch without a name needs it.

        Returns:
            True: no source will send its items again. False: its items will come again. None: unknown here.
        """
        with self.lock:
            if not self.hosted():
                return None
            states = [state for state in self._resumed.values() if state is not None]
            if not states:
                return False  # only the slot knows the position, and it moves only after publishing
            if epoch is None:
                state = self._resumed.get(source or "")
                if state is None or first is None:
                    return None
                return state["commit_lsn"] is not None and first <= (state["commit_lsn"], state["seq"])
            run, _, number = epoch.rpartition("-")
            known = [state.get("epochs", {}) for state in states]
            if any(int(number) <= runs.get(run, 0) for runs in known):
                return True
            return None if all(_CUT in runs and run not in runs for runs in known) else False

    def hosted(self) -> bool:
        """Whether this process has a source, and so a gate, in the current run."""
        with self.lock:
            return bool(self._openings or self._finished)

    def finishing(self) -> bool:
        """Whether a source has ended and none was aborted, so that a part that closes now has seen its last item."""
        with self.lock:
            return bool(self._finished) and not self._aborted

    # -- sources ------------------------------------------------------------------------------------------------

    def source_opened(self, source: str = "", state: Mapping[str, Any] | None = None) -> None:
        """A source of this process begins.

        Args:
            source: Its name, unique in the process: the slot's.
            state: Its resume state, with "commit_lsn" and "seq", the last position that will not come again, and
                "epochs", which `epochs` returned. None if only the slot knows what was acknowledged.
        """
        with self.lock:
            if not self._openings or source in self._openings:
                # A new run. Sink parts may have been built before this source, so those registered stay.
                self._openings.clear()
                self._finished.clear()
                self._aborted.clear()
                self._ended.clear()
                self._resumed.clear()
                self._highest = 0
                self._name = _run_name(0)
            self._openings[source] = 0
            self._resumed[source] = state
            newest = max((state or {}).get("epochs", {}), default=_CUT)
            if self._name <= newest:  # the clock was set back
                self._name = _run_name(int(newest[1:], 16))

    def epochs(self, source: str = "") -> dict[str, int]:
        """How many epochs of each run are durable once the current snapshot of `source` is."""
        with self.lock:
            runs = dict((self._resumed.get(source) or {}).get("epochs", {}))
            runs[self._name] = self._openings.get(source, 0) + 1
            kept = sorted(runs)[-MAX_RUNS:]
            return {**({} if len(kept) == len(runs) else {_CUT: 0}), **{run: runs[run] for run in kept}}

    def opened(self, source: str = "", complete: tuple[tuple[str, ...], int] | None = None) -> None:
        """The last snapshot of `source` is durable. Call this once per snapshot, before acknowledging.

        Args:
            source: Its name.
            complete: The origin of its changes (system, database, slot) and the position before which all that
                committed has been delivered; None while that is not so, as during a copy.

        Raises:
            SinkError: Files could not be published: don't acknowledge. Other errors of publishers pass through too.
        """
        with self.lock:
            while self._expected:
                self._expected.popitem()[1]()
            number = self._openings.get(source, 0) + 1
            self._openings[source] = number
            self._highest = max(self._highest, number)
            for publisher, needed in list(self._needs.items()):
                if needed <= number:
                    publisher.committed()
            for publisher, needed in list(self._ended.items()):
                if needed <= number:
                    publisher.committed()
                    publisher.drain()
                    del self._ended[publisher]
            if complete is not None:
                for follow in list(self._followers.values()):
                    follow(*complete)

    def drain(self) -> None:
        """Publish everything committed, due or not. A source that stops calls this after its last `opened`."""
        with self.lock:
            for publisher in list(self._needs):
                publisher.drain()

    def source_finished(self, source: str = "") -> None:
        """`source` has ended and is about to raise StopIteration."""
        with self.lock:
            self._finished.add(source)

    def source_closed(self, source: str = "") -> None:
        """`source` was closed. If it did not call `source_finished` before, the run was aborted."""
        with self.lock:
            if self._openings.pop(source, None) is not None and source not in self._finished:
                self._aborted.add(source)

    # -- the run's owner ----------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Publish what sink parts staged at the end of a bounded run, once Bytewax has returned normally."""
        with self.lock:
            try:
                if self.finishing() and not self._openings:
                    for publisher in list(self._ended):
                        publisher.committed()
                        publisher.drain()
            finally:
                self.abandon()

    def abandon(self) -> None:
        """Forget the current run. It publishes nothing more; the next start does."""
        with self.lock:
            self._openings: dict[str, int] = {}  # of each open source
            self._resumed: dict[str, Mapping[str, Any] | None] = {}  # the state of each source
            self._name = ""
            self._highest = 0
            self._finished: set[str] = set()
            self._aborted: set[str] = set()
            self._needs: dict[Publisher, int] = {}  # the number of the opening that proves its last snapshot
            self._ended: dict[Publisher, int] = {}  # the same, for parts that were closed at their end
            self._expected: dict[object, Callable[[], None]] = {}  # what to do at the first opening
            self._followers: dict[object, Complete] = {}
            self._holding: set[object] = set()


def _run_name(after: int) -> str:
    # The letter sorts after digits, so these names sort after those of runs that only had a number.
    return f"r{max(time.time_ns(), after + 1):016x}"
