"""`ReplicationStream`: the one owner of the replication connection. It starts, polls, acknowledges and reconnects.

Frames come out as psycopg hands them over, header included and undecoded. What this file knows of the protocol is its
outermost layer, and the rules by which a walsender lives: it wants a word from us before `wal_sender_timeout` is over,
however long a flow is busy with something else; it believes every position that we acknowledge; and it stops with the
server only when we let it.

    poll()          reads until nothing more is there, and answers; the only one that reads, and that reconnects
    acknowledge()   notes the position up to which PostgreSQL may forget
    the reporter    a thread that only sends: what is acknowledged, when nothing was sent for a while

https://www.postgresql.org/docs/current/protocol-replication.html
"""

from __future__ import annotations

import contextlib
import logging
import random
import re
import select
import threading
import time
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from pgoutput_source.decode.in_progress import PROTOCOLS
from pgoutput_source.errors import (
    ConnectionFailed,
    PgOutputError,
    ProtocolError,
    PublicationError,
    ServerError,
    SlotInUse,
    StateError,
)
from pgoutput_source.protocol.wire import XLOG_DATA_HEADER, Keepalive, Lsn, XLogData, parse_frame
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream import start
from pgoutput_source.stream.large_messages import LARGE, LargeMessages, no_garbage_collection
from pgoutput_source.stream.walsender import Backend, Lost, Walsender

logger = logging.getLogger(__name__)

# A walsender sends each message by itself. A reader that wakes for every one of them burns a core and slows it down:
# while messages come densely, read again only after a nap, in which the next ones gather, and for no longer than this.
# Few frames return with the first nap that brings nothing; many have more patience, for larger batches decode faster.
_NAP: Final = 0.0003
_ENOUGH: Final = 64
_PER_NAP: Final = 256
_LINGER: Final = 0.05

_GETS: Final = 64  # messages taken from libpq by one loop in C
_COMMIT_SIZE: Final = XLOG_DATA_HEADER + 26  # of a pgoutput Commit
_COMMIT: Final = ord("C")
_ENDS: Final = b"CcPKrp"  # messages whose position is the end of their WAL record, which may be acknowledged

_REPLY_INTERVAL: Final = 0.1
_ACKNOWLEDGE_WITHIN: Final = 1.0
_SHUTDOWN_KEEPALIVES: Final = 10


class ReplicationStream:
    """Frames of one replication slot, in the order in which PostgreSQL sends them, for as long as it takes.

    A lost connection is made again inside `poll`. PostgreSQL then sends again what was not acknowledged, `generation`
    is one higher, and whoever decodes the frames starts afresh and drops what it already has. A connection that can't
    be had at the start, and errors that trying again does not mend, are raised.

    Methods are called by one thread at a time; `acknowledge` and the attributes may be used by any.

    Args:
        dsn: A libpq connection string or URL; "" leaves all to libpq's own environment variables.
        slot: The slot's name.
        publications: Names of the publications.
        proto_version: Of pgoutput, 1 to 4.
        messages: Whether logical decoding messages are wanted.
        streaming: "on" (protocol 2) and "parallel" (protocol 4) bring transactions while they are in progress.
        origin: "none" leaves out what came to the server by replication; PostgreSQL 16.
        binary: "on" brings values in binary, "auto" does so if every published column can be read so.
        status_interval: Seconds between two reports, lowered to a quarter of the server's wal_sender_timeout.
        reconnect_seconds: How long to try again after a loss.
        slot_wait_seconds: How long `start` waits for a slot that another process holds.

    Attributes:
        generation: 0, and one more after each reconnect.
        system_id: The database system's identifier, known after `start`.
        timeline: Its timeline when the connection was made.
        standby, server, backend, confirmed: Of the last connection, see `Walsender`.
        sent: On this connection the server has sent everything up to here.
        server_version: As libpq says it: 180006.

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
        self.sent = Lsn(0)
        self.server_version = 0
        self._dsn = dsn
        self._options = {"proto_version": str(proto_version)} | ({"messages": "true"} if messages else {})
        # Named only where they differ from the default: older servers know neither.
        self._options |= {"streaming": streaming} if streaming != "off" else {}
        self._options |= {"origin": origin} if origin != "any" else {}
        self._binary = binary
        self._only_commits = proto_version == 1
        self._status_interval = status_interval
        self._reconnect_seconds = reconnect_seconds
        self._slot_wait_seconds = slot_wait_seconds

        # Positions. They only ever grow, whatever the connection does.
        self._acknowledged = Lsn(0)
        self._seen = Lsn(0)
        self._received = Lsn(0)
        self._keepalive_lsn = Lsn(0)

        # The connection. libpq's is not for two threads at once: the lock is held around each use.
        self._lock = threading.Lock()
        self._walsender: Walsender | None = None
        self._poll = select.poll()
        self._timeout = 60.0  # the server's wal_sender_timeout in seconds
        self._fatal: PgOutputError | None = None
        self._stop = threading.Event()
        self._reporter: threading.Thread | None = None

        # What was received on this connection, and when.
        self._heard_at = 0.0
        self._asked_at: float | None = None
        self._reply_wanted = False
        self._insistent = 0  # keepalives in a row that want a reply and say the same
        self._insistent_at = 0.0
        self._large = LargeMessages()

        # While there is no connection.
        self._lost_at: float | None = None
        self._attempts = 0
        self._next_attempt = 0.0

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
        )

    @property
    def received(self) -> Lsn:
        """The highest position that may be acknowledged: the end of the last commit received, or a keepalive's."""
        return max(self._received, self._keepalive_lsn)

    @property
    def keepalive_lsn(self) -> Lsn:
        """The server has sent everything up to here, and `poll` has handed it out.

        While no transaction is open it is the position to acknowledge for a publication in which nothing happens.
        """
        return self._keepalive_lsn

    @property
    def acknowledged(self) -> Lsn:
        """Up to here PostgreSQL may forget."""
        return self._acknowledged

    @property
    def reconnects(self) -> int:
        """How often the connection was made again."""
        return self.generation

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -- start and end ----------------------------------------------------------------------------------------------

    def start(self, seen: Lsn) -> None:
        """Connect, and start to stream where the slot stands.

        Args:
            seen: Up to here an earlier stream was done with everything, so the server must have it; 0 if nothing is
                known. It is not acknowledged: that is done with what this server sends.

        Raises:
            ConnectionFailed, NotConfigured: Nothing is tried twice here, but for a server that is just starting up.
            SlotInUse: Another process kept the slot for longer than `slot_wait_seconds`.
            SlotNotFound, SlotMismatch, SlotLost: The slot can't be used.
            SlotAhead: The slot has moved past `seen`.
            StateError: `seen` is beyond the end of the server's WAL, so it is of another server.
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
                    patience = min(60.0, self._reconnect_seconds)
                else:
                    raise
                if waited > patience:
                    raise
                if not told:
                    told = True
                    logger.info("%s; waiting for up to %.0f s", e.message, patience)
                time.sleep(min(0.1 + waited / 4, 2.0))
        self._reporter = threading.Thread(
            target=_keep_reporting, args=(weakref.ref(self), self._stop), name=f"pgoutput-{self.slot}", daemon=True
        )
        self._reporter.start()

    def close(self, *, graceful: bool = False, timeout: float = 5.0) -> None:
        """End the stream. Closing twice is allowed, and nothing is raised: what went wrong is in the log.

        Args:
            graceful: Report what is acknowledged, and wait until the server has confirmed the end: then it knows.
            timeout: Seconds to wait for that; a server in the midst of a large transaction sends all of it first.
        """
        self._stop.set()
        with self._lock:
            walsender, self._walsender = self._walsender, None
            if walsender is not None:
                try:
                    if graceful:
                        self._send_status(walsender)
                        if not walsender.finish(time.monotonic() + timeout):
                            logger.warning("slot %r: the server did not confirm the end of the stream", self.slot)
                except Lost as e:
                    logger.warning("slot %r: the connection was lost while ending: %s", self.slot, _one_line(e))
                finally:
                    walsender.close()
        if self._reporter is not None and self._reporter is not threading.current_thread():
            self._reporter.join(1.0)

    # -- poll -------------------------------------------------------------------------------------------------------

    def poll(
        self, *, max_frames: int = 65_536, max_bytes: int = 16 << 20, timeout: float = 0.0, whole: bool = False
    ) -> list[memoryview]:
        """What has come: CopyData payloads of XLogData with their header, without keepalives; nothing after `timeout`.

        Once something is there, it waits a moment for more as long as more comes densely, 50 ms at most. What is not
        read stays with the server: its walsender waits.

        Args:
            max_frames: Return when there are so many.
            max_bytes: Return when these are so many bytes; a few frames more may come.
            timeout: Seconds to wait for the first.
            whole: What was handed out so far are whole transactions, so the connection may be replaced. That is done
                some seconds after a message of more than 32 MiB was acknowledged: it gives libpq's buffer back.

        Raises:
            ConnectionFailed: The connection was lost and could not be made again in time.
            PublicationError: A publication is missing at this position of the WAL.
            SlotLost, SlotNotFound, SlotInUse: The slot went away, or somebody else took it.
            ServerError: The server can't decode its WAL.
        """
        if self._fatal is not None:
            raise self._fatal
        if self._walsender is None:
            if self._lost_at is None or self._stop.is_set():
                raise ConnectionFailed("the stream is not open", hint="call start() first, once, and close() last")
            self._reconnect(timeout)
            return []
        if whole and self._large.over(self._received, self._acknowledged):
            self._renew()
            return []
        frames: list[memoryview] = []
        try:
            with no_garbage_collection():
                self._receive(self._walsender, frames, max_frames, max_bytes, timeout)
        except Lost as e:
            if self._fatal is None:
                self._lose(_one_line(e))
        except PgOutputError as e:
            self._fatal = e
        if self._fatal is not None:
            self._hang_up()
            # What came before an error is as good as ever, but not what a missing publication is missing in.
            if not frames or isinstance(self._fatal, PublicationError):
                raise self._fatal
        return frames

    def _receive(
        self, walsender: Walsender, frames: list[memoryview], max_frames: int, max_bytes: int, timeout: float
    ) -> None:
        clock = time.monotonic
        begun = clock()
        deadline = begun + timeout
        until = 0.0
        size = 0
        asked = arrived = False
        dry = 0
        while True:
            got, before = 0, size
            with self._lock:
                while size < max_bytes and (room := min(_GETS, max_frames - len(frames))) > 0:
                    chunk, error = walsender.take(room)
                    if chunk:
                        lengths, payloads = zip(*chunk, strict=True)
                        got += len(chunk)
                        size += sum(lengths)
                        if size > LARGE and max(lengths) > LARGE:
                            self._large.seen()
                        if min(lengths) <= XLOG_DATA_HEADER:
                            self._sift(walsender, chunk, frames)
                        else:
                            frames += payloads
                            self._note_commits(lengths, payloads)
                    if error is not None:
                        raise error
                    if len(chunk) < room:
                        break
                now = clock()
                if got:
                    self._heard_at, self._asked_at = now, None
                self._fatal = self._fatal or walsender.fatal
                if self._fatal is not None:
                    return
                self._report(walsender, now)
                if size >= max_bytes or len(frames) >= max_frames:
                    return
            if frames:
                until = until or now + _LINGER
                dry = 0 if got else dry + 1
                if dry > len(frames) // _PER_NAP or now > until:
                    return
                if got < _ENOUGH:
                    time.sleep(_NAP)
            elif asked:
                arrived = arrived and not got
                if arrived:  # and no message is whole yet: a very large one takes its time
                    self._heard_at, self._asked_at = now, None
                self._watch(now)
                patience = max(deadline, begun + _LINGER) if arrived else deadline
                if now >= patience:
                    return
                # Not for longer, because reports are due, and the reporter may have read something into libpq.
                arrived = bool(self._poll.poll(min(patience - now, 0.25) * 1000))
            else:
                arrived = bool(self._poll.poll(0))
            asked = True
            with self._lock:
                # Only when libpq has given all that it had: otherwise its buffer would grow and grow.
                walsender.read(size - before)

    def _sift(self, walsender: Walsender, chunk: list[tuple[int, memoryview]], frames: list[memoryview]) -> None:
        """A chunk that holds a keepalive, or the end of the stream."""
        for length, payload in chunk:
            if length > XLOG_DATA_HEADER:
                frames.append(payload)
                self._note_commits((length,), (payload,))
            elif length > 0:
                frame = parse_frame(bytes(payload))
                if not isinstance(frame, Keepalive):
                    raise ProtocolError(f"a frame of {length} bytes is neither data nor a keepalive")
                self._note_keepalive(frame)
            else:
                self._fatal = walsender.end()

    def _note_commits(self, lengths: Sequence[int], payloads: Sequence[memoryview]) -> None:
        """The end of the last transaction may be acknowledged; it says its position in its header."""
        if self._only_commits:
            # Commits are told by their size first: looking at each frame would cost as much as receiving it.
            backwards = lengths[::-1]
            try:
                at = backwards.index(_COMMIT_SIZE) + 1
                while payloads[-at][XLOG_DATA_HEADER] != _COMMIT:
                    at = backwards.index(_COMMIT_SIZE, at) + 1
            except ValueError:
                return
        else:
            at = next((n for n, each in enumerate(reversed(payloads), 1) if each[XLOG_DATA_HEADER] in _ENDS), 0)
            if not at:
                return
        frame = parse_frame(bytes(payloads[-at]))
        if isinstance(frame, XLogData) and frame.start > self._received:
            self._received = frame.start

    def _note_keepalive(self, keepalive: Keepalive) -> None:
        now = time.monotonic()
        if keepalive.reply:
            self._reply_wanted = True
            # A walsender that wants to stop with its server asks again at once until we confirm the end of the WAL.
            same = keepalive.wal_end == self._keepalive_lsn and now - self._insistent_at < 3 * _REPLY_INTERVAL
            self._insistent = self._insistent + 1 if same else 0
            self._insistent_at = now
        self.sent = keepalive.wal_end
        if keepalive.wal_end > self._keepalive_lsn:
            self._keepalive_lsn = keepalive.wal_end

    def _watch(self, now: float) -> None:
        """Nothing is there to be read: find out whether the server is."""
        if self._insistent >= _SHUTDOWN_KEEPALIVES:
            # It would wait for us for ever, and all that is not acknowledged comes again after its restart.
            raise Lost("the server is shutting down")
        silence = now - max(self._heard_at, self._asked_at or 0.0)
        if silence > self._timeout / 2:
            if self._asked_at is not None:
                raise Lost(f"the server has not answered for {now - self._heard_at:.0f} s")
            self._asked_at = now
            with self._lock:
                if self._walsender is not None:
                    self._send_status(self._walsender, reply=True)

    # -- reports to the server --------------------------------------------------------------------------------------

    def acknowledge(self, lsn: Lsn, *, now: bool = False) -> None:
        """PostgreSQL may forget everything before `lsn`: it was given out, and what became of it is durable.

        Acknowledge the end of a commit, not its begin, or a keepalive's position while no transaction is open. A
        position below the last one changes nothing. The server hears of it within a second if `poll` is called, else
        with the next report.

        Args:
            lsn: The position.
            now: Report it at once.

        Raises:
            ProtocolError: The position was never received. The server would believe it, and drop what is before it.
        """
        if lsn > self.received:
            raise ProtocolError(f"position {lsn} can't be acknowledged: only {self.received} was received")
        if lsn > self._acknowledged:
            self._acknowledged = Lsn(lsn)
        if now:
            with self._lock:
                if self._walsender is not None and self._walsender.sent_flush < self._acknowledged:
                    # A connection that is gone is noticed, and made again, by poll.
                    with contextlib.suppress(Lost):
                        self._send_status(self._walsender)

    def _report(self, walsender: Walsender, now: float) -> None:
        """Send a status if one is due. Called with the lock held."""
        since = now - walsender.sent_at
        moved = self._acknowledged > walsender.sent_flush
        if (
            since >= self._interval
            or (moved and since >= _ACKNOWLEDGE_WITHIN)
            or (self._reply_wanted and (moved or since >= _REPLY_INTERVAL))
        ):
            self._send_status(walsender)

    @property
    def _interval(self) -> float:
        return min(self._status_interval, self._timeout / 4)

    def _send_status(self, walsender: Walsender, *, reply: bool = False) -> None:
        """Called with the lock held."""
        walsender.send_status(max(self.received, self._acknowledged), self._acknowledged, reply=reply)
        self._reply_wanted = False

    def _report_if_silent(self) -> float:
        """Send a status if nothing was sent for a while; the seconds until the next look."""
        with self._lock:
            if self._walsender is not None and time.monotonic() - self._walsender.sent_at >= self._interval * 0.9:
                with contextlib.suppress(Lost):  # poll notices, and connects again
                    self._send_status(self._walsender)
        return self._interval / 2

    # -- the connection ---------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Connect and start to stream: a new connection each time, for a walsender streams only once."""
        walsender = Walsender(
            self._dsn,
            slot=self.slot,
            publications=self.publications,
            options=self._options,
            binary=self._binary,
            # Our own former walsender may not have noticed yet that we are gone.
            previous=self.backend,
            admit=self._admit,
        )
        self.backend = walsender.backend
        self.confirmed, self.sent = walsender.confirmed or Lsn(0), Lsn(0)
        if not self._acknowledged:
            self._acknowledged = self._received = self.confirmed
        self._poll = select.poll()
        self._poll.register(walsender.socket, select.POLLIN)
        with self._lock:
            self._heard_at, self._asked_at, self._insistent = time.monotonic(), None, 0
            self._walsender = walsender
            self._large.connected()
            self._send_status(walsender)

    def _admit(self, walsender: Walsender) -> None:
        """Whether it is the server that it was, with all that it had. Called before it streams."""
        start.admit(walsender, self.system_id, max(self._seen, self._acknowledged))
        if self.timeline and walsender.timeline != self.timeline:
            logger.warning(
                "slot %r: the server is on timeline %d now, not %d", self.slot, walsender.timeline, self.timeline
            )
            # What the former primary had sent beyond the end of the new one must not be acknowledged to it.
            end = walsender.wal_end
            self._received, self._keepalive_lsn = min(self._received, end), min(self._keepalive_lsn, end)
        self.system_id, self.timeline = walsender.system_id, walsender.timeline
        self.standby, self.server = walsender.standby, walsender.server
        self.server_version, self._timeout = walsender.server_version, walsender.timeout

    def _hang_up(self) -> None:
        with self._lock:
            walsender, self._walsender = self._walsender, None
        if walsender is not None:
            walsender.close()

    def _lose(self, why: str) -> None:
        self._hang_up()
        self._lost_at = time.monotonic()
        self._attempts = 0
        self._next_attempt = self._lost_at
        logger.warning("slot %r: %s; connecting again for up to %.0f s", self.slot, why, self._reconnect_seconds)

    def _renew(self) -> None:
        """Replace a connection that works: the server hears first what is acknowledged, and does not send it again."""
        with self._lock, contextlib.suppress(Lost):
            if self._walsender is not None:
                self._send_status(self._walsender)
        self._lose("giving back the memory of a very large message")

    def _reconnect(self, timeout: float) -> None:
        """One attempt if it is time for one; otherwise wait, but not for longer than `timeout`."""
        now = time.monotonic()
        lost_at = self._lost_at or now
        if now < self._next_attempt:
            time.sleep(min(timeout, self._next_attempt - now))
            return
        try:
            self._connect()
        except (ServerError, StateError) as e:
            passing = (isinstance(e, ConnectionFailed) and e.transient) or isinstance(e, SlotInUse)
            passing = passing or (isinstance(e, ServerError) and (e.sqlstate or "")[:2] in ("53", "57"))
            waited = time.monotonic() - lost_at
            if not passing or waited > self._reconnect_seconds:
                self._fatal = e
                raise
            # Full jitter keeps several readers from coming back all at once.
            self._next_attempt = time.monotonic() + random.uniform(0.05, min(0.1 * 2**self._attempts, 5.0))
            self._attempts += 1
            logger.info("slot %r: not yet: %s", self.slot, e.message)
        else:
            self.generation += 1
            self._lost_at = None
            logger.warning("slot %r: connected again after %.1f s", self.slot, time.monotonic() - lost_at)


def _keep_reporting(stream: weakref.ref[ReplicationStream], stop: threading.Event) -> None:
    """The reporter. It holds no stream alive that nobody else does."""
    wait = 0.1
    while not stop.wait(wait):
        owner = stream()
        if owner is None:
            return
        wait = owner._report_if_silent()
        del owner


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()
