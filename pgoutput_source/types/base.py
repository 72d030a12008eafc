"""The contract of a row of the type table, and how a family looks at a column as a whole.

A family's decoder is written for a column without NULLs (`dense` puts them back). It looks at the bytes of all values
at once: `Texts` is a NumPy view of them. It first refuses what is not PostgreSQL's grammar, because Arrow's own casts
are more generous (``0x1F`` is an int32 to them, ``1e400`` a double), and then lets an Arrow kernel parse the column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Decode = Callable[[pa.BinaryArray, pa.DataType], pa.Array]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.integer[Any]]
Uint8s = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PgType:
    """One row of the table.

    `oid` is PostgreSQL's (0 for a type whose OID differs from database to database); `arrow` gives the canonical Arrow
    type for a typmod (-1: none); `decode` turns a column of PostgreSQL's text into it, see `pgoutput_source.types`.
    `misfits` says in words which legitimate values the Arrow type can't hold. `array` is the OID of the type of its
    arrays, 0 if it has none, and `delimiter` what separates their elements. `metadata` gives for a typmod what the Arrow
    field says besides PostgreSQL's names, such as the name of an Arrow extension type. `changed` is the transaction
    that last changed what a value of the type consists of, 0 if it is as it was made.
    """

    oid: int
    name: str
    arrow: Callable[[int], pa.DataType]
    decode: Decode
    misfits: str = ""
    array: int = 0
    delimiter: str = ","
    metadata: Callable[[int], Mapping[str, str]] | None = None
    changed: int = 0


def always(kind: pa.DataType) -> Callable[[int], pa.DataType]:
    """The Arrow type that does not depend on the typmod."""
    return lambda typmod: kind


def text(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    """PostgreSQL's text as it is. Raises pa.ArrowInvalid where it is not UTF-8."""
    return values.cast(kind)


def refuse(name: str) -> NoReturn:
    """Say that a column has a value that is no text of the type `name`; whoever called finds out which."""
    raise ValueError(f"not a value of type {name}")


class Texts:
    """The bytes of a column without NULLs: `data` holds all values end to end, `offsets` where each begins and ends."""

    __slots__ = ("data", "ends", "lengths", "starts")

    def __init__(self, values: pa.BinaryArray) -> None:
        _, offsets, data = values.buffers()
        if len(values) == 0:  # Arrow then may give no buffers at all.
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
        """The byte at `position` of each value; a negative one counts from the end. Every value must be so long."""
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
    """A decoder of any column from one of columns without NULLs."""

    @wraps(decode)
    def with_nulls(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        if values.null_count == 0:
            return decode(values, kind)
        valid = values.is_valid().to_numpy(zero_copy_only=False)
        return decode(values.drop_null(), kind).take(pa.array(np.cumsum(valid) - 1, mask=~valid))

    return with_nulls


def one_of(values: pa.BinaryArray, *words: bytes) -> Ints:
    """For each value the index of the word that it is, -1 if it is none of them."""
    found = pc.index_in(values, pa.array(words, values.type))
    return found.fill_null(-1).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def with_misfits(decode: Decode, *words: bytes) -> Decode:
    """A decoder to which the rare values `words` are misfits, from one (of columns without NULLs) that refuses them.

    Almost no column holds one, so the column is first tried as it is.
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
