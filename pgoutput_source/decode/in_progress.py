"""Transactions in progress: what PostgreSQL streams of them before they commit, kept until they do.

With protocol 2 and `streaming`, a server does not spill a large transaction to its own disk until the commit. It sends
the transaction in chunks, between StreamStart and StreamStop, and these interleave with the chunks of others and with
whole small transactions. `StreamedTransactions` turns such a stream back into one of protocol 1, frame by frame. It
keeps the bytes of a transaction's chunks, and at its StreamCommit returns them between a Begin and a Commit, in pieces.
Whatever reads protocol 1 (`assembler.Assembler`) then finds the same changes at the same positions.

Each message of a chunk names its subtransaction. A StreamAbort discards all messages of a subtransaction, including its
Relation messages. The remaining ones are announced at the commit, because from then on the server relies on them.

Memory is bounded: once everything that is kept exceeds a limit, the largest transaction goes to a file. The file has no
name, so it disappears when the transaction, the connection or the process ends, however that happens.

https://www.postgresql.org/docs/current/protocol-logical-replication.html
"""

from __future__ import annotations

import itertools
import re
import struct
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

import numpy as np
from numpy.typing import NDArray

from pgoutput_source.decode.frames import Frame, Joined
from pgoutput_source.decode.order import BETWEEN, CHUNK, INSIDE, STREAMED, UNTRUSTED
from pgoutput_source.errors import ProtocolError, SpillError
from pgoutput_source.protocol import messages
from pgoutput_source.protocol.wire import XLOG_DATA_HEADER, XLogData, parse_frame

_BOUNDS = re.compile(rb"[SEcA]")
_IN_CHUNK = b"".join(tag.encode() for tag, state in STREAMED[CHUNK].items() if state == CHUNK)
_TAG = XLOG_DATA_HEADER
_XID = slice(_TAG + 1, _TAG + 5)
_KEEPALIVE_SIZE = 18
_ORIGIN, _RELATION = b"OR"
_SEAL = 1 << 20  # bytes of frames that are joined to one segment: large enough for NumPy, small against the limit
_LENGTHS = np.dtype("<u4")
_HEAD = struct.Struct("<II")  # of a segment: the number of its frames, and their bytes


@dataclass(slots=True, eq=False)
class _Transaction:
    """A transaction so far: sealed segments, in memory or in its file, and the frames after them."""

    xid: int
    frames: list[Frame] = field(default_factory=list)
    size: int = 0  # of `frames`
    segments: list[bytes] = field(default_factory=list)
    file: IO[bytes] | None = None
    held: int = 0  # bytes in memory, frames and segments
    aborted: set[int] = field(default_factory=set)
    relations: list[tuple[int, int, int, bytes]] = field(default_factory=list)  # serial, xid, relation, frame

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


class StreamedTransactions:
    """Frames of protocol 2 to 4 → frames of protocol 1, in which a transaction comes as a whole once it is committed.

    `add` the frames of a poll, then `take` what can be decoded until nothing is pending.

    Args:
        memory: Bytes of transactions in progress that are held in memory; the rest goes to files.
        piece: About how many bytes to deliver at a time.
        parallel: The stream was started with streaming 'parallel'.
        on_spill: Called with the number of bytes after each write to a file.

    Attributes:
        spilled: Bytes written to files in total.
    """

    def __init__(
        self,
        *,
        memory: int = 64 << 20,
        piece: int = 16 << 20,
        parallel: bool = False,
        on_spill: Callable[[int], object] | None = None,
    ) -> None:
        self.memory = memory
        self.piece = piece
        self.parallel = parallel
        self.spilled = 0
        self._on_spill = on_spill
        self._open: dict[int, _Transaction] = {}
        self._chunk: _Transaction | None = None  # whose StreamStop is still to come
        self._inside = False
        self._committed: list[_Transaction] = []  # not yet delivered to their end
        self._ready: deque[Iterator[Joined]] = deque()
        self._serial = itertools.count()
        self._announced: dict[int, tuple[int, Frame]] = {}  # the last Relation that counts, by relation: when, and it

    @property
    def pending(self) -> bool:
        """Whether `take` would return more without another `add`."""
        return bool(self._ready)

    @property
    def keeping(self) -> bool:
        """Whether anything is kept, of transactions in progress or of committed ones."""
        return bool(self._open or self._ready)

    @property
    def held(self) -> int:
        """Bytes of transactions in progress that are held in memory."""
        return sum(t.held for t in self._open.values())

    def reconnected(self) -> None:
        """A new connection starts: the server sends again, from its beginning, what was not acknowledged."""
        for transaction in self._open.values():
            transaction.close()
        for transaction in self._committed:
            transaction.close()
        self._open.clear()
        self._committed.clear()
        self._ready.clear()
        self._announced.clear()
        self._chunk, self._inside = None, False

    close = reconnected

    # -- in -------------------------------------------------------------------------------------------------------

    def add(self, frames: Sequence[Frame]) -> None:
        """Add the frames of a poll; keepalives are ignored.

        Raises:
            ProtocolError: An illegal order of messages, or bytes that are not a message.
            SpillError: A temporary file can't be written.
        """
        if frames and min(map(len, frames)) <= _TAG:
            frames = [f for f in frames if not _is_keepalive(f)]
        tags = bytes([f[_TAG] for f in frames])
        done = 0
        for bound in _BOUNDS.finditer(tags):
            at = bound.start()
            self._run(frames[done:at], tags[done:at])
            self._bound(frames[at], tags[at : at + 1])
            done = at + 1
        self._run(frames[done:], tags[done:])
        while self.held > self.memory:
            self._spill(max(self._open.values(), key=lambda t: t.held))

    def _run(self, frames: Sequence[Frame], tags: bytes) -> None:
        """Frames between two bounds: either all of one chunk, or all outside of chunks."""
        if not frames:
            return
        if self._chunk is None:
            self._inside = tags.rfind(b"B") > tags.rfind(b"C") or (self._inside and b"C" not in tags)
            if b"R" in tags:
                for frame in (f for f, tag in zip(frames, tags, strict=True) if tag == _RELATION):
                    self._announced[_relation_id(frame, _TAG + 1)] = next(self._serial), bytes(frame)
            self._ready.append(iter([_joined(frames)]))
            return
        alien = tags.translate(None, _IN_CHUNK)
        if alien:
            raise _illegal(frames[tags.index(alien[:1])], alien[:1], CHUNK)
        transaction = self._chunk
        if b"R" in tags:
            for frame in (f for f, tag in zip(frames, tags, strict=True) if tag == _RELATION):
                xid, bare = int.from_bytes(frame[_XID], "big"), bytes(frame[: _TAG + 1]) + bytes(frame[_XID.stop :])
                transaction.relations.append((next(self._serial), xid, _relation_id(bare, _TAG + 1), bare))
        size = sum(map(len, frames))
        transaction.frames += frames
        transaction.size += size
        transaction.held += size
        if transaction.size >= _SEAL:
            self._seal(transaction)

    def _bound(self, frame: Frame, tag: bytes) -> None:
        state = CHUNK if self._chunk is not None else INSIDE if self._inside else BETWEEN
        if tag.decode() not in STREAMED[state]:
            raise _illegal(frame, tag, state)
        try:
            message = messages.decode(bytes(frame[_TAG:]), parallel=self.parallel)
        except ProtocolError as e:
            e.lsn = e.lsn if e.lsn is not None else _lsn(frame)
            raise
        match message:
            case messages.StreamStart():
                self._start(frame, message)
            case messages.StreamStop():
                self._chunk = None
            case messages.StreamAbort():
                self._abort(message)
            case messages.StreamCommit():
                transaction = self._open.pop(message.xid, None)
                if transaction is None:
                    raise ProtocolError(
                        f"a StreamCommit of transaction {message.xid}, which was not streamed",
                        lsn=_lsn(frame),
                        hint=UNTRUSTED,
                    )
                self._committed.append(transaction)
                again = self._announce(transaction)  # now: a Relation that comes after this commit counts from there
                self._ready.append(self._pieces(transaction, frame, message, again))

    def _start(self, frame: Frame, start: messages.StreamStart) -> None:
        if start.first is (start.xid in self._open):
            problem = "a second first chunk" if start.first else "a further chunk without a first one"
            raise ProtocolError(f"transaction {start.xid}: {problem}", lsn=_lsn(frame), hint=UNTRUSTED)
        self._chunk = self._open.setdefault(start.xid, _Transaction(start.xid))

    def _abort(self, abort: messages.StreamAbort) -> None:
        # PostgreSQL 18 also names transactions and subtransactions that it never streamed.
        transaction = self._open.get(abort.xid)
        if transaction is None:
            return
        if abort.subxid == abort.xid:
            self._open.pop(abort.xid).close()
        else:
            transaction.aborted.add(abort.subxid)

    # -- kept -----------------------------------------------------------------------------------------------------

    def _seal(self, transaction: _Transaction) -> None:
        """Join the frames after the segments into another segment, in the file if there is one."""
        if not transaction.frames:
            return
        lengths = np.fromiter(map(len, transaction.frames), _LENGTHS, len(transaction.frames))
        head = _HEAD.pack(len(lengths), transaction.size)
        segment = b"".join([head, lengths.tobytes(), *transaction.frames])
        transaction.frames, transaction.size = [], 0
        if transaction.file is None:
            transaction.segments.append(segment)
            transaction.held = sum(map(len, transaction.segments))
        else:
            self._write(transaction.file, segment)
            transaction.held = 0

    def _spill(self, transaction: _Transaction) -> None:
        """Move all of the transaction from memory to its file."""
        if transaction.file is None:
            try:
                transaction.file = tempfile.TemporaryFile(prefix="pgoutput-", buffering=0)  # noqa: SIM115
            except OSError as e:
                raise _spill_error(e) from e
            for segment in transaction.segments:
                self._write(transaction.file, segment)
            transaction.segments = []
        self._seal(transaction)
        transaction.held = 0

    def _write(self, file: IO[bytes], segment: bytes) -> None:
        rest = memoryview(segment)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as e:
            raise _spill_error(e) from e
        self.spilled += len(segment)
        if self._on_spill is not None:
            self._on_spill(len(segment))

    # -- out ------------------------------------------------------------------------------------------------------

    def take(self) -> Joined:
        """The next frames of protocol 1, about `piece` bytes of them; none if none are pending."""
        taken: list[Joined] = []
        size = 0
        while self._ready:
            piece = next(self._ready[0], None)
            if piece is None:
                self._ready.popleft()
                continue
            if size >= self.piece:
                self._ready.appendleft(iter([piece]))
                break
            shift = size
            size += sum(map(len, piece.parts))
            taken.append(
                piece._replace(start=piece.start + shift, payload=piece.payload + shift, end=piece.end + shift)
            )
        if not taken:
            return _joined(())
        return Joined(
            [part for each in taken for part in each.parts],
            np.concatenate([each.start for each in taken]),
            np.concatenate([each.payload for each in taken]),
            np.concatenate([each.end for each in taken]),
        )

    def _announce(self, transaction: _Transaction) -> list[Frame]:
        """The transaction's Relations count from its commit on, unless a newer one came in the meantime."""
        again: dict[int, Frame] = {}
        for serial, xid, relation_id, frame in transaction.relations:
            if xid in transaction.aborted:
                continue
            known = self._announced.get(relation_id)
            if known is not None and known[0] > serial:
                again[relation_id] = known[1]
            else:
                self._announced[relation_id] = serial, frame
                again.pop(relation_id, None)
        return list(again.values())

    def _pieces(
        self, transaction: _Transaction, frame: Frame, commit: messages.StreamCommit, again: list[Frame]
    ) -> Iterator[Joined]:
        """The transaction as protocol 1 would have sent it."""
        head = parse_frame(bytes(frame))
        assert isinstance(head, XLogData)
        begin = b"B" + struct.pack(">QqI", commit.commit_lsn, commit.commit_ts, commit.xid)
        end = b"C" + head.payload[5:]
        aborted = np.array(sorted(transaction.aborted), np.uint32)
        yield _joined([XLogData(commit.commit_lsn, commit.commit_lsn, head.sent_at, begin).encode()])
        self._seal(transaction)
        for segment in _segments(transaction):
            yield _stripped(segment, aborted)
        transaction.close()
        self._committed.remove(transaction)
        yield _joined([*again, XLogData(head.start, head.end, head.sent_at, end).encode()])


def _segments(transaction: _Transaction) -> Iterator[bytes]:
    if transaction.file is None:
        segments, transaction.segments = transaction.segments[::-1], []
        while segments:
            yield segments.pop()
        return
    file = transaction.file
    file.seek(0)
    while head := _read(file, _HEAD.size):
        count, size = _HEAD.unpack(head)
        yield head + _read(file, count * _LENGTHS.itemsize + size)


def _read(file: IO[bytes], size: int) -> bytes:
    parts = []
    try:
        while size and (part := file.read(size)):
            parts.append(part)
            size -= len(part)
    except OSError as e:
        raise _spill_error(e) from e
    return b"".join(parts)


def _stripped(segment: bytes, aborted: NDArray[np.uint32]) -> Joined:
    """The frames of a segment without their transaction's number, and without those of aborted subtransactions."""
    count, size = _HEAD.unpack_from(segment)
    length = np.frombuffer(segment, _LENGTHS, count, _HEAD.size).astype(np.int64)
    part = bytearray(memoryview(segment)[_HEAD.size + count * _LENGTHS.itemsize :])
    raw = np.frombuffer(part, np.uint8, size)
    end = np.cumsum(length)
    start = end - length
    tag = raw[start + _TAG]
    numbered = tag != _ORIGIN
    short = numbered & (length < _XID.stop)
    if short.any():
        bad = int(start[int(np.argmax(short))])
        raise ProtocolError(
            "a message of a chunk without its transaction", lsn=_lsn(part[bad : bad + 9]), hint=UNTRUSTED
        )
    payload = start + _TAG
    if len(aborted):
        # A big-endian integer at any offset, for all frames at once.
        xid = np.ndarray(size - 3, ">u4", buffer=part, strides=(1,))[np.where(numbered, payload + 1, 0)]
        kept = np.flatnonzero(~(numbered & np.isin(xid.astype(np.uint32), aborted)))
        start, payload, end, tag, numbered = start[kept], payload[kept], end[kept], tag[kept], numbered[kept]
    # Only the message's first byte is moved: onto the last byte of the number, which is no longer needed.
    payload = payload + np.where(numbered, _XID.stop - _XID.start, 0)
    raw[payload] = tag
    return Joined([part], start, payload, end)


def _joined(frames: Sequence[Frame]) -> Joined:
    length = np.fromiter(map(len, frames), np.int64, len(frames))
    end = np.cumsum(length)
    start = end - length
    return Joined([b"".join(frames)], start, start + _TAG, end)


def _is_keepalive(frame: Frame) -> bool:
    if len(frame) == _KEEPALIVE_SIZE and frame[0] == ord("k"):
        return True
    if len(frame) <= _TAG:
        raise ProtocolError(f"XLogData: expected more than {_TAG} bytes, got {len(frame)}")
    return False


def _relation_id(frame: Frame, at: int) -> int:
    return int.from_bytes(frame[at : at + 4], "big")


def _lsn(frame: Frame | bytearray) -> int:
    return int.from_bytes(frame[1:9], "big")


def _illegal(frame: Frame, tag: bytes, state: str) -> ProtocolError:
    return ProtocolError(f"a message {tag.decode('latin-1')!r} {state}", lsn=_lsn(frame), hint=UNTRUSTED)


def _spill_error(error: OSError) -> SpillError:
    return SpillError(
        f"a transaction in progress can't be kept in a temporary file: {error.strerror}",
        hint=f"make room in {tempfile.gettempdir()}, or set TMPDIR to a disk with as much room as your largest "
        "transactions need; with streaming='off' the server keeps them",
    )
