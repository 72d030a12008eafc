"""Numbers and booleans.

https://www.postgresql.org/docs/current/datatype-numeric.html
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.types.base import (
    Binary,
    Bools,
    Decode,
    PgType,
    Sent,
    Texts,
    always,
    dense,
    fixed_width,
    nulled,
    one_of,
    refuse,
    with_misfits,
)
from pgoutput_source.types.numbers_binary import NUMERIC_BINARY

_ZERO, _MINUS, _DOT = ord("0"), ord("-"), ord(".")
_SPECIAL = (b"NaN", b"Infinity", b"-Infinity")


@dense
def boolean(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    """``t`` and ``f``."""
    t = Texts(values)
    true = t.data == ord("t")
    if not (t.lengths == 1).all() or not (true | (t.data == ord("f"))).all():
        refuse("boolean")
    return pa.Array.from_buffers(kind, len(t), [None, pa.py_buffer(np.packbits(true, bitorder="little"))])


def _leading_zeros(t: Texts, minus: Bools) -> bool:
    """Whether a value begins with a zero that is neither its only digit nor right before the point."""
    at = t.starts + minus
    several = t.lengths - minus > 1
    at = at[several]
    return bool(((t.data[at] == _ZERO) & (t.data[at + 1] != _DOT)).any())


def _check_plain(t: Texts, scale: int, name: str) -> None:
    """Check that every value is digits, after an optional minus, with exactly `scale` of them after a point.

    It looks where a minus or a point may be. All the other bytes must be digits, so counting the digits of the whole
    column is enough.
    """
    point = scale + 1 if scale else 0
    if not len(t):
        return
    if t.lengths.min() <= point:
        refuse(name)
    minus = t.at(0) == _MINUS
    digits = np.count_nonzero((t.data - _ZERO) < 10)
    if digits + np.count_nonzero(minus) + (len(t) if scale else 0) != len(t.data):
        refuse(name)
    if (t.lengths - minus <= point).any() or (scale and (t.at(-point) != _DOT).any()) or _leading_zeros(t, minus):
        refuse(name)


def integer_text(name: str) -> Decode:
    """How to read the text of the integer type `name`."""

    @dense
    def integer(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        _check_plain(Texts(values), 0, name)
        return values.cast(pa.utf8()).cast(kind)

    return integer


def floating_text(name: str) -> Decode:
    """How to read the text of the floating-point type `name`, whose infinities and NaN Arrow holds as they are."""

    @dense
    def floating(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        special = None
        if Texts(values).without(b"0123456789-.e+"):
            special = one_of(values, *_SPECIAL)
            values = nulled(values, special >= 0)
            if Texts(values.drop_null()).without(b"0123456789-.e+"):
                refuse(name)
        # Arrow's parser rounds to the nearest value as PostgreSQL does, but gives infinity or zero for values out of
        # range, where PostgreSQL raises an error: so neither may result unless the text says so.
        numbers = values.cast(pa.utf8()).cast(kind)
        out = numbers.fill_null(1).to_numpy(zero_copy_only=False)
        if not np.isfinite(out).all():
            refuse(name)
        zero = out == 0
        if zero.any() and (one_of(values.filter(pa.array(zero)), b"0", b"-0") < 0).any():
            refuse(name)
        if special is None:
            return numbers
        return pa.array(np.where(special < 0, out, np.array([np.nan, np.inf, -np.inf], out.dtype)[special]))

    return floating


def precision_and_scale(typmod: int) -> tuple[int, int]:
    """The p and s of ``numeric(p,s)``.

    >>> precision_and_scale(655366), precision_and_scale(329729), precision_and_scale(196617)
    ((10, 2), (5, -3), (3, 5))
    """
    return (typmod - 4) >> 16 & 0xFFFF, (((typmod - 4) & 0x7FF) ^ 1024) - 1024


def numeric_arrow(typmod: int) -> pa.DataType:
    """The narrowest decimal for ``numeric(p,s)``; utf8 where there is none.

    Parquet knows no negative scale and no scale above the precision: ``numeric(5,-3)`` needs 8 digits before the point,
    ``numeric(3,5)`` needs five after it. Without bounds, no Arrow type holds every value. Above 38 digits, decimal256
    would, but Polars can't read a table that has one, and DuckDB wrongly reads it from Parquet as DOUBLE.

    >>> numeric_arrow(655366), numeric_arrow(329729), numeric_arrow(-1)
    (Decimal128Type(decimal128(10, 2)), Decimal128Type(decimal128(8, 0)), DataType(string))
    """
    if typmod < 4:
        return pa.utf8()
    precision, scale = precision_and_scale(typmod)
    digits, scale = (max(precision, scale), scale) if scale >= 0 else (precision - scale, 0)
    return pa.decimal128(digits, scale) if digits <= 38 else pa.utf8()


def _exact(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    t = Texts(values)
    _check_plain(t, kind.scale, "numeric")
    if len(t):
        # Digits before the point. Arrow's cast overflows silently, so there must not be too many.
        minus = t.at(0) == _MINUS
        whole = t.lengths - minus - (kind.scale + 1 if kind.scale else 0)
        room = kind.precision - kind.scale
        if whole.max() > max(room, 1) or (room == 0 and (t.data[t.starts + minus] != _ZERO).any()):
            refuse(f"numeric({kind.precision},{kind.scale})")
    if kind.precision > 18:
        return values.cast(pa.utf8()).cast(kind)
    # Up to 18 digits: without their points the values are int64s, twice as fast to parse as decimals.
    unscaled = values
    if kind.scale:
        edges = np.append(t.starts, len(t.data)) - np.arange(len(t) + 1)
        buffers = [None, pa.py_buffer(edges.astype(np.int32)), pa.py_buffer(t.without(b"."))]
        unscaled = pa.Array.from_buffers(pa.binary(), len(t), buffers)
    integers = unscaled.cast(pa.utf8()).cast(pa.int64()).to_numpy(zero_copy_only=False)
    words = np.empty((len(t), 2), "<i8")  # A decimal128 is a little-endian 128-bit integer.
    words[:, 0] = integers
    words[:, 1] = integers >> 63
    return pa.Array.from_buffers(kind, len(t), [None, pa.py_buffer(words)])


_exact_or_misfit = with_misfits(_exact, b"NaN")  # Infinity has no place in numeric(p,s).


@dense
def _any_numeric(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    strings = values.cast(kind)
    t = Texts(values)
    if len(t):
        # Each value is a special one, or digits after an optional minus, with at most one point among them.
        special = one_of(values, *_SPECIAL) >= 0
        finite = Texts(values.filter(pa.array(~special))) if special.any() else t
        points = np.flatnonzero(finite.data == _DOT)
        owner = np.searchsorted(finite.starts, points, "right") - 1  # Empty values share a start, but are refused.
        minus = finite.at(0) == _MINUS if len(finite) and finite.lengths.min() else np.zeros(0, bool)
        digits = np.count_nonzero((finite.data - _ZERO) < 10)
        if (
            len(minus) != len(finite)
            or digits + len(points) + np.count_nonzero(minus) != len(finite.data)
            or (owner[1:] == owner[:-1]).any()
            # There is a digit on each side of a point, and after a minus.
            or (points - finite.starts[owner] - minus[owner] < 1).any()
            or (points + 1 == finite.ends[owner]).any()
            or (finite.lengths <= minus).any()
            or _leading_zeros(finite, minus)
        ):
            refuse("numeric")
    return strings


def numeric(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    """Decimals of a fixed scale, or the exact text."""
    return (_exact_or_misfit if pa.types.is_decimal(kind) else _any_numeric)(values, kind)


@dense
def money(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    """Money in the format of ``lc_monetary=C``: ``-$1,234,567.89``."""
    t = Texts(values)
    if not len(t):
        return pa.nulls(0, kind)
    if t.lengths.min() < 5:
        refuse("money")
    minus = t.at(0) == _MINUS
    first = t.starts + minus + 1
    # Commas separate the digits before the point into groups of three; the rest is checked below.
    commas = np.flatnonzero(t.data == ord(","))
    point = t.ends - 3
    owner = np.searchsorted(t.starts, commas, "right") - 1
    if (
        (t.data[first - 1] != ord("$")).any()
        or np.count_nonzero(t.data == ord("$")) != len(t)
        or np.count_nonzero(t.data == _MINUS) != np.count_nonzero(minus)
        or (np.bincount(owner, minlength=len(t)) != (point - first) // 4).any()
        or ((point - first) % 4 == 0).any()
        or ((point[owner] - commas) % 4 != 0).any()
        or (commas < first[owner]).any()
    ):
        refuse("money")
    kept = np.append(0, np.cumsum((t.data != ord("$")) & (t.data != ord(",")), dtype=np.int32)).astype(np.int32)
    edges = np.append(kept[t.starts], kept[-1])
    buffers = [None, pa.py_buffer(edges), pa.py_buffer(t.without(b"$,"))]
    amounts = _exact(pa.Array.from_buffers(pa.binary(), len(t), buffers), kind)
    least, most = pc.min_max(amounts).as_py().values()
    if len(t) and not -(2**63) <= int(least.scaleb(2)) <= int(most.scaleb(2)) < 2**63:
        refuse("money")
    return amounts


def as_it_is(numbers: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    """A column of numbers that the Arrow type holds as they are."""
    return pa.array(numbers, kind)


def integer_binary(dtype: str, name: str) -> Binary:
    """An integer type of the width of `dtype`."""
    return fixed_width(dtype, name, as_it_is, str)


def _floats(numbers: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    missing = np.isnan(numbers)
    if missing.any():
        numbers[missing] = np.nan  # there are many NaNs, with the same text
    return pa.array(numbers, kind)


def float_text(value: float, bits: int = 64) -> str:
    """PostgreSQL's text of a floating-point number: the fewest digits that are nearer to it than to any other.

    Python's text may lie midway between two numbers, because it is read back as the even one.

    >>> float_text(9.06930671788664e17), float_text(1e15), float_text(0.1), float_text(1.6777216e7, 32)
    ('9.069306717886641e+17', '1e+15', '0.1', '1.6777216e+07')
    """
    if value != value:
        return "NaN"
    sign = "-" if np.signbit(value) else ""
    number = np.float32(abs(value)) if bits == 32 else np.float64(abs(value))
    if np.isinf(number) or number == 0:
        return sign + ("0" if number == 0 else "Infinity")
    mantissa, _, exponent = np.format_float_scientific(number, trim="-").partition("e")
    digits, tens = mantissa.replace(".", ""), int(exponent)
    exact = Fraction(float(number))
    below = Fraction(float(np.nextafter(number, type(number)(0))))
    above = Fraction(float(np.nextafter(number, type(number)(np.inf)))) if number < np.finfo(number).max else None
    low, high = (below + exact) / 2, (exact + (2 * exact - below if above is None else above)) / 2
    if not low < int(digits) * Fraction(10) ** (tens + 1 - len(digits)) < high:
        for length in range(len(digits), 18):
            unit = Fraction(10) ** (tens + 1 - length)
            down = exact // unit
            inside = [n for n in (down, down + 1) if low < n * unit < high]
            if inside:
                digits = str(min(inside, key=lambda n: abs(n * unit - exact)))
                break
    digits = digits.rstrip("0")
    if not -4 <= tens < (6 if bits == 32 else 15):
        return f"{sign}{digits[0]}{'.' if digits[1:] else ''}{digits[1:]}e{tens:+03d}"
    if tens < 0:
        return f"{sign}0.{'0' * (-tens - 1)}{digits}"
    whole, fraction = digits[: tens + 1].ljust(tens + 1, "0"), digits[tens + 1 :]
    return f"{sign}{whole}{'.' if fraction else ''}{fraction}"


FLOAT4 = fixed_width(">f4", "real", _floats, lambda value: float_text(value, 32))
FLOAT8 = fixed_width(">f8", "double precision", _floats, float_text)


def _booleans(sent: Sent, kind: pa.DataType) -> pa.Array:
    sent.fixed(1, "boolean")
    true = sent.u1[sent.start]
    if true.max(initial=0) > 1:
        refuse("boolean")
    return pa.Array.from_buffers(kind, len(sent), [None, pa.py_buffer(np.packbits(true, bitorder="little"))])


def _boolean_text(value: bytes) -> bytes:
    if value not in (b"\0", b"\1"):
        refuse("boolean")
    return b"t" if value == b"\1" else b"f"


def _amounts(numbers: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    words = np.empty((len(numbers), 2), "<i8")
    words[:, 0] = numbers
    words[:, 1] = numbers >> 63
    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(words)])


def _money_text(cents: int) -> str:
    whole, rest = divmod(abs(cents), 100)
    return f"{'-' if cents < 0 else ''}${whole:,}.{rest:02}"


NUMBERS = (
    PgType(16, "boolean", always(pa.bool_()), boolean, array=1000, binary=Binary(_booleans, _boolean_text)),
    PgType(
        21,
        "smallint",
        always(pa.int16()),
        integer_text("smallint"),
        array=1005,
        binary=integer_binary(">i2", "smallint"),
    ),
    PgType(
        23, "integer", always(pa.int32()), integer_text("integer"), array=1007, binary=integer_binary(">i4", "integer")
    ),
    PgType(
        20, "bigint", always(pa.int64()), integer_text("bigint"), array=1016, binary=integer_binary(">i8", "bigint")
    ),
    PgType(700, "real", always(pa.float32()), floating_text("real"), array=1021, binary=FLOAT4),
    PgType(701, "double precision", always(pa.float64()), floating_text("double precision"), array=1022, binary=FLOAT8),
    PgType(
        1700,
        "numeric",
        numeric_arrow,
        numeric,
        misfits="NaN, where it is a decimal",
        array=1231,
        binary=NUMERIC_BINARY,
    ),
    PgType(
        790,
        "money",
        always(pa.decimal128(19, 2)),
        money,
        array=791,
        binary=fixed_width(">i8", "money", _amounts, _money_text),  # cents: lc_monetary is pinned to C
    ),
)
