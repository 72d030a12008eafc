"""`Feedback`: what to tell the server about a stream, and when. It has no socket; the caller gives it the time.

It holds the positions of a stream across all its connections, and knows three habits of a walsender. It wants to hear
from us before `wal_sender_timeout` is over, however busy the flow is. It believes every position that we acknowledge.
And at a shutdown of the server it waits until we let it stop.

https://www.postgresql.org/docs/current/protocol-replication.html (Standby status update)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pgoutput_source.errors import ProtocolError
from pgoutput_source.protocol.wire import (
    XLOG_DATA_HEADER,
    Keepalive,
    Lsn,
    StandbyStatus,
    XLogData,
    parse_frame,
    pg_now,
)
from pgoutput_source.stream.walsender import Lost

_COMMIT_SIZE: Final = XLOG_DATA_HEADER + 26  # of a pgoutput Commit
_COMMIT: Final = ord("C")
_ENDS: Final = b"CcPKrp"  # messages whose position is the end of their WAL record, so that it may be acknowledged

_REPLY_INTERVAL: Final = 0.1  # seconds
_ACKNOWLEDGE_WITHIN: Final = 1.0
_SHUTDOWN_KEEPALIVES: Final = 10


class Feedback:
    """The positions of a stream, and when to report them.

    Positions only grow, across all connections; `left_timeline` is the one exception. `now` is always the time in
    seconds of one monotonic clock.

    Args:
        status_interval: Seconds between two reports, at most a quarter of the server's wal_sender_timeout.
        only_commits: Whether only commits end at a position to acknowledge, as in protocol 1.

    Attributes:
        acknowledged: PostgreSQL may forget everything before it.
        sent: The server has sent everything before it on this connection.
        sent_all: Whether that is all the WAL that existed when the connection was made.

    Example:
        >>> feedback = Feedback(status_interval=10.0, only_commits=True)
        >>> feedback.connected(0.0, confirmed=Lsn("0/100"), wal_end=Lsn("0/200"), timeout=60.0)
        >>> feedback.status(0.0).flush, feedback.due(5.0), feedback.due(10.0)
        (Lsn('0/100'), False, True)
        >>> feedback.keepalive(Keepalive(Lsn("0/300"), 0, reply=True), 5.0)
        >>> feedback.due(5.0), feedback.received
        (True, Lsn('0/300'))
        >>> feedback.acknowledge(Lsn("0/301"))
        Traceback (most recent call last):
        pgoutput_source.errors.ProtocolError: position 0/301 can't be acknowledged: only 0/300 was received
    """

    def __init__(self, status_interval: float, *, only_commits: bool) -> None:
        self.acknowledged = Lsn(0)
        self.sent = Lsn(0)
        self.sent_all = False
        self._status_interval = status_interval
        self._only_commits = only_commits
        self._committed = Lsn(0)  # the end of the last transaction received
        self._looked_through = Lsn(0)  # the highest position of a keepalive
        self._timeout = 60.0
        self._wal_end = Lsn(0)  # of the server when the connection was made
        # What was reported and heard on this connection.
        self._reported = Lsn(0)
        self._reported_at = 0.0
        self._heard_at = 0.0
        self._asked_at: float | None = None
        self._reply_wanted = False
        self._insistent = 0  # successive identical keepalives that want a reply
        self._insistent_at = 0.0

    def connected(self, now: float, *, confirmed: Lsn, wal_end: Lsn, timeout: float) -> None:
        """A connection begins to stream.

        Args:
            now: The time.
            confirmed: The slot's position.
            wal_end: Where the server's WAL ends.
            timeout: The server's wal_sender_timeout in seconds.
        """
        if not self.acknowledged:
            self.acknowledged = self._committed = confirmed
        self.sent, self.sent_all = Lsn(0), False
        self._wal_end, self._timeout = wal_end, timeout
        self._reported, self._reported_at = Lsn(0), now
        self._heard_at, self._asked_at = now, None
        self._reply_wanted, self._insistent = False, 0

    def left_timeline(self, end: Lsn) -> None:
        """Lower the received positions to `end`: the new primary must not be told of WAL that it never had."""
        self._committed, self._looked_through = min(self._committed, end), min(self._looked_through, end)

    # -- what comes from the server ---------------------------------------------------------------------------------

    @property
    def received(self) -> Lsn:
        """The highest position that may be acknowledged: the end of the last commit received, or a keepalive's."""
        return max(self._committed, self._looked_through)

    def heard(self, now: float) -> None:
        """Something came, perhaps only a part of a message."""
        self._heard_at, self._asked_at = now, None

    def commits(self, lengths: Sequence[int], frames: Sequence[memoryview]) -> None:
        """Find the end of the last transaction in new frames, and note that it may be acknowledged."""
        if self._only_commits:
            # Look for the size of a commit first: looking into each frame would cost as much as receiving it.
            backwards = lengths[::-1]
            try:
                at = backwards.index(_COMMIT_SIZE) + 1
                while frames[-at][XLOG_DATA_HEADER] != _COMMIT:
                    at = backwards.index(_COMMIT_SIZE, at) + 1
            except ValueError:
                return
        else:
            at = next((n for n, each in enumerate(reversed(frames), 1) if each[XLOG_DATA_HEADER] in _ENDS), 0)
            if not at:
                return
        frame = parse_frame(bytes(frames[-at]))
        if isinstance(frame, XLogData) and frame.start > self._committed:
            self._committed = frame.start

    def keepalive(self, keepalive: Keepalive, now: float) -> None:
        """A keepalive came. Everything before its position was sent before it."""
        if keepalive.reply:
            self._reply_wanted = True
            # At a shutdown, a walsender repeats its request at once until we confirm the end of the WAL.
            same = keepalive.wal_end == self._looked_through and now - self._insistent_at < 3 * _REPLY_INTERVAL
            self._insistent = self._insistent + 1 if same else 0
            self._insistent_at = now
        self.sent = keepalive.wal_end
        self.sent_all = keepalive.wal_end >= self._wal_end
        self._looked_through = max(self._looked_through, keepalive.wal_end)

    def silence(self, now: float) -> bool:
        """There is nothing to read. Returns whether to ask the server for a reply.

        Raises:
            Lost: It does not answer, or is shutting down.
        """
        if self._insistent >= _SHUTDOWN_KEEPALIVES:
            # It would wait for us for ever. After its restart it sends again what was not acknowledged.
            raise Lost("the server is shutting down")
        if now - max(self._heard_at, self._asked_at or 0.0) <= self._timeout / 2:
            return False
        if self._asked_at is not None:
            raise Lost(f"the server has not answered for {now - self._heard_at:.0f} s")
        self._asked_at = now
        return True

    # -- what goes to the server ------------------------------------------------------------------------------------

    @property
    def interval(self) -> float:
        """Seconds between two reports."""
        return min(self._status_interval, self._timeout / 4)

    @property
    def unreported(self) -> bool:
        """Whether the server has not been told yet what is acknowledged."""
        return self.acknowledged > self._reported

    def acknowledge(self, lsn: Lsn) -> None:
        """PostgreSQL may forget everything before `lsn`. A position before the last one changes nothing.

        Raises:
            ProtocolError: The position was never received. The server would believe it and forget what is before it.
        """
        if lsn > self.received:
            raise ProtocolError(f"position {lsn} can't be acknowledged: only {self.received} was received")
        self.acknowledged = max(self.acknowledged, Lsn(lsn))

    def due(self, now: float) -> bool:
        """Whether a report is due: it is time, there is something new, or the server asked."""
        since, news = now - self._reported_at, self.unreported
        return (
            since >= self.interval
            or (news and since >= _ACKNOWLEDGE_WITHIN)
            or (self._reply_wanted and (news or since >= _REPLY_INTERVAL))
        )

    def overdue(self, now: float) -> bool:
        """Whether no report was sent for nearly as long as the interval allows."""
        return now - self._reported_at >= self.interval * 0.9

    def status(self, now: float, *, reply: bool = False) -> StandbyStatus:
        """The report to send now; `reply` asks the server to answer."""
        self._reported, self._reported_at, self._reply_wanted = self.acknowledged, now, False
        return StandbyStatus(
            max(self.received, self.acknowledged), self.acknowledged, self.acknowledged, pg_now(), reply
        )
