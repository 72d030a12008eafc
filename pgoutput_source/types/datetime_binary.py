"""Dates and times in binary: days and microseconds since 2000-01-01.

A column is its numbers, shifted. Texts are needed for values that their Arrow type can't hold, in `_raw`, and for
nested values that contain one.

https://www.postgresql.org/docs/current/datatype-datetime.html
https://github.com/postgres/postgres/blob/REL_18_STABLE/src/backend/utils/adt/timestamp.c
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pgoutput_source.types.base import Binary, Sent, fixed_width, pattern, refuse, through_text
from pgoutput_source.types.calendar import US_PER_DAY, date_text, day_of, moment_text, time_text

_EPOCH_DAYS: Final = day_of(2000, 1, 1)
_EPOCH_US: Final = _EPOCH_DAYS * US_PER_DAY
_FIRST_DATE, _LAST_DATE = -2_451_545, 2_145_031_948  # 4714-11-24 BC and 5874897-12-31 in days since 2000-01-01
_FIRST_MOMENT, _END_MOMENT = _FIRST_DATE * US_PER_DAY, 9_223_371_331_200_000_000
_FARTHEST_ZONE: Final = 16 * 3600


def _infinite(number: int, bits: int) -> str | None:
    if number == 2 ** (bits - 1) - 1:
        return "infinity"
    return "-infinity" if number == -(2 ** (bits - 1)) else None


def _shifted(numbers: npt.NDArray[Any], kind: pa.DataType, shift: int, first: int, last: int, name: str) -> pa.Array:
    limits = np.iinfo(numbers.dtype)
    misfit = (numbers == limits.max) | (numbers == limits.min)
    if ((numbers < first) | (numbers > last))[~misfit].any():
        refuse(name)
    misfit |= numbers > limits.max - shift
    if not misfit.any():
        return pa.array(numbers + numbers.dtype.type(shift)).view(kind)
    return pa.array(np.where(misfit, 0, numbers) + numbers.dtype.type(shift), mask=misfit).view(kind)


def _date_text(days: int) -> str:
    if (infinite := _infinite(days, 32)) is not None:
        return infinite
    if not _FIRST_DATE <= days <= _LAST_DATE:
        refuse("date")
    return date_text(days + _EPOCH_DAYS)


def _moment_text(us: int, zone: str, name: str) -> str:
    if (infinite := _infinite(us, 64)) is not None:
        return infinite
    if not _FIRST_MOMENT <= us < _END_MOMENT:
        refuse(name)
    return moment_text(us + _EPOCH_US, zone)


def _moments(name: str, zone: str) -> Binary:
    return fixed_width(
        ">i8",
        name,
        lambda numbers, kind: _shifted(numbers, kind, _EPOCH_US, _FIRST_MOMENT, _END_MOMENT - 1, name),
        lambda us: _moment_text(us, zone, name),
    )


def _times(numbers: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    misfit = numbers == US_PER_DAY
    if ((numbers < 0) | (numbers > US_PER_DAY)).any():
        refuse("time")
    return pa.array(numbers, pa.int64(), mask=misfit if misfit.any() else None).view(kind)


def _time_text(us: int) -> str:
    if not 0 <= us <= US_PER_DAY:
        refuse("time")
    return time_text(us)


def _timetz_text(value: bytes) -> bytes:
    if len(value) != 12:
        refuse("time with time zone")
    us, west = struct.unpack(">qi", value)
    if abs(west) >= _FARTHEST_ZONE:
        refuse("time with time zone")
    minutes, seconds = divmod(abs(west), 60)
    zone = f"{'-' if west > 0 else '+'}{minutes // 60:02}"
    if minutes % 60 or seconds:
        zone += f":{minutes % 60:02}"
    return f"{_time_text(us)}{zone}{f':{seconds:02}' if seconds else ''}".encode()


def _interval_binary(*, infinities: bool) -> Binary:
    """Before PostgreSQL 17, the values that now mean infinity were ordinary intervals."""

    def infinite(sent: Sent) -> npt.NDArray[np.bool_]:
        found = np.zeros(len(sent), bool)
        if infinities:
            for byte in (b"\x7f\xff", b"\x80\x00"):
                us, days = byte + byte[1:] * 6, byte + byte[1:] * 2
                found |= (sent.integers(">i8") == int.from_bytes(us, "big", signed=True)) & (
                    sent.integers(">i8", 8) == int.from_bytes(days * 2, "big", signed=True)
                )
        return found

    def decode(sent: Sent, kind: pa.DataType) -> pa.Array:
        sent.fixed(16, "interval")
        misfit = infinite(sent)
        children = [
            pa.array(sent.integers(">i4", 12)),
            pa.array(sent.integers(">i4", 8)),
            pa.array(sent.integers(">i8")),
        ]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=pa.array(misfit) if misfit.any() else None)

    def text(value: bytes) -> bytes:
        if len(value) != 16:
            refuse("interval")
        us, days, months = struct.unpack(">qii", value)
        if infinities and _infinite(us, 64) and _infinite(us, 64) == _infinite(days, 32) == _infinite(months, 32):
            return str(_infinite(us, 64)).encode()
        return _interval_text(months, days, us).encode()

    return Binary(decode, text)


def _interval_text(months: int, days: int, us: int) -> str:
    """The style ``postgres``: a plus is written only after a minus."""
    sign = -1 if months < 0 else 1
    parts: list[str] = []
    before = False
    for count, unit in ((sign * (abs(months) // 12), "year"), (sign * (abs(months) % 12), "mon"), (days, "day")):
        if count:
            parts.append(f"{'+' if before and count > 0 else ''}{count} {unit}{'' if count == 1 else 's'}")
            before = count < 0
    if us or not parts:
        parts.append(f"{'-' if us < 0 else '+' if before else ''}{time_text(abs(us))}")
    return " ".join(parts)


DATE: Final = fixed_width(
    ">i4",
    "date",
    lambda numbers, kind: _shifted(numbers, kind, _EPOCH_DAYS, _FIRST_DATE, _LAST_DATE, "date"),
    _date_text,
)
TIME: Final = fixed_width(">i8", "time", _times, _time_text)
TIMESTAMP: Final = _moments("timestamp", "")
TIMESTAMPTZ: Final = _moments("timestamp with time zone", "+00")
TIMETZ: Final = through_text(
    _timetz_text, pattern(r"\d\d:\d\d:\d\d(\.\d{1,6})?[+-]\d\d(:\d\d){0,2}", "time with time zone")
)
INTERVAL_BINARY: Final = _interval_binary(infinities=True)
INTERVAL_BEFORE_17: Final = _interval_binary(infinities=False)
