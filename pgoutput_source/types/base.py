"""The contract of a row of the type table, and the tools to decode a whole column.

A family's decoder is written for a column without NULLs (`dense` puts them back). It looks at the bytes of all values
at once: `Texts` is a NumPy view of them. It first refuses what is not in PostgreSQL's grammar, because Arrow's casts
accept more (``0x1F`` as an int32, ``1e400`` as a double). Then an Arrow kernel parses the column.

With the option `binary`, the send functions of the types write the values. `Sent` is a view of a column of them.
`Binary` decodes it to the same column, and each value to the same text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import zip_longest
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Decode = Callable[[pa.BinaryArray, pa.DataType], pa.Array]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.integer[Any]]
Uint8s = npt.NDArray[np.uint8]


class Sent:
    """Values in binary, none of them NULL: ranges of one buffer, which ascend and do not overlap.

    The buffer has at least 8 more bytes after the last value, so a gather may read there before the lengths are
    checked.
    """

    __slots__ = ("length", "raw", "start", "u1")

    def __init__(self, raw: bytes, start: Ints, length: Ints) -> None:
        self.raw, self.start, self.length = raw, start, length
        self.u1: Uint8s = np.frombuffer(raw, np.uint8)

    @classmethod
    def of(cls, values: Sequence[bytes]) -> Sent:
        """A view of these."""
        length = np.fromiter(map(len, values), np.int64, len(values))
        return cls(b"".join([*values, bytes(8)]), np.cumsum(length) - length, length)

    def __len__(self) -> int:
        return len(self.start)

    def integers(self, dtype: str, at: Ints | int = 0) -> npt.NDArray[Any]:
        """Big-endian numbers of `dtype`, `at` bytes after each value's start, in native byte order."""
        return numbers_at(self.raw, dtype, self.start + at)

    def fixed(self, width: int, name: str) -> None:
        """Refuse values that do not have `width` bytes."""
        if (self.length != width).any():
            refuse(name)

    def part(self, at: Ints | int, length: Ints) -> Sent:
        """A part of each value: `length` bytes, `at` bytes after its start."""
        return Sent(self.raw, self.start + at, length)

    def take(self, rows: Ints | Bools | slice) -> Sent:
        """Some of the values, in their order."""
        return Sent(self.raw, self.start[rows], self.length[rows])

    def slice(self, offset: int, length: int | None = None) -> Sent:
        """The values from `offset` on, `length` of them or all."""
        return self.take(slice(offset, None if length is None else offset + length))

    def slices(self) -> pa.BinaryArray:
        """The bytes of each value."""
        return ranges_of(self.raw, self.start, self.length, None)

    def values(self) -> list[bytes]:
        """The bytes of each value, as Python objects."""
        return [
            self.raw[start : start + length]
            for start, length in zip(self.start.tolist(), self.length.tolist(), strict=True)
        ]


def numbers_at(raw: bytes, dtype: str, offsets: Ints) -> npt.NDArray[Any]:
    """Big-endian numbers of `dtype` at any byte offsets, in native byte order."""
    kind = np.dtype(dtype)
    # Element i is the number that begins at byte i: a fancy index is an unaligned vector load.
    view: npt.NDArray[Any] = np.ndarray(len(raw) - kind.itemsize + 1, kind, buffer=raw, strides=(1,))
    return view[offsets].astype(kind.newbyteorder("="))


def ranges_of(raw: bytes | Uint8s, start: Ints, length: Ints, valid: Bools | None) -> pa.BinaryArray:
    """The byte ranges [start, start + length) as one array; null where not valid. Ranges must ascend."""
    if len(start) == 1 and valid is None and 2 * length[0] > len(raw):
        # Most of the buffer is this value: a copy would cost more than keeping the rest does.
        edge = np.array([start[0], start[0] + length[0]], np.int32)
        return pa.BinaryArray.from_buffers(pa.binary(), 1, [None, pa.py_buffer(edge), pa.py_buffer(raw)])
    edges = np.empty(2 * len(start), np.int32)
    edges[0::2] = start
    np.add(start, length, out=edges[1::2], casting="unsafe")
    return between(raw, edges, valid)


def between(raw: bytes | Uint8s, edges: npt.NDArray[np.int32], valid: Bools | None = None) -> pa.BinaryArray:
    """The byte ranges start0, end0, start1, end1, … as one array, gathered in C++; null where not valid.

    Arrow takes the edges as offsets: value 2i is the wanted range and value 2i + 1 the gap after it. So the ranges must
    ascend.
    """
    n = len(edges) // 2
    if n == 0:
        return pa.array([], pa.binary())
    even = np.arange(0, 2 * n, 2, dtype=np.int32)
    every = pa.BinaryArray.from_buffers(pa.binary(), 2 * n - 1, [None, pa.py_buffer(edges), pa.py_buffer(raw)])
    return every.take(pa.array(even, mask=None if valid is None else ~valid))


@dataclass(frozen=True, slots=True)
class Binary:
    """How to read what a type's send function writes.

    `decode` gives the same Arrow values as the type's decoder of text: null where the Arrow type can't hold a value,
    and a ValueError for bytes that the send function never writes. `text` gives the exact text that PostgreSQL writes
    for one value, or a ValueError. `by_value` says that columns, too, are decoded value by value. That is slow: prefer
    text for such types.
    """

    decode: Callable[[Sent, pa.DataType], pa.Array]
    text: Callable[[bytes], bytes]
    by_value: bool = False


@dataclass(frozen=True, slots=True)
class PgType:
    """One row of the table.

    `oid` is PostgreSQL's (0 for a type whose OID differs from database to database); `arrow` gives the canonical Arrow
    type for a typmod (-1: none); `decode` turns a column of PostgreSQL's text into it, see `pgoutput_source.types`.
    `misfits` names the legitimate values that the Arrow type can't hold. `array` is the OID of the type's array type, 0
    if it has none, and `delimiter` separates its elements. `binary` reads what the type's send function writes; None if
    that needs the server's help. `metadata` gives, for a typmod, the metadata of the Arrow field besides PostgreSQL's
    names, such as the name of an Arrow extension type. `changed` is the last transaction that altered the parts of the
    type, 0 if none did.
    """

    oid: int
    name: str
    arrow: Callable[[int], pa.DataType]
    decode: Decode
    misfits: str = ""
    array: int = 0
    delimiter: str = ","
    binary: Binary | None = None
    metadata: Callable[[int], Mapping[str, str]] | None = None
    changed: int = 0


def always(kind: pa.DataType) -> Callable[[int], pa.DataType]:
    """The same Arrow type for every typmod."""
    return lambda typmod: kind


def text(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    """PostgreSQL's text as it is. Raises pa.ArrowInvalid where it is not UTF-8."""
    return values.cast(kind)


def same_bytes(decode: Decode) -> Binary:
    """For a type whose send function writes the very bytes of its text."""
    return Binary(lambda sent, kind: decode(sent.slices(), kind), lambda value: value)


def through_text(to_text: Callable[[bytes], bytes], decode: Decode) -> Binary:
    """For a rare type: turn each value into its text, then decode the texts."""

    def decode_texts(sent: Sent, kind: pa.DataType) -> pa.Array:
        return decode(pa.array(list(map(to_text, sent.values())), pa.binary()), kind)

    return Binary(decode_texts, to_text, by_value=True)


def fixed_width(
    dtype: str, name: str, to_arrow: Callable[[npt.NDArray[Any], pa.DataType], pa.Array], to_text: Callable[[Any], str]
) -> Binary:
    """For a type that is one number of `dtype`, from functions that make the column and the text."""
    width = np.dtype(dtype).itemsize

    def decode(sent: Sent, kind: pa.DataType) -> pa.Array:
        sent.fixed(width, name)
        return to_arrow(sent.integers(dtype), kind)

    def text_of(value: bytes) -> bytes:
        if len(value) != width:
            refuse(name)
        return to_text(np.frombuffer(value, dtype)[0].item()).encode()

    return Binary(decode, text_of)


def exact_text(value: bytes) -> str:
    r"""A value's text as a string. Bytes that are not UTF-8 are in the escape format of bytea, which loses nothing.

    https://www.postgresql.org/docs/current/datatype-binary.html#DATATYPE-BINARY-BYTEA-ESCAPE-FORMAT

    >>> print(exact_text("ä".encode()), exact_text(b"\xe4 \\"))
    ä \344 \\
    """
    try:
        return value.decode()
    except UnicodeDecodeError:
        return "".join("\\\\" if b == 92 else chr(b) if 0 < b < 128 else f"\\{b:03o}" for b in value)


def unescaped(text: str) -> bytes:
    r"""The bytes that `exact_text` wrote in the escape format.

    >>> unescaped(exact_text(b"\xe4 \\"))
    b'\xe4 \\'
    """
    parts = re.split(r"\\(\\|[0-7]{3})", text)
    octal = ["\\" if part == "\\" else chr(int(part, 8)) for part in parts[1::2]]
    return "".join(map("".join, zip_longest(parts[::2], octal, fillvalue=""))).encode("latin-1")


def refuse(name: str) -> NoReturn:
    """Raise: a value of the column is not of the type `name`. The caller finds out which one."""
    raise ValueError(f"not a value of type {name}")


class Texts:
    """The bytes of a column without NULLs: `data` holds all values end to end, `offsets` where each begins and ends."""

    __slots__ = ("data", "ends", "lengths", "starts")

    def __init__(self, values: pa.BinaryArray) -> None:
        _, offsets, data = values.buffers()
        if len(values) == 0:  # Then Arrow may have no buffers at all.
            self.data, edges = np.zeros(0, np.uint8), np.zeros(1, np.int32)
        else:
            edges = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
            whole = np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
            self.data = whole[edges[0] : edges[-1]]
            edges = edges - edges[0]
        self.starts: Ints = edges[:-1]
        self.ends: Ints = edges[1:]
        self.lengths: Ints = self.ends - self.starts

    def __len__(self) -> int:
        return len(self.starts)

    def at(self, position: int) -> Uint8s:
        """The byte at `position` of each value; a negative one counts from the end. No value may be shorter."""
        return self.data[(self.starts if position >= 0 else self.ends) + position]

    def without(self, characters: bytes) -> bytes:
        """All bytes but `characters`."""
        return self.data.tobytes().translate(None, characters)


def nulled(values: pa.BinaryArray, mask: Bools) -> pa.BinaryArray:
    """A column without NULLs, with NULL where `mask` is true. Copies no values."""
    bits = pa.py_buffer(np.packbits(np.concatenate([np.ones(values.offset, bool), ~mask]), bitorder="little"))
    _, offsets, data = values.buffers()
    return pa.Array.from_buffers(values.type, len(values), [bits, offsets, data], offset=values.offset)


def dense(decode: Decode) -> Decode:
    """Make a decoder of columns without NULLs accept NULLs."""

    @wraps(decode)
    def with_nulls(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        if values.null_count == 0:
            return decode(values, kind)
        valid = values.is_valid().to_numpy(zero_copy_only=False)
        return decode(values.drop_null(), kind).take(pa.array(np.cumsum(valid) - 1, mask=~valid))

    return with_nulls


def one_of(values: pa.BinaryArray, *words: bytes) -> Ints:
    """The index of each value among the words, -1 if it is not among them."""
    found = pc.index_in(values, pa.array(words, values.type))
    return found.fill_null(-1).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def with_misfits(decode: Decode, *words: bytes) -> Decode:
    """Make a decoder of columns without NULLs accept NULLs, and treat the rare values `words` as misfits.

    `decode` refuses these words. Few columns have any, so the column is first decoded as it is.
    """
    whole = dense(decode)

    @wraps(decode)
    def retried(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        try:
            return whole(values, kind)
        except ValueError:
            pass
        present = values.drop_null()
        misfit = one_of(present, *words) >= 0
        if not misfit.any():
            return whole(values, kind)
        return dense(lambda some, _: whole(nulled(some, misfit), kind))(values, kind)

    return retried


def charset(allowed: bytes, name: str) -> Decode:
    """A decoder to text of a type whose values consist of the bytes `allowed`."""

    @dense
    def decode(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        if Texts(values).without(allowed):
            refuse(name)
        return values.cast(kind)

    return decode


def pattern(regex: str, name: str) -> Decode:
    """A decoder to text of a type whose values match `regex` as a whole."""

    def decode(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        strings = values.cast(kind)
        if not pc.all(pc.match_substring_regex(strings, f"^(?:{regex})$"), min_count=0).as_py():
            refuse(name)
        return strings

    return decode
