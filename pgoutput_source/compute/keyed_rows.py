"""Rows by key: what a batch of changes comes to, key by key, and the last row of each key as kept state.

With a replica identity of only the key PostgreSQL sends no old rows, so whoever needs them must remember them.
`KeptRows` does: an append-only log of Arrow batches, and a dict that says where in it each key's row lies. `segments`
cuts a batch into pieces in which every key has one outcome, so that all further work is Arrow's, column by column.

https://www.postgresql.org/docs/current/logical-replication-publication.html#LOGICAL-REPLICATION-PUBLICATION-REPLICA-IDENTITY
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pgoutput_source.changes.schema import OP_CODE
from pgoutput_source.compute.grouping import column_of, pack, unpack
from pgoutput_source.errors import StateError

Ints: TypeAlias = NDArray[np.int64]

_DELETE, _UPDATE, _TRUNCATE = OP_CODE["D"], OP_CODE["U"], OP_CODE["T"]
KNOWN = "_known "  # stands before a column that was added later, and that rows from before do not know
_NAN = "NaN"  # NaN is not equal to itself, but it is one group and one key
_MERGED_BYTES = 256 << 20  # far below the 2 GiB that an Arrow string array can hold
_GARBAGE_ROWS = 16384


# -------------------------------------------------------------------------------------------------- values and codes


def plain(values: pa.Array) -> list[Hashable]:
    """Values as Python objects that can be hashed, compared and pickled: times as integers, NaN as a word."""
    kind = values.type
    if pa.types.is_temporal(kind):
        return list(values.view(pa.int64() if kind.bit_width == 64 else pa.int32()).to_pylist())
    objects: list[Hashable] = values.to_pylist()
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


def keys_of(columns: Sequence[pa.Array], rows: Ints) -> list[Hashable]:
    """The keys of some rows as Python objects: a value, or a tuple of values."""
    lists = [plain(column.take(pa.array(rows))) for column in columns]
    return lists[0] if len(lists) == 1 else list(zip(*lists, strict=True))


# ----------------------------------------------------------------------------------------------------------- kept rows


class KeptRows:
    """The last row of each key: some columns, in memory.

    A row costs its Arrow values and about 150 bytes for the index; rows that were replaced stay until they are as many
    as those that count.
    """

    def __init__(self, key: tuple[str, ...]) -> None:
        self.key = key
        self._index: dict[Hashable, int] = {}
        self._chunks: list[pa.Table] = []
        self._end = 0

    def __len__(self) -> int:
        return len(self._index)

    @property
    def types(self) -> dict[str, pa.DataType]:
        """The columns that are kept, empty while no row is."""
        return {field.name: field.type for chunk in self._chunks for field in chunk.schema}

    def find(self, keys: Sequence[Hashable]) -> Ints:
        """Where each key's row lies, -1 for a key that has none."""
        return np.fromiter(map(self._index.get, keys, itertools.repeat(-1)), np.int64, len(keys))

    def take(self, places: Ints) -> pa.Table | None:
        """The rows at these places, in this order; None if nothing was ever kept."""
        if not self._chunks:
            return None
        if len(self._chunks) == 1:
            return self._chunks[0].take(pa.array(places))
        starts = np.cumsum([0, *(c.num_rows for c in self._chunks[:-1])])
        chunk = np.searchsorted(starts, places, "right") - 1
        order = np.argsort(chunk, kind="stable")
        parts = []
        for i in np.unique(chunk).tolist() or [0]:
            parts.append(self._chunks[i].take(pa.array(places[chunk == i] - starts[i])))
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return joined(parts).take(pa.array(back))

    def put(self, keys: Sequence[Hashable], rows: pa.Table) -> None:
        """Keep the rows of these keys, in place of those they had."""
        if not rows.num_rows:
            return
        self._index.update(zip(keys, range(self._end, self._end + rows.num_rows), strict=True))
        self._end += rows.num_rows
        self._chunks.append(rows)
        # A chunk at least twice as large as the next: there are few, and a row is copied few times.
        while len(self._chunks) > 1:
            last, before = self._chunks[-1], self._chunks[-2]
            if before.num_rows > 2 * last.num_rows or before.nbytes + last.nbytes > _MERGED_BYTES:
                break
            self._chunks[-2:] = [joined([before, last])]
        if self._end > 2 * len(self._index) + _GARBAGE_ROWS:
            self._collect()

    def drop(self, keys: Sequence[Hashable]) -> None:
        """Forget these keys."""
        for key in keys:
            self._index.pop(key, None)

    def clear(self) -> None:
        """Forget all."""
        self._index.clear()
        self._chunks.clear()
        self._end = 0

    def rekey(self, key: tuple[str, ...]) -> None:
        """Keep the same rows by other columns.

        Raises:
            StateError: These columns are not kept.
        """
        table = self._live()
        if table is not None and not set(key) <= set(table.column_names):
            raise StateError(
                f"the replica identity has changed from ({', '.join(self.key)}) to ({', '.join(key)}), "
                "and the rows that are kept don't have its columns",
                hint="start afresh with a new recovery folder, or another step name",
            )
        self.clear()
        self.key = key
        if table is not None:
            columns = [table.column(name).combine_chunks() for name in key]
            self.put(keys_of(columns, np.arange(table.num_rows)), table)

    def snapshot(self) -> dict[str, Any]:
        """Builtins that `restore` takes."""
        return {"key": self.key, "rows": pack(self._live())}

    @classmethod
    def restore(cls, state: dict[str, Any]) -> KeptRows:
        """What `snapshot` gave."""
        kept = cls(tuple(state["key"]))
        table = unpack(state["rows"])
        if table is not None:
            columns = [table.column(name).combine_chunks() for name in kept.key]
            kept.put(keys_of(columns, np.arange(table.num_rows)), table)
        return kept

    def _live(self) -> pa.Table | None:
        self._collect()
        return None if not self._chunks else joined(self._chunks) if len(self._chunks) > 1 else self._chunks[0]

    def _collect(self) -> None:
        """Drop the rows that were replaced."""
        if self._end == len(self._index):
            return
        places = np.fromiter(self._index.values(), np.int64, len(self._index))
        places_in_order = np.sort(places)
        rows = self.take(places_in_order)
        assert rows is not None
        keys = list(self._index)
        ranks = np.searchsorted(places_in_order, places)
        self._index = dict(zip(keys, ranks.tolist(), strict=True))
        self._chunks = [rows] if rows.num_rows else []
        self._end = rows.num_rows


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of all tables, in types that hold the values of each.

    Raises:
        StateError: There is no such type for a column.
    """
    if all(table.schema.equals(tables[0].schema) for table in tables):
        return pa.concat_tables(tables).combine_chunks()
    decimals = {field.name for table in tables for field in table.schema if pa.types.is_decimal(field.type)}
    try:
        # Arrow promotes by itself, but not integers to decimals.
        alike = [
            pa.table({name: _as_decimal(column) if name in decimals else column for name, column in columns})
            for columns in (zip(table.column_names, table.columns, strict=True) for table in tables)
        ]
        return pa.concat_tables(alike, promote_options="permissive").combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as e:
        raise StateError(
            f"a column has changed its type, and what is kept does not go with what comes: {e}",
            hint="start afresh with a new recovery folder, or another step name",
        ) from e


def _as_decimal(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.decimal128(20, 0)) if pa.types.is_integer(column.type) else column


# ------------------------------------------------------------------------------------------------ changes, key by key


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive changes and their outcome for each key.

    Attributes:
        truncated: The table was truncated right before.
        data: The changes, none of them a truncate.
        keys: Each key that they touch, once.
        codes: For each change, the index of its (new) key.
        last: For each key, the change that touched it last.
        gone: For each key, whether it has no row in the end.
        renames: Keys that changed: indexes of the old and the new one. Nothing here touches either before that, so
            that all of these may be taken to happen at the start.
        moved: The changes that these are.
    """

    truncated: bool
    data: pa.RecordBatch
    keys: list[Hashable]
    codes: Ints
    last: Ints
    gone: NDArray[np.bool_]
    renames: list[tuple[int, int]]
    moved: list[int]

    @property
    def there(self) -> list[Hashable]:
        """The keys that have a row in the end."""
        return (
            [key for key, gone in zip(self.keys, self.gone.tolist(), strict=True) if not gone]
            if self.gone.any()
            else self.keys
        )

    @property
    def dropped(self) -> list[Hashable]:
        """The keys that have none."""
        return [self.keys[i] for i in np.flatnonzero(self.gone).tolist()]

    def found(self, kept: KeptRows) -> tuple[pa.Table | None, Ints]:
        """The kept rows of these keys; and for each key its row among them, -1 without one, once keys have changed."""
        places = kept.find(self.keys)
        have = places >= 0
        rank = np.where(have, np.cumsum(have) - 1, -1)
        for old, new in self.renames:
            rank[new], rank[old] = rank[old], -1
        return (kept.take(places[have]) if have.any() else None), rank

    def filled(
        self, columns: Sequence[str], kept: pa.Table | None, found: Ints
    ) -> dict[str, tuple[pa.Array, NDArray[np.bool_] | None]]:
        """The last row of each key that has one, column by column, with what PostgreSQL did not send filled in.

        An unchanged TOASTed value comes from an earlier change, or from the kept row of its key.

        Args:
            columns: Which columns.
            kept: Rows that were kept of these keys.
            found: For each key its row in `kept`, or -1.

        Returns:
            For each column its values, and which of them are still not known (None: all are), in the order of the
            keys that have a row.
        """
        have = self.last[~self.gone]
        masks = unsent(self.data, columns)
        if not masks:
            return {name: (column_of(self.data, name).take(pa.array(have)), None) for name in columns}
        odd = misfits(self.data)
        order = np.argsort(self.codes, kind="stable")
        of_key = self.codes[order]
        starts = np.concatenate([[True], of_key[1:] != of_key[:-1]])
        place = np.arange(len(order))
        where = np.empty(len(order), np.int64)
        where[order] = place  # where in the sorted order a change stands
        out: dict[str, tuple[pa.Array, NDArray[np.bool_] | None]] = {}
        for name in columns:
            values = column_of(self.data, name)
            mask = masks.get(name)
            if mask is None:
                out[name] = (values.take(pa.array(have)), None)
                continue
            sent = ~mask[order]
            source = np.maximum.accumulate(np.where(sent | starts, place, 0))[where[have]]
            source_row = order[source]
            missing = ~sent[source]  # the chain of this key begins without the value
            index = source_row
            known = np.full(len(have), -1, np.int64)
            if kept is not None and name in kept.column_names:
                known = found[self.codes[have]]
                if KNOWN + name in kept.column_names:
                    was_there = pc.fill_null(kept.column(KNOWN + name), False).to_numpy()
                    known = np.where(was_there[known] & (known >= 0), known, -1)
                old = kept.column(name).combine_chunks()
                values = pa.concat_arrays([values, old.cast(values.type) if old.type != values.type else old])
                index = np.where(missing & (known >= 0), len(self.data) + known, index)
            unknown = missing & (known < 0)
            if name in odd:
                # What the column's type can't hold is in that change's `_raw`, not in its cell.
                unknown |= odd[name][source_row] & (source_row != have)
            out[name] = (values.take(pa.array(index)), unknown if unknown.any() else None)
        return out


def unsent(data: pa.RecordBatch, columns: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """By column, the rows for which PostgreSQL did not send its value: unchanged TOAST."""
    unchanged = data.column("_unchanged")
    if unchanged.null_count == len(unchanged):
        return {}
    rows = pc.list_parent_indices(unchanged).to_numpy()
    names = pc.list_flatten(unchanged).dictionary_encode()
    masks: dict[str, NDArray[np.bool_]] = {}
    for code, name in enumerate(names.dictionary.to_pylist()):
        if name in columns:
            mask = np.zeros(len(data), np.bool_)
            mask[rows[names.indices.to_numpy() == code]] = True
            masks[name] = mask
    return masks


def misfits(data: pa.RecordBatch) -> dict[str, NDArray[np.bool_]]:
    """By column, the rows whose value its Arrow type can't hold: they are in `_raw`."""
    masks: dict[str, NDArray[np.bool_]] = {}
    if data.column("_raw").null_count < len(data):
        for row, texts in enumerate(data.column("_raw").to_pylist()):
            for name, _ in texts or ():
                masks.setdefault(name, np.zeros(len(data), np.bool_))[row] = True
    return masks


def operations(data: pa.RecordBatch) -> NDArray[np.int8]:
    """`_op` of each row as its index in `OPS`."""
    column = data.column("_op")
    codes: NDArray[np.int8] = np.array([OP_CODE[op] for op in column.dictionary.to_pylist()], np.int8)
    found: NDArray[np.int8] = codes[column.indices.to_numpy()]
    return found


def segments(data: pa.RecordBatch, key: tuple[str, ...]) -> Iterator[Segment]:
    """A batch of changes as segments, in order: cut at truncates, and where a change of key needs what was before."""
    ops = operations(data)
    truncates = np.flatnonzero(ops == _TRUNCATE).tolist()
    start = 0
    for end in [*truncates, len(data)]:
        if end > start or (start and end == len(data)):
            yield from _between(data.slice(start, end - start), ops[start:end], key, truncated=start > 0)
        start = end + 1


def _between(
    data: pa.RecordBatch, ops: NDArray[np.int8], key: tuple[str, ...], *, truncated: bool
) -> Iterator[Segment]:
    columns = [column_of(data, name) for name in key]
    moved, before = _moved(data, ops, columns, key)
    n = len(data)
    if len(moved):
        columns = [pa.concat_arrays([c, b]) for c, b in zip(columns, before, strict=True)]
    codes, some = encode(columns)
    olds = dict(zip(moved.tolist(), codes[n:].tolist(), strict=True))
    cuts = [0, *_cuts(codes[:n], olds), n]
    for low, high in itertools.pairwise(cuts):
        inside = {row - low: old for row, old in olds.items() if low <= row < high}
        here = codes[low:high]
        touched, dense = np.unique(np.concatenate([here, [*inside.values()]]).astype(np.int64), return_inverse=True)
        here, old = dense[: high - low], dense[high - low :]
        last = np.full(len(touched), -1, np.int64)
        last[here] = np.arange(high - low)
        gone = (last >= 0) & (ops[low:high][last] == _DELETE) if high > low else np.zeros(len(touched), np.bool_)
        renames = []
        for row, code in zip(inside, old.tolist(), strict=True):
            renames.append((code, int(here[row])))
            if last[code] < row:
                last[code], gone[code] = row, True
        yield Segment(
            truncated and low == 0,
            data.slice(low, high - low),
            keys_of(columns, some[touched]) if len(touched) else [],
            here,
            last,
            gone,
            renames,
            list(inside),
        )


def _moved(
    data: pa.RecordBatch, ops: NDArray[np.int8], columns: Sequence[pa.Array], key: tuple[str, ...]
) -> tuple[Ints, list[pa.Array]]:
    """The updates that changed the key, and their old keys."""
    before = data.column("_before")
    if before.null_count == len(data):
        return np.zeros(0, np.int64), []
    sent = np.flatnonzero((ops == _UPDATE) & pc.is_valid(before).to_numpy(zero_copy_only=False))
    olds = [pc.struct_field(before, name).take(pa.array(sent)) for name in key]
    differs = np.zeros(len(sent), np.bool_)
    for column, old in zip(columns, olds, strict=True):
        same = pc.equal(column.take(pa.array(sent)), old)
        differs |= ~pc.fill_null(same, False).to_numpy(zero_copy_only=False)
    changed = np.flatnonzero(differs)
    return sent[changed], [old.take(pa.array(changed)) for old in olds]


def _cuts(codes: Ints, olds: dict[int, int]) -> list[int]:
    """Where a change of key must begin a segment: something before in the segment touches its old or its new key."""
    if not olds:
        return []
    cuts: list[int] = []
    touched: set[int] = set()
    for row, code in enumerate(codes.tolist()):
        old = olds.get(row)
        if old is not None:
            if old in touched or code in touched:
                cuts.append(row)
                touched = set()
            touched.add(old)
        touched.add(code)
    return [cut for cut in cuts if cut]
