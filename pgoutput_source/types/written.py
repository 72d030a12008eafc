"""The inverse of the type table: Arrow columns as text that PostgreSQL's input functions read.

The way to another PostgreSQL leads through text: every type has it, and the server itself reads it. What the type table
decoded from a text is written so that the server reads the same value, though perhaps not with the same characters:
``1 mons 2 days`` for ``1 mon 2 days``. Whole columns at once; rows never become Python objects.

The session that reads the text has `DateStyle` ISO, `IntervalStyle` postgres and `TimeZone` UTC.
https://www.postgresql.org/docs/current/sql-copy.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pgoutput_source.types.calendar import US_PER_DAY, date_text, day_of, moment_text
from pgoutput_source.types.datetime import INTERVAL
from pgoutput_source.types.geometry import POINT

_TEXT: Final = pa.large_utf8()
_YEAR_ONE, _YEAR_10000 = day_of(1, 1, 1), day_of(10_000, 1, 1)  # in between Arrow and PostgreSQL write the same
_HEX: Final = np.frombuffer(b"".join(b"%02x" % byte for byte in range(256)), "<u2")


def written(values: pa.Array, pg_type: str = "") -> pa.LargeStringArray:
    """A column as text, null where it is null.

    Args:
        values: The column, of an Arrow type that the type table gives.
        pg_type: PostgreSQL's name of its type, which tells arrays from multiranges and from vectors.

    >>> written(pa.array([[1, None], []], pa.list_(pa.int32())), "integer[]").to_pylist()
    ['{"1",NULL}', '{}']
    >>> written(pa.array([{"months": 14, "days": -3, "microseconds": 1}], INTERVAL), "interval").to_pylist()
    ['14 mons -3 days 00:00:00.000001']

    Raises:
        TypeError: The type table gives no such Arrow type.
    """
    kind = values.type
    if pa.types.is_dictionary(kind):
        return written(values.dictionary_decode(), pg_type)
    if isinstance(kind, pa.BaseExtensionType):
        return written(values.storage, pg_type)
    for matches, write in _WRITERS:
        if matches(kind):
            return write(values, pg_type)
    raise TypeError(f"no PostgreSQL text is known for Arrow's {kind}")


# -- scalars ----------------------------------------------------------------------------------------------------------


def _cast(values: pa.Array, _: str) -> pa.Array:
    return values.cast(_TEXT)


def _decimals(values: pa.Array, _: str) -> pa.Array:
    return values.cast(pa.utf8()).cast(_TEXT)


def _lsns(values: pa.Array, pg_type: str) -> pa.Array:
    if pg_type != "pg_lsn":
        return values.cast(_TEXT)
    numbers = values.to_pylist()
    return pa.array([None if n is None else f"{n >> 32:X}/{n & 0xFFFFFFFF:X}" for n in numbers], _TEXT)


def _bytes(values: pa.Array, pg_type: str) -> pa.Array:
    r"""``\x`` and two digits a byte; PostGIS reads the digits alone."""
    blobs = values.cast(pa.large_binary())
    _, offsets, data = blobs.buffers()
    edges = np.frombuffer(offsets, np.int64)[blobs.offset : blobs.offset + len(blobs) + 1]
    held = np.frombuffer(data, np.uint8)[edges[0] : edges[-1]] if data is not None else np.zeros(0, np.uint8)
    digits = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(),
        len(blobs),
        [None, pa.py_buffer((edges - edges[0]) * 2), pa.py_buffer(_HEX[held])],
    ).cast(_TEXT)
    return _where_valid(_between("" if pg_type in ("geometry", "geography") else "\\x", digits, ""), values)


def _dates(values: pa.Array, _: str) -> pa.Array:
    days = values.view(pa.int32())
    if _all_within(days, _YEAR_ONE, _YEAR_10000):
        return values.cast(_TEXT)
    return pa.array([None if day is None else date_text(day) for day in days.to_pylist()], _TEXT)


def _moments(values: pa.Array, _: str) -> pa.Array:
    zone = "+00" if values.type.tz else ""
    us = values.view(pa.int64())
    if _all_within(us, _YEAR_ONE * US_PER_DAY, _YEAR_10000 * US_PER_DAY):
        return _between("", values.view(pa.timestamp("us")).cast(_TEXT), zone)
    return pa.array([None if moment is None else moment_text(moment, zone) for moment in us.to_pylist()], _TEXT)


def _all_within(numbers: pa.Array, first: int, end: int) -> bool:
    least, most = pc.min_max(numbers).as_py().values()
    return least is None or (least >= first and most < end)


# -- values of several parts ------------------------------------------------------------------------------------------


def _lists(values: pa.Array, pg_type: str) -> pa.Array:
    if pa.types.is_fixed_size_list(values.type):
        values = values.cast(pa.list_(values.type.value_type))
    element = pg_type.removesuffix("[]")
    elements = values.flatten()
    if pg_type.endswith("multirange"):
        texts, opening, closing, between = written(elements, pg_type.replace("multirange", "range")), "{", "}", ","
    elif pg_type in ("int2vector", "oidvector"):
        texts, opening, closing, between = written(elements), "", "", " "
    elif not pg_type.endswith("[]"):
        texts, opening, closing, between = written(elements), "[", "]", ","  # of the extension vector
    else:
        quoted = _quoted(written(elements, element))
        texts = pc.fill_null(quoted, pa.scalar("NULL", _TEXT))
        opening, closing, between = "{", "}", ";" if element == "box" else ","
    return _where_valid(_between(opening, _joined(values, texts, between), closing), values)


def _structs(values: pa.Array, pg_type: str) -> pa.Array:
    names = [field.name for field in values.type]
    if values.type == INTERVAL:
        return _intervals(values)
    if values.type == POINT and pg_type in ("point", ""):
        return _where_valid(_tuple([written(part) for part in values.flatten()], "(", ")"), values)
    if names == ["lower", "upper", "lower_inc", "upper_inc", "empty"]:
        return _ranges(values)
    if names == ["indices", "values", "dim"]:
        return _sparse(values)
    attributes = [_quoted(written(part, _type_of(part.type))) for part in values.flatten()]
    return _where_valid(_tuple([pc.fill_null(text, pa.scalar("", _TEXT)) for text in attributes], "(", ")"), values)


def _type_of(kind: pa.DataType) -> str:
    """What an attribute's Arrow type says of PostgreSQL's: a list is an array, or of ranges a multirange."""
    if not pa.types.is_list(kind):
        return ""
    inner = kind.value_type
    if pa.types.is_struct(inner) and inner.get_field_index("lower_inc") >= 0:
        return "multirange"
    return _type_of(inner) + "[]"


def _intervals(values: pa.Array) -> pa.Array:
    """``14 mons -3 days -00:00:01.500000``: each field has its own sign."""
    months, days, microseconds = (pc.fill_null(part, 0) for part in values.flatten())
    us = microseconds.to_numpy(zero_copy_only=False)
    seconds, fraction = np.divmod(np.abs(us).view(np.uint64), np.uint64(1_000_000))
    minutes, second = np.divmod(seconds, np.uint64(60))
    hours, minute = np.divmod(minutes, np.uint64(60))
    sign = pa.array(np.where(us < 0, "-", ""), _TEXT)
    time = [_digits(number, width) for number, width in ((hours, 2), (minute, 2), (second, 2), (fraction, 6))]
    parts = [months.cast(_TEXT), " mons ", days.cast(_TEXT), " days ", sign]
    parts += [time[0], ":", time[1], ":", time[2], ".", time[3]]
    scalars = [pa.scalar(part, _TEXT) if isinstance(part, str) else part for part in parts]
    return _where_valid(pc.binary_join_element_wise(*scalars, pa.scalar("", _TEXT)), values)


def _digits(numbers: NDArray[np.uint64], width: int) -> pa.Array:
    return pc.utf8_lpad(pa.array(numbers).cast(_TEXT), width, "0")


def _ranges(values: pa.Array) -> pa.Array:
    lower, upper, lower_inc, upper_inc, empty = values.flatten()
    bounds = [pc.fill_null(_quoted(written(bound)), pa.scalar("", _TEXT)) for bound in (lower, upper)]
    opening = pc.if_else(lower_inc, pa.scalar("[", _TEXT), pa.scalar("(", _TEXT))
    closing = pc.if_else(upper_inc, pa.scalar("]", _TEXT), pa.scalar(")", _TEXT))
    parts = [opening, bounds[0], pa.scalar(",", _TEXT), bounds[1], closing]
    text = pc.binary_join_element_wise(*parts, pa.scalar("", _TEXT))
    return _where_valid(pc.if_else(pc.fill_null(empty, False), pa.scalar("empty", _TEXT), text), values)


def _sparse(values: pa.Array) -> pa.Array:
    """``{1:0.5,3:2}/5`` of the extension vector."""
    rows: list[dict[str, Any] | None] = values.to_pylist()
    texts = [None if row is None else _sparse_text(row) for row in rows]
    return pa.array(texts, _TEXT)


def _sparse_text(row: dict[str, Any]) -> str:
    pairs = zip(row["indices"], row["values"], strict=True)
    return "{" + ",".join(f"{index}:{value!r}" for index, value in pairs) + f"}}/{row['dim']}"


def _maps(values: pa.Array, _: str) -> pa.Array:
    """``"a"=>"1", "b"=>NULL``, as hstore reads it."""
    pairs = values.cast(pa.list_(pa.struct([pa.field("key", pa.utf8()), pa.field("value", pa.utf8())])))
    keys, items = pairs.flatten().flatten()
    item = pc.fill_null(_quoted(items.cast(_TEXT)), pa.scalar("NULL", _TEXT))
    texts = pc.binary_join_element_wise(_quoted(keys.cast(_TEXT)), item, pa.scalar("=>", _TEXT))
    return _where_valid(_joined(pairs, texts, ", "), values)


def _joined(lists: pa.Array, texts: pa.Array, between: str) -> pa.Array:
    """For each list the texts of its elements, one after the other."""
    counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    offsets = np.append(0, np.cumsum(counts, dtype=np.int64))
    return pc.binary_join(pa.LargeListArray.from_arrays(pa.array(offsets), texts), pa.scalar(between, _TEXT))


def _quoted(texts: pa.Array) -> pa.Array:
    r"""In double quotes, with a backslash before each quote and backslash: what arrays, composites and ranges read."""
    escaped = pc.replace_substring(pc.replace_substring(texts, "\\", "\\\\"), '"', '\\"')
    return _between('"', escaped, '"')


def _tuple(parts: list[pa.Array], opening: str, closing: str) -> pa.Array:
    joined = parts[0] if len(parts) == 1 else pc.binary_join_element_wise(*parts, pa.scalar(",", _TEXT))
    return _between(opening, joined, closing)


def _between(opening: str, texts: pa.Array, closing: str) -> pa.Array:
    return pc.binary_join_element_wise(
        pa.scalar(opening, _TEXT), texts, pa.scalar(closing, _TEXT), pa.scalar("", _TEXT)
    )


def _where_valid(texts: pa.Array, values: pa.Array) -> pa.Array:
    return texts if not values.null_count else pc.if_else(values.is_valid(), texts, pa.scalar(None, _TEXT))


Writer = Callable[[pa.Array, str], pa.Array]

_WRITERS: Final[tuple[tuple[Callable[[pa.DataType], bool], Writer], ...]] = (
    (lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind), _cast),
    (pa.types.is_uint64, _lsns),
    (pa.types.is_integer, _cast),
    (pa.types.is_boolean, _cast),
    (pa.types.is_floating, _cast),
    (pa.types.is_decimal, _decimals),
    (pa.types.is_timestamp, _moments),
    (pa.types.is_date32, _dates),
    (pa.types.is_time64, _cast),
    (lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind), _bytes),
    (pa.types.is_fixed_size_binary, _bytes),
    (pa.types.is_map, _maps),
    (lambda kind: pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind), _lists),
    (pa.types.is_struct, _structs),
    (pa.types.is_null, _cast),
)


# -- rows of COPY -----------------------------------------------------------------------------------------------------


def copy_text(columns: Sequence[pa.Array]) -> memoryview:
    r"""Rows in COPY's text format, from the texts of their columns; null is ``\N``.

    https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.3.55.9.2

    >>> bytes(copy_text([pa.array(["1", None], pa.large_utf8()), pa.array(["a\tb", ""], pa.large_utf8())]))
    b'1\ta\\tb\n\\N\t\n'
    """
    cells = [pc.fill_null(_escaped(column), pa.scalar("\\N", _TEXT)) for column in columns]
    lines = pc.binary_join_element_wise(*cells, pa.scalar("\t", _TEXT))
    ended = _between("", lines, "\n")
    _, offsets, data = ended.buffers()
    edges = np.frombuffer(offsets, np.int64)[ended.offset : ended.offset + len(ended) + 1]
    return memoryview(b"" if data is None else data)[edges[0] : edges[-1]]


def _escaped(texts: pa.Array) -> pa.Array:
    for character, escape in (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r")):
        if pc.any(pc.match_substring(texts, character)).as_py():
            texts = pc.replace_substring(texts, character, escape)
    return texts
