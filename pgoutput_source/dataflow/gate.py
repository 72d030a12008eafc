"""The gate: the moment at which an epoch is known durable, and what hangs on it, within this process.

Bytewax calls a source's ``next_batch()``, or its next ``snapshot()``, after a ``snapshot()`` only when that epoch is
durable in the whole cluster. At this moment the source calls `opened`, *before* it acknowledges to PostgreSQL, and
every sink part of the process publishes what it staged in that epoch. What a publisher raises goes to the source, which
fails without acknowledging. Sources and sinks live in different worker threads: everything here runs under `lock`.

    source                                       sink part
    ------                                       ---------
                                                 list_parts   expect(self, …), by the sink
    build_part   source_opened("orders")         build_part   register(self)
    next_batch   opened("orders"), acknowledge   snapshot     staged(self)
    StopIteration  source_finished("orders")     close        ended(self) or unregister(self)
    close        source_closed("orders")

**Several sources in one flow.** A gate proves all epochs that its source has closed, yet a sink behind another source
may already have staged the epoch after. Every source counts its openings, which is an epoch number, because all of them
start in the same epoch and take one snapshot in each; a publisher's files wait for an opening with a number that proves
them. This needs the flow's sources in one process, or all of them upstream of the sink.

**The end of a bounded run.** After a source's StopIteration windows still emit, sinks stage once more and close, and no
gate opens any more. These last files are durable only when ``run_main`` has returned; `finish` publishes them then, by
itself at the interpreter's exit. It does nothing after an exception that ended the program or a source; a program that
catches the exception of ``run_main`` and goes on calls `abandon`. What is not published here is published by the next
start, from its resume state or because the files say that they may be.
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

lock = threading.RLock()
"""Held while the gate opens. A sink part holds it while it changes what `Publisher.committed` looks at."""


class Publisher(Protocol):
    """A sink part that stages in ``snapshot()`` and publishes behind the gate. Both methods run under `lock`."""

    def committed(self) -> None:
        """Everything up to the last snapshot is durable: remember it, and publish what is due."""

    def drain(self) -> None:
        """Publish everything committed, due or not, because the flow stops."""


@dataclass
class _Run:
    """What is known of the current run of a dataflow in this process."""

    openings: dict[str, int] = field(default_factory=dict)  # of each source that is open
    highest: int = 0
    finished: set[str] = field(default_factory=set)
    aborted: set[str] = field(default_factory=set)
    needs: dict[Publisher, int] = field(default_factory=dict)  # the number of the opening that proves its last snapshot
    ended: dict[Publisher, int] = field(default_factory=dict)  # the same, for parts that were closed at their end
    expected: dict[object, Callable[[], None]] = field(default_factory=dict)  # what to do at the first opening


_run = _Run()


def expect(sink: object, settle: Callable[[], None]) -> None:
    """`sink` is part of the dataflow that starts: `settle` is called once, when the gate first opens.

    Bytewax builds a sink's part without a resume state only when its first item comes. A sink that must look after
    what an earlier run left, or wants to fail before any data comes, does it then.
    """
    with lock:
        _run.expected[sink] = settle


def register(publisher: Publisher) -> None:
    """A sink part begins: it hears of each opening from now on."""
    with lock:
        _run.needs[publisher] = 0


def unregister(publisher: Publisher) -> None:
    """A sink part is gone, and has nothing left to publish in this run."""
    with lock:
        _run.needs.pop(publisher, None)
        _run.ended.pop(publisher, None)


def staged(publisher: Publisher) -> None:
    """A sink part has staged its epoch: `Publisher.committed` is next called when an opening proves this epoch."""
    with lock:
        # Whoever sends to this part has closed the epoch but can't have opened the gate behind it.
        _run.needs[publisher] = _run.highest + 1


def ended(publisher: Publisher) -> None:
    """A sink part was closed at the end of its input and still has staged files: `finish` will publish them."""
    with lock:
        _run.ended[publisher] = _run.needs.pop(publisher, 0)


def source_opened(source: str = "") -> None:
    """A source of this process begins; `source` is its name, unique in the process: the slot's."""
    with lock:
        if not _run.openings or source in _run.openings:
            # A new run. Sink parts may have been built before this source, so those registered stay.
            _run.openings.clear()
            _run.finished.clear()
            _run.aborted.clear()
            _run.ended.clear()
            _run.highest = 0
        _run.openings[source] = 0


def opened(source: str = "") -> None:
    """The last snapshot of `source` is durable. Call it once for each, before acknowledging.

    Raises:
        SinkError: Files could not be published: don't acknowledge. Whatever else a publisher raises comes through, too.
    """
    with lock:
        while _run.expected:
            _run.expected.popitem()[1]()
        number = _run.openings.get(source, 0) + 1
        _run.openings[source] = number
        _run.highest = max(_run.highest, number)
        for publisher, needed in list(_run.needs.items()):
            if needed <= number:
                publisher.committed()
        for publisher, needed in list(_run.ended.items()):
            if needed <= number:
                publisher.committed()
                publisher.drain()
                del _run.ended[publisher]


def drain() -> None:
    """Publish everything that was committed, due or not. A source that stops calls it after its last `opened`."""
    with lock:
        for publisher in list(_run.needs):
            publisher.drain()


def source_finished(source: str = "") -> None:
    """`source` has come to its end and is about to raise StopIteration."""
    with lock:
        _run.finished.add(source)


def source_closed(source: str = "") -> None:
    """`source` was closed: regularly if it calls `source_finished` as well, otherwise because the run was aborted."""
    with lock:
        if _run.openings.pop(source, None) is not None and source not in _run.finished:
            _run.aborted.add(source)


def hosted() -> bool:
    """Whether this process has a source, and so a gate, in the current run."""
    with lock:
        return bool(_run.openings or _run.finished)


def finishing() -> bool:
    """Whether a source has come to its end and none was aborted: a sink part that is closed now saw its last item."""
    with lock:
        return bool(_run.finished) and not _run.aborted


def finish() -> None:
    """Publish what sink parts staged at the end of a bounded run. Call it only after ``run_main`` returned normally.

    Runs at the interpreter's exit, too. Tests and notebooks that start flows in their own process call it themselves.
    """
    with lock:
        try:
            if finishing() and not _run.openings:
                for publisher in list(_run.ended):
                    publisher.committed()
                    publisher.drain()
        finally:
            abandon()


def abandon() -> None:
    """Forget the current run: nothing more is published in it, the next start does."""
    global _run
    with lock:
        _run = _Run()


def _at_exit() -> None:
    # The interpreter keeps the exception that ended the program, KeyboardInterrupt included, in sys.last_value.
    # sys.exit() leaves no trace there, and is how a program ends that went well as much as one that did not.
    if getattr(sys, "last_value", None) is None:
        finish()


atexit.register(_at_exit)
