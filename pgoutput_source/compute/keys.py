"""Keys: when two rows have the same one, as PostgreSQL sees it, and what a key is as a Python object.

A key is its cells *and* their exact text where the Arrow type can't hold a value: '-infinity' and 'infinity' leave the
same null cell. Floats compare as PostgreSQL compares them: both zeros are one key, and so are all NaNs.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pgoutput_source.compute.metadata import UPDATE, Bools, Ints, Texts

Objects: TypeAlias = list[Hashable]

_NAN = "NaN"  # NaN is not equal to itself, but it is one group and one key


def plain(values: pa.Array) -> Objects:
    """Values as Python objects that can be hashed, compared and pickled: times as integers, NaN as a word."""
    kind = values.type
    if pa.types.is_temporal(kind):
        return list(values.view(pa.int64() if kind.bit_width == 64 else pa.int32()).to_pylist())
    objects: Objects = values.to_pylist()
    if pa.types.is_floating(kind):
        return [_NAN if v != v else v for v in objects]
    return objects


def arrow(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """The array whose values `plain` gave."""
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
    """A code for each row, equal where the columns are, from 0 on without gaps; and a row of each code."""
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
    """The columns of a key, cells and texts, for some rows."""

    def __init__(self, cells: Sequence[pa.Array], texts: Mapping[int, pa.Array]) -> None:
        """`texts` holds, by index of the column, what `_raw` says; most keys have none."""
        self.cells = [one_zero_one_nan(c) if pa.types.is_floating(c.type) and len(c) else c for c in cells]
        self.texts = dict(texts)

    @classmethod
    def of(cls, columns: Mapping[str, pa.Array], texts: Mapping[str, Texts], prefix: str = "") -> KeyColumns:
        """From columns by name and what `metadata.texts` found, old rows' under `prefix`."""
        known = {i: texts[prefix + n].column(len(columns[n])) for i, n in enumerate(columns) if prefix + n in texts}
        return cls(list(columns.values()), known)

    def __len__(self) -> int:
        return len(self.cells[0]) if self.cells else 0

    def take(self, rows: Ints) -> KeyColumns:
        """The keys of some rows."""
        index = pa.array(rows)
        return KeyColumns([c.take(index) for c in self.cells], {i: t.take(index) for i, t in self.texts.items()})

    def followed_by(self, others: KeyColumns) -> KeyColumns:
        """These keys and others after them."""
        cells = [
            pa.concat_arrays([a, b.cast(a.type) if a.type != b.type else b])
            for a, b in zip(self.cells, others.cells, strict=True)
        ]
        texts = {}
        for i in self.texts.keys() | others.texts.keys():
            texts[i] = pa.concat_arrays(
                [keys.texts.get(i, pa.nulls(len(keys), pa.utf8())) for keys in (self, others)],
            )
        return KeyColumns(cells, texts)

    def encode(self) -> tuple[Ints, Ints]:
        """A code for each key, equal where PostgreSQL takes them for equal; and a row of each code."""
        return encode([*self.cells, *self.texts.values()])

    def known(self) -> Bools:
        """The keys that hold a value in each column."""
        found = np.ones(len(self), np.bool_)
        for i, cells in enumerate(self.cells):
            if cells.null_count:
                valid = cells.is_valid().to_numpy(zero_copy_only=False)
                if i in self.texts:
                    valid = valid | self.texts[i].is_valid().to_numpy(zero_copy_only=False)
                found &= valid
        return found

    def differ(self, others: KeyColumns) -> Bools:
        """Where these keys are not those of others, row by row; NULL is equal to itself."""
        found = np.zeros(len(self), np.bool_)
        pairs = [(a, b.cast(a.type) if a.type != b.type else b) for a, b in zip(self.cells, others.cells, strict=True)]
        for i in self.texts.keys() | others.texts.keys():
            none = pa.nulls(len(self), pa.utf8())
            pairs.append((self.texts.get(i, none), others.texts.get(i, none)))
        for a, b in pairs:
            same = pc.fill_null(pc.equal(a, b), False).to_numpy(zero_copy_only=False)
            if pa.types.is_floating(a.type):
                same = same | pc.fill_null(pc.and_(pc.is_nan(a), pc.is_nan(b)), False).to_numpy(zero_copy_only=False)
            if a.null_count and b.null_count:
                same = same | pc.and_(a.is_null(), b.is_null()).to_numpy(zero_copy_only=False)
            found |= ~same
        return found

    def objects(self) -> Objects:
        """The keys as Python objects: a value, or a tuple of values. A text stands in a tuple of its own."""
        lists = []
        for i, cells in enumerate(self.cells):
            values = plain(cells)
            if i in self.texts:
                known = self.texts[i].to_pylist()
                values = [v if text is None else (text,) for v, text in zip(values, known, strict=True)]
            lists.append(values)
        return lists[0] if len(lists) == 1 else list(zip(*lists, strict=True))


def moved(ops: NDArray[np.int8], news: KeyColumns, olds: KeyColumns | None, sent: Bools, whole: Bools) -> Ints:
    """The updates that changed the key.

    Args:
        ops: `_op` of each change.
        news: The keys of new rows.
        olds: The keys of old rows, None if none was sent.
        sent: Where an old row, or its key, was sent.
        whole: Where an old row was sent with all its columns, so that a null in it is a NULL.
    """
    if olds is None:
        return np.zeros(0, np.int64)
    rows = np.flatnonzero((ops == UPDATE) & sent)
    now, before = news.take(rows), olds.take(rows)
    return rows[now.differ(before) & (before.known() | whole[rows])]
