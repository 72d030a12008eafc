"""The end of a run: signals that drain, the exit code, and errors printed without a traceback.

    SIGTERM, Ctrl-C       `stopping()` is true: sources deliver nothing more, and leave once everything is durable
    before it has begun   interrupts whatever the source waits for: nothing was delivered, nothing is lost
    the second time       does what the signal did before
    a drained run         exit code 0, although in a cluster only an error ends Bytewax's workers

A member of a cluster that reads no slot can't know when the others have drained. It keeps working until the process
that reads the slot is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from pgoutput_source.errors import PgOutputError
from pgoutput_source.status_line import StatusLine, status_line

logger = logging.getLogger(__name__)


class Drained(KeyboardInterrupt):
    """Ends a cluster's workers after a drain, or interrupts a start. Only an interrupt reaches all workers."""


class Shutdown:
    """The signals, and what the sources of this process do, by the names of their slots."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._previous: dict[int, Any] = {}
        self._previous_hook: Callable[..., Any] = sys.__excepthook__
        self._stop = threading.Event()
        self.reset()

    def reset(self) -> None:
        """Forget runs and signals."""
        self._stop.clear()
        self._building: set[int] = set()  # threads
        self._running: set[str] = set()
        self._left: set[str] = set()
        self._member = False  # whether it is a member of a cluster without a source
        self.drained = False
        """Whether a signal ended the run and it has completed everything."""

    # -- sources call these -------------------------------------------------------------------------------------

    def joined(self) -> None:
        """A worker of this process is about to start a dataflow, with a source in this process or in another."""
        if sys.excepthook != self._excepthook:
            self._previous_hook, sys.excepthook = sys.excepthook, self._excepthook
        # Without a cluster the main thread is the worker.
        if threading.current_thread() is not threading.main_thread() and not self._running and not self._building:
            self._member = True

    @contextlib.contextmanager
    def building(self, source: str) -> Iterator[None]:
        """Wrap the building of a source, which may wait for a server or a slot. After that it runs in this process.

        Raises:
            Drained: A signal came, now or before.
        """
        thread = threading.get_ident()
        with self._lock:
            self._member = self.drained = False
            self._building.add(thread)
        try:
            if self.stopping():
                raise Drained
            yield
            with self._lock:
                self._building.discard(thread)
                self._running.add(source)
        except Drained:
            self.drained = True
            raise
        finally:
            self._building.discard(thread)
            if not self._building and not self._running:
                self._stop.clear()

    def left(self, source: str) -> bool:
        """Note that everything of a source is durable and acknowledged. Returns whether that holds for all sources."""
        self._left.add(source)
        self.drained = self._running <= self._left
        return self.drained

    def closed(self, source: str) -> None:
        """Note that a source was closed, for whatever reason."""
        self._running.discard(source)
        self._left.discard(source)
        if not self._running:
            self._stop.clear()

    def stopping(self) -> bool:
        """Whether a signal has come."""
        return self._stop.is_set()

    # -- signals ------------------------------------------------------------------------------------------------

    def catch_signals(self) -> None:
        """Make SIGTERM and Ctrl-C drain while a dataflow runs. Otherwise, and the second time, they act as before.

        Only the main thread can install handlers, and with several workers all it does is construct the source.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(number)
            if handler != self._on_signal and handler is not None:
                self._previous[number] = handler
                signal.signal(number, self._on_signal)

    def release_signals(self) -> None:
        """Restore the previous signal handlers."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._previous.items():
                if signal.getsignal(number) == self._on_signal:
                    signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        with self._lock:
            first = not self._stop.is_set()
            if first and self._building:
                self._stop.set()
                logger.info("%s: stopped before anything was delivered", name)
                self._interrupt()
                return
        if first and (self._running or self._member):
            self._stop.set()
            if self._running:
                logger.info("%s: draining; what is staged will be published when the epoch closes", name)
            else:
                logger.info("%s: waiting until the process that reads the slot has drained; again to end at once", name)
            return
        if self._running or self._member:
            logger.info("%s again: ending at once; the next start continues where this run was durable", name)
        previous = self._previous.get(number, signal.SIG_DFL)
        if previous is signal.default_int_handler and by_bytewax():
            previous = signal.SIG_DFL  # nobody catches a KeyboardInterrupt there: it would only print two tracebacks
        if callable(previous):
            previous(number, frame)
        elif previous == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _interrupt(self) -> None:
        """Raise `Drained` in threads that are building sources. It interrupts every wait that is a loop in Python."""
        main = threading.main_thread().ident
        for thread in self._building - {main}:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Drained))
        if main in self._building:
            raise Drained

    # -- the exit code, and what a person sees ------------------------------------------------------------------

    def _excepthook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if self.drained or (self._member and self.stopping() and kind.__name__ == "PanicException"):
            # This is Bytewax's error for a successful drain, or because the other workers left. Nothing else can change
            # the exit code here, and exit handlers must still run.
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        if (terminal := status_line()) is not None:
            terminal.show("")
        cause = cause_of(error, PgOutputError)
        if cause is None or logger.isEnabledFor(logging.DEBUG) or self._previous_hook is not sys.__excepthook__:
            self._previous_hook(kind, error, trace)
        else:
            # The error says what to do, so thirty lines of traceback are left out.
            print(f"{type(cause).__name__}: {cause}", file=sys.stderr)


def by_bytewax() -> bool:
    """Whether ``python -m bytewax.run`` is the program."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name == "bytewax.run"


def cause_of(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """The first error of this kind in the chain of an error and its causes."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kind):
        cause = cause.__cause__ or cause.__context__
    return cause


def show_log() -> None:
    """Send log lines to standard error if logging is not configured. They are few, and each is meant to be read."""
    package = logging.getLogger("pgoutput_source")
    if not logging.getLogger().handlers and not package.handlers:
        handler = StatusLine() if StatusLine.possible() else logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        package.addHandler(handler)
        package.setLevel(logging.INFO)
