"""`current`: the table that a folder of changes leads to, computed without replaying them row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pgoutput_source.changes.schema import OP_CODE, MetadataNames
from pgoutput_source.compute.keys import KeyColumns, moved
from pgoutput_source.compute.metadata import DELETE, TRUNCATE, Bools, Ints, own_columns, texts
from pgoutput_source.compute.net_effect import Crowd, Lives, digests, lives
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.files import local_path
from pgoutput_source.parquet.history import OLD, TableHistory


def current(folder: str | Path, *, key: str | Sequence[str], table: str | None = None) -> pa.Table:
    """The rows of a table after the last change in a `ParquetSink`'s published files: one for each existing key.

    It equals ``SELECT * FROM`` the table at that change's position, as far as the files have its history: rows that
    have not changed since the slot was created are missing. PostgreSQL does not send a large value that did not change,
    so it is filled in from an earlier change. If the files never had it, it is null and named in `_unchanged`, because
    this null is not a NULL. A change that is in the files twice counts once. If keys trade places within a transaction,
    the result is right as of its end.

    The table is the one that has the name in the newest file. Rows of another table that had the name before, and was
    dropped or renamed, are left out; changes from the time when this table had another name are included. Columns are
    those of the newest file. A renamed column keeps its values. ALTER TABLE changes rows without sending them, and
    what can be known of that is applied. An added column has its default in older rows. After a change of type (except
    to a wider varchar, numeric, time or timestamp) the values of rows that were not sent again are unknown, because
    USING may have computed anything; they are named in `_unchanged`. ``UPDATE t SET c = c`` sends them again.

    A key keeps its values if PostgreSQL's own cast to the new type depends on nothing else: if it was and is a number,
    if it becomes text (but for dates, times, floats and bytea, whose text depends on settings), and if a date becomes a
    timestamp. Otherwise the key of rows that were not sent again is unknown, and their earlier versions can't be
    matched with rows that were: give the new version a folder of its own.

    It also works on the output of `cdc.latest` and `cdc.aggregate`. It holds the keys of all changes and the result in
    memory.

    Args:
        folder: The folder of a `ParquetSink`.
        key: Columns that identify a row. Deletes must have them: they belong to the replica identity, or it is FULL.
        table: Schema and table; needed when the folder has changes of several tables.

    Returns:
        The table's own columns, and the metadata columns (except `_before`) of each row's last change, in the order of
        these changes.

    Raises:
        ConfigurationError: The folder has changes of several tables, or no changes, or no such key.

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
    history = TableHistory(local_path(folder).absolute(), table)
    _check_columns(history.schema, keys, folder)
    changes = _changes(history, keys)
    own = [name for name in history.schema.names if name != history.metadata.before]
    result = history.take(changes.place[changes.last], own).replace_schema_metadata(history.metadata.said or None)
    if history.metadata.unchanged in own:
        result = _filled(history, changes, result, keys)
    return result


def _check_columns(schema: pa.Schema, keys: tuple[str, ...], folder: str | Path) -> None:
    missing = [name for name in (*_needed(schema), *keys) if name not in schema.names]
    if missing or not keys:
        own = ", ".join(own_columns(schema))
        raise ConfigurationError(
            f"the files in {folder} have no column {missing[0]!r}" if missing else "key is empty",
            hint=f"pass key= with columns that identify a row; the columns are {own}",
        )


def _needed(schema: pa.Schema) -> tuple[str, ...]:
    metadata = MetadataNames.of(schema)
    return metadata.op, metadata.commit_lsn, metadata.seq


# -- changes --------------------------------------------------------------------------------------------------------


class _Changes(NamedTuple):
    """The changes that count, in position order, and what became of each key.

    Attributes:
        place: The place of each change in the history.
        lives: The lives that the changes form.
        event: For each row of the result, the event that left it as it is; in the order of the changes.
        last: The changes of these events.
    """

    place: Ints
    lives: Lives
    event: Ints
    last: Ints


def _changes(history: TableHistory, keys: tuple[str, ...]) -> _Changes:
    schema, metadata = history.schema, history.metadata
    olds = keys if metadata.before in schema.names and all(_in_before(schema, name) for name in keys) else ()
    names = [*_needed(schema), *keys, *([metadata.raw] if metadata.raw in schema.names else [])]
    table = history.columns(names, olds, keys)
    ops = _operations(table.column(metadata.op))
    place = _in_order(table, metadata)
    truncates = np.flatnonzero(ops[place] == TRUNCATE)
    if len(truncates):
        place = place[truncates[-1] + 1 :]
    taken = table.take(pa.array(place))
    ops = ops[place]
    raw = _array(taken, metadata.raw) if metadata.raw in names else None
    news = KeyColumns.of({name: _array(taken, name) for name in keys}, schema, raw)
    before = KeyColumns.of({n: _array(taken, OLD + n) for n in keys}, schema, raw, metadata.old) if olds else None
    # The output of `cdc.aggregate` has no LSNs of changes. There, NULL is a group that can be removed like any other.
    if metadata.lsn in schema.names:
        _check_deletes(news.known()[ops == DELETE], keys, history.whole()[place][ops == DELETE])
    is_whole = history.whole()[place]
    sent = taken.column(OLD).to_numpy() if olds else np.zeros(len(place), np.bool_)
    moves = moved(ops, news, before, sent, is_whole)
    together = news if before is None else news.followed_by(before.take(moves))
    code, _ = together.encode()
    n = len(place)
    twice = _twice(taken, metadata, code[:n], ops)
    if twice.any():
        once = np.flatnonzero(~twice)
        stays = ~twice[moves]
        code = np.concatenate([code[:n][once], code[n:][stays]])
        moves = (np.cumsum(~twice) - 1)[moves[stays]]
        place, ops, is_whole, n = place[once], ops[once], is_whole[once], len(once)
        taken = taken.select([metadata.commit_lsn]).take(pa.array(once))
    crowd = None
    if olds and is_whole.any():
        crowd = _crowd(history, taken.column(metadata.commit_lsn).to_numpy().astype(np.int64), is_whole, place)
    found = lives(ops, code[:n], moves, code[n:], crowd)
    event = found.last()
    event = event[~found.ends[event]]
    event = event[np.argsort(found.row[event], kind="stable")]
    return _Changes(place, found, event, found.row[event])


def _in_before(schema: pa.Schema, name: str) -> bool:
    return bool(schema.field(MetadataNames.of(schema).before).type.get_field_index(name) >= 0)


def _in_order(table: pa.Table, metadata: MetadataNames) -> Ints:
    """The places of all changes in position order."""
    lsn, seq = (table.column(name).to_numpy() for name in (metadata.commit_lsn, metadata.seq))
    place: Ints = np.lexsort((seq, lsn)).astype(np.int64)
    return place


def _twice(taken: pa.Table, metadata: MetadataNames, code: Ints, ops: NDArray[np.int8]) -> Bools:
    """Which changes repeat another one: the same operation on the same key at the same position."""
    n = len(code)
    lsn, seq = (taken.column(name).to_numpy() for name in (metadata.commit_lsn, metadata.seq))
    again = np.zeros(n, np.bool_)
    again[1:] = (lsn[1:] == lsn[:-1]) & (seq[1:] == seq[:-1])
    if again.any():
        # The delete of an old key has the same position as the update that moves its row to the new key.
        position = np.cumsum(~again)
        order = np.lexsort((ops, code, position))
        same = np.stack([position[order], code[order], ops[order]])
        again[order] = np.append(False, (np.diff(same, axis=1) == 0).all(axis=0))
    return again


def _crowd(history: TableHistory, transaction: Ints, is_whole: Bools, place: Ints) -> Crowd:
    metadata = history.metadata
    names = [
        name
        for name in own_columns(history.schema)
        if _in_before(history.schema, name) and _comparable(history.known(name)[place], transaction)
    ]

    def contents(rows: Ints, prefix: str) -> list[bytes]:
        raw = [metadata.raw] if metadata.raw in history.schema.names else []
        table = history.take(place[rows], [*([] if prefix else names), *raw], names if prefix else ())
        found = digests([_array(table, prefix + name) for name in sorted(names)])
        for name, odd in sorted(texts(_array(table, metadata.raw) if raw else None).items()):
            if name.startswith(metadata.old) == bool(prefix):
                for row, text in zip(odd.rows.tolist(), odd.texts, strict=True):
                    found[row] += f"{name.removeprefix(metadata.old)}={text}".encode()
        return found

    return Crowd(transaction, is_whole, lambda rows: contents(rows, ""), lambda rows: contents(rows, OLD))


def _comparable(known: Bools, transaction: Ints) -> bool:
    """Whether no transaction has changes with the column's value and others without: ALTER TABLE amid its changes."""
    return bool(known.all()) or not np.isin(transaction[~known], transaction[known]).any()


def _operations(column: pa.ChunkedArray) -> NDArray[np.int8]:
    letters = pa.array(OP_CODE)
    found: NDArray[np.int8] = pc.index_in(column.cast(pa.utf8()), letters).to_numpy().astype(np.int8)
    return found


def _array(table: pa.Table, name: str) -> pa.Array:
    return table.column(name).combine_chunks()


def _check_deletes(known: Bools, keys: tuple[str, ...], is_whole: Bools) -> None:
    if (~known & ~is_whole).any():
        raise ConfigurationError(
            f"deletes come without {', '.join(keys)}",
            hint="the replica identity does not include it: choose other columns for key=, or set it to FULL",
        )


# -- values that were not sent --------------------------------------------------------------------------------------


def _filled(history: TableHistory, changes: _Changes, result: pa.Table, keys: tuple[str, ...]) -> pa.Table:
    """Fill in the values that the changes did not have. Values that no file has are named in `_unchanged`."""
    metadata = history.metadata
    unchanged = _array(history.columns([metadata.unchanged]), metadata.unchanged)
    of_change = pc.list_parent_indices(unchanged).to_numpy()
    of_name = pc.list_flatten(unchanged).dictionary_encode()
    codes = {name: code for code, name in enumerate(of_name.dictionary.to_pylist())}
    own = [name for name in own_columns(history.schema) if name in codes or not history.known(name).all()]
    raw: dict[int, dict[str, str]] = {}
    unknown: dict[int, list[str]] = {}
    open_: set[int] = set()
    for name in own:
        sent = history.known(name)
        if name in codes:
            sent[of_change[of_name.indices.to_numpy() == codes[name]]] = False
        sent = sent[changes.place]
        missing = np.flatnonzero(~sent[changes.last])
        if not len(missing):
            continue
        open_.update(missing.tolist())
        source = changes.lives.origins(sent, changes.event[missing]).change
        nowhere = missing[source < 0]
        if name in keys and len(nowhere) and history.keeps_identity(name):
            result, nowhere = _with_key(history, changes, result, name, nowhere)
        for row in nowhere.tolist():
            unknown.setdefault(row, []).append(name)
        missing, source = missing[source >= 0], source[source >= 0]
        columns = [name, *([metadata.raw] if metadata.raw in history.schema.names else [])]
        values = history.take(changes.place[source], columns)
        where = np.arange(len(result))
        where[missing] = len(result) + np.arange(len(missing))
        index = result.schema.get_field_index(name)
        both = pa.chunked_array([*result.column(index).chunks, *values.column(name).chunks], result.field(index).type)
        result = result.set_column(index, result.field(index), both.take(pa.array(where)))
        odd = texts(_array(values, metadata.raw) if len(columns) > 1 else None).get(name)
        for at, text in zip(odd.rows.tolist(), odd.texts, strict=True) if odd else ():
            raw.setdefault(int(missing[at]), {})[name] = text
    if open_:
        result = _with_values(result, metadata.unchanged, {row: unknown.get(row) for row in open_})
    if raw:
        old = result.column(metadata.raw)
        known = {i: {**dict(old[i].as_py() or ()), **more} for i, more in raw.items()}
        result = _with_values(result, metadata.raw, known)
    return result


def _with_key(
    history: TableHistory, changes: _Changes, result: pa.Table, name: str, rows: Ints
) -> tuple[pa.Table, Ints]:
    """The result with the values by which rows were identified, although their type has changed since.

    Returns:
        The result, and the rows of `rows` whose value the new type does not hold.
    """
    index = result.schema.get_field_index(name)
    cells = _array(history.columns([name], keys=[name]), name).take(pa.array(changes.place[changes.last][rows]))
    try:
        cells = cells.cast(result.field(index).type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return result, rows
    where = np.arange(len(result))
    where[rows] = len(result) + np.arange(len(rows))
    both = pa.chunked_array([*result.column(index).chunks, cells], cells.type)
    return result.set_column(index, result.field(index), both.take(pa.array(where))), rows[_nulls(cells)]


def _nulls(cells: pa.Array) -> Bools:
    found: Bools = cells.is_null().to_numpy(zero_copy_only=False)
    return found


def _with_values(table: pa.Table, name: str, values: Mapping[int, Any]) -> pa.Table:
    index = table.schema.get_field_index(name)
    cells = table.column(index).to_pylist()
    for row, value in values.items():
        cells[row] = list(value.items()) if isinstance(value, dict) else value
    return table.set_column(index, table.field(index), pa.array(cells, table.field(index).type))
