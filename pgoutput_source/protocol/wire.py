"""The outermost layer of a replication stream: log positions, PostgreSQL's clock and the CopyData envelope.

Bytes come in, small objects go out, and the other way round. No socket, no state, no pgoutput: that is `messages`.
Every integer is big-endian; moments are microseconds since 2000-01-01 UTC. Bytes that break the layout, and nothing
else, raise `ProtocolError`: it names the field, what was expected and what came. It never names the LSN: nobody here
knows it.

https://www.postgresql.org/docs/current/protocol-replication.html
"""

from __future__ import annotations

import datetime
import re
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

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
            match = _LSN_TEXT.fullmatch(value.strip())
            if match is None:
                raise ValueError(
                    f"not an LSN: {value!r} (PostgreSQL writes them as two hexadecimal numbers: 0/16B3748)"
                )
            number = int(match[1], 16) << 32 | int(match[2], 16)
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
        # The type that a spec ends with tells whether it is meant for a number: {lsn:d}, {lsn:>20}.
        return super().__format__(spec) if spec[-1:] in "bcdeEfFgGnoxX%" and spec else format(str(self), spec)


def pg_now() -> int:
    """Now, in PostgreSQL's microseconds."""
    return time.time_ns() // 1000 - PG_EPOCH_US


def pg_datetime(microseconds: int) -> datetime.datetime:
    """A moment on PostgreSQL's clock as an aware datetime.

    >>> pg_datetime(0).isoformat()
    '2000-01-01T00:00:00+00:00'

    Raises:
        ProtocolError: Python's datetime can't hold it: it ends with the year 9999, PostgreSQL's clock does not.
    """
    try:
        return _EPOCH + datetime.timedelta(microseconds=microseconds)
    except OverflowError:
        raise ProtocolError(f"time: expected the years 1 to 9999, got {microseconds} µs since 2000-01-01") from None


_LSN_TEXT = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")
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


AnyFrame = XLogData | Keepalive | StandbyStatus


def parse_frame(data: bytes) -> AnyFrame:
    """One CopyData payload as an object.

    Raises:
        ProtocolError: It is empty, of unknown kind, or of the wrong length.
    """
    kind = data[:1]
    if kind == b"w":
        if len(data) < XLOG_DATA_HEADER:
            raise ProtocolError(f"XLogData: expected at least {XLOG_DATA_HEADER} bytes, got {len(data)}")
        _, start, end, sent_at = _XLOG_DATA.unpack_from(data)
        return XLogData(Lsn(start), Lsn(end), sent_at, bytes(data[XLOG_DATA_HEADER:]))
    if kind == b"k":
        _, wal_end, sent_at, reply = _unpack(_KEEPALIVE, data, "Keepalive")
        return Keepalive(Lsn(wal_end), sent_at, bool(reply))
    if kind == b"r":
        _, write, flush, apply, sent_at, reply = _unpack(_STATUS, data, "StandbyStatus")
        return StandbyStatus(Lsn(write), Lsn(flush), Lsn(apply), sent_at, bool(reply))
    raise ProtocolError(
        f"frame: expected 'w', 'k' or 'r', got {bytes(kind)!r}" if kind else "frame: expected a kind, got nothing"
    )


def _unpack(layout: struct.Struct, data: bytes, what: str) -> tuple[Any, ...]:
    if len(data) != layout.size:
        raise ProtocolError(f"{what}: expected {layout.size} bytes, got {len(data)}")
    return layout.unpack(data)


class Cursor:
    """Reads big-endian fields one after another; each read is bounds-checked and names the field when it fails.

    >>> c = Cursor(bytes.fromhex("00000017 6964 00"))
    >>> c.uint32("Type.oid"), c.string("Type.name")
    (23, 'id')
    >>> c.uint8("Type.flags")
    Traceback (most recent call last):
    pgoutput_source.errors.ProtocolError: Type.flags: expected 1 byte, got 0
    """

    __slots__ = ("data", "pos")

    def __init__(self, data: bytes, pos: int = 0) -> None:
        self.data = data
        self.pos = pos

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes; a negative count, which only a broken length field can be, is an error too."""
        end = self.pos + count
        if count < 0 or end > len(self.data):
            unit = "byte" if count == 1 else "bytes"
            raise ProtocolError(f"{what}: expected {count} {unit}, got {len(self.data) - self.pos}")
        piece = self.data[self.pos : end]
        self.pos = end
        return piece

    def uint8(self, what: str) -> int:
        """Int8, unsigned: flags, counts of one byte and the letters that name a kind."""
        return self.take(1, what)[0]

    def uint16(self, what: str) -> int:
        """Int16, unsigned: the number of columns."""
        return int.from_bytes(self.take(2, what), "big")

    def int32(self, what: str) -> int:
        """Int32, signed: lengths, typmods."""
        return int.from_bytes(self.take(4, what), "big", signed=True)

    def uint32(self, what: str) -> int:
        """Int32, unsigned: OIDs, transaction ids."""
        return int.from_bytes(self.take(4, what), "big")

    def int64(self, what: str) -> int:
        """Int64, signed: moments."""
        return int.from_bytes(self.take(8, what), "big", signed=True)

    def lsn(self, what: str) -> Lsn:
        """Int64, unsigned: a position in the WAL."""
        return Lsn(int.from_bytes(self.take(8, what), "big"))

    def letter(self, expected: str, what: str) -> str:
        """Byte1: one of the letters in `expected`."""
        byte = self.uint8(what)
        if chr(byte) not in expected:
            raise ProtocolError(f"{what}: expected {_one_of(map(repr, expected))}, got {chr(byte)!r}")
        return chr(byte)

    def flags(self, known: int, what: str) -> int:
        """Int8: a set of bits. A bit outside of `known` is an error: nobody can tell what it changes."""
        byte = self.uint8(what)
        if byte & ~known:
            raise ProtocolError(f"{what}: expected no flags but {known:#x}, got {byte:#x}")
        return byte

    def string(self, what: str) -> str:
        """String: UTF-8, ended by a zero byte."""
        end = self.data.find(0, self.pos)
        if end < 0:
            raise ProtocolError(f"{what}: expected a zero byte at the end of the string, got the end of the message")
        try:
            text = self.data[self.pos : end].decode()
        except UnicodeDecodeError as e:
            raise ProtocolError(f"{what}: expected UTF-8, got something else ({e.reason})") from None
        self.pos = end + 1
        return text

    def end(self, what: str) -> None:
        """Nothing may follow."""
        if self.pos != len(self.data):
            raise ProtocolError(f"{what}: expected its end, got {len(self.data) - self.pos} more bytes")


def _one_of(choices: Iterable[str]) -> str:
    *most, last = choices
    return f"{', '.join(most)} or {last}" if most else last
