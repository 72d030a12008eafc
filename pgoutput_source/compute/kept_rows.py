"""The last row of each key, kept as state.

With a replica identity of only the key PostgreSQL sends no old rows, so a step that needs them must remember them.
`KeptRows` does: an append-only log of Arrow tables, and a dict with the place of each key's row in it.

https://www.postgresql.org/docs/current/logical-replication-publication.html#LOGICAL-REPLICATION-PUBLICATION-REPLICA-IDENTITY
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.compute.keys import KeyColumns
from pgoutput_source.compute.metadata import Bools, Ints, renamed
from pgoutput_source.compute.state import AFRESH, pack, unpack
from pgoutput_source.compute.versions import column_in
from pgoutput_source.errors import StateError

KNOWN = "_known "
"""The prefix of a column of booleans that tells which kept rows know the value of the column named after it."""

RAW = "raw\0"
"""The column of a row's misfits. Its name has a zero byte, so no column of a table has such a name."""

_MERGED_BYTES = 256 << 20  # well below the 2 GiB that an Arrow string array can hold
_GARBAGE_ROWS = 16384
_RAW_OF_0_1 = "_raw"  # the column's name in states of version 0.1.0, which don't have it


class KeptRows:
    """The last row of each key, in memory: some columns, and `RAW` for misfits.

    A row costs its Arrow values and about 150 bytes for the index. Replaced rows stay until there are as many of them
    as of current ones.
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
        """The kept columns; empty while no row is kept."""
        return {field.name: field.type for chunk in self._chunks for field in chunk.schema}

    def find(self, keys: Sequence[Hashable]) -> Ints:
        """The place of each key's row; -1 for a key without one."""
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
        """Keep the rows of these keys, in place of their earlier rows."""
        if not rows.num_rows:
            return
        self._index.update(zip(keys, range(self._end, self._end + rows.num_rows), strict=True))
        self._end += rows.num_rows
        self._chunks.append(rows)
        # A chunk is at least twice as large as the next. So there are few chunks, and a row is copied only a few times.
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
        """Forget all rows."""
        self._index.clear()
        self._chunks.clear()
        self._end = 0

    def rekey(self, key: tuple[str, ...]) -> None:
        """Change the key of the kept rows.

        Raises:
            StateError: These columns are not kept.
        """
        table = self.table()
        if table is not None and not set(key) <= set(table.column_names):
            raise StateError(
                f"the replica identity has changed from ({', '.join(self.key)}) to ({', '.join(key)}), "
                "and the kept rows don't have its columns",
                hint=AFRESH,
            )
        self.key = key
        self.replace(table)

    def replace(self, table: pa.Table | None) -> None:
        """Keep exactly these rows."""
        self.clear()
        if table is not None:
            columns = {name: table.column(name).combine_chunks() for name in self.key}
            raw = table.column(RAW).combine_chunks() if RAW in table.column_names else None
            self.put(KeyColumns.of(columns, table.schema, raw).objects(), table)

    def rename(self, names: Mapping[str, str]) -> None:
        """Rename columns of the kept rows; `names` maps old names to new ones."""
        rows = self.table()
        self.key = tuple(names.get(name, name) for name in self.key)
        if rows is not None:
            if RAW in rows.column_names:
                own = {name: names.get(name, name) for name in rows.column_names}
                index = rows.schema.get_field_index(RAW)
                rows = rows.set_column(index, rows.field(index), renamed(rows.column(RAW), own))
            rows = rows.rename_columns([names.get(name, name) for name in rows.column_names])
        self.replace(rows)

    def become(self, old: pa.Schema, new: pa.Schema, key: tuple[str, ...], columns: Sequence[str]) -> None:
        """Convert the kept rows to another version of their table.

        Args:
            old: Their current version.
            new: The new version.
            key: The new key's columns.
            columns: The columns to keep from now on, including the key's.

        Raises:
            StateError: The key has columns that are not kept.
        """
        rows = self.table()
        self.key = key
        if rows is None:
            return
        past = {name: column_in(old, new.field(name)) for name in columns}
        fields, arrays = [], []
        for name in columns:
            field, was = new.field(name), past[name]
            here = was.name is not None and was.name in rows.column_names
            if name in key and not here:
                raise StateError(
                    f"the replica identity has changed to ({', '.join(key)}), and the kept rows lack {name}",
                    hint=AFRESH,
                )
            if here and (was.known or name in key):
                column = rows.column(was.name)
                fields.append(field.with_type(column.type) if name in key else field)
                arrays.append(column if name in key or column.type == field.type else column.cast(field.type))
                if KNOWN + str(was.name) in rows.column_names:
                    fields.append(pa.field(KNOWN + name, pa.bool_()))
                    arrays.append(rows.column(KNOWN + str(was.name)))
            elif was.name is None and was.known:
                fields.append(field)
                arrays.append(pa.repeat(pa.scalar(None, field.type) if was.value is None else was.value, len(rows)))
            else:
                fields += [field, pa.field(KNOWN + name, pa.bool_())]
                arrays += [pa.nulls(len(rows), field.type), pa.repeat(False, len(rows))]
        if RAW in rows.column_names:
            names = {was.name: name for name, was in past.items() if was.name is not None}
            fields.append(rows.schema.field(RAW))
            arrays.append(renamed(rows.column(RAW), names))
        self.replace(pa.table(arrays, pa.schema(fields)))

    def table(self) -> pa.Table | None:
        """All rows; None if nothing is kept."""
        self._collect()
        return None if not self._chunks else joined(self._chunks) if len(self._chunks) > 1 else self._chunks[0]

    def snapshot(self) -> dict[str, Any]:
        """The rows as builtins, for `restore`."""
        return {"key": self.key, "rows": pack(self.table()), "raw": RAW}

    @classmethod
    def restore(cls, state: dict[str, Any]) -> KeptRows:
        """The rows that `snapshot` returned."""
        kept = cls(tuple(state["key"]))
        rows, raw = unpack(state["rows"]), state.get("raw", _RAW_OF_0_1)
        if rows is not None and raw != RAW:
            rows = rows.rename_columns([RAW if name == raw else name for name in rows.column_names])
        kept.replace(rows)
        return kept

    def _collect(self) -> None:
        """Drop replaced rows."""
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


def known(rows: pa.Table, name: str) -> Bools:
    """Which kept rows know the value of a column."""
    if name not in rows.column_names:
        return np.zeros(rows.num_rows, np.bool_)
    if KNOWN + name not in rows.column_names:
        return np.ones(rows.num_rows, np.bool_)
    found: Bools = pc.fill_null(rows.column(KNOWN + name), False).to_numpy()
    return found


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of all tables, in types that hold the values of each. Where a table lacks a column, it is unknown.

    Raises:
        StateError: A column has no such type.
    """
    if all(table.schema.equals(tables[0].schema) for table in tables):
        return pa.concat_tables(tables).combine_chunks()
    names = {name for table in tables for name in table.column_names if name != RAW and not name.startswith(KNOWN)}
    marked = {n for n in names if any(n not in t.column_names or KNOWN + n in t.column_names for t in tables)}
    decimals = {field.name for table in tables for field in table.schema if pa.types.is_decimal(field.type)}
    try:
        return pa.concat_tables(
            [_alike(table, marked, decimals) for table in tables], promote_options="permissive"
        ).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as e:
        raise StateError(
            f"a column has changed its type, and new values don't go with the kept ones: {e}", hint=AFRESH
        ) from e


def _alike(table: pa.Table, marked: set[str], decimals: set[str]) -> pa.Table:
    """A table ready to be joined: with columns for what it knows, and integers as decimals, which Arrow won't cast."""
    arrays, fields = list(table.columns), list(table.schema)
    for i, field in enumerate(fields):
        if field.name in decimals and pa.types.is_integer(field.type):
            fields[i] = field.with_type(pa.decimal128(20, 0))
            arrays[i] = arrays[i].cast(fields[i].type)
    known_columns = [KNOWN + name for name in sorted(marked)]
    keep = [i for i, field in enumerate(fields) if field.name not in known_columns]
    arrays = [*(arrays[i] for i in keep), *(pa.array(known(table, name)) for name in sorted(marked))]
    return pa.table(arrays, pa.schema([*(fields[i] for i in keep), *(pa.field(n, pa.bool_()) for n in known_columns)]))
