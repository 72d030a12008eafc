"""Waiting for what a test needs to have happened."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 60.0
"""Seconds for what takes one or two on a machine that has nothing else to do."""


def until(condition: Callable[[], object], what: object = "it did not happen", seconds: float = PATIENCE) -> None:
    """Wait until a condition holds. If it does not, `what` is said: a list of lines may grow until then."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
