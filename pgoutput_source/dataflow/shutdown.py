"""How a run ends: signals that drain, the exit code, errors shown as themselves, and a watchdog for what never ends.

    SIGTERM, Ctrl-C    `stopping()` is true: sources give out nothing more, and leave once all is durable
    the second time    what the signal did before
    a drained run      exit code 0, whatever Bytewax makes of it: in a cluster its workers can be ended only by an error
    a stalled run      in a cluster whose member hangs, Bytewax waits for ever, and the slot keeps the server's WAL

A member of a cluster that reads no slot can't know when the others have drained. It goes on working until the one that
reads the slot has gone.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Final

from pgoutput_source import metrics
from pgoutput_source.errors import PgOutputError

logger = logging.getLogger(__name__)

STALLED: Final = 70
"""The exit code of a run that the watchdog ended: EX_SOFTWARE."""

_WARN_AFTER: Final = 60.0

_stop = threading.Event()
_running: set[object] = set()
_left: set[object] = set()
_member = False  # of a cluster, and no source has run in this process
_drained = False
_previous: dict[int, Any] = {}
_previous_hook: Callable[..., Any] = sys.__excepthook__


class Drained(KeyboardInterrupt):
    """Ends a cluster's workers after a drain: only an interrupt reaches all of them."""


# -- sources say what they do ---------------------------------------------------------------------------------------


def joined() -> None:
    """A worker of this process is about to start a dataflow, with a source in this process or in another."""
    global _member, _previous_hook
    if sys.excepthook is not _excepthook:
        _previous_hook, sys.excepthook = sys.excepthook, _excepthook
    # The main thread works by itself if there is no cluster.
    if threading.current_thread() is not threading.main_thread() and not _running:
        _member = True


def began(source: object) -> None:
    """A source runs in this process."""
    global _member, _drained
    _member = _drained = False
    _running.add(source)


def left(source: object) -> bool:
    """All of a source is durable and acknowledged; whether that is true of all sources of this process."""
    global _drained
    _left.add(source)
    _drained = _running <= _left
    return _drained


def closed(source: object) -> None:
    """A source was closed, for whatever reason."""
    _running.discard(source)
    _left.discard(source)
    if not _running:
        _stop.clear()


def stopping() -> bool:
    """Whether a signal has come."""
    return _stop.is_set()


# -- signals --------------------------------------------------------------------------------------------------------


def catch_signals() -> None:
    """SIGTERM and Ctrl-C drain while a dataflow runs; without one, and the second time, they do what they did.

    Handlers can only be installed by the main thread, which with several workers only ever constructs the source.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        handler = signal.getsignal(number)
        if handler is not _on_signal and handler is not None:
            _previous[number] = handler
            signal.signal(number, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if (_running or _member) and not _stop.is_set():
        _stop.set()
        name = signal.Signals(number).name
        if _running:
            logger.info("%s: draining; what is staged will be published when the epoch closes", name)
        else:
            logger.info("%s: waiting until the process that reads the slot has drained; once more ends this one", name)
        return
    previous = _previous.get(number, signal.SIG_DFL)
    if callable(previous):
        previous(number, frame)
    elif previous == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


# -- the exit code, and what a person sees --------------------------------------------------------------------------


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if _drained or (_member and _stop.is_set() and kind.__name__ == "PanicException"):
        # Bytewax's error for a drain that went well, or for the others that have left. There is no other way to
        # change the exit code here; what runs at an exit must run all the same.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, PgOutputError):
        cause = cause.__cause__ or cause.__context__
    if cause is None or logger.isEnabledFor(logging.DEBUG) or _previous_hook is not sys.__excepthook__:
        _previous_hook(kind, error, trace)
    else:
        # Not thirty lines of traceback: the error says what to do.
        print(f"{type(cause).__name__}: {cause}", file=sys.stderr)


def show_log() -> None:
    """Log lines go to standard error if nobody configured logging: they are few, and each is meant to be read."""
    package = logging.getLogger("pgoutput_source")
    if not logging.getLogger().handlers and not package.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        package.addHandler(handler)
        package.setLevel(logging.INFO)


# -- the watchdog ---------------------------------------------------------------------------------------------------


class Watchdog:
    """Sees that a source is not called any more while the server has more for it, and ends the process if told to.

    Bytewax calls a source many times a second, but not while an epoch does not become durable: because a step or a
    sink hangs, or another process of the cluster was stopped or cut off. Nothing then ever ends, and the slot keeps the
    server's WAL.

    Args:
        slot: The slot's name.
        behind: Whether the server has more than is acknowledged. It is asked only in a stall, from another thread.
        seconds: After so long the process ends, with exit code 70 and without any cleaning up, as in a crash: what is
            not durable comes again. None only warns.
    """

    def __init__(self, slot: str, behind: Callable[[], bool], seconds: float | None) -> None:
        self._slot = slot
        self._behind = behind
        self._seconds = seconds
        self._warn_after = _WARN_AFTER if seconds is None else min(_WARN_AFTER, seconds / 2)
        self._called = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"pgoutput-watchdog-{slot}", daemon=True)
        self._thread.start()

    def called(self) -> None:
        """The source was called."""
        self._called = time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        stalled = metrics.STALLED.labels(self._slot)
        warned = 0.0
        while not self._closed.wait(min(1.0, self._warn_after / 4)):
            called = self._called
            silent = time.monotonic() - called
            if silent < self._warn_after:
                stalled.set(0)
                continue
            stalled.set(silent)
            end = self._seconds is not None and silent >= self._seconds
            if warned == called and not end:
                continue
            try:
                if not self._behind():
                    continue
            except PgOutputError as e:
                # Without its server a run may wait as long as it likes.
                logger.warning("slot %s: no progress for %.0f s, and: %s", self._slot, silent, e.message)
                warned = called
                continue
            if self._called != called:
                continue
            warned = called
            text = "slot %s: no progress for %.0f s although the server has more: %s"
            why = "a step or a sink hangs, or another process of the cluster"
            if not end:
                logger.warning(text, self._slot, silent, why)
                continue
            logger.critical(text, self._slot, silent, f"{why}; this process ends, to free the slot")
            logging.shutdown()
            os._exit(STALLED)
