"""Keys of several columns and many rows: codes that are equal for equal keys, keys as Python objects, and key moves.

`types.keys` defines when two values are equal.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pgoutput_source.compute.metadata import UPDATE, Bools, Ints
from pgoutput_source.types.keys import KeyColumn, joined, key_column

Objects: TypeAlias = list[Hashable]

_NAN = "NaN"  # NaN is not equal to itself, but it is one group and one key


def plain(values: pa.Array) -> Objects:
    """Values as Python objects that can be hashed, compared and pickled: times as integers, NaN as a string."""
    kind = values.type
    if pa.types.is_temporal(kind):
        return list(values.view(pa.int64() if kind.bit_width == 64 else pa.int32()).to_pylist())
    objects: Objects = values.to_pylist()
    if pa.types.is_floating(kind):
        return [_NAN if v != v else v for v in objects]
    return objects


def arrow(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """The array whose values `plain` returned."""
    if pa.types.is_temporal(kind):
        return pa.array(values, pa.int64() if kind.bit_width == 64 else pa.int32()).view(kind)
    if pa.types.is_floating(kind):
        return pa.array([float("nan") if v == _NAN else v for v in values], kind)
    return pa.array(values, kind)


def one_zero_one_nan(values: pa.Array) -> pa.Array:
    """Floats with one zero and one NaN, as PostgreSQL compares them."""
    nulls = None if not values.null_count else pc.is_null(values).to_numpy(zero_copy_only=False)
    floats = pc.fill_null(values, 0).to_numpy() + 0.0  # -0.0 becomes 0.0
    floats[np.isnan(floats)] = np.nan
    return pa.array(floats, values.type, mask=nulls, from_pandas=False)


def encode(columns: Sequence[pa.Array]) -> tuple[Ints, Ints]:
    """A code for each row, from 0 on without gaps, equal for equal rows; and one row of each code."""
    codes: Ints | None = None
    for column in columns:
        encoded = column.dictionary_encode(null_encoding="encode")
        more = encoded.indices.to_numpy().astype(np.int64)
        # Codes are made dense again before the next column multiplies them, so that they can't overflow.
        codes = more if codes is None else np.unique(codes, return_inverse=True)[1] * len(encoded.dictionary) + more
    if codes is None or not len(codes):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if len(columns) > 1:
        codes = np.unique(codes, return_inverse=True)[1].astype(np.int64)
    some = np.empty(int(codes.max()) + 1, np.int64)
    some[codes] = np.arange(len(codes))
    return codes, some


class KeyColumns:
    """The keys of some rows: for each key column, what PostgreSQL's ``=`` compares."""

    def __init__(self, columns: Sequence[KeyColumn]) -> None:
        self.columns = list(columns)

    @classmethod
    def of(cls, cells: Mapping[str, pa.Array], schema: pa.Schema, raw: pa.Array | None, prefix: str = "") -> KeyColumns:
        """From columns by name, their fields, and their texts in `_raw`; for old rows these are under `prefix`."""
        return cls([key_column(values, schema.field(name), raw, prefix + name) for name, values in cells.items()])

    def __len__(self) -> int:
        return len(self.columns[0].cells) if self.columns else 0

    def take(self, rows: Ints) -> KeyColumns:
        """The keys of some rows."""
        return KeyColumns([column.take(pa.array(rows)) for column in self.columns])

    def followed_by(self, others: KeyColumns) -> KeyColumns:
        """These keys, followed by others."""
        return KeyColumns([joined([a, b]) for a, b in zip(self.columns, others.columns, strict=True)])

    def encode(self) -> tuple[Ints, Ints]:
        """A code for each key, equal for keys that are equal in PostgreSQL; and one row of each code."""
        return encode([part for column in self.columns for part in column.columns])

    def known(self) -> Bools:
        """Which keys have a value in every column."""
        found = np.ones(len(self), np.bool_)
        for column in self.columns:
            if column.cells.null_count:
                valid = column.cells.is_valid().to_numpy(zero_copy_only=False)
                if column.texts is not None:
                    valid = valid | column.texts.is_valid().to_numpy(zero_copy_only=False)
                found &= valid
        return found

    def differ(self, others: KeyColumns) -> Bools:
        """Where these keys differ from others, row by row. NULL is equal to itself."""
        found = np.zeros(len(self), np.bool_)
        none = pa.nulls(len(self), pa.utf8())
        for one, two in zip(self.columns, others.columns, strict=True):
            pairs = [(one.cells, two.cells)]
            if one.texts is not None or two.texts is not None:
                pairs.append((none if one.texts is None else one.texts, none if two.texts is None else two.texts))
            for a, b in pairs:
                same = pc.fill_null(pc.equal(a, b), False).to_numpy(zero_copy_only=False)
                if pa.types.is_floating(a.type):
                    nans = pc.fill_null(pc.and_(pc.is_nan(a), pc.is_nan(b)), False)
                    same = same | nans.to_numpy(zero_copy_only=False)
                if a.null_count and b.null_count:
                    same = same | pc.and_(a.is_null(), b.is_null()).to_numpy(zero_copy_only=False)
                found |= ~same
        return found

    def objects(self) -> Objects:
        """The keys as builtins: a value, or a tuple of values. A text is in its own tuple."""
        return as_keys([column.objects() for column in self.columns])


def as_keys(columns: Sequence[Objects]) -> Objects:
    """The keys formed by columns of values: values, or tuples of them."""
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))


def moved(ops: NDArray[np.int8], news: KeyColumns, olds: KeyColumns | None, sent: Bools, whole: Bools) -> Ints:
    """The updates that changed the key.

    Args:
        ops: `_op` of each change.
        news: The keys of new rows.
        olds: The keys of old rows; None if none was sent.
        sent: Where an old row, or its key, was sent.
        whole: Where an old row was sent with all its columns, so that a null in it is a NULL.
    """
    if olds is None:
        return np.zeros(0, np.int64)
    rows = np.flatnonzero((ops == UPDATE) & sent)
    now, before = news.take(rows), olds.take(rows)
    return rows[now.differ(before) & (before.known() | whole[rows])]
