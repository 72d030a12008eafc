"""`current`: a table as its changes leave it, from a folder of Parquet files, without replaying row by row.

A key's changes, in order, are cut into *lives*: one begins with an insert, or when an update brings the row from
another key, and ends with a delete, or when an update takes it to another key. The last change of a key's last life is
its row. A large value that PostgreSQL did not send again comes from earlier in the same life, or from the life that the
row had under its old key. All of that is sorting and accumulating over whole columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pgoutput_source.changes.schema import OP_CODE
from pgoutput_source.compute.keyed_rows import Ints, encode
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.parquet.folder import table_of
from pgoutput_source.parquet.read import read

Bools = NDArray[np.bool_]

_NEEDED: Final = ("_op", "_commit_lsn", "_seq")
_OLD: Final = "_before."


def current(folder: str | Path, *, key: str | Sequence[str], table: str | None = None) -> pa.Table:
    """The rows of a table after the last change in a `ParquetSink`'s published files: one per key, deleted ones gone.

    It equals ``SELECT * FROM`` the table at that change's position, as far as the files have its history: rows that
    never changed since the slot was made are not there. A large value that did not change, and that PostgreSQL
    therefore did not send, is filled in from before; what the files never had stays named in `_unchanged`, for its null
    is no NULL. Changes that are in the files twice count once.

    It works on what `cdc.latest` and `cdc.aggregate` wrote as well. In memory are the keys of all changes, and the
    result.

    Args:
        folder: The folder of a `ParquetSink`.
        key: Columns that identify a row. Deletes must bring them: they belong to the replica identity, or it is FULL.
        table: Schema and table; needed when the folder has changes of several.

    Returns:
        The table's own columns, and the metadata columns of each row's last change but `_before`; in the order of
        these changes.

    Raises:
        ConfigurationError: The folder has changes of several tables, or none at all, or no such key.
        SinkError: The files have a column of types that can't be brought together.

    Example:
        >>> import pyarrow.parquet as pq, tempfile
        >>> from pgoutput_source.testing import batch
        >>> changes = [("I", {"id": 1, "status": "new"}), ("I", {"id": 2, "status": "new"})]
        >>> changes += [("U", {"id": 1, "status": "paid"}), ("D", {"id": 2}, {"id": 2})]
        >>> folder = tempfile.mkdtemp()
        >>> pq.write_table(pa.table(batch("public.orders", changes)), f"{folder}/orders.parquet")
        >>> current(folder, key="id").select(["id", "status"]).to_pylist()
        [{'id': 1, 'status': 'paid'}]
    """
    keys = (key,) if isinstance(key, str) else tuple(key)
    files = read(folder, table=_the_table(Path(folder), table))
    _check_columns(files.schema, keys, folder)
    lives = _lives(files, keys)
    found = lives.current()
    own = [name for name in files.schema.names if name != "_before"]
    result = files.scanner(columns=own).take(pa.array(lives.place[found.row]))
    if "_unchanged" in own:
        result = _filled(files, lives, found, result)
    return result


# -- the files ------------------------------------------------------------------------------------------------------


def _the_table(folder: Path, table: str | None) -> str | None:
    tables = {table_of(pq.read_schema(file)) for file in folder.glob("*.parquet")}
    if not tables or (table is not None and table not in tables):
        raise ConfigurationError(
            f"there are no changes of {table or 'any table'} in {folder}",
            hint=f"it has changes of {', '.join(sorted(tables))}" if tables else "it has no published files (yet)",
        )
    if table is None and len(tables) > 1:
        raise ConfigurationError(
            f"{folder} has changes of several tables", hint=f"pass table=, one of {', '.join(sorted(tables))}"
        )
    return table


def _check_columns(schema: pa.Schema, keys: tuple[str, ...], folder: str | Path) -> None:
    missing = [name for name in (*_NEEDED, *keys) if name not in schema.names]
    if missing or not keys:
        own = ", ".join(name for name in schema.names if not name.startswith("_"))
        raise ConfigurationError(
            f"the files in {folder} have no column {missing[0]!r}" if missing else "key is empty",
            hint=f"pass key= with columns that identify a row; there are {own}",
        )


# -- lives ----------------------------------------------------------------------------------------------------------


class _Current(NamedTuple):
    """The last change of each row that is there: which event it is, and which change, in position order."""

    event: Ints
    row: Ints


class _Lives(NamedTuple):
    """Changes in position order, and *events*: changes by key, where an update of the key is one of its old key, too.

    Attributes:
        place: Of each change, where in the files it stands.
        code: Of each event, its key.
        row: Of each event, its change.
        leaves: Of each event, whether it takes the row to another key.
        ends: Of each event, whether its key has no row any more.
        start: Of each event, the first event of its life.
        parent: Of each event, the event at the old key if this one brings the row from there, or -1.
    """

    place: Ints
    code: Ints
    row: Ints
    leaves: Bools
    ends: Bools
    start: Ints
    parent: Ints

    def current(self) -> _Current:
        if not len(self.code):
            return _Current(self.row, self.row)
        last = np.append(self.code[1:] != self.code[:-1], True) & ~self.ends
        event = np.flatnonzero(last)
        event = event[np.argsort(self.row[event], kind="stable")]
        return _Current(event, self.row[event])

    def sources(self, sent: Bools, event: Ints) -> Ints:
        """The change that last sent a column's value, for the rows after these events; -1 if none did."""
        here = np.where(sent[self.row] & ~self.leaves, np.arange(len(self.row)), -1)
        latest = np.maximum.accumulate(here)
        found = np.full(len(event), -1, np.int64)
        open_ = np.arange(len(event))
        at = event
        while len(open_):
            known = latest[at] >= self.start[at]
            found[open_[known]] = self.row[latest[at[known]]]
            at = self.parent[self.start[at]]
            again = ~known & (at >= 0)
            open_, at = open_[again], at[again]
        return found


def _lives(files: ds.FileSystemDataset, keys: tuple[str, ...]) -> _Lives:
    columns = {name: pc.field(name) for name in (*_NEEDED, *keys)}
    olds = _old_keys(files.schema, keys)
    table = files.to_table(columns=columns | olds)
    lsn, seq = (table.column(name).to_numpy() for name in ("_commit_lsn", "_seq"))
    ops = _operations(table.column("_op"))
    place = np.lexsort((seq, lsn))
    truncates = np.flatnonzero(ops[place] == OP_CODE["T"])
    if len(truncates):
        place = place[truncates[-1] + 1 :]
    ops = ops[place]
    taken = table.take(pa.array(place))
    new = [taken.column(name).combine_chunks() for name in keys]
    # What `cdc.aggregate` wrote has no LSN of changes, and there NULL is a group that may go like any other.
    if "_lsn" in files.schema.names:
        _check_deletes(ops, new, keys)
    moved, old = _moved(ops, new, [taken.column(name).combine_chunks() for name in olds])
    n = len(place)
    codes, _ = encode([pa.concat_arrays([a, b.cast(a.type)]) for a, b in zip(new, old, strict=True)] if old else new)
    row = np.concatenate([np.arange(n), moved])
    leaves = np.arange(len(row)) >= n
    if n:
        # What is in the files twice is next to itself in the order of key, position and kind.
        position = np.cumsum(np.append(False, (np.diff(lsn[place]) != 0) | (np.diff(seq[place]) != 0)))
        order = np.lexsort((row, leaves, ops[row], position[row], codes))
        same = np.stack([codes[order], position[row[order]], ops[row[order]], leaves[order]])
        order = order[np.append(True, (np.diff(same, axis=1) != 0).any(axis=0))]
        order = order[np.lexsort((row[order], codes[order]))]
        codes, row, leaves = codes[order], row[order], leaves[order]
    ends = leaves | (ops[row] == OP_CODE["D"])
    back = np.full(n, -1, np.int64)
    back[row[leaves]] = np.flatnonzero(leaves)
    parent = np.where(leaves, -1, back[row])
    begins = np.isin(ops[row], (OP_CODE["I"], OP_CODE["R"])) | (parent >= 0)
    begins[:1] = True
    begins[1:] |= (codes[1:] != codes[:-1]) | ends[:-1]
    start = np.maximum.accumulate(np.where(begins, np.arange(len(row)), 0))
    return _Lives(place, codes, row, leaves, ends, start, parent)


def _old_keys(schema: pa.Schema, keys: tuple[str, ...]) -> dict[str, pc.Expression]:
    if "_before" not in schema.names:
        return {}
    before = schema.field("_before").type
    if not all(before.get_field_index(name) >= 0 for name in keys):
        return {}
    return {_OLD + name: pc.field("_before", name) for name in keys}


def _operations(column: pa.ChunkedArray) -> NDArray[np.int8]:
    letters = pa.array(OP_CODE)
    found: NDArray[np.int8] = pc.index_in(column.cast(pa.utf8()), letters).to_numpy().astype(np.int8)
    return found


def _check_deletes(ops: NDArray[np.int8], new: list[pa.Array], keys: tuple[str, ...]) -> None:
    deletes = pa.array(np.flatnonzero(ops == OP_CODE["D"]))
    for name, column in zip(keys, new, strict=True):
        if column.null_count and column.take(deletes).null_count:
            raise ConfigurationError(
                f"deletes come without {name}",
                hint="the replica identity does not send it: choose other columns for key=, or set it to FULL",
            )


def _moved(ops: NDArray[np.int8], new: list[pa.Array], old: list[pa.Array]) -> tuple[Ints, list[pa.Array]]:
    """The updates that changed the key, and their old keys."""
    differs, known = np.zeros(len(ops), np.bool_), ops == OP_CODE["U"]
    for now, before in zip(new, old, strict=bool(old)):
        known &= before.is_valid().to_numpy(zero_copy_only=False)
        differs |= ~pc.fill_null(pc.equal(now, before), False).to_numpy(zero_copy_only=False)
    moved = np.flatnonzero(differs & known)
    return moved, [before.take(pa.array(moved)) for before in old]


# -- values that were not sent --------------------------------------------------------------------------------------


def _filled(files: ds.FileSystemDataset, lives: _Lives, found: _Current, result: pa.Table) -> pa.Table:
    """The result with the values that PostgreSQL did not send again; those that no file has stay in `_unchanged`."""
    unchanged = result.column("_unchanged").combine_chunks()
    if unchanged.null_count == len(unchanged):
        return result
    rows = pc.list_parent_indices(unchanged).to_numpy()
    names = pc.list_flatten(unchanged).to_numpy(zero_copy_only=False)
    history = files.to_table(columns=["_unchanged"]).column("_unchanged").combine_chunks()
    of_change = pc.list_parent_indices(history).to_numpy()
    of_name = pc.list_flatten(history).dictionary_encode()
    raw: dict[int, dict[str, str]] = {}
    unknown: dict[int, list[str]] = {}
    for code, name in enumerate(of_name.dictionary.to_pylist()):
        missing = rows[names == name]
        if not len(missing):
            continue
        sent = _with_column(files, name)
        sent[of_change[of_name.indices.to_numpy() == code]] = False
        source = lives.sources(sent[lives.place], found.event[missing])
        for row in missing[source < 0].tolist():
            unknown.setdefault(row, []).append(name)
        missing, source = missing[source >= 0], source[source >= 0]
        index = result.schema.get_field_index(name)
        columns = [name, "_raw"] if "_raw" in files.schema.names else [name]
        values = files.scanner(columns=columns).take(pa.array(lives.place[source]))
        where = np.arange(len(result))
        where[missing] = len(result) + np.arange(len(missing))
        both = pa.chunked_array([*result.column(index).chunks, *values.column(name).chunks], result.field(index).type)
        result = result.set_column(index, result.field(index), both.take(pa.array(where)))
        for row, text in _texts(values, name):
            raw.setdefault(int(missing[row]), {})[name] = text
    result = _with_values(result, "_unchanged", {row: unknown.get(row) for row in set(rows.tolist())})
    if raw:
        old = result.column("_raw")
        result = _with_values(result, "_raw", {i: {**dict(old[i].as_py() or ()), **texts} for i, texts in raw.items()})
    return result


def _with_column(files: ds.FileSystemDataset, name: str) -> Bools:
    """Of each change, whether its file has a column: where it has not, the column was added later."""
    counts, has = [], []
    for fragment in files.get_fragments():
        counts.append(fragment.count_rows())
        has.append(name in fragment.physical_schema.names)
    return np.repeat(np.array(has, np.bool_), counts)


def _texts(values: pa.Table, name: str) -> list[tuple[int, str]]:
    """The exact texts of a column's values that its type can't hold, by row."""
    if "_raw" not in values.column_names or values.column("_raw").null_count == len(values):
        return []
    texts = enumerate(values.column("_raw").to_pylist())
    return [(i, dict(known)[name]) for i, known in texts if known and name in dict(known)]


def _with_values(table: pa.Table, name: str, values: dict[int, Any]) -> pa.Table:
    index = table.schema.get_field_index(name)
    cells = table.column(index).to_pylist()
    for row, value in values.items():
        cells[row] = list(value.items()) if isinstance(value, dict) else value
    return table.set_column(index, table.field(index), pa.array(cells, table.field(index).type))
