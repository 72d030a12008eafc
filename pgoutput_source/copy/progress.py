"""How far the copy is: a line on a terminal, or lines in the log; and metrics."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Final

from pgoutput_source import metrics
from pgoutput_source.copy.ledger import Ledger, TableCopy
from pgoutput_source.status_line import status_line

logger = logging.getLogger(__name__)

_LOG_EVERY: Final = 10.0  # seconds
_SHOW_EVERY: Final = 0.1  # seconds
_WIDTH: Final = 10  # characters of the bar
_RATE_OVER: Final = 10.0  # seconds that count for the rate


class Progress:
    """What was copied, what is left, and how fast it goes.

    Args:
        slot: The label of the metrics.
        ledger: Of the copy.
    """

    def __init__(self, slot: str, ledger: Ledger) -> None:
        self.slot, self.ledger = slot, ledger
        self.estimates: Mapping[int, int] = {}
        """Rows of each published table, as far as the server's statistics know."""
        self._logged_at = self._rated_at = time.monotonic()
        self._rate = self._shown_at = 0.0

    def read(self, copy: TableCopy, rows: int) -> None:
        """Some rows of a table were read."""
        now = time.monotonic()
        metrics.COPIED.labels(self.slot).inc(rows)
        passed = now - self._rated_at
        if passed > 0:
            weight = math.exp(-passed / _RATE_OVER) if self._rate else 0.0
            self._rate = weight * self._rate + (1 - weight) * rows / passed
            self._rated_at = now
        self.publish()
        terminal = status_line()
        if terminal is not None:
            if now - self._shown_at >= _SHOW_EVERY:
                self._shown_at = now
                terminal.show(self._bar(copy))
            return
        if now - self._logged_at < _LOG_EVERY:
            return
        self._logged_at = now
        expected = self._expected(copy)
        of = f" of about {expected}" if expected > copy.rows else ""
        tables = len(self.ledger.copying)
        logger.info(
            "slot %s: copying %s: %d%s rows, tables left: %d, %.0f rows/s%s",
            self.slot,
            copy.name,
            copy.rows,
            of,
            tables,
            self._rate,
            f", about {self._left():.0f} s left" if self._left() else "",
        )

    def _bar(self, copy: TableCopy) -> str:
        expected, left, done = self._expected(copy), math.ceil(self._left()), len(self.ledger.done)
        full = _WIDTH * copy.rows // max(1, expected)
        return (
            f"{copy.name} [{'#' * full:.<{_WIDTH}}] {_short(copy.rows)} of {_short(expected)} rows, "
            f"{_short(self._rate)}/s, {f'{timedelta(seconds=left)} left, ' if left else ''}"
            f"tables {done}/{done + len(self.ledger.copying)}"
        )

    def end(self) -> None:
        """Nothing is copied any more."""
        terminal = status_line()
        if terminal is not None:
            terminal.show("")

    def publish(self) -> None:
        """Set the metrics."""
        copying = self.ledger.copying.values()
        metrics.COPYING.labels(self.slot).set(len(copying))
        metrics.COPY_READ.labels(self.slot).set(sum(copy.rows for copy in copying))
        metrics.COPY_EXPECTED.labels(self.slot).set(sum(self._expected(copy) for copy in copying))
        metrics.COPY_LEFT.labels(self.slot).set(self._left())

    def _expected(self, copy: TableCopy) -> int:
        return max(copy.rows, self.estimates.get(copy.relation_id, 0))

    def _left(self) -> float:
        """Seconds; 0 if it is not known."""
        rows = sum(self._expected(copy) - copy.rows for copy in self.ledger.copying.values())
        return rows / self._rate if self._rate else 0.0


def _short(number: float) -> str:
    """A number that doesn't take much room.

    >>> _short(950), _short(1_540_000)
    ('950', '1.5 M')
    """
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return f"{number:.0f}"
