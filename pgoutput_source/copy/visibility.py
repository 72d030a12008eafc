"""Tells which transactions a snapshot shows.

A commit is in the WAL before other sessions see it, with synchronous standbys long before. So a WAL position can't tell
whether the rows that were read show a transaction. `pg_current_snapshot()` tells exactly.

https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-PG-SNAPSHOT
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]

_HALF = 1 << 31
_WHOLE = 1 << 32


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one REPEATABLE READ transaction sees. Xids are 64-bit, like ``xid8``.

    Attributes:
        xmin: All transactions before it have ended.
        xmax: No transaction from it on is visible.
        running: The transactions in between that had not ended, ascending; only top-level ones.
        high: A WAL position that was read after the snapshot was taken. Every commit that the snapshot shows is
            recorded before it. A transaction that commits at or after it is invisible, whatever its xid.

    Example:
        >>> seen = Snapshot.of("10:14:10,12", 5000)
        >>> seen.shows([9, 10, 11, 12, 13, 14], 4000).tolist()
        [True, False, True, False, True, False]
    """

    xmin: int
    xmax: int
    running: tuple[int, ...]
    high: int

    @classmethod
    def of(cls, text: str, high: int) -> Snapshot:
        """From the text of `pg_current_snapshot()` and a position that was read after it."""
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), tuple(sorted(map(int, filter(None, running.split(","))))), high)

    def full(self, xids: Any) -> NDArray[np.int64]:
        """The 64-bit xids for 32-bit ones, as they are on the wire: the nearest to `xmax`.

        Transactions that are known at the same time are never 2^31 apart, so the nearest is the right one.
        """
        away = (np.asarray(xids).astype(np.int64) - self.xmax + _HALF) % _WHOLE - _HALF
        found: NDArray[np.int64] = self.xmax + away
        return found

    def shows(self, xids: Any, commit_lsns: Any = 0) -> Bools:
        """Whether rows that were read under this snapshot show what these transactions did.

        Args:
            xids: 32-bit xids of committed top-level transactions.
            commit_lsns: Where each committed; 0 decides by the xid alone.
        """
        full = self.full(xids)
        visible = (full < self.xmax) & (np.asarray(commit_lsns).astype(np.uint64) < np.uint64(self.high))
        if self.running:
            visible &= ~np.isin(full, np.array(self.running, np.int64))
        return visible

    def state(self) -> list[Any]:
        """The snapshot as builtins, for `from_state`."""
        return [self.xmin, self.xmax, list(self.running), self.high]

    @classmethod
    def from_state(cls, state: list[Any]) -> Snapshot:
        """The snapshot that `state` described."""
        xmin, xmax, running, high = state
        return cls(xmin, xmax, tuple(running), high)
