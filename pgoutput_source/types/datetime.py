"""Dates and times.

The plain shapes, ``2024-02-29`` and ``2024-02-29 12:34:56.789``, are parsed by Arrow, the whole column at once.
Infinities are found by comparing the whole column. The rest, years above 9999 and before Christ, is parsed value by
value.
https://www.postgresql.org/docs/current/datatype-datetime.html
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.types.base import (
    Bools,
    Decode,
    Ints,
    PgType,
    Texts,
    always,
    dense,
    one_of,
    pattern,
    refuse,
    with_misfits,
)
from pgoutput_source.types.calendar import US_PER_DAY, day_of, days_in_month
from pgoutput_source.types.datetime_binary import DATE, INTERVAL_BINARY, TIME, TIMESTAMP, TIMESTAMPTZ, TIMETZ
from pgoutput_source.types.interval import interval

_INFINITY = (b"infinity", b"-infinity")
_YEAR_ONE = day_of(1, 1, 1)  # Arrow would also read a year 0000.
_FIRST_DAY = day_of(-4713, 11, 24)  # 4714-11-24 BC, PostgreSQL's first
_DATE = re.compile(rb"([1-9]\d{4,6}|\d{4})-(\d\d)-(\d\d)")
_TIME = re.compile(rb"(\d\d):(\d\d):(\d\d)(?:\.(\d{1,6}))?")


def _parse_date(value: bytes, before_christ: bool, last_year: int) -> int:
    """Days since 1970-01-01."""
    if (match := _DATE.fullmatch(value)) is None:
        refuse("date")
    year, month, day = map(int, match.groups())
    astronomical = 1 - year if before_christ else year
    if not (1 <= year <= last_year and 1 <= month <= 12 and 1 <= day <= days_in_month(astronomical, month)):
        refuse("date")
    days = day_of(astronomical, month, day)
    if days < _FIRST_DAY:
        refuse("date")
    return days


def _parse_time(value: bytes) -> int:
    """Microseconds since midnight."""
    if (match := _TIME.fullmatch(value)) is None:
        refuse("time")
    hour, minute, second = map(int, match.group(1, 2, 3))
    if hour > 23 or minute > 59 or second > 59:
        refuse("time")
    return ((hour * 60 + minute) * 60 + second) * 1_000_000 + int((match[4] or b"").ljust(6, b"0"))


def _rare_date(value: bytes) -> int:
    date = value.removesuffix(b" BC")
    return _parse_date(date, date != value, 5_874_897)


def _rare_timestamp(zone: bytes) -> Callable[[bytes], int]:
    def parse(value: bytes) -> int:
        moment = value.removesuffix(b" BC")
        if not moment.endswith(zone):
            refuse("timestamp")
        date, _, time = moment.removesuffix(zone).partition(b" ")
        return _parse_date(date, moment != value, 294_276) * US_PER_DAY + _parse_time(time)

    return parse


def _decoder(
    name: str, is_plain: Callable[[Texts], Bools], rare: Callable[[bytes], int], width: pa.DataType, earliest: int
) -> Decode:
    """A decoder of plain values by Arrow, and of the others by `rare`; `width` is the Arrow type's integer."""
    limits = np.iinfo(width.to_pandas_dtype())

    def plain(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        parsed = values.cast(pa.utf8()).cast(kind)
        if len(parsed) and pc.min(parsed.view(width)).as_py() < earliest:
            refuse(name)
        return parsed

    @dense
    def decode(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        common = is_plain(Texts(values))
        if common.all():
            return plain(values, kind)
        out: Ints = np.zeros(len(values), limits.dtype)
        held = np.ones(len(values), bool)
        out[common] = plain(values.filter(pa.array(common)), kind).view(width).to_numpy(zero_copy_only=False)
        infinite = one_of(values, *_INFINITY) >= 0
        held[infinite] = False
        others = np.flatnonzero(~(common | infinite))
        for at, value in zip(others.tolist(), values.take(pa.array(others)).to_pylist(), strict=True):
            number = rare(value)
            held[at] = limits.min <= number <= limits.max
            out[at] = number if held[at] else 0
        return pa.array(out, width, mask=~held).view(kind)

    return decode


def _plain_date(t: Texts) -> Bools:
    plain: Bools = t.lengths == 10
    return plain


def _plain_timestamp(zone: bytes) -> Callable[[Texts], Bools]:
    def is_plain(t: Texts) -> Bools:
        """Only PostgreSQL's own form is plain: Arrow also accepts ``T``, other zones, and times without seconds."""
        shortest = 19 + len(zone)
        plain: Bools = (t.lengths >= shortest) & (t.lengths != shortest + 1) & (t.lengths <= shortest + 7)
        starts = t.starts if plain.all() else t.starts[plain]
        ends = t.ends if plain.all() else t.ends[plain]
        shape = t.data[starts + 4] == ord("-")
        for at, character in ((10, " "), (13, ":"), (16, ":")):
            shape &= t.data[starts + at] == ord(character)
        for at, byte in enumerate(zone, -len(zone)):
            shape &= t.data[ends + at] == byte
        if not zone:
            shape &= t.data[ends - 1] != ord("C")
        plain[plain] = shape
        return plain

    return is_plain


def _time(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    t = Texts(values)
    if len(t) and (t.lengths.min() < 8 or (t.lengths == 9).any() or t.lengths.max() > 15):
        refuse("time")
    if (t.at(2) != ord(":")).any() or (t.at(5) != ord(":")).any():
        refuse("time")
    # Arrow parses no times, but it parses timestamps; on 1970-01-01 both are the same number.
    moments = pc.binary_join_element_wise(pa.scalar("1970-01-01"), values.cast(pa.utf8()), " ")
    return moments.cast(pa.timestamp("us")).view(kind)


_TIMESTAMP, _TIMESTAMPTZ = (
    _decoder(name, _plain_timestamp(zone), _rare_timestamp(zone), pa.int64(), _YEAR_ONE * US_PER_DAY)
    for name, zone in (("timestamp", b""), ("timestamp with time zone", b"+00"))
)

# month_day_nano_interval was tried: neither Parquet nor Polars takes it, and it overflows after 292 years.
INTERVAL = pa.struct(
    [pa.field("months", pa.int32()), pa.field("days", pa.int32()), pa.field("microseconds", pa.int64())]
)

DATETIME = (
    PgType(
        1082,
        "date",
        always(pa.date32()),
        _decoder("date", _plain_date, _rare_date, pa.int32(), _YEAR_ONE),
        misfits="infinity, -infinity",
        array=1182,
        binary=DATE,
    ),
    PgType(
        1083,
        "time without time zone",
        always(pa.time64("us")),
        with_misfits(_time, b"24:00:00"),
        misfits="24:00:00",
        array=1183,
        binary=TIME,
    ),
    PgType(
        1114,
        "timestamp without time zone",
        always(pa.timestamp("us")),
        _TIMESTAMP,
        misfits="infinity, -infinity, after 294247-01-10 04:00:54.775807",
        array=1115,
        binary=TIMESTAMP,
    ),
    PgType(
        1184,
        "timestamp with time zone",
        always(pa.timestamp("us", "UTC")),
        _TIMESTAMPTZ,
        misfits="infinity, -infinity, after 294247-01-10 04:00:54.775807+00",
        array=1185,
        binary=TIMESTAMPTZ,
    ),
    PgType(
        1266,
        "time with time zone",
        always(pa.utf8()),
        pattern(r"\d\d:\d\d:\d\d(\.\d{1,6})?[+-]\d\d(:\d\d){0,2}", "time with time zone"),
        array=1270,
        binary=TIMETZ,
    ),
    PgType(
        1186,
        "interval",
        always(INTERVAL),
        with_misfits(interval, *_INFINITY),
        misfits="infinity, -infinity",
        array=1187,
        binary=INTERVAL_BINARY,
    ),
)
