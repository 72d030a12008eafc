"""Intervals in the style ``postgres``: ``-1 years -2 mons +3 days -04:05:06.789``, each field with its own sign.

The words of all values are read together: pairs of a number and a unit, then the time of day.
https://www.postgresql.org/docs/current/datatype-datetime.html#DATATYPE-INTERVAL-OUTPUT
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pgoutput_source.types.base import Bools, Ints, Texts, Uint8s, dense, refuse

_SPACE, _COLON, _DOT, _PLUS, _MINUS, _ZERO = b" :.+-0"
_UNITS = np.array([list(b"years"), list(b"mons\0"), list(b"days\0")], np.uint8)
_SINGULAR = np.array([4, 3, 3])
_MOST_DIGITS = 10
_MOST_HOURS = 2_562_047_788
_INT32 = np.iinfo(np.int32)


def _number(data: Uint8s, start: Ints, end: Ints) -> Ints:
    """The digits of each range as a number."""
    width = end - start
    if not len(width):
        return width
    if width.min() < 1 or width.max() > _MOST_DIGITS:
        refuse("interval")
    total = np.zeros(len(width), np.int64)
    shortest = width.min()
    for at in range(int(width.max())):
        if at < shortest:
            digit = data[start + at] - _ZERO
            total = total * 10 + digit
        else:
            longer = np.flatnonzero(width > at)
            digit = data[start[longer] + at] - _ZERO
            total[longer] = total[longer] * 10 + digit
        if digit.max() > 9:
            refuse("interval")
    return total


def _signed(data: Uint8s, start: Ints) -> tuple[Ints, Bools]:
    """Where the digits begin, and whether a minus stands before them."""
    minus = data[start] == _MINUS
    return start + (minus | (data[start] == _PLUS)), minus


def _times(data: Uint8s, start: Ints, end: Ints, colons: Ints) -> Ints:
    """Microseconds of ``-04:05:06.789``; hours may be many."""
    start, minus = _signed(data, start)
    if len(colons) != 2 * len(start):
        refuse("interval")
    first, second = colons[0::2], colons[1::2]
    if ((first < start + 2) | (second != first + 3) | (end < second + 3)).any():
        refuse("interval")
    hours = _number(data, start, first)
    minutes, seconds = _number(data, first + 1, second), _number(data, second + 1, second + 3)
    if ((hours > _MOST_HOURS) | (minutes > 59) | (seconds > 59)).any():
        refuse("interval")
    total = ((hours * 60 + minutes) * 60 + seconds).astype(np.uint64) * np.uint64(1_000_000)
    parts = np.flatnonzero(end > second + 3)
    if len(parts):
        point = second[parts] + 3
        digits = end[parts] - point - 1
        if (data[point] != _DOT).any() or digits.max() > 6:
            refuse("interval")
        total[parts] += (_number(data, point + 1, end[parts]) * 10 ** (6 - digits)).astype(np.uint64)
    if (total > np.uint64(2**63 - 1) + minus).any():
        refuse("interval")
    return np.where(minus, -total.view(np.int64), total.view(np.int64))


@dense
def interval(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    """A struct of months, days and microseconds."""
    t = Texts(values)
    data = t.data
    spaces = np.flatnonzero(data == _SPACE)
    begins, stops = np.zeros((2, len(data) + 1), np.bool_)
    begins[t.starts] = begins[spaces + 1] = stops[t.ends] = stops[spaces] = True
    start, end = np.flatnonzero(begins), np.flatnonzero(stops)
    # Each value has one word more than spaces, and no word is empty.
    if len(start) != len(t) + len(spaces) or len(end) != len(start) or (end <= start).any():
        refuse("interval")
    word_at = np.cumsum(begins, dtype=np.int32) - 1
    first = np.zeros(len(start), np.bool_)
    first[word_at[t.starts]] = True
    owner = np.cumsum(first, dtype=np.int32) - 1
    colons = np.flatnonzero(data == _COLON)
    is_time = np.zeros(len(start), np.bool_)
    is_time[word_at[colons]] = True
    at = np.flatnonzero(is_time)
    if (end[at] != t.ends[owner[at]]).any():
        refuse("interval")
    microseconds = np.zeros(len(t), np.int64)
    microseconds[owner[at]] = _times(data, start[at], end[at], colons)

    words = np.flatnonzero(~is_time)
    number, unit = words[0::2], words[1::2]
    if len(number) != len(unit) or (owner[number] != owner[unit]).any():
        refuse("interval")
    which = _which(data, start[unit], end[unit])
    if ((np.diff(which) <= 0) & (np.diff(owner[unit]) == 0)).any():
        refuse("interval")
    digits, minus = _signed(data, start[number])
    amounts = _number(data, digits, end[number])
    fields = np.zeros((3, len(t)), np.int64)
    fields[which, owner[number]] = np.where(minus, -amounts, amounts)
    years, mons, days = fields
    months = 12 * years + mons
    for field in (months, days):
        if len(t) and (field.min() < _INT32.min or field.max() > _INT32.max):
            refuse("interval")
    children = [pa.array(months.astype(np.int32)), pa.array(days.astype(np.int32)), pa.array(microseconds)]
    return pa.StructArray.from_arrays(children, fields=list(kind))


def _which(data: Uint8s, start: Ints, end: Ints) -> Ints:
    """Which unit each word is: 0 years, 1 months, 2 days, in the singular or the plural."""
    if not len(start):
        return start
    letter = data[start]
    which: Ints = (letter == ord("m")) + 2 * (letter == ord("d"))
    length = end - start
    plural = length - _SINGULAR[which]
    if ((plural < 0) | (plural > 1)).any():
        refuse("interval")
    for at in range(int(length.max())):
        inside = np.flatnonzero(length > at) if at >= _SINGULAR.min() else slice(None)
        if (data[start[inside] + at] != _UNITS[which[inside], at]).any():
            refuse("interval")
    return which
