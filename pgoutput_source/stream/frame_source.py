"""`FrameSource`: what a `SlotSession` needs from its source of frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.stream.walsender import Backend


class FrameSource(Protocol):
    """Frames of one slot, in the order in which PostgreSQL decodes them.

    `ReplicationStream` never ends. `PeekedFrames` reads the slot by SQL, and ends: see `exhausted`.
    """

    @property
    def slot(self) -> str:
        """The slot's name."""

    @property
    def generation(self) -> int:
        """Counts reconnects. After each, the server sends again what was not acknowledged."""

    @property
    def exhausted(self) -> bool:
        """Whether no further frame will ever come."""

    @property
    def confirmed(self) -> Lsn:
        """The slot's position when this connection was made."""

    @property
    def sent(self) -> Lsn:
        """The server has sent everything up to here on this connection, and `poll` has returned it."""

    @property
    def received(self) -> Lsn:
        """The highest position that may be acknowledged."""

    @property
    def acknowledged(self) -> Lsn:
        """PostgreSQL may forget everything before it."""

    @property
    def timeline(self) -> int:
        """The server's timeline when this connection was made."""

    @property
    def standby(self) -> bool:
        """Whether the server was a standby when this connection was made."""

    @property
    def server(self) -> str:
        """When the server was started. It distinguishes servers."""

    @property
    def backend(self) -> Backend | None:
        """The server's process that sends the frames."""

    def start(self, seen: Lsn) -> None:
        """Begin to read at the slot's position; the server must have everything before `seen`."""

    def poll(self, *, max_frames: int, max_bytes: int, timeout: float, whole: bool) -> Sequence[bytes | memoryview]:
        """The next frames: CopyData payloads with their header; none if nothing came within `timeout` seconds.

        Args:
            max_frames: Return once there are this many frames.
            max_bytes: Return once the frames have this many bytes.
            timeout: Seconds to wait for the first frame.
            whole: Whether only whole transactions were returned so far, so that the connection may be replaced.
        """

    def acknowledge(self, lsn: Lsn) -> None:
        """PostgreSQL may forget everything before `lsn`, which must not be after `received`."""

    def close(self, *, graceful: bool = False) -> None:
        """Stop reading. With `graceful`, wait until the server confirms what is acknowledged."""
