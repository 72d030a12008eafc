"""What a very large message leaves behind, and when it can be given back; and what many small ones need.

A message of 600 MB passes through libpq's buffer, which grows to its size and stays so for as long as the connection
lives, and through Arrow's memory pool, which keeps what was freed for the next time. Both are right for the messages of
every day. After a very large one the process would hold as much memory again until it ends.
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
"""A message of more bytes than this is very large. Nothing is given back for smaller ones."""

_QUIET: Final = 3.0  # seconds without another one, which would need the memory again


class LargeMessages:
    """Takes note of very large messages, and says when a connection should be replaced because of them."""

    def __init__(self) -> None:
        self._seen_at: float | None = None
        self._whole: Lsn | None = None  # acknowledged up to here, the large ones are done with
        self._allocated: int | None = None  # by Arrow, before them

    def seen(self) -> None:
        """One has been received."""
        if self._allocated is None:
            self._allocated = pa.total_allocated_bytes()
        self._seen_at, self._whole = time.monotonic(), None

    def connected(self) -> None:
        """The connection is a new one, whose buffer is small."""
        self._seen_at = self._whole = None

    def over(self, received: Lsn, acknowledged: Lsn) -> bool:
        """Whether the connection should be replaced now: what it has to send again holds no large message.

        To be asked while all that was received, up to `received`, are whole transactions. Once there is a new one, it
        gives back what Arrow's pool holds, as soon as the values are released.
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
    """Thousands of frames that are all kept look like garbage to the collector: searching them costs as much as
    receiving them, and finds nothing, as they can't be part of a cycle.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
