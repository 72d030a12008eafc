"""The Gregorian calendar as PostgreSQL uses it: for all time, also before its introduction and outside Python's years.

Days count from 1970-01-01. Years are astronomical: the year 0 is 1 BC, because PostgreSQL has 1 BC right before 1 AD.

https://www.postgresql.org/docs/current/datetime-units-history.html
"""

from __future__ import annotations

from typing import Final

US_PER_DAY: Final = 86_400_000_000
_DAYS_IN_ERA: Final = 146_097  # 400 years, after which the calendar repeats
_FIRST_MARCH: Final = -719_468  # 0000-03-01
_DAYS_IN_MONTH: Final = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def days_in_month(year: int, month: int) -> int:
    """How many days a month has.

    >>> days_in_month(0, 2), days_in_month(1900, 2), days_in_month(2024, 12)
    (29, 28, 31)
    """
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    return 29 if month == 2 and leap else _DAYS_IN_MONTH[month - 1]


# Both directions count years from March, so that a leap day is the last day of a year.


def day_of(year: int, month: int, day: int) -> int:
    """The number of a day. The date must exist.

    >>> day_of(1970, 1, 1), day_of(2000, 1, 1), day_of(-4713, 11, 24)
    (0, 10957, -2440588)
    """
    year, month = year - (month <= 2), (month + 9) % 12
    leap_days = year // 4 - year // 100 + year // 400
    return 365 * year + leap_days + (153 * month + 2) // 5 + day - 1 + _FIRST_MARCH


def date_of(days: int) -> tuple[int, int, int]:
    """Year, month and day of the day with this number.

    >>> date_of(-1), date_of(-719_529)
    ((1969, 12, 31), (-1, 12, 31))
    """
    era, day = divmod(days - _FIRST_MARCH, _DAYS_IN_ERA)
    year = (day - day // 1_460 + day // 36_524 - day // 146_096) // 365
    day -= 365 * year + year // 4 - year // 100
    month = (5 * day + 2) // 153
    day -= (153 * month + 2) // 5
    month = month + 3 if month < 10 else month - 9
    return year + 400 * era + (month <= 2), month, day + 1


def date_text(days: int, then: str = "") -> str:
    """PostgreSQL's text of a day. `then` follows the date, but precedes BC.

    >>> date_text(0), date_text(-719_529), date_text(-719_529, " 12:00:00+00")
    ('1970-01-01', '0002-12-31 BC', '0002-12-31 12:00:00+00 BC')
    """
    year, month, day = date_of(days)
    era = "" if year > 0 else " BC"
    return f"{year if year > 0 else 1 - year:04}-{month:02}-{day:02}{then}{era}"


def time_text(us: int) -> str:
    """PostgreSQL's text of microseconds since midnight, or of the time in an interval, which may be longer than a day.

    >>> time_text(86_399_900_000), time_text(360_000_000_000)
    ('23:59:59.9', '100:00:00')
    """
    seconds, fraction = divmod(us, 1_000_000)
    text = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return f"{text}.{fraction:06}".rstrip("0") if fraction else text


def moment_text(us: int, zone: str) -> str:
    """PostgreSQL's text of microseconds since 1970-01-01 00:00, with what it writes for the time zone.

    >>> moment_text(-1, ""), moment_text(1_500_000, "+00")
    ('1969-12-31 23:59:59.999999', '1970-01-01 00:00:01.5+00')
    """
    days, time = divmod(us, US_PER_DAY)
    return date_text(days, f" {time_text(time)}{zone}")
