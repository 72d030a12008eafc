"""Keys: when two values of a type are one and the same to PostgreSQL.

An Arrow cell alone is no key. A value that its Arrow type can't hold (infinity in a date, NaN in a decimal, 24:00) has
a null cell and its exact text in `_raw`: without the text all of them would be one key, and equal to NULL. And some
values are equal to PostgreSQL though their cells differ: -0 and 0, numerics with more or fewer zeros at the end.
So a key is a cell in a normal form *and* a text; `key_column` gives both.

What two cells can't tell, because the stream does not say what would be needed:

- Text in a nondeterministic collation, and `citext`: which letters are equal is up to the server's locale. Here they
  are equal if their bytes are.
- Numerics without declared precision within composites, and domains over types that have a normal form: Arrow's field
  does not say what is inside. They are equal if their text is.

To tell *rows* apart this is always enough. PostgreSQL sends the old key whenever the bytes of a key have changed, and
every change brings the bytes of its row, so a row never goes by two keys at once. Only a GROUP BY may then have more
groups than SQL's.

https://www.postgresql.org/docs/current/collation.html#COLLATION-NONDETERMINISTIC
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.types.calendar import US_PER_DAY
from pgoutput_source.types.datetime import INTERVAL

_NAN: Final = "NaN"


@dataclass(frozen=True, slots=True)
class KeyColumn:
    """One column of keys: two rows have equal keys if and only if both `cells` and `texts` are equal, NULLs too.

    `cells` are of one Arrow type for all batches of a column. `texts` (utf8) are null wherever the cell says it all;
    None says that this is so everywhere.
    """

    cells: pa.Array
    texts: pa.Array | None = None

    @property
    def columns(self) -> list[pa.Array]:
        """The cells, and the texts if there are any: what to sort, group or encode by."""
        return [self.cells] if self.texts is None else [self.cells, self.texts]

    def take(self, rows: pa.Array) -> KeyColumn:
        """The keys of some rows."""
        return KeyColumn(self.cells.take(rows), None if self.texts is None else self.texts.take(rows))

    def objects(self) -> list[Hashable]:
        """Each key as a builtin that can be hashed and pickled: the cell, or ``(text,)``.

        Dates and times are Arrow's integers, a NaN is a word.

        >>> KeyColumn(pa.array([1.5, float("nan"), None]), pa.array([None, None, "oops"])).objects()
        [1.5, 'NaN', ('oops',)]
        """
        found = _objects(self.cells)
        if self.texts is not None:
            valid = np.flatnonzero(self.texts.is_valid().to_numpy(zero_copy_only=False)).tolist()
            for row, text in zip(valid, self.texts.drop_null().to_pylist(), strict=True):
                found[row] = (text,)
        return found


def key_column(values: pa.Array, field: pa.Field, raw: pa.MapArray | None = None, name: str | None = None) -> KeyColumn:
    """A column as keys that are equal where PostgreSQL's ``=`` says so, and NULL equal to NULL.

    Args:
        values: The column's cells.
        field: Its field in a batch or a file, whose metadata names PostgreSQL's type.
        raw: The `_raw` of the same rows; None if it is known that there is nothing in it.
        name: What `raw` calls the column, if not as the field is called: ``_before.id`` for an old key.

    >>> field = pa.field("price", pa.utf8(), metadata={"pg.oid": "1700"})
    >>> key_column(pa.array(["1.0", "1.00", "1.01", "NaN"]), field).cells.to_pylist()
    ['1', '1', '1.01', 'NaN']
    >>> raw = pa.array([[("day", "infinity")], None], pa.map_(pa.utf8(), pa.utf8()))
    >>> key_column(pa.array([None, 3], pa.date32()), pa.field("day", pa.date32()), raw).objects()
    [('infinity',), 3]
    """
    oid = int((field.metadata or {}).get(b"pg.oid", 0))
    texts = None
    if raw is not None and values.null_count and raw.null_count < len(raw):
        texts = pc.map_lookup(raw, pa.scalar(name or field.name), "first")
        texts = None if texts.null_count == len(texts) else texts
    return KeyColumn(_normal(values, oid), texts)


def cells_tell(field: pa.Field) -> bool:
    """Whether two values of a column that are not null are equal to PostgreSQL if and only if their cells are.

    >>> cells_tell(pa.field("id", pa.int64())), cells_tell(pa.field("x", pa.float64()))
    (True, False)
    """
    oid = int((field.metadata or {}).get(b"pg.oid", 0))
    return oid not in _NORMAL and not pa.types.is_floating(field.type) and not pa.types.is_nested(field.type)


def joined(parts: Sequence[KeyColumn]) -> KeyColumn:
    """The keys of several batches, one after the other."""
    cells = pa.concat_arrays([part.cells for part in parts])
    if all(part.texts is None for part in parts):
        return KeyColumn(cells)
    texts = [pa.nulls(len(part.cells), pa.utf8()) if part.texts is None else part.texts for part in parts]
    return KeyColumn(cells, pa.concat_arrays(texts))


# -- normal forms -----------------------------------------------------------------------------------------------------


def _normal(values: pa.Array, oid: int) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_floating(values.type):
        return _floats(values)
    if oid in _NORMAL:
        return _NORMAL[oid](values)
    if pa.types.is_nested(values.type):
        written = [None if value is None else repr(value) for value in _objects(values, _ELEMENT.get(oid, 0))]
        return pa.array(written, pa.utf8())
    return values


def _floats(values: pa.Array) -> pa.Array:
    """-0 is 0, and there is one NaN."""
    if not len(values):
        return values
    missing = values.is_null().to_numpy(zero_copy_only=False) if values.null_count else None
    numbers = pc.fill_null(values, 0).to_numpy(zero_copy_only=False) + values.type.to_pandas_dtype()(0)
    numbers[np.isnan(numbers)] = np.nan
    return pa.array(numbers, values.type, mask=missing)


def _numerics(values: pa.Array) -> pa.Array:
    """Without the zeros at the end that only show the scale. Decimals have one scale and are as they are."""
    if not pa.types.is_string(values.type):
        return values
    return pc.replace_substring_regex(values, r"(\.[0-9]*[1-9])0+$|\.0+$", r"\1")


def _characters(values: pa.Array) -> pa.Array:
    """`character` does not count spaces at the end."""
    return pc.utf8_rtrim(values, " ")


def _intervals(values: pa.Array) -> pa.Array:
    """A month is 30 days and a day is 24 hours, to ``=``."""
    months, days, us = (pc.fill_null(child, 0).to_numpy().astype(np.int64) for child in values.flatten())
    more, us = np.divmod(us, US_PER_DAY)
    parts = (pa.array(part).cast(pa.utf8()) for part in (30 * months + days + more, us))
    written = pc.binary_join_element_wise(*parts, " ")
    return pc.if_else(values.is_valid(), written, pa.scalar(None, pa.utf8()))


_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+\.\d+')


def _documents(values: pa.Array) -> pa.Array:
    """`jsonb` compares its numbers as `numeric`; all else of its text is the same for equal documents."""

    def number(found: re.Match[str]) -> str:
        token = found[0]
        return token if token[0] == '"' else token.rstrip("0").rstrip(".")

    return pa.array([None if text is None else _TOKEN.sub(number, text) for text in values.to_pylist()], pa.utf8())


_NORMAL: Final[dict[int, Callable[[pa.Array], pa.Array]]] = {
    1700: _numerics,
    1042: _characters,
    1186: _intervals,
    3802: _documents,
}
"""By OID, the types of which different cells may be equal."""

_ELEMENT: Final = {1231: 1700, 1014: 1042, 1187: 1186, 3807: 3802, 3906: 1700, 3907: 1700, 4532: 1700, 6151: 1700}
"""Arrays, ranges and multiranges of these: by their OID, that of what is inside."""


def _objects(values: pa.Array, leaf: int = 0) -> list[Any]:
    """Values as builtins, structs and lists as tuples; `leaf` is the type's OID of what is inside."""
    kind = values.type
    if leaf in _NORMAL and (pa.types.is_string(kind) or kind == INTERVAL):
        return _objects(_NORMAL[leaf](values))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        elements = _objects(values.flatten(), leaf)
        counts = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
        ends = np.cumsum(counts)
        found: list[Any] = [
            tuple(elements[start:end]) for start, end in zip((ends - counts).tolist(), ends.tolist(), strict=True)
        ]
    elif pa.types.is_struct(kind):
        children = [_objects(child, leaf) for child in values.flatten()]
        found = list(zip(*children, strict=True)) if children else [()] * len(values)
    elif pa.types.is_map(kind):
        found = [None if pairs is None else tuple(pairs) for pairs in values.to_pylist()]
    elif pa.types.is_temporal(kind):
        found = values.view(pa.int64() if kind.bit_width == 64 else pa.int32()).to_pylist()
    elif pa.types.is_floating(kind):
        found = [_NAN if v is not None and v != v else v for v in _floats(values).to_pylist()]
    else:
        found = values.to_pylist()
    if values.null_count and pa.types.is_nested(kind):
        for row in np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False)).tolist():
            found[row] = None
    return found
