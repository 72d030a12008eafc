"""`Patience`: how long to retry a stream that makes no progress. It has no clock and connects to nothing."""

from __future__ import annotations

import random
from typing import Final

_FIRST_PAUSE: Final = 0.1  # seconds
_LONGEST_PAUSE: Final = 5.0
_SETTLED: Final = 10.0  # seconds after which a connection that has sent everything counts as progress


class Patience:
    """When to connect again, and when to give up after so many seconds without progress.

    A new connection alone is not progress: a walsender might die each time at the same place, before it sends anything
    new. Progress is a position that no earlier connection reached, or a connection that has sent everything and stays
    up.

    Args:
        seconds: Give up this long after the first loss since the last progress.

    Example:
        >>> patience = Patience(60.0)
        >>> patience.lost(100.0)
        >>> patience.pause(100.0), patience.over(100.0), patience.over(160.1)
        (0.0, False, True)
        >>> patience.connected(101.0)
        >>> patience.reached(5000, now=102.0)  # a new position
        >>> patience.lost(300.0)
        >>> patience.over(300.0)
        False
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.since: float | None = None
        """When the first connection since the last progress was lost; None while all is well."""
        self._attempts = 0
        self._next = 0.0
        self._reached = 0
        self._connected_at = 0.0

    def lost(self, now: float) -> None:
        """A connection was lost."""
        if self.since is None:
            self.since, self._attempts, self._next = now, 0, now
        else:
            self._back_off(now)

    def failed(self, now: float) -> None:
        """A connection attempt failed."""
        self._back_off(now)

    def _back_off(self, now: float) -> None:
        # Full jitter keeps readers from coming back all at once.
        self._next = now + random.uniform(_FIRST_PAUSE / 2, min(_FIRST_PAUSE * 2**self._attempts, _LONGEST_PAUSE))
        self._attempts = min(self._attempts + 1, 16)

    def connected(self, now: float) -> None:
        """A connection was made."""
        self._connected_at = now

    def reached(self, position: int, *, now: float, everything: bool = False) -> None:
        """The stream has reached a position.

        Args:
            position: Where it is now.
            now: The time.
            everything: Whether the server has nothing beyond it.
        """
        new = position > self._reached
        if new:
            self._reached = position
        if new or (everything and now - self._connected_at >= min(_SETTLED, self.seconds)):
            self.since = None

    def went_back(self, position: int) -> None:
        """The server's history ends at `position`: later WAL is gone, and its positions are used again."""
        self._reached = min(self._reached, position)

    def pause(self, now: float) -> float:
        """Seconds until the next attempt is due."""
        return max(0.0, self._next - now)

    def over(self, now: float) -> bool:
        """Whether it is time to give up."""
        return self.since is not None and now - self.since > self.seconds
