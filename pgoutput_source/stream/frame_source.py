"""`FrameSource`: what a `SlotSession` asks of the place that its frames come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.stream.walsender import Backend


class FrameSource(Protocol):
    """Frames of one slot, in the order in which PostgreSQL decodes them.

    `ReplicationStream` is the one that runs for ever. Another may read the slot by SQL, and end: see `exhausted`.
    """

    @property
    def slot(self) -> str:
        """The slot's name."""

    @property
    def generation(self) -> int:
        """One more after each reconnect: from then on the server repeats what was not acknowledged."""

    @property
    def exhausted(self) -> bool:
        """Whether no further frame will ever come."""

    @property
    def confirmed(self) -> Lsn:
        """Where the slot stood when this connection was made."""

    @property
    def sent(self) -> Lsn:
        """On this connection the server has sent everything up to here, and `poll` has returned it."""

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
        """Whether the server was a standby then."""

    @property
    def server(self) -> str:
        """When the server was started, which tells it from others."""

    @property
    def backend(self) -> Backend | None:
        """The server's process that sends the frames."""

    def start(self, seen: Lsn) -> None:
        """Begin to read where the slot stands; the server must have everything before `seen`."""

    def poll(self, *, max_frames: int, max_bytes: int, timeout: float, whole: bool) -> Sequence[bytes | memoryview]:
        """The next frames: CopyData payloads with their header; none if nothing came within `timeout` seconds.

        Args:
            max_frames: Return when there are so many.
            max_bytes: Return when these are so many bytes.
            timeout: Seconds to wait for the first.
            whole: Whether what was returned so far are whole transactions, so that the connection may be replaced.
        """

    def acknowledge(self, lsn: Lsn) -> None:
        """PostgreSQL may forget everything before `lsn`, which is not beyond `received`."""

    def close(self, *, graceful: bool = False) -> None:
        """Stop reading; with `graceful` the server confirms what is acknowledged."""
