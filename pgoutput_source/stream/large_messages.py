"""Gives back the memory that a very large message leaves behind, and receives many small ones cheaply.

A message of 600 MB grows libpq's buffer to its size, for as long as the connection lives. Arrow's memory pool also
keeps what was freed, to use it again. Both are right for ordinary messages. But after a very large one the process
would hold that memory until it ends.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import Final

import pyarrow as pa

from pgoutput_source.protocol.wire import Lsn

LARGE: Final = 32 << 20
"""A message with more bytes than this is very large. Smaller ones don't cause memory to be given back."""

_QUIET: Final = 3.0  # seconds without another one, which would need the memory again


class LargeMessages:
    """Notes very large messages, and tells when a connection should be replaced because of them."""

    def __init__(self) -> None:
        self._seen_at: float | None = None
        self._whole: Lsn | None = None  # once this is acknowledged, no large message will be sent again
        self._allocated: int | None = None  # by Arrow, before them

    def seen(self) -> None:
        """A very large message was received."""
        if self._allocated is None:
            self._allocated = pa.total_allocated_bytes()
        self._seen_at, self._whole = time.monotonic(), None

    def connected(self) -> None:
        """The connection is new, so its buffer is small."""
        self._seen_at = self._whole = None

    def over(self, received: Lsn, acknowledged: Lsn) -> bool:
        """Whether to replace the connection now: nothing that would be sent again holds a large message.

        Call it only when everything received, up to `received`, is whole transactions. With the new connection, it
        also releases the unused memory of Arrow's pool, as soon as the values are gone.
        """
        if self._allocated is not None and self._seen_at is None:
            if pa.total_allocated_bytes() < self._allocated + LARGE:
                pa.default_memory_pool().release_unused()
                self._allocated = None
            return False
        if self._seen_at is None:
            return False
        self._whole = self._whole or received
        return acknowledged >= self._whole and time.monotonic() - self._seen_at >= _QUIET


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Suspend garbage collection while thousands of frames are allocated.

    That many new objects trigger the collector. It would take as long as receiving them, and find nothing: frames are
    never part of a cycle.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
