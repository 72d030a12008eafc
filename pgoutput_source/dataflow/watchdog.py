"""A watchdog for stalled runs: Bytewax waits for ever for a member of a cluster that hangs."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final

from pgoutput_source import metrics
from pgoutput_source.errors import PgOutputError

logger = logging.getLogger(__name__)

STALLED: Final = 70
"""The exit code of a run that the watchdog ended: EX_SOFTWARE."""

_WARN_AFTER: Final = 60.0


class Watchdog:
    """Notices when a source is no longer called although the server has more, and ends the process if told to.

    Bytewax calls a source many times a second, except while an epoch can't become durable: a step or a sink hangs, or
    another process of the cluster was stopped or cut off. Such a run never ends, and the slot retains the server's WAL.

    Args:
        slot: The slot's name.
        behind: Whether the server has more than is acknowledged. It is called only in a stall, from another thread.
        seconds: After this time the process ends, with exit code 70 and no cleanup, as in a crash. Changes that are not
            durable will come again. None only warns.
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
                # A run without its server may wait as long as it likes.
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
