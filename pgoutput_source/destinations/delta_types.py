"""Arrow columns as Delta Lake holds them.

Delta's types are those of Spark: no unsigned numbers, no time of day, years 1 to 9999.
https://github.com/delta-io/delta/blob/master/PROTOCOL.md#schema-serialization-format
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.compute.metadata import Bools
from pgoutput_source.types.calendar import US_PER_DAY, day_of
from pgoutput_source.types.written import written

_FIRST_DAY: Final = day_of(1, 1, 1)
_END: Final = day_of(10_000, 1, 1)


def stored(values: pa.Array) -> pa.Array:
    """A column in Delta's type for it. Values that this type can't hold must be null: see `beyond`.

    >>> stored(pa.array([2**64 - 1], pa.uint64())).type, stored(pa.array([1], pa.time64("us"))).to_pylist()
    (Decimal128Type(decimal128(20, 0)), ['00:00:00.000001'])
    """
    kind, t = values.type, pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return stored(values.storage)
    if t.is_dictionary(kind):
        return stored(values.dictionary_decode())
    if t.is_uint64(kind):
        return values.cast(pa.decimal128(20, 0))
    if t.is_unsigned_integer(kind):
        return values.cast(pa.int64())
    if t.is_time(kind) or t.is_null(kind) or t.is_large_string(kind) or t.is_string_view(kind):
        return values.cast(pa.utf8())
    if t.is_large_binary(kind) or t.is_fixed_size_binary(kind) or t.is_binary_view(kind):
        return values.cast(pa.binary())
    if t.is_struct(kind):
        names = [field.name for field in kind]
        if not names or len({name.casefold() for name in names}) < len(names):
            return written(values).cast(pa.utf8()) if names else _empty_rows(values)
        parts = [stored(part) for part in values.flatten()]
        fields = [pa.field(name, part.type) for name, part in zip(names, parts, strict=True)]
        return pa.StructArray.from_arrays(parts, fields=fields, mask=values.is_null())
    if t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.append(0, np.cumsum(lengths)), pa.int32())
        return pa.ListArray.from_arrays(offsets, stored(values.flatten()), mask=values.is_null())
    return values


def _empty_rows(values: pa.Array) -> pa.Array:
    """What PostgreSQL writes for a row without columns."""
    return pc.if_else(values.is_valid(), pa.scalar("()"), pa.scalar(None, pa.utf8()))


def stored_type(kind: pa.DataType) -> pa.DataType:
    """Delta's type for an Arrow type."""
    return stored(pa.array([], kind)).type


def beyond(values: pa.Array) -> Bools | None:
    """Where a value has a date or a moment outside of the years 1 to 9999, at any depth; None if it is nowhere."""
    kind, t = values.type, pa.types
    found: Bools | None = None
    if t.is_date32(kind) or t.is_timestamp(kind):
        days = t.is_date32(kind)
        numbers = values.view(pa.int32() if days else pa.int64())
        first, end = (_FIRST_DAY, _END) if days else (_FIRST_DAY * US_PER_DAY, _END * US_PER_DAY)
        least, most = pc.min_max(numbers).as_py().values()
        if least is not None and (least < first or most >= end):
            within = pc.and_(pc.greater_equal(numbers, first), pc.less(numbers, end))
            found = ~pc.fill_null(within, True).to_numpy(zero_copy_only=False)
    elif t.is_struct(kind):
        for part in values.flatten():
            if (rows := beyond(part)) is not None:
                found = rows if found is None else found | rows
    elif t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
        elements = beyond(values.flatten())
        if elements is not None:
            found = np.zeros(len(values), np.bool_)
            found[pc.list_parent_indices(values).to_numpy()[elements]] = True
    return found


def without(values: pa.Array, rows: Bools) -> pa.Array:
    """A column with these rows null."""
    return pc.if_else(pa.array(rows), pa.scalar(None, values.type), values)


class Misfits:
    """Texts that `_raw` gets for values that are null because Delta can't hold them."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, str]] = {}

    def stored(self, values: pa.Array, pg_type: str, name: str) -> pa.Array:
        """A column in Delta's type; the texts of what it can't hold are noted under `name`."""
        rows = beyond(values)
        if rows is not None:
            at = np.flatnonzero(rows)
            for row, text in zip(at.tolist(), written(values.take(pa.array(at)), pg_type).to_pylist(), strict=True):
                self.rows.setdefault(row, {})[name] = text
            values = without(values, rows)
        return stored(values)

    def added_to(self, raw: pa.Array) -> pa.Array:
        """A `_raw` column with these texts in it, too."""
        return with_texts(raw, self.rows)


def with_texts(raw: pa.Array, texts: Mapping[int, Mapping[str, str]]) -> pa.Array:
    """A `_raw` column with more texts, by row and column."""
    if not texts:
        return raw
    rows: list[Any] = raw.to_pylist()
    for row, more in texts.items():
        rows[row] = list({**dict(rows[row] or ()), **more}.items())
    return pa.array(rows, raw.type)


def fits(kind: pa.DataType, there: pa.DataType) -> bool:
    """Whether a column of type `there` holds all values of Delta's type `kind`.

    >>> fits(pa.int16(), pa.int64()), fits(pa.decimal128(10, 2), pa.decimal128(12, 2)), fits(pa.int64(), pa.int32())
    (True, True, False)
    """
    t = pa.types
    if t.is_signed_integer(kind) and t.is_signed_integer(there):
        return bool(kind.bit_width <= there.bit_width)
    if t.is_decimal(kind) and t.is_decimal(there):
        whole, there_whole = kind.precision - kind.scale, there.precision - there.scale
        return bool(kind.scale <= there.scale and whole <= there_whole)
    return bool(kind == there or (t.is_float32(kind) and t.is_float64(there)))
