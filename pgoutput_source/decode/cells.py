"""One column's values and a decoder that refuses some of them: which ones, and what becomes of the others.

A decoder looks at a whole column and raises for a single bad value. Here the bad ones are found, by halving.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgoutput_source.types.base import PgType, Sent

Bools: TypeAlias = NDArray[np.bool_]
Values: TypeAlias = pa.BinaryArray | Sent
"""A column's values, as text or in binary."""
DecodeValues: TypeAlias = Callable[[Any, pa.DataType], pa.Array]


class BadValue(ValueError):
    """The value at `index` is not a value of its type."""

    def __init__(self, index: int) -> None:
        super().__init__(f"value {index} is not a value of its type")
        self.index = index


def decoded(values: Values, pg_type: PgType, decode: DecodeValues, kind: pa.DataType, *, defined: bool) -> pa.Array:
    """A column's values as `kind`, by the type's decoder of text or of binary.

    Some values that the decoder refuses are misfits, so their cell is null: a text that is not UTF-8, which a database
    in SQL_ASCII may send; and any value of a type that the database defines itself (`defined`), which was altered since
    the catalogue was asked.

    Raises:
        BadValue: The first value that the decoder refuses otherwise.
    """
    try:
        return decode(values, kind)
    except (ValueError, pa.ArrowException) as e:
        if defined:
            return salvaged(decode, values, kind)
        alien = not_utf8(values, pg_type, kind)
        if alien is None:
            raise BadValue(first_bad(values, lambda part: decode(part, kind))) from e
    good = np.flatnonzero(~alien)
    part = values.take(good) if isinstance(values, Sent) else values.take(pa.array(good))
    try:
        found = decoded(part, pg_type, decode, kind, defined=defined)
    except BadValue as e:
        raise BadValue(int(good[e.index])) from e
    return found.take(pa.array(np.cumsum(~alien) - 1, mask=alien))


def salvaged(decode: DecodeValues, values: Values, kind: pa.DataType) -> pa.Array:
    """The values that decode; the others are null."""
    try:
        return decode(values, kind)
    except (ValueError, pa.ArrowException):
        if len(values) == 1:
            return pa.nulls(1, kind)
        half = len(values) // 2
        return pa.concat_arrays([salvaged(decode, part, kind) for part in (values.slice(0, half), values.slice(half))])


def not_utf8(values: Values, pg_type: PgType, kind: pa.DataType) -> Bools | None:
    """Which values that hold text are not UTF-8, None if all are: a database in SQL_ASCII sends any bytes."""
    if not (pa.types.is_string(kind) or pa.types.is_nested(kind)):
        return None
    texts = values.to_pylist() if isinstance(values, pa.Array) else map(_text_or_none, repeat(pg_type), values.values())
    alien = np.zeros(len(values), np.bool_)
    for at, text in enumerate(texts):
        try:
            (text or b"").decode()
        except UnicodeDecodeError:
            alien[at] = True
    return alien if alien.any() else None


def _text_or_none(pg_type: PgType, value: bytes) -> bytes | None:
    try:
        return pg_type.binary.text(value) if pg_type.binary else None
    except ValueError:
        return None


def first_bad(values: Values, decode: Callable[[Any], pa.Array]) -> int:
    """Index of the first value that fails to decode."""
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            decode(values.slice(low, middle - low))
        except (ValueError, pa.ArrowException):
            high = middle
        else:
            low = middle
    return low
