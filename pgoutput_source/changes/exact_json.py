"""JSON of values, in which every number is exactly as PostgreSQL wrote it.

JSON numbers have no limits, but Python's parser and encoder have: 1.10 becomes 1.1, 1e400 becomes infinity, and
12345678901234567890.10 loses its last digits. So the numbers of `json` and `jsonb` documents keep their text here, and
`dumps` writes it. Numerics are strings in JSON, because most readers treat a JSON number as a double.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from datetime import date, datetime, time
from decimal import Decimal, InvalidOperation
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Any, Final
from uuid import UUID

_CERTAIN_DIGITS: Final = 4000  # Python refuses to read longer integers


class JsonFloat(float):
    """A number of a JSON document that equals a float, but is not written like Python's float: 1.10, 1e5, -0.

    >>> JsonFloat("1.10"), JsonFloat("1.10") == 1.1, dumps([JsonFloat("1.10")])
    (1.1, True, '[1.10]')
    """

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> JsonFloat:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __reduce__(self) -> tuple[type[JsonFloat], tuple[str]]:
        return JsonFloat, (self.text,)


class JsonDecimal(Decimal):
    """A number of a JSON document with more digits or a larger range than a float.

    >>> dumps({"document": JsonDecimal("1e400"), "numeric": Decimal("1.10")})
    '{"document": 1e400, "numeric": "1.10"}'
    """

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> JsonDecimal:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __reduce__(self) -> tuple[type[JsonDecimal], tuple[str]]:
        return JsonDecimal, (self.text,)


class JsonText(str):
    """The text of a JSON document, which `dumps` writes unchanged."""

    __slots__ = ()


def parse(text: str) -> Any:
    """Parsed JSON; the text itself if Python can't hold it: too deeply nested, or with half of a surrogate pair."""
    try:
        value = loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False, default=str).encode()
    except (RecursionError, UnicodeEncodeError):
        return text
    return value


def loads(text: str | bytes | bytearray) -> Any:
    """`json.loads` with exact numbers.

    >>> loads('[1.5, 1.10, 12345678901234567890.10]')
    [1.5, 1.1, Decimal('12345678901234567890.10')]
    """
    return json.loads(text, parse_float=_fraction, parse_int=_integer)


def _fraction(text: str) -> float | Decimal | str:
    number = float(text)
    if repr(number) == text:
        return number
    try:
        exact = JsonDecimal(text)
    except InvalidOperation:  # an exponent that Decimal can't hold
        return JsonText(text)
    return JsonFloat(text) if math.isfinite(number) and Decimal(repr(number)) == exact else exact


def _integer(text: str) -> int | float | Decimal:
    if text == "-0":
        return JsonFloat(text)
    return int(text) if len(text) <= _CERTAIN_DIGITS else JsonDecimal(text)


# -- what a value is in JSON ------------------------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    r"""A value in a form that `json.dumps` accepts. Only the notation of a document's numbers is lost.

    Decimals are strings, as PostgreSQL writes them; bytes are PostgreSQL's hexadecimal text; dates and times are ISO
    8601; a float that JSON can't express is the string NaN, Infinity or -Infinity.

    >>> to_json({"price": Decimal("1.50"), "key": b"\x00\xff", "at": date(2024, 2, 29), "n": [1]})
    {'price': '1.50', 'key': '\\x00ff', 'at': '2024-02-29', 'n': [1]}
    """
    form = _FORMS.get(type(value))
    return value if form is None else form(value)


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"


_FORMS: Final[dict[type, Callable[[Any], Any]]] = {
    Decimal: lambda v: format(v, "f"),
    JsonDecimal: lambda v: format(v, "f"),
    float: _number,
    bytes: lambda v: "\\x" + v.hex(),
    datetime: datetime.isoformat,
    date: date.isoformat,
    time: time.isoformat,
    UUID: str,
    list: lambda v: [to_json(x) for x in v],
    tuple: lambda v: [to_json(x) for x in v],
    dict: lambda v: {k: to_json(x) for k, x in v.items()},
}


# -- text -------------------------------------------------------------------------------------------------------------


class JsonWriter:
    """Writes values in the forms of `to_json`, and the numbers of documents with their original text.

    Args:
        item, key: The separators between items, and between a key and its value.
        indent: The number of spaces per level; None writes one line.
        ascii: Whether to escape other characters.
        sort_keys: Whether to sort the keys of objects.
    """

    def __init__(
        self,
        item: str = ", ",
        key: str = ": ",
        *,
        indent: int | None = None,
        ascii: bool = False,
        sort_keys: bool = False,
    ) -> None:
        self._item, self._key, self._indent, self._sort = item, key, indent, sort_keys
        string: Callable[[str], str] = encode_basestring_ascii if ascii else encode_basestring
        self._string = string
        self._forms: dict[type, Callable[[Any], str]] = {
            str: string,
            int: int.__repr__,
            bool: lambda v: "true" if v else "false",
            type(None): lambda v: "null",
            float: lambda v: float.__repr__(v) if math.isfinite(v) else f'"{_number(v)}"',
            JsonFloat: lambda v: v.text,
            JsonDecimal: lambda v: v.text,
            JsonText: lambda v: v.replace("\n", " ").replace("\r", " "),  # they never occur within a string
            Decimal: lambda v: f'"{v:f}"',
            bytes: lambda v: f'"\\\\x{v.hex()}"',
            datetime: lambda v: f'"{v.isoformat()}"',
            date: lambda v: f'"{v.isoformat()}"',
            time: lambda v: f'"{v.isoformat()}"',
            UUID: lambda v: f'"{v}"',
        }

    def __call__(self, value: Any) -> str:
        """The JSON text of a value.

        Raises:
            TypeError, ValueError: A value has no form in JSON.
        """
        form = self._forms.get(type(value))
        return form(value) if form is not None else self._nested(value, 1)

    def _write(self, value: Any, level: int) -> str:
        form = self._forms.get(type(value))
        return form(value) if form is not None else self._nested(value, level)

    def _nested(self, value: Any, level: int) -> str:
        write, forms = self._write, self._forms
        if isinstance(value, dict):
            pairs: Iterable[tuple[Any, Any]] = sorted(value.items()) if self._sort else value.items()
            parts = [
                (self._string(k) if type(k) is str else self._name(k))
                + self._key
                + (form(v) if (form := forms.get(type(v))) is not None else write(v, level + 1))
                for k, v in pairs
            ]
            return self._enclosed("{", parts, "}", level)
        if isinstance(value, (list, tuple)):
            return self._enclosed("[", [write(each, level + 1) for each in value], "]", level)
        # The rest are subclasses, which json can write, and values that it refuses.
        return json.dumps(value, allow_nan=False)

    def _enclosed(self, opening: str, parts: list[str], closing: str, level: int) -> str:
        if self._indent is None or not parts:
            return opening + self._item.join(parts) + closing
        line = "\n" + " " * (self._indent * level)
        end = "\n" + " " * (self._indent * (level - 1))
        return opening + line + (self._item.rstrip() + line).join(parts) + end + closing

    def _name(self, key: Any) -> str:
        """A key that is not a string, as json writes it."""
        if isinstance(key, str):
            return self._string(key)
        if key is None or isinstance(key, (int, float)):
            return self._string(json.dumps(key, allow_nan=False))
        raise TypeError(f"keys must be str, int, float, bool or None, not {type(key).__name__}")


dumps: Final = JsonWriter()
"""A value on one line, with a space after commas and colons."""
