"""The owner of a run: what this process knows about the dataflow that it runs, and `run`, which runs one.

Bytewax builds sources and sinks in worker threads without telling them about each other. They meet here: a process runs
one dataflow at a time, so there is one `gate` and one `shutdown`.
"""

from __future__ import annotations

import pgoutput_source.dataflow.needs_bytewax  # noqa: F401

# isort: split
import argparse
import atexit
import logging
import os
import sys
import threading
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from bytewax.dataflow import Dataflow
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.testing import cluster_main, run_main

from pgoutput_source.dataflow.gate import Gate
from pgoutput_source.dataflow.recovery import drop_void, parts, steps
from pgoutput_source.dataflow.shutdown import Shutdown, by_bytewax, cause_of
from pgoutput_source.errors import ConfigurationError, PgOutputError

logger = logging.getLogger(__name__)


def recovery_folder() -> Path | None:
    """The recovery folder that ``python -m bytewax.run`` got; None without one, or in another program."""
    if not by_bytewax():
        return None
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-r", "--recovery-directory", default=os.environ.get("BYTEWAX_RECOVERY_DIRECTORY"))
    folder = parser.parse_known_args(sys.argv[1:])[0].recovery_directory
    return None if folder is None else Path(folder)


class Run:
    """The dataflow that this process runs, if any."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.shutdown = Shutdown()
        self._store_opened = False
        atexit.register(self._at_exit)
        os.register_at_fork(after_in_child=self._forked)

    def open_store(self) -> None:
        """Drop the void states of the store that ``python -m bytewax.run`` got, once in this process."""
        if self._store_opened or not by_bytewax():
            return
        self._store_opened = True
        if (folder := recovery_folder()) is not None:
            drop_void(folder)

    def abandon(self) -> None:
        """Forget the dataflow. Nothing more is published here; the next start does."""
        self.gate.abandon()
        self.shutdown.reset()

    def _at_exit(self) -> None:
        # sys.last_value is the exception that ended the program, KeyboardInterrupt included. sys.exit() leaves no trace
        # there, and a program may call it after success as well as after failure.
        if getattr(sys, "last_value", None) is None:
            self.gate.finish()

    def _forked(self) -> None:
        # The child has none of the run's threads, which may have held the locks, and the run does not belong to it.
        self.gate.__init__()  # type: ignore[misc]
        self.shutdown.reset()


_run: Final = Run()
gate: Final = _run.gate
shutdown: Final = _run.shutdown
open_store: Final = _run.open_store


def run(
    flow: Dataflow,
    *,
    recovery: str | Path | None = None,
    epoch: timedelta = timedelta(seconds=10),
    backup: timedelta = timedelta(0),
    workers: int = 1,
) -> None:
    """Run a dataflow in this process until it ends or a signal stops it, as ``python -m bytewax.run`` does.

    When it returns, everything that its `PgOutputSource` delivered is published. If the main thread calls it, SIGTERM
    and Ctrl-C drain: what was read is published and acknowledged, and `run` returns normally. After an exception
    another run can follow, which continues where this one was durable.

    Args:
        flow: The dataflow.
        recovery: The folder of the recovery store. It is created if it does not exist or is empty. Without one no state
            is kept, and a run starts from the slot.
        epoch: The time after which an epoch closes; zero closes one with each batch of the source.
        backup: How long to keep states that are no longer needed, for backups of the recovery store.
        workers: How many worker threads.

    Raises:
        PgOutputError: What a source, a step or a sink of this package raised.
        ConfigurationError: An argument is invalid, or another dataflow runs in this process.
        BytewaxRuntimeError: Any other error that ended the run, as its cause.

    Example:
        >>> import bytewax.operators as op
        >>> from bytewax.testing import TestingSource
        >>> from pgoutput_source import JsonLinesSink
        >>> flow = Dataflow("greetings")
        >>> op.output("out", op.input("in", flow, TestingSource([("key", {"hello": "world"})])), JsonLinesSink())
        >>> run(flow)
        {"hello": "world"}
    """
    if workers < 1:
        raise ConfigurationError(f"workers is {workers}", hint="use at least one thread")
    if epoch < timedelta(0) or backup < timedelta(0):
        raise ConfigurationError("epoch and backup must be times that are not negative")
    if not _running.acquire(blocking=False):
        raise ConfigurationError(
            "a dataflow runs in this process already", hint="put both pipelines into one Dataflow, or use two processes"
        )
    failure: BaseException | None = None
    try:
        _run.abandon()
        shutdown.catch_signals()
        config = None if recovery is None else _store(flow, Path(recovery), backup)
        try:
            if workers == 1:
                run_main(flow, epoch_interval=epoch, recovery_config=config)  # type: ignore[no-untyped-call]
            else:
                cluster_main(  # type: ignore[no-untyped-call]
                    flow, [], 0, epoch_interval=epoch, recovery_config=config, worker_count_per_proc=workers
                )
        except BaseException as error:
            if not shutdown.drained:
                # Bytewax wraps whatever was raised, even an interrupt.
                failure = cause_of(error, PgOutputError) or cause_of(error, KeyboardInterrupt) or error
        if failure is not None:
            raise failure
        gate.finish()
    finally:
        _run.abandon()
        shutdown.release_signals()
        _running.release()


_running: Final = threading.Lock()


def _store(flow: Dataflow, folder: Path, backup: timedelta) -> RecoveryConfig:
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        init_db_dir(folder, 1)  # type: ignore[no-untyped-call]
    if parts(folder):
        drop_void(folder)
        if unknown := steps(folder) - _steps(flow):
            logger.warning(
                "%s has states of steps that the flow does not have: %s. A renamed step begins without its state",
                folder,
                ", ".join(sorted(unknown)),
            )
    return RecoveryConfig(folder, backup)  # type: ignore[no-untyped-call]


def _steps(operator: Any) -> set[str]:
    """The ids of all steps within a dataflow or an operator."""
    inner: Iterable[Any] = getattr(operator, "substeps", ())
    return {step.step_id for step in inner}.union(*map(_steps, inner))
