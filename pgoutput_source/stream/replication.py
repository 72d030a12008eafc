"""`ReplicationStream` owns the replication connection: it starts, polls, acknowledges and reconnects.

Frames come out undecoded, with their header, as psycopg returns them. This module joins four parts:

    Walsender    one connection, until it is lost
    Pacing       when a poll reads again, waits, or returns
    Feedback     positions, and when to report them to the server
    Patience     when to connect again, and when to give up

and has three ways in:

    poll()          reads until there is nothing more, and replies; only it reads and reconnects
    acknowledge()   notes the position before which PostgreSQL may forget
    the reporter    a thread that only sends: it reports when nothing was sent for a while

https://www.postgresql.org/docs/current/protocol-replication.html
"""

from __future__ import annotations

import contextlib
import logging
import select
import threading
import time
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from pgoutput_source.errors import (
    ConnectionFailed,
    PgOutputError,
    ProtocolError,
    PublicationError,
    ServerError,
    SlotInUse,
    StateError,
)
from pgoutput_source.postgres.refusals import passing
from pgoutput_source.protocol.messages import PROTOCOLS
from pgoutput_source.protocol.wire import XLOG_DATA_HEADER, Keepalive, Lsn, parse_frame
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream import start
from pgoutput_source.stream.feedback import Feedback
from pgoutput_source.stream.large_messages import LARGE, LargeMessages, no_garbage_collection
from pgoutput_source.stream.pacing import Nap, Pacing, Wait
from pgoutput_source.stream.patience import Patience
from pgoutput_source.stream.walsender import Backend, Lost, Walsender

logger = logging.getLogger(__name__)

_GETS: Final = 64  # how many messages one loop in C takes from libpq


class ReplicationStream:
    """Frames of one replication slot, in the order in which PostgreSQL sends them, without an end.

    `poll` replaces a lost connection. PostgreSQL then sends again what was not acknowledged, and `generation` goes up
    by one: the decoder must start afresh and skip what was already delivered. A failure to connect at the start, and
    errors that a retry does not fix, are raised.

    Call the methods from one thread at a time. Any thread may use `acknowledge` and the attributes.

    Args:
        dsn: A libpq connection string or URL; "" leaves everything to libpq's environment variables.
        slot: The slot's name.
        publications: Names of the publications.
        proto_version: Of pgoutput, 1 to 4.
        messages: Whether to receive logical decoding messages.
        streaming: "on" (protocol 2) and "parallel" (protocol 4) stream transactions while they are in progress.
        origin: "none" skips what came to the server by replication; PostgreSQL 16.
        binary: "on" sends values in binary; "auto" does so if every published column can be read that way.
        status_interval: Seconds between two reports, at most a quarter of the server's wal_sender_timeout.
        reconnect_seconds: How long to retry after a loss while nothing new comes.
        slot_wait_seconds: How long `start` waits for a slot that another process holds.
        temporary: Whether to create the slot, for as long as the connection lasts. A lost connection is not replaced.

    Attributes:
        generation: Counts reconnects.
        exhausted: False: a slot never ends.
        system_id: The database system's identifier, known after `start`.
        timeline: Its timeline when the connection was made.
        standby, server, backend, confirmed: Of the last connection, see `Walsender`.

    Raises:
        ConnectionFailed, NotConfigured, SlotError, PublicationError, ProtocolError: See each method.
    """

    exhausted: Final = False

    def __init__(
        self,
        dsn: str,
        *,
        slot: str,
        publications: Sequence[str],
        proto_version: int = 1,
        messages: bool = True,
        streaming: str = "off",
        origin: str = "any",
        binary: str = "off",
        status_interval: float = 10.0,
        reconnect_seconds: float = 300.0,
        slot_wait_seconds: float = 60.0,
        temporary: bool = False,
    ) -> None:
        self.slot = slot
        self.publications = tuple(publications)
        self.generation = 0
        self.system_id = ""
        self.timeline = 0
        self.standby = False
        self.server = ""
        self.backend: Backend | None = None
        self.confirmed = Lsn(0)
        self._dsn = dsn
        self._options = {"proto_version": str(proto_version)} | ({"messages": "true"} if messages else {})
        # Sent only when they differ from the default, because older servers don't know them.
        self._options |= {"streaming": streaming} if streaming != "off" else {}
        self._options |= {"origin": origin} if origin != "any" else {}
        self._binary = binary
        self._slot_wait_seconds = slot_wait_seconds
        self._temporary = temporary
        self._seen = Lsn(0)
        self._feedback = Feedback(status_interval, only_commits=proto_version == 1)
        self._patience = Patience(reconnect_seconds)
        self._large = LargeMessages()

        # The connection. Only one thread at a time may use libpq's, so the lock is held around each use.
        self._lock = threading.Lock()
        self._walsender: Walsender | None = None
        self._started = False
        self._poll = select.poll()
        self._fatal: PgOutputError | None = None
        self._stop = threading.Event()
        self._reporter: threading.Thread | None = None

    @classmethod
    def of(cls, dsn: str, settings: SourceSettings) -> Self:
        """The stream that `settings` describe, on the server of `dsn`."""
        return cls(
            dsn,
            slot=settings.slot,
            publications=settings.publication,
            proto_version=PROTOCOLS[settings.streaming],
            streaming=settings.streaming,
            origin=settings.origin,
            binary=settings.binary,
            status_interval=settings.status_interval,
            reconnect_seconds=settings.reconnect_seconds,
            slot_wait_seconds=settings.slot_wait_seconds,
            temporary=settings.snapshot == "only",
        )

    @property
    def received(self) -> Lsn:
        """The highest position that may be acknowledged: the end of the last commit received, or a keepalive's."""
        return self._feedback.received

    @property
    def sent(self) -> Lsn:
        """The server has sent everything before it on this connection, and `poll` has returned it.

        While no transaction is open, this is the position to acknowledge for a publication without changes.
        """
        return self._feedback.sent

    @property
    def acknowledged(self) -> Lsn:
        """PostgreSQL may forget everything before it."""
        return self._feedback.acknowledged

    @property
    def reconnects(self) -> int:
        """How often a lost connection was replaced."""
        return self.generation

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -- start and end ----------------------------------------------------------------------------------------------

    def start(self, seen: Lsn) -> None:
        """Connect, and start to stream at the slot's position.

        Args:
            seen: An earlier stream processed everything before it, so the server must have it; 0 if nothing is known.
                It is not acknowledged: only positions that this server sends are.

        Raises:
            ConnectionFailed, NotConfigured: The connection failed. Only a server that is starting up is waited for.
            SlotInUse: Another process held the slot for longer than `slot_wait_seconds`.
            SlotNotFound, SlotMismatch, SlotLost: The slot can't be used.
            SlotAhead: The slot has moved past `seen`.
            StateError: `seen` is beyond the end of the server's WAL, so another server wrote it.
        """
        self._seen = seen
        begun = time.monotonic()
        told = False
        while True:
            try:
                self._connect()
                break
            except ServerError as e:
                waited = time.monotonic() - begun
                if isinstance(e, SlotInUse):
                    patience = self._slot_wait_seconds
                elif e.sqlstate == "57P03":
                    patience = min(60.0, self._patience.seconds)
                else:
                    raise
                if waited > patience:
                    raise
                if not told:
                    told = True
                    logger.info("%s; waiting for up to %.0f s", e.message, patience)
                time.sleep(min(0.1 + waited / 4, 2.0))
        self._started = True
        self._reporter = threading.Thread(
            target=_keep_reporting, args=(weakref.ref(self), self._stop), name=f"pgoutput-{self.slot}", daemon=True
        )
        self._reporter.start()

    def close(self, *, graceful: bool = False, timeout: float = 5.0) -> None:
        """End the stream. Closing twice is allowed. Errors are logged, not raised.

        Args:
            graceful: Report what is acknowledged, and wait until the server confirms the end.
            timeout: Seconds to wait for that. A server that is sending a large transaction sends all of it first.
        """
        self._stop.set()
        with self._lock:
            walsender, self._walsender = self._walsender, None
            if walsender is not None:
                try:
                    if graceful:
                        self._report(walsender)
                        if not walsender.finish(time.monotonic() + timeout):
                            logger.warning("slot %r: the server did not confirm the end of the stream", self.slot)
                except Lost as e:
                    logger.warning("slot %r: the connection was lost while ending: %s", self.slot, e)
                finally:
                    walsender.close()
        if self._reporter is not None and self._reporter is not threading.current_thread():
            self._reporter.join(1.0)

    # -- poll -------------------------------------------------------------------------------------------------------

    def poll(
        self, *, max_frames: int = 65_536, max_bytes: int = 16 << 20, timeout: float = 0.0, whole: bool = False
    ) -> list[memoryview]:
        """The next frames: CopyData payloads of XLogData with their header, without keepalives; none after `timeout`.

        Once there is a frame, it waits for more while frames come densely, for at most 50 ms. What is not read stays on
        the server, where the walsender waits.

        Args:
            max_frames: Return once there are this many frames.
            max_bytes: Return once the frames have this many bytes; a few more frames may come.
            timeout: Seconds to wait for the first frame.
            whole: Whether only whole transactions were returned so far, so that the connection may be replaced. A few
                seconds after a message of more than 32 MiB is acknowledged, that gives back libpq's buffer.

        Raises:
            ConnectionFailed: The connection was lost and could not be replaced in time, or no new connection brought
                anything new.
            PublicationError: A publication is missing at this position of the WAL.
            SlotLost, SlotNotFound, SlotInUse: The slot is gone, or another process took it.
            ServerError: The server can't decode its WAL.
        """
        if self._fatal is not None:
            raise self._fatal
        if not self._started or self._stop.is_set():
            raise ConnectionFailed("the stream is not open", hint="call start() first, once, and close() last")
        if self._walsender is None:
            self._reconnect(timeout)
            return []
        if whole and not self._temporary and self._large.over(self.received, self.acknowledged):
            self._renew()
            return []
        frames: list[memoryview] = []
        try:
            with no_garbage_collection():
                self._receive(self._walsender, Pacing(time.monotonic(), timeout, max_frames, max_bytes), frames)
        except Lost as e:
            self._note_headway(frames)
            self._lose(str(e))
        except PgOutputError as e:
            self._fatal = e
        else:
            self._note_headway(frames)
        if self._fatal is not None:
            self._hang_up()
            # Frames from before an error are good, unless a publication is missing: then its changes are left out.
            if not frames or isinstance(self._fatal, PublicationError):
                raise self._fatal
        return frames

    def _receive(self, walsender: Walsender, pacing: Pacing, frames: list[memoryview]) -> None:
        """Append what comes to `frames`, at the pace of one poll.

        Raises:
            Lost: The connection should be replaced; earlier frames are in `frames`.
            PgOutputError: The server, or the stream, can't continue.
        """
        feedback = self._feedback
        arrived = False
        while True:
            with self._lock:
                messages, size = self._take(walsender, pacing, frames)
                now = time.monotonic()
                if messages or arrived:  # perhaps only a part of a very large message, which takes long
                    feedback.heard(now)
                if walsender.fatal is not None:
                    raise walsender.fatal
                if feedback.due(now):
                    self._report(walsender)
            step = pacing.next(now, messages=messages, size=size, frames=len(frames), arrived=arrived)
            arrived = False
            match step:
                case None:
                    if not frames:  # even a poll with timeout 0 has looked once
                        self._ask_if_silent(walsender, now)
                    return
                case Nap(seconds):
                    if seconds:
                        time.sleep(seconds)
                case Wait(seconds):
                    if seconds:
                        self._ask_if_silent(walsender, now)
                    arrived = bool(self._poll.poll(seconds * 1000))
            with self._lock:
                walsender.read(size)

    def _ask_if_silent(self, walsender: Walsender, now: float) -> None:
        """There is nothing to read: find out whether the server is still there.

        Raises:
            Lost: It does not answer, or is shutting down.
        """
        if self._feedback.silence(now):
            with self._lock:
                self._report(walsender, reply=True)

    def _take(self, walsender: Walsender, pacing: Pacing, frames: list[memoryview]) -> tuple[int, int]:
        """Take messages from libpq while there is room. Called with the lock held.

        Returns:
            How many messages there were, and how many bytes.
        """
        messages = size = 0
        while (room := min(_GETS, pacing.room(len(frames), size))) > 0:
            chunk, lost = walsender.take(room)
            if chunk:
                lengths, payloads = zip(*chunk, strict=True)
                messages += len(chunk)
                size += sum(lengths)
                if size > LARGE and max(lengths) > LARGE:
                    self._large.seen()
                if min(lengths) > XLOG_DATA_HEADER:
                    frames += payloads
                    self._feedback.commits(lengths, payloads)
                else:
                    self._sift(walsender, chunk, frames)
            if lost is not None:
                raise lost
            if len(chunk) < room:
                break
        return messages, size

    def _sift(self, walsender: Walsender, chunk: list[tuple[int, memoryview]], frames: list[memoryview]) -> None:
        """Handle a chunk that holds a keepalive, or the end of the stream."""
        for length, payload in chunk:
            if length > XLOG_DATA_HEADER:
                frames.append(payload)
                self._feedback.commits((length,), (payload,))
            elif length > 0:
                frame = parse_frame(bytes(payload))
                if not isinstance(frame, Keepalive):
                    raise ProtocolError(f"a frame of {length} bytes is neither data nor a keepalive")
                self._feedback.keepalive(frame, time.monotonic())
            else:
                raise walsender.end()

    # -- reports to the server --------------------------------------------------------------------------------------

    def acknowledge(self, lsn: Lsn, *, now: bool = False) -> None:
        """PostgreSQL may forget everything before `lsn`: it was delivered, and its results are durable.

        Acknowledge the end of a commit, not its beginning, or a keepalive's position while no transaction is open. A
        position before the last one changes nothing. The server is told within a second if `poll` is called, otherwise
        with the next report.

        Args:
            lsn: The position.
            now: Whether to report it at once.

        Raises:
            ProtocolError: The position was never received. The server would believe it and forget what is before it.
        """
        self._feedback.acknowledge(lsn)
        if now:
            with self._lock:
                if self._walsender is not None and self._feedback.unreported:
                    # `poll` notices that a connection is gone, and replaces it.
                    with contextlib.suppress(Lost):
                        self._report(self._walsender)

    def _report(self, walsender: Walsender, *, reply: bool = False) -> None:
        """Send a report. Called with the lock held."""
        walsender.send(self._feedback.status(time.monotonic(), reply=reply))

    def _report_if_silent(self) -> float:
        """Send a report if none was sent for a while. Returns the seconds until the next look."""
        with self._lock:
            if self._walsender is not None and self._feedback.overdue(time.monotonic()):
                with contextlib.suppress(Lost):  # `poll` notices
                    self._report(self._walsender)
        return self._feedback.interval / 2

    # -- the connection ---------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Connect and start to stream, with a new connection each time, because a walsender streams only once."""
        walsender = Walsender(
            self._dsn,
            slot=self.slot,
            publications=self.publications,
            options=self._options,
            binary=self._binary,
            temporary=self._temporary,
            # The walsender of our last connection may not have noticed yet that we are gone.
            previous=self.backend,
            admit=self._admit,
        )
        self.backend, self.confirmed = walsender.backend, walsender.confirmed
        self._poll = select.poll()
        self._poll.register(walsender.socket, select.POLLIN)
        now = time.monotonic()
        self._patience.connected(now)
        with self._lock:
            self._feedback.connected(
                now, confirmed=walsender.confirmed, wal_end=walsender.wal_end, timeout=walsender.timeout
            )
            self._walsender = walsender
            self._large.connected()
            with contextlib.suppress(Lost):  # `poll` notices
                self._report(walsender)

    def _admit(self, walsender: Walsender) -> None:
        """Check that it is the same server, with everything that it had."""
        start.admit(walsender, self.system_id, max(self._seen, self.acknowledged))
        if self.timeline and walsender.timeline != self.timeline:
            logger.warning(
                "slot %r: the server is on timeline %d now, not %d", self.slot, walsender.timeline, self.timeline
            )
            self._feedback.left_timeline(walsender.wal_end)
            self._patience.went_back(walsender.wal_end)
        self.system_id, self.timeline = walsender.system_id, walsender.timeline
        self.standby, self.server = walsender.standby, walsender.server

    def _hang_up(self) -> None:
        with self._lock:
            walsender, self._walsender = self._walsender, None
        if walsender is not None:
            walsender.close()

    def _note_headway(self, frames: list[memoryview]) -> None:
        # Also within a transaction so large that no connection brings all of it.
        position = max(self.received, int.from_bytes(frames[-1][1:9], "big") if frames else 0)
        self._patience.reached(position, now=time.monotonic(), everything=self._feedback.sent_all)

    def _lose(self, why: str) -> None:
        self._hang_up()
        if self._temporary:
            self._fatal = ConnectionFailed(
                f"slot {self.slot!r}: {why}; the slot was temporary and is gone",
                hint="start the copy again. It starts over, and with the same recovery folder it empties the tables "
                "first",
            )
            return
        now = time.monotonic()
        self._patience.lost(now)
        if self._patience.over(now):
            error = ConnectionFailed(
                f"slot {self.slot!r}: {why}; for {self._patience.seconds:.0f} s no connection has brought anything new",
                hint="see the server's log for why its process ends: it may fail at the same place each time",
            )
            error.transient = True
            self._fatal = error
            return
        logger.warning("slot %r: %s; connecting again for up to %.0f s", self.slot, why, self._patience.seconds)

    def _renew(self) -> None:
        """Replace a working connection. It first reports what is acknowledged, so that it does not come again."""
        with self._lock, contextlib.suppress(Lost):
            if self._walsender is not None:
                self._report(self._walsender)
        self._lose("giving back the memory of a very large message")

    def _reconnect(self, timeout: float) -> None:
        """Make one attempt if it is due; otherwise wait for at most `timeout`."""
        patience = self._patience
        pause = patience.pause(time.monotonic())
        if pause:
            time.sleep(min(timeout, pause))
            return
        since = patience.since or time.monotonic()
        try:
            self._connect()
        except (ServerError, StateError) as e:
            now = time.monotonic()
            if not (passing(e) or isinstance(e, SlotInUse)) or patience.over(now):
                self._fatal = e
                raise
            patience.failed(now)
            logger.info("slot %r: not yet: %s", self.slot, e.message)
        else:
            self.generation += 1
            logger.warning("slot %r: connected again after %.1f s", self.slot, time.monotonic() - since)


def _keep_reporting(stream: weakref.ref[ReplicationStream], stop: threading.Event) -> None:
    """The reporter thread. Its weak reference does not keep the stream alive."""
    wait = 0.1
    while not stop.wait(wait):
        owner = stream()
        if owner is None:
            return
        wait = owner._report_if_silent()
        del owner
