"""Notations: what PostgreSQL's output functions write, made from what the send functions of these types send.

Columns of these types are PostgreSQL's text, so only texts are needed. Most of the types are rare, and written value by
value; addresses are written for a whole column.

https://www.postgresql.org/docs/current/datatype-net-types.html
https://www.postgresql.org/docs/current/datatype-bit.html
https://www.postgresql.org/docs/current/datatype-textsearch.html
"""

from __future__ import annotations

import binascii
import struct
from collections.abc import Callable
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.types.base import Binary, Sent, Texts, ranges_of, refuse, text, through_text
from pgoutput_source.types.numbers import float_text


def _notation(name: str, write: Callable[[bytes], str]) -> Binary:
    """For a type whose values `write` turns into characters of one byte each."""

    def to_text(value: bytes) -> bytes:
        try:
            return write(value).encode("latin-1")
        except (struct.error, IndexError):
            refuse(name)  # it is too short

    return through_text(to_text, text)


# -- network addresses ----------------------------------------------------------------------------------------------

_WIDTHS: Final = {2: 4, 3: 16}  # PGSQL_AF_INET and PGSQL_AF_INET6


def _address(is_cidr: bool) -> Callable[[bytes], str]:
    def write(value: bytes) -> str:
        family, bits, cidr, width = value[:4]
        if _WIDTHS.get(family) != width or len(value) != 4 + width or bits > 8 * width or cidr != is_cidr:
            refuse("inet")
        address = ".".join(map(str, value[4:])) if width == 4 else _ipv6(value[4:])
        return address if bits == 8 * width and not is_cidr else f"{address}/{bits}"

    return write


def _ipv6(address: bytes) -> str:
    words = struct.unpack(">8H", address)
    # The longest run of zeros, the first of several, if it is more than one.
    best, length = 0, 1
    at = 0
    while at < 8:
        end = at
        while end < 8 and words[end] == 0:
            end += 1
        if end - at > length:
            best, length = at, end - at
        at = max(end, at + 1)
    if length == 1:
        return ":".join(f"{word:x}" for word in words)
    if best == 0 and (length == 6 or (length == 5 and words[5] == 0xFFFF)):
        return ("::ffff:" if length == 5 else "::") + ".".join(map(str, address[12:]))
    before, after = words[:best], words[best + length :]
    return f"{':'.join(f'{word:x}' for word in before)}::{':'.join(f'{word:x}' for word in after)}"


_OCTETS = pa.array(list(map(str, range(256))))


def _addresses(is_cidr: bool) -> Binary:
    by_value = _notation("inet", _address(is_cidr))
    masks = pa.array([f"/{bits}" for bits in range(32)] + ["/32" if is_cidr else ""])

    def decode(sent: Sent, kind: pa.DataType) -> pa.Array:
        version_4 = sent.length == 8
        if not version_4.all():
            others = by_value.decode(sent.take(~version_4), kind)
            found = pa.concat_arrays([decode(sent.take(version_4), kind), others])
            at = np.where(version_4, np.cumsum(version_4) - 1, np.cumsum(~version_4) - 1 + version_4.sum())
            return found.take(pa.array(at))
        head = sent.integers(">u4")
        bits = head >> np.uint32(16) & np.uint32(0xFF)
        # The family, whether it is a network, and the width of the address.
        if ((head & np.uint32(0xFF00FFFF)) != (2 << 24 | is_cidr << 8 | 4)).any() or bits.max(initial=0) > 32:
            refuse("inet")
        octets = [_OCTETS.take(pa.array(sent.u1[sent.start + at])) for at in range(4, 8)]
        address = pc.binary_join_element_wise(*octets, ".")
        if not is_cidr and bits.min(initial=32) == 32:
            return address.cast(kind)
        return pc.binary_join_element_wise(address, masks.take(pa.array(bits)), "").cast(kind)

    return Binary(decode, by_value.text)


def hardware_address(width: int) -> Binary:
    """Of so many bytes: ``08:00:2b:01:02:03``."""

    def decode(sent: Sent, kind: pa.DataType) -> pa.Array:
        sent.fixed(width, "macaddr")
        characters = np.full((len(sent), width, 3), ord(":"), np.uint8)
        digits = binascii.hexlify(Texts(sent.slices()).data.data)
        characters[:, :, :2] = np.frombuffer(digits, np.uint8).reshape(-1, width, 2)
        each = np.arange(len(sent)) * 3 * width
        return ranges_of(characters.tobytes(), each, np.full(len(sent), 3 * width - 1), None).cast(kind)

    def write(value: bytes) -> bytes:
        if len(value) != width:
            refuse("macaddr")
        return value.hex(":").encode()

    return Binary(decode, write)


INET: Final = _addresses(is_cidr=False)
CIDR: Final = _addresses(is_cidr=True)


# -- bits, rows, transactions, text search ----------------------------------------------------------------------------


def _bits(value: bytes) -> str:
    (bits,) = struct.unpack_from(">i", value)
    if bits < 0 or len(value) != 4 + (bits + 7) // 8:
        refuse("bit")
    written = "".join(f"{byte:08b}" for byte in value[4:])
    if "1" in written[bits:]:
        refuse("bit")
    return written[:bits]


def _tid(value: bytes) -> str:
    block, row = struct.unpack(">IH", value)
    return f"({block},{row})"


def _snapshot(value: bytes) -> str:
    count, least, most = struct.unpack_from(">iQQ", value)
    if count < 0 or len(value) != 20 + 8 * count:
        refuse("pg_snapshot")
    running = struct.unpack_from(f">{count}Q", value, 20)
    return f"{least}:{most}:{','.join(map(str, running))}"


def _tsvector(value: bytes) -> str:
    (count,) = struct.unpack_from(">i", value)
    at = 4
    words = []
    for _ in range(max(count, -1)):
        end = value.index(0, at)
        lexeme = value[at:end].decode("latin-1").replace("\\", "\\\\").replace("'", "''")
        (positions,) = struct.unpack_from(">H", value, end + 1)
        at = end + 3
        # The two highest bits are the weight. D is the default, and is not written.
        placed = [f"{p & 0x3FFF}{'DCBA'[p >> 14]}".rstrip("D") for p in struct.unpack_from(f">{positions}H", value, at)]
        at += 2 * positions
        words.append(f"'{lexeme}'{':' if placed else ''}{','.join(placed)}")
    if count < 0 or at != len(value):
        refuse("tsvector")
    return " ".join(words)


BITS: Final = _notation("bit", _bits)
TID: Final = _notation("tid", _tid)
SNAPSHOT: Final = _notation("pg_snapshot", _snapshot)
TSVECTOR: Final = _notation("tsvector", _tsvector)


# -- geometric shapes -------------------------------------------------------------------------------------------------


def _numbers(value: bytes, at: int = 0, count: int | None = None) -> list[str]:
    """All the numbers from `at` on, which must be `count`."""
    found = struct.unpack_from(f">{(len(value) - at) // 8}d", value, at)
    if len(value) != at + 8 * len(found) or (count is not None and len(found) != count):
        refuse("geometric type")
    return list(map(float_text, found))


def _points(numbers: list[str]) -> str:
    return ",".join(f"({x},{y})" for x, y in zip(numbers[::2], numbers[1::2], strict=True))


def _path(value: bytes) -> str:
    closed, count = struct.unpack_from(">Bi", value)
    if closed > 1 or count < 1:
        refuse("path")
    points = _points(_numbers(value, 5, 2 * count))
    return f"({points})" if closed else f"[{points}]"


def _polygon(value: bytes) -> str:
    (count,) = struct.unpack_from(">i", value)
    if count < 1:
        refuse("polygon")
    return f"({_points(_numbers(value, 4, 2 * count))})"


def _circle(value: bytes) -> str:
    x, y, radius = _numbers(value, 0, 3)
    return f"<({x},{y}),{radius}>"


SHAPES: Final = {
    601: _notation("lseg", lambda value: f"[{_points(_numbers(value, 0, 4))}]"),
    602: _notation("path", _path),
    603: _notation("box", lambda value: _points(_numbers(value, 0, 4))),
    604: _notation("polygon", _polygon),
    628: _notation("line", lambda value: f"{{{','.join(_numbers(value, 0, 3))}}}"),
    718: _notation("circle", _circle),
}
"""By OID, the geometric types that stay text."""


def point_text(value: bytes) -> bytes:
    """``(1,2.5)``."""
    if len(value) != 16:
        refuse("point")
    return _points(_numbers(value)).encode()
