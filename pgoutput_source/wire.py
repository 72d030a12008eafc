"""The outermost layer of a replication stream: log positions, PostgreSQL's clock and the CopyData envelope.

Bytes come in, small objects go out, and the other way round. No socket, no state, no pgoutput: that is `messages`.
https://www.postgresql.org/docs/current/protocol-replication.html
"""

from __future__ import annotations

import datetime
import struct
from dataclasses import dataclass
from typing import Final

from pgoutput_source.errors import ProtocolError

PG_EPOCH_US: Final = 946_684_800_000_000
"""PostgreSQL counts microseconds from 2000-01-01 UTC: this many after Unix's epoch."""

XLOG_DATA_HEADER: Final = 25
"""Bytes before the payload of an XLogData frame: the tag, two positions and the time of sending."""


class Lsn(int):
    """A position in the write-ahead log. It is an int: compare it and subtract it; `str()` is PostgreSQL's notation.

    >>> Lsn("0/16B3748")
    Lsn('0/16B3748')
    >>> print(Lsn(23803720), Lsn("1/0") - Lsn("0/FFFFFFFF"))
    0/16B3748 1
    >>> Lsn("16B3748")
    Traceback (most recent call last):
    ValueError: not an LSN: '16B3748' (PostgreSQL writes them as two hexadecimal numbers: 0/16B3748)
    """

    __slots__ = ()

    def __new__(cls, value: int | str = 0) -> Lsn:
        if isinstance(value, str):
            high, slash, low = value.strip().partition("/")
            try:
                if not slash or not (0 < len(high) <= 8) or not (0 < len(low) <= 8):
                    raise ValueError
                number = int(high, 16) << 32 | int(low, 16)
            except ValueError:
                msg = f"not an LSN: {value!r} (PostgreSQL writes them as two hexadecimal numbers: 0/16B3748)"
                raise ValueError(msg) from None
        else:
            number = value
        if not 0 <= number < 1 << 64:
            raise ValueError(f"not an LSN: {value!r} (it does not fit in 64 bits)")
        return super().__new__(cls, number)

    def __str__(self) -> str:
        return f"{self >> 32:X}/{self & 0xFFFFFFFF:X}"

    def __repr__(self) -> str:
        return f"Lsn('{self}')"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec) if not spec or spec[-1] in "s<>^" else super().__format__(spec)


def pg_now() -> int:
    """Now, in PostgreSQL's microseconds."""
    return int(datetime.datetime.now(datetime.UTC).timestamp() * 1_000_000) - PG_EPOCH_US


def pg_datetime(microseconds: int) -> datetime.datetime:
    """A moment on PostgreSQL's clock as an aware datetime."""
    return _EPOCH + datetime.timedelta(microseconds=microseconds)


_EPOCH = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)

_XLOG_DATA = struct.Struct(">cQQq")
_KEEPALIVE = struct.Struct(">cQqB")
_STATUS = struct.Struct(">cQQQqB")


@dataclass(frozen=True, slots=True)
class XLogData:
    """Byte1('w'), Int64 start of the WAL data, Int64 current end of WAL, Int64 time of sending, then the payload.

    For logical slots both positions are equal, and 0 for messages that stand for no WAL record (Relation, Type).
    """

    start: Lsn
    end: Lsn
    sent_at: int
    payload: bytes

    def encode(self) -> bytes:
        """The frame."""
        return _XLOG_DATA.pack(b"w", self.start, self.end, self.sent_at) + self.payload


@dataclass(frozen=True, slots=True)
class Keepalive:
    """Byte1('k'), Int64 current end of WAL on the server, Int64 time of sending, Byte1 1 if a reply is wanted."""

    wal_end: Lsn
    sent_at: int
    reply: bool

    def encode(self) -> bytes:
        """The frame."""
        return _KEEPALIVE.pack(b"k", self.wal_end, self.sent_at, self.reply)


@dataclass(frozen=True, slots=True)
class StandbyStatus:
    """Byte1('r'), the positions written, flushed and applied, Int64 time of sending, Byte1 1 if a reply is wanted.

    Only `flush` moves a logical slot.
    """

    write: Lsn
    flush: Lsn
    apply: Lsn
    sent_at: int
    reply: bool = False

    def encode(self) -> bytes:
        """The frame."""
        return _STATUS.pack(b"r", self.write, self.flush, self.apply, self.sent_at, self.reply)


Frame = XLogData | Keepalive | StandbyStatus


def parse_frame(data: bytes) -> Frame:
    """One CopyData payload as an object.

    Raises:
        ProtocolError: It is empty, of unknown kind, or of the wrong length.
    """
    tag = data[:1]
    if tag == b"w":
        if len(data) < XLOG_DATA_HEADER:
            raise ProtocolError(f"XLogData: expected at least {XLOG_DATA_HEADER} bytes, got {len(data)}")
        _, start, end, sent_at = _XLOG_DATA.unpack_from(data)
        return XLogData(Lsn(start), Lsn(end), sent_at, bytes(data[XLOG_DATA_HEADER:]))
    for kind, layout in ((b"k", _KEEPALIVE), (b"r", _STATUS)):
        if tag == kind and len(data) != layout.size:
            raise ProtocolError(f"frame {kind.decode()!r}: expected {layout.size} bytes, got {len(data)}")
    if tag == b"k":
        _, wal_end, sent_at, reply = _KEEPALIVE.unpack(data)
        return Keepalive(Lsn(wal_end), sent_at, bool(reply))
    if tag == b"r":
        _, write, flush, apply, sent_at, reply = _STATUS.unpack(data)
        return StandbyStatus(Lsn(write), Lsn(flush), Lsn(apply), sent_at, bool(reply))
    raise ProtocolError(f"unknown frame kind {bytes(tag)!r}" if tag else "empty frame")


class Cursor:
    """Reads big-endian fields one after another; each read is bounds-checked and names the field when it fails."""

    __slots__ = ("data", "pos")

    def __init__(self, data: bytes, pos: int = 0) -> None:
        self.data = data
        self.pos = pos

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        end = self.pos + count
        if count < 0 or end > len(self.data):
            raise ProtocolError(f"{what}: expected {count} bytes, got {len(self.data) - self.pos}")
        piece = self.data[self.pos : end]
        self.pos = end
        return piece

    def _int(self, count: int, signed: bool, what: str) -> int:
        return int.from_bytes(self.take(count, what), "big", signed=signed)

    def uint8(self, what: str) -> int:
        """Byte."""
        return self._int(1, False, what)

    def uint16(self, what: str) -> int:
        """Int16, unsigned."""
        return self._int(2, False, what)

    def int32(self, what: str) -> int:
        """Int32, signed."""
        return self._int(4, True, what)

    def uint32(self, what: str) -> int:
        """Int32, unsigned: OIDs and transaction ids."""
        return self._int(4, False, what)

    def int64(self, what: str) -> int:
        """Int64, signed: times."""
        return self._int(8, True, what)

    def lsn(self, what: str) -> Lsn:
        """Int64 as a position in the WAL."""
        return Lsn(self._int(8, False, what))

    def string(self, what: str) -> str:
        """A NUL-terminated string in UTF-8."""
        end = self.data.find(0, self.pos)
        if end < 0:
            raise ProtocolError(f"{what}: a string without its end")
        try:
            text = bytes(self.data[self.pos : end]).decode()
        except UnicodeDecodeError as e:
            raise ProtocolError(f"{what}: not UTF-8 ({e.reason})") from None
        self.pos = end + 1
        return text

    def end(self, what: str) -> None:
        """Nothing may follow."""
        if self.pos != len(self.data):
            raise ProtocolError(f"{what}: {len(self.data) - self.pos} bytes too many")
