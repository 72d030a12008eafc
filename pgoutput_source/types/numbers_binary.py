"""``numeric`` in binary: digits of base 10000, the weight of the first, a sign, and how many decimal places are shown.

A column is read digit by digit, each step for all rows at once: into integers where the Arrow type is a decimal, into
characters where it is text. Values that would make all rows too wide are written one by one.

https://www.postgresql.org/docs/current/datatype-numeric.html#DATATYPE-NUMERIC-DECIMAL
https://github.com/postgres/postgres/blob/REL_18_STABLE/src/backend/utils/adt/numeric.c (numeric_send)
"""

from __future__ import annotations

import struct
import sys
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pgoutput_source.types.base import Binary, Bools, Sent, ranges_of, refuse

_HEAD: Final = 8
_NEGATIVE: Final = 0x4000
_SPECIAL: Final = {0xC000: b"NaN", 0xD000: b"Infinity", 0xF000: b"-Infinity"}
_LAST_DSCALE: Final = 0x3FFF
_WIDEST: Final = 8  # more digits of base 10000 on one side of the point are written value by value

# The characters of each digit of base 10000, as one integer.
_CHARACTERS = np.frombuffer(b"".join(b"%04d" % i for i in range(10_000)), "<u4")
_SHOWN = np.array([len(str(i)) for i in range(10_000)])
_TENS = 10 ** np.arange(5)
_POINT, _MINUS = b".-"
_LITTLE: Final = slice(None, None, -1 if sys.byteorder == "little" else 1)

Ints = npt.NDArray[np.integer[Any]]


class _Parts(NamedTuple):
    """The headers of values, and which of them are not numbers."""

    digits: Ints
    weight: Ints
    negative: Bools
    dscale: Ints
    special: Bools

    def take(self, rows: Bools) -> _Parts:
        """Those of some of the values."""
        return _Parts(self.digits[rows], self.weight[rows], self.negative[rows], self.dscale[rows], self.special[rows])


def _parts(sent: Sent) -> _Parts:
    if (sent.length < _HEAD).any():
        refuse("numeric")
    head = np.ascontiguousarray(sent.integers(">u8")).view(np.int16).reshape(-1, 4)[:, _LITTLE]
    digits, weight, dscale = (head[:, at].astype(np.int32) for at in (0, 1, 3))
    sign = head[:, 2].view(np.uint16)
    if (sent.length != _HEAD + 2 * digits).any():
        refuse("numeric")
    negative = sign == _NEGATIVE
    special = ~negative & (sign != 0)
    if special.any():
        if not np.isin(sign[special], list(_SPECIAL)).all() or digits[special].any():
            refuse("numeric")
        dscale[special] = weight[special] = 0
    # A zero has no digits and no sign, and no digit is beyond the decimal places shown. The server sends no other
    # numbers: their text would hide something.
    if (
        dscale.min(initial=0) < 0
        or dscale.max(initial=0) > _LAST_DSCALE
        or (negative > digits).any()
        or (digits > np.maximum(weight + 1 + (dscale + 3 >> 2), 0)).any()
    ):
        refuse("numeric")
    return _Parts(digits, weight, negative, dscale, special)


def _digit(sent: Sent, parts: _Parts, weight: int) -> Ints:
    """Each value's digit of base 10000 that counts 10000 ** weight."""
    index = parts.weight - weight
    has = (index >= 0) & (index < parts.digits)
    if has.all():
        digit = sent.integers(">u2", _HEAD + 2 * index)
    else:
        digit = sent.integers(">u2", (_HEAD + 2 * index) * has) * has
    if digit.max(initial=0) > 9999:
        refuse("numeric")
    return digit.astype(np.int64)


def _decimals(sent: Sent, parts: _Parts, kind: pa.Decimal128Type) -> pa.Array:
    precision, scale = kind.precision, kind.scale
    name = f"numeric({precision},{scale})"
    before, after = -(-(precision - scale) // 4), -(-scale // 4)
    if (parts.dscale != scale).any() or (parts.digits.astype(bool) & (parts.weight >= before)).any():
        refuse(name)
    words = _Words(len(sent), precision)
    for weight in range(min(int(parts.weight.max(initial=-1)), before - 1), -after - 1, -1):
        digit = _digit(sent, parts, weight)
        if weight == before - 1 and digit.max(initial=0) >= 10 ** (precision - scale - 4 * weight):
            refuse(name)
        if weight == -after and (unseen := 4 * after - scale):
            digit, hidden = np.divmod(digit, 10**unseen)
            if hidden.any():
                refuse(name)
            words.push(10 ** (4 - unseen), digit)
        else:
            words.push(10_000, digit)
    return pa.Array.from_buffers(kind, len(sent), [None, pa.py_buffer(words.signed(parts.negative))])


class _Words:
    """Integers of up to 38 decimal digits, each in as many words of 32 bits as it needs; up to 18 digits in one."""

    def __init__(self, rows: int, precision: int) -> None:
        self.words: list[npt.NDArray[np.uint64]] = [np.zeros(rows, np.uint64)]
        self.narrow = precision <= 18
        self.largest = 0
        self.base = 1
        self.digit: npt.NDArray[np.uint64] = np.zeros(rows, np.uint64)

    def push(self, base: int, digit: Ints) -> None:
        """Each number times `base`, plus its `digit`."""
        if self.narrow:
            self.words[0] = self.words[0] * np.uint64(base) + digit.view(np.uint64)
            return
        # Two digits at a time are half the work: a word times 10 ** 8 is still less than 2 ** 64.
        if self.base * base > 10**8:
            self._multiply()
        self.base *= base
        self.digit = self.digit * np.uint64(base) + digit.view(np.uint64)

    def _multiply(self) -> None:
        self.largest = self.largest * self.base + self.base - 1
        carry = self.digit
        for i, word in enumerate(self.words):
            wide = word * np.uint64(self.base) + carry
            self.words[i], carry = wide & np.uint64(0xFFFFFFFF), wide >> np.uint64(32)
        if self.largest >> 32 * len(self.words):
            self.words.append(carry)
        self.base, self.digit = 1, np.zeros_like(carry)

    def signed(self, negative: Bools) -> npt.NDArray[np.int64]:
        """As decimal128 needs them: little-endian integers of 128 bits."""
        if not self.narrow:
            self._multiply()
        out = np.zeros((len(negative), 2), "<u8")
        out[:, 0] = self.words[0]
        for i, word in enumerate(self.words[1:], 1):
            out[:, i // 2] |= word << np.uint64(32 * (i % 2))
        if negative.any():
            out[negative] = ~out[negative]
            out[negative, 0] += np.uint64(1)
            out[:, 1] += (negative & (out[:, 0] == 0)).astype(np.uint64)
        return out.view(np.int64)


def _texts(sent: Sent, parts: _Parts) -> pa.Array:
    """Numbers that are not too wide, as text: each is a range of a row of characters."""
    before = max(int(parts.weight.max(initial=0)), 0) + 1
    after = (int(parts.dscale.max(initial=0)) + 3) // 4
    point = 1 + 4 * before  # A minus has a place before the first digit.
    width = point + 1 + 4 * after
    characters = bytearray(len(sent) * width + 8)

    def write(at: int, digit: Ints) -> None:
        column = np.ndarray(len(sent), "<u4", characters, at, (width,))
        column[:] = _CHARACTERS[digit]

    for group in range(before):
        write(1 + 4 * group, _digit(sent, parts, before - 1 - group))
    for group in range(after):
        digit = _digit(sent, parts, -1 - group)
        hidden = np.clip(4 * (group + 1) - parts.dscale, 0, 4)
        if hidden.any() and (digit % _TENS[hidden]).any():
            refuse("numeric")
        write(point + 1 + 4 * group, digit)
    table = np.frombuffer(characters, np.uint8)[: len(sent) * width].reshape(-1, width)
    table[:, point] = _POINT
    first = sent.integers(">u2", np.where(parts.digits > 0, _HEAD, 0))
    shown = np.where((parts.digits > 0) & (parts.weight >= 0), 4 * parts.weight + _SHOWN[np.minimum(first, 9999)], 1)
    minus = np.flatnonzero(parts.negative)
    table[minus, (point - 1 - shown)[minus]] = _MINUS
    start = np.arange(len(sent)) * width + point - shown - parts.negative
    length = parts.negative + shown + parts.dscale + (parts.dscale > 0)
    return ranges_of(bytes(characters), start, length, None).cast(pa.utf8())


def _text(value: bytes) -> bytes:
    """PostgreSQL's text of one value."""
    sent = Sent.of([value])
    parts = _parts(sent)
    digits, weight, sign, dscale = struct.unpack_from(">HhHH", value)
    if sign in _SPECIAL:
        return _SPECIAL[sign]
    groups = struct.unpack_from(f">{digits}H", value, _HEAD)
    if max(groups, default=0) > 9999:
        refuse("numeric")
    written = b"%04d" * digits % groups
    if weight < 0:
        written, weight = b"0000" * -weight + written, 0
    point = 4 * (weight + 1)
    written = written.ljust(point + dscale, b"0")
    if written[point + dscale :].strip(b"0"):
        refuse("numeric")
    whole, fraction = written[:point].lstrip(b"0") or b"0", written[point : point + dscale]
    return (b"-" if parts.negative[0] else b"") + whole + (b"." + fraction if dscale else b"")


def _decode(sent: Sent, kind: pa.DataType) -> pa.Array:
    parts = _parts(sent)
    decimal = pa.types.is_decimal(kind)
    if decimal:
        if parts.special.any() and (sent.integers(">u2", 4)[parts.special] != 0xC000).any():
            refuse("numeric")  # Infinity has no place in numeric(p,s).
        odd = parts.special
    else:
        odd = parts.special | (parts.weight >= _WIDEST) | (parts.dscale > 4 * _WIDEST)
        # Leading zeros are not sent, but would do no harm.
        odd |= (parts.digits > 0) & (sent.integers(">u2", np.where(parts.digits > 0, _HEAD, 0)) == 0)
    if not odd.any():
        return _decimals(sent, parts, kind) if decimal else _texts(sent, parts)
    usual = ~odd
    plain = sent.take(usual)
    plain_parts = parts.take(usual)
    rows = np.cumsum(usual) - 1
    if decimal:
        return _decimals(plain, plain_parts, kind).take(pa.array(rows, mask=odd))
    others = pa.array(list(map(_text, sent.take(odd).values())), pa.binary()).cast(kind)
    rows[odd] = len(plain) + np.arange(len(others))
    return pa.concat_arrays([_texts(plain, plain_parts), others]).take(pa.array(rows))


NUMERIC_BINARY: Final = Binary(_decode, _text)
"""`numeric` as numeric_send writes it."""
