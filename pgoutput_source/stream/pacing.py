"""`Pacing`: when a poll reads again, how long it waits, and when it returns. It has no socket and no clock.

A walsender sends each message separately. A reader that wakes for each of them burns a core and slows the server down.
So while messages come densely, a poll naps briefly between two reads, and messages gather meanwhile. With few frames,
it returns after the first nap that brings nothing. With many it is more patient, because larger batches decode faster.
"""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

_NAP: Final = 0.0003  # seconds
_DENSE: Final = 64  # messages in one read: the next read need not wait
_NAPS_FOR: Final = 256  # for each so many frames, one more nap may bring nothing
_LINGER: Final = 0.05  # seconds after the first frame, at most
_LOOK: Final = 0.25  # seconds: reports are due, and the reporter may have read something into libpq


class Nap(NamedTuple):
    """Let messages gather for this many seconds, then read."""

    seconds: float


class Wait(NamedTuple):
    """Wait until there is something to read, for at most this many seconds."""

    seconds: float


Step: TypeAlias = Nap | Wait | None
"""What a poll does next; None means that it returns."""

_NAP_STEP: Final = Nap(_NAP)
_READ_ON: Final = Nap(0.0)
_LOOK_ONCE: Final = Wait(0.0)


class Pacing:
    """The pace of one poll.

    Args:
        now: When the poll began, in seconds of any clock.
        timeout: Seconds to wait for the first frame.
        max_frames: Return once there are this many frames.
        max_bytes: Return once the received messages have this many bytes.

    Example:
        >>> pacing = Pacing(now=0.0, timeout=1.0, max_frames=1000, max_bytes=1 << 20)
        >>> pacing.next(0.0, messages=0, size=0, frames=0, arrived=False)
        Wait(seconds=0.0)
        >>> pacing.next(0.0, messages=0, size=0, frames=0, arrived=False)
        Wait(seconds=0.25)
        >>> pacing.next(0.1, messages=3, size=300, frames=3, arrived=True)
        Nap(seconds=0.0003)
        >>> pacing.next(0.1004, messages=0, size=0, frames=3, arrived=True) is None
        True
    """

    __slots__ = (
        "_deadline",
        "_looked",
        "_max_bytes",
        "_max_frames",
        "_partial_until",
        "_size",
        "_until",
        "_vain",
    )

    def __init__(self, now: float, timeout: float, max_frames: int, max_bytes: int) -> None:
        self._deadline = now + timeout
        self._partial_until = max(self._deadline, now + _LINGER)
        self._max_frames, self._max_bytes = max_frames, max_bytes
        self._size = 0
        self._until = 0.0  # when it returns what it has
        self._vain = 0  # successive naps that brought nothing
        self._looked = False

    def room(self, frames: int, size: int) -> int:
        """How many more messages to take, given `frames` so far and `size` bytes since the last step."""
        return 0 if self._size + size >= self._max_bytes else self._max_frames - frames

    def next(self, now: float, *, messages: int, size: int, frames: int, arrived: bool) -> Step:
        """What to do after taking every message that libpq had.

        Args:
            now: The time.
            messages: How many messages were taken since the last step, keepalives included.
            size: Their bytes.
            frames: How many frames there are by now.
            arrived: Whether the socket had something to read before that.
        """
        self._size += size
        if self._size >= self._max_bytes or frames >= self._max_frames:
            return None
        if frames:
            self._until = self._until or now + _LINGER
            self._vain = 0 if messages else self._vain + 1
            if self._vain > frames // _NAPS_FOR or now > self._until:
                return None
            return _NAP_STEP if messages < _DENSE else _READ_ON
        if not self._looked:
            self._looked = True
            return _LOOK_ONCE
        # A part of a very large message came, and the rest is on its way.
        partial = arrived and not messages
        patience = self._partial_until if partial else self._deadline
        return Wait(min(patience - now, _LOOK)) if now < patience else None
