"""Frames joined into one buffer, with readers of integers and ranges at any offset, for many frames at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgoutput_source.errors import ConfigurationError, ProtocolError
from pgoutput_source.protocol.wire import XLOG_DATA_HEADER
from pgoutput_source.types.base import numbers_at, ranges_of

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Frame = bytes | memoryview
"""One CopyData payload of the replication protocol."""

_PADDING = bytes(32)  # a gather may look a few bytes past the last frame before its bounds are known
_MOST_BYTES = 2**31 - 1 - len(_PADDING)
_KEEPALIVE_SIZE = 18


class Joined(NamedTuple):
    """XLogData frames that lie joined already, perhaps with gaps: their bytes, and where each frame, its message and
    its end are in them. Each message has at least its first byte.
    """

    parts: list[bytes | bytearray | memoryview]
    start: Ints
    payload: Ints
    end: Ints


class Frames:
    """CopyData frames joined into one buffer, with readers of big-endian integers at any offset, for many at once.

    `start` and `end` are the byte offsets of the XLogData frames; keepalives are skipped. `tag` is the pgoutput
    message's first byte, `lsn` the WAL start of its frame.

    Raises:
        ProtocolError: A frame is neither XLogData nor a keepalive, or has no payload.
        ConfigurationError: More than 2 GiB at once.
    """

    def __init__(self, frames: Sequence[Frame] | Joined) -> None:
        if isinstance(frames, Joined):
            parts: list[bytes | bytearray | memoryview] = [*frames.parts]
            start, payload, end = frames.start, frames.payload, frames.end
        else:
            parts = [*frames]
            length = np.fromiter(map(len, frames), np.int64, len(frames))
            end = np.cumsum(length)
            start = end - length
            payload = start + XLOG_DATA_HEADER
        size = int(end.max(initial=0))
        if size > _MOST_BYTES:
            raise ConfigurationError(
                f"{size} bytes of frames in one feed; Arrow's offsets end at {_MOST_BYTES}",
                hint="feed fewer frames at a time; PostgreSQL never sends more than 1 GiB in one",
            )
        parts.append(_PADDING)
        self.raw = b"".join(parts)
        self.u1 = np.frombuffer(self.raw, np.uint8)
        kind = self.u1[start]
        data = kind == ord("w")
        if not data.all():
            other = ~data
            if not ((kind[other] == ord("k")) & ((end - start)[other] == _KEEPALIVE_SIZE)).all():
                raise ProtocolError("a frame that is neither XLogData nor a keepalive")
            start, payload, end = start[data], payload[data], end[data]
        if (payload >= end).any():
            raise ProtocolError(
                f"XLogData: expected more than {XLOG_DATA_HEADER} bytes, got {int((end - start).min())}"
            )
        self.start: Ints = start
        self.end: Ints = end
        self.payload: Ints = payload
        self.tag: NDArray[np.uint8] = self.u1[payload]

    def __len__(self) -> int:
        return len(self.start)

    def integers(self, dtype: str, offsets: Ints) -> NDArray[Any]:
        """Big-endian integers of `dtype` at any byte offsets, in native byte order."""
        return numbers_at(self.raw, dtype, offsets)

    @property
    def lsn(self) -> NDArray[np.uint64]:
        """WAL start of each frame."""
        return self.integers(">u8", self.start + 1)

    def lsn_of(self, index: int) -> int:
        """WAL start of one frame."""
        at = int(self.start[index]) + 1
        return int.from_bytes(self.raw[at : at + 8], "big")

    def message(self, index: int) -> bytes:
        """One pgoutput message, for the rare kinds that are decoded one by one."""
        return self.raw[self.payload[index] : self.end[index]]

    def slices(self, start: Ints, length: Ints, valid: Bools | None) -> pa.BinaryArray:
        """The byte ranges [start, start + length) as one array, null where not valid; see `ranges_of`."""
        return ranges_of(self.raw, start, length, valid)
