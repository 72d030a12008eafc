"""Turns Arrow columns into Python values, a whole column at a time.

One table, `KINDS`, says for every Arrow type how to make its values and how a row model annotates them. Every value is
exact: numerics are `Decimal`, timestamps with a time zone are aware. A value that Python's type can't hold (a date
before the year 1 or after 9999, an infinite timestamp) is PostgreSQL's own text, a `str`.

Arrow's own `to_pylist` takes microseconds for a timestamp or a decimal. This module takes a tenth of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any, NamedTuple
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from pgoutput_source.changes import exact_json
from pgoutput_source.changes.schema import Column
from pgoutput_source.types.base import unescaped
from pgoutput_source.types.calendar import US_PER_DAY, date_text, moment_text

Leaf = Callable[[str], Any]

_FIRST_DAY = date.min.toordinal() - date(1970, 1, 1).toordinal()
_LAST_DAY = date.max.toordinal() - date(1970, 1, 1).toordinal()
_MIDNIGHT = datetime(1970, 1, 1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Kind(NamedTuple):
    """How to make the values of an Arrow type: `values` gets an array without nulls, and a `Leaf` for its strings."""

    values: Callable[[pa.Array, Leaf | None], Sequence[Any]]
    annotation: Callable[[pa.DataType], Any]


def to_python(array: pa.Array, column: Column | None = None, *, parsed: bool = True) -> list[Any]:
    """A column's values as Python objects, None for nulls.

    `column` distinguishes strings of `numeric` and `json` from texts. They become `Decimal` and parsed JSON; without
    `parsed`, JSON becomes `JsonText`.
    """
    leaf = None if column is None else _leaf(column)
    return _values(array, exact_json.JsonText if leaf is exact_json.parse and not parsed else leaf)


def misfit(text: str, column: Column) -> Any:
    r"""A value that its Arrow type can't hold, from its exact PostgreSQL text: a Decimal such as NaN, or the text.

    The misfit of a string is bytes that are not UTF-8, from a database in SQL_ASCII. They stay bytes.

    >>> misfit("NaN", Column("price", 1700, 655366, False, "numeric", pa.decimal128(10, 2)))
    Decimal('NaN')
    >>> misfit("h\\344t", Column("name", 25, -1, False, "text", pa.utf8()))
    b'h\xe4t'
    """
    if pa.types.is_string(column.arrow):
        return unescaped(text)
    return Decimal(text) if pa.types.is_decimal(column.arrow) else text


# -- values ---------------------------------------------------------------------------------------------------------


def _values(array: pa.Array, leaf: Leaf | None) -> list[Any]:
    nulls = array.null_count
    if nulls == len(array):
        return [None] * nulls
    values = kind_of(array.type).values
    if not nulls:
        return list(values(array, leaf))
    out: list[Any] = [None] * len(array)
    valid = np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False))
    for at, value in zip(valid.tolist(), values(array.drop_null(), leaf), strict=True):
        out[at] = value
    return out


def kind_of(arrow: pa.DataType) -> Kind:
    """The row of the table for an Arrow type. Types that are not in it are left to Arrow."""
    if isinstance(arrow, pa.BaseExtensionType):
        return _UUID if arrow.extension_name == "arrow.uuid" else _EXTENSION
    return KINDS.get(arrow.id, _OTHER)


def _plain(array: pa.Array, leaf: Leaf | None) -> list[Any]:
    return array.to_numpy(zero_copy_only=False).tolist()  # type: ignore[no-any-return]


def _strings(array: pa.Array, leaf: Leaf | None) -> list[Any]:
    strings = array.to_numpy(zero_copy_only=False).tolist()
    return strings if leaf is None else list(map(leaf, strings))


def _single(array: pa.Array, leaf: Leaf | None) -> list[float]:
    """The shortest number that gives the same `real`, like PostgreSQL's text: 0.1, not 0.10000000149011612."""
    return list(map(float, _plain(array.cast(pa.utf8()), None)))


def _decimals(array: pa.Array, leaf: Leaf | None) -> list[Decimal]:
    return list(map(Decimal, _plain(array.cast(pa.utf8()), None)))


def _dates(array: pa.Array, leaf: Leaf | None) -> list[date | str]:
    days: NDArray[np.int32] = array.view(pa.int32()).to_numpy()
    if days.min() >= _FIRST_DAY and days.max() <= _LAST_DAY:
        return days.astype("M8[D]").tolist()  # type: ignore[no-any-return]
    return [_MIDNIGHT.date() + timedelta(d) if _FIRST_DAY <= d <= _LAST_DAY else date_text(d) for d in days.tolist()]


def _timestamps(array: pa.Array, leaf: Leaf | None) -> list[datetime | str]:
    aware = array.type.tz is not None
    epoch, zone = (_EPOCH, "+00") if aware else (_MIDNIGHT, "")
    moments: NDArray[np.int64] = array.cast(pa.timestamp("us", array.type.tz)).view(pa.int64()).to_numpy()
    first, end = _FIRST_DAY * US_PER_DAY, (_LAST_DAY + 1) * US_PER_DAY
    if moments.min() >= first and moments.max() < end:
        return [epoch + since for since in moments.astype("m8[us]").tolist()]
    return [epoch + timedelta(0, 0, m) if first <= m < end else moment_text(m, zone) for m in moments.tolist()]


def _times(array: pa.Array, leaf: Leaf | None) -> list[time]:
    return [(_MIDNIGHT + since).time() for since in array.view(pa.int64()).to_numpy().astype("m8[us]").tolist()]


def _lists(array: pa.Array, leaf: Leaf | None) -> list[list[Any]]:
    elements = _values(array.flatten(), leaf)
    ends = np.cumsum(pc.list_value_length(array).to_numpy(zero_copy_only=False)).tolist()
    return [elements[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _structs(array: pa.Array, leaf: Leaf | None) -> list[dict[str, Any]]:
    return rows([f.name for f in array.type], [_values(child, leaf) for child in array.flatten()], len(array))


def rows(names: Sequence[str], columns: Sequence[Sequence[Any]], count: int) -> list[dict[str, Any]]:
    """One dict per row, from columns."""
    if not columns:
        return [{} for _ in range(count)]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _arrow(array: pa.Array, leaf: Leaf | None) -> list[Any]:
    return array.to_pylist()  # type: ignore[no-any-return]


# -- strings that are more than texts -------------------------------------------------------------------------------


def _leaf(column: Column) -> Leaf | None:
    return _LEAVES.get(column.type_name.removesuffix("[]"))


_LEAVES: dict[str, Leaf] = {
    "numeric": Decimal,
    "numrange": Decimal,
    "nummultirange": Decimal,
    "json": exact_json.parse,
    "jsonb": exact_json.parse,
}


# -- the table ------------------------------------------------------------------------------------------------------


def _from_hex(value: Any) -> Any:
    return bytes.fromhex(value[2:]) if isinstance(value, str) and value.startswith("\\x") else value


def _always(annotation: Any) -> Callable[[pa.DataType], Any]:
    return lambda arrow: annotation


def _or_text(kind: Any) -> Callable[[pa.DataType], Any]:
    return _always(Annotated[kind | str, Field(union_mode="left_to_right")])


_DECIMAL = Annotated[Decimal, Field(allow_inf_nan=True)]
_BYTES = Annotated[bytes, BeforeValidator(_from_hex)]


def _list_of(arrow: pa.DataType) -> Any:
    return list[kind_of(arrow.value_type).annotation(arrow.value_type) | None] | str  # type: ignore[misc]


def annotation(column: Column) -> Any:
    """The type of a column's values, for a row model."""
    leaf = _leaf(column)
    if leaf is exact_json.parse:
        return Any
    if leaf is Decimal and pa.types.is_string(column.arrow):
        return _DECIMAL
    return kind_of(column.arrow).annotation(column.arrow)


_OTHER = Kind(_arrow, _always(Any))
_UUID = Kind(_arrow, _always(UUID))
_EXTENSION = Kind(
    lambda array, leaf: _values(array.storage, leaf),
    lambda arrow: kind_of(arrow.storage_type).annotation(arrow.storage_type),
)
_TEXTS = Kind(_strings, _always(str))
_INTEGERS = Kind(_plain, _always(int))
_BINARY = Kind(_plain, _always(_BYTES))

KINDS: dict[int, Kind] = {
    pa.bool_().id: Kind(_plain, _always(bool)),
    **{k().id: _INTEGERS for k in (pa.int8, pa.int16, pa.int32, pa.int64, pa.uint8, pa.uint16, pa.uint32, pa.uint64)},
    pa.float32().id: Kind(_single, _always(float)),
    pa.float64().id: Kind(_plain, _always(float)),
    pa.decimal128(1).id: Kind(_decimals, _always(_DECIMAL)),
    pa.decimal256(1).id: Kind(_decimals, _always(_DECIMAL)),
    pa.utf8().id: _TEXTS,
    pa.large_utf8().id: _TEXTS,
    pa.binary().id: _BINARY,
    pa.large_binary().id: _BINARY,
    pa.date32().id: Kind(_dates, _or_text(date)),
    pa.time64("us").id: Kind(_times, _or_text(time)),
    pa.timestamp("us").id: Kind(_timestamps, _or_text(datetime)),
    pa.list_(pa.null()).id: Kind(_lists, _list_of),
    pa.large_list(pa.null()).id: Kind(_lists, _list_of),
    pa.list_(pa.null(), 1).id: Kind(_lists, _list_of),
    pa.struct([]).id: Kind(_structs, _always(dict[str, Any])),
    pa.map_(pa.utf8(), pa.utf8()).id: Kind(lambda a, leaf: [dict(v) for v in a.to_pylist()], _always(dict[str, Any])),
    pa.dictionary(pa.int8(), pa.utf8()).id: Kind(
        lambda array, leaf: _values(array.dictionary_decode(), leaf),
        lambda arrow: kind_of(arrow.value_type).annotation(arrow.value_type),
    ),
}
"""How to make and annotate values, by the id of the Arrow type."""
