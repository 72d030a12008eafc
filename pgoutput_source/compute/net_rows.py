"""What changes come to for a destination that holds one row per key: which keys to empty, and which rows to put.

A destination first takes from its own rows the values that PostgreSQL did not send, then removes the rows of `gone` and
of all keys of `puts`, and then inserts `puts`. Each key is touched once, so keys may be swapped or rotated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.changes.schema import MetadataNames
from pgoutput_source.compute.columns import column_of
from pgoutput_source.compute.keyed_changes import Found, KeyedChanges
from pgoutput_source.compute.metadata import TRUNCATE, operations, own_columns, row_texts
from pgoutput_source.compute.net_effect import Standing

_TEXTS = pa.map_(pa.utf8(), pa.utf8())


class NetRows(NamedTuple):
    """The net effect of changes of one table.

    Attributes:
        emptied: The table was truncated: nothing of before stays.
        gone: Keys that have no row any more: the key's columns and `_raw`.
        puts: Rows as they are now: the table's own columns, `_commit_lsn`, `_seq`, `_unchanged` with the columns that
            none of the changes brought, and `_raw`.
        sources: For each row of `puts` the key under which these columns are at the destination: the key's columns and
            `_raw`. All null where there is nothing to take, or nowhere.
    """

    emptied: bool
    gone: pa.RecordBatch
    puts: pa.RecordBatch
    sources: pa.RecordBatch


def net_rows(
    data: pa.RecordBatch, key: Sequence[str], *, whole: bool = False, standing: Standing | None = None
) -> tuple[NetRows, Standing | None]:
    """The net effect of some changes, in position order, of one version of a table.

    Args:
        data: The changes.
        key: The columns that identify a row.
        whole: The replica identity is FULL.
        standing: What this returned for the changes before, if their last transaction may go on here.

    Returns:
        The net effect; and with identity FULL what the last transaction left, for the changes that follow.
    """
    truncates = np.flatnonzero(operations(data) == TRUNCATE)
    if len(truncates):
        data, standing = data.slice(int(truncates[-1]) + 1), None
    own, names = own_columns(data.schema), MetadataNames.of(data.schema)
    kept = (names.commit_lsn, names.seq, names.unchanged, names.raw)
    if not len(data):
        puts, keys = data.select([*own, *kept]), data.select([*key, names.raw])
        return NetRows(len(truncates) > 0, keys, puts, keys), None
    changes = KeyedChanges(data, tuple(key), whole=whole, standing=standing)
    _, last = changes.there
    emptied = len(truncates) > 0
    keys = _keys(changes, key)
    gone = keys.take(pa.array(np.concatenate([changes.deleted[0], changes.left[0]])))
    filled = changes.filled(own, last, Found(None, changes))
    unknown: dict[int, list[str]] = {}
    came_from = np.full(len(last), -1, np.int64)
    raw = data.column(names.raw).take(pa.array(last))
    texts: dict[int, dict[str, str]] = {}
    for name in own:
        column = filled[name]
        for row, text in column.texts.items():
            texts.setdefault(row, {})[name] = text
        if column.unknown is None:
            continue
        rows = np.flatnonzero(column.unknown)
        for row in rows.tolist():
            unknown.setdefault(row, []).append(name)
        came_from[rows] = changes.came_from(name, last[rows])
    arrays = [filled[name].values for name in own]
    arrays += [data.column(name).take(pa.array(last)) for name in kept[:2]]
    kind = data.schema.field(names.unchanged).type
    arrays.append(pa.array([unknown.get(row) for row in range(len(last))] if unknown else [None] * len(last), kind))
    arrays.append(_with_texts(row_texts(raw, names.old), texts))
    fields = [data.schema.field(name) for name in (*own, *kept)]
    puts = pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields, data.schema.metadata))
    if emptied:
        came_from[:] = -1
    sources = keys.take(pa.array(np.maximum(came_from, 0), mask=came_from < 0))
    after = changes.standing_after() if whole else None
    return NetRows(emptied, gone, puts, sources), after


def _keys(changes: KeyedChanges, key: Sequence[str]) -> pa.RecordBatch:
    """Each key that is touched, by its code, as the cells and texts that the changes hold."""
    data = changes.data
    some = pa.array(changes.some)
    before, moves = data.column(changes.metadata.before), pa.array(changes.moves)
    arrays = []
    texts: dict[tuple[int, str], str] = {}
    for name in key:
        values = column_of(data, name)
        if len(changes.moves):
            old = pc.struct_field(before, [name]).take(moves)
            values = pa.concat_arrays([values, old.cast(values.type) if old.type != values.type else old])
        arrays.append(values.take(some))
        texts |= _key_texts(changes, name)
    at = {row: code for code, row in enumerate(changes.some.tolist())}
    found: dict[int, dict[str, str]] = {}
    for (row, name), text in texts.items():
        if row in at:
            found.setdefault(at[row], {})[name] = text
    none = pa.nulls(len(changes.some), _TEXTS)
    fields = [*(data.schema.field(name) for name in key), pa.field(changes.metadata.raw, _TEXTS)]
    schema = pa.schema(fields, data.schema.metadata)  # which knows the prefix
    return pa.RecordBatch.from_arrays([*arrays, _with_texts(none, found)], schema=schema)


def _key_texts(changes: KeyedChanges, name: str) -> dict[tuple[int, str], str]:
    """What `_raw` says of a key's column: by row, or by move after the rows."""
    found: dict[tuple[int, str], str] = {}
    if name in changes.texts:
        one = changes.texts[name]
        found |= {(row, name): text for row, text in zip(one.rows.tolist(), one.texts, strict=True)}
    old = changes.metadata.old + name
    if old in changes.texts and len(changes.moves):
        move_of: dict[int, int] = {row: i for i, row in enumerate(changes.moves.tolist())}
        one = changes.texts[old]
        for row, text in zip(one.rows.tolist(), one.texts, strict=True):
            if row in move_of:
                found[len(changes.data) + move_of[row], name] = text
    return found


def _with_texts(raw: pa.Array, texts: dict[int, dict[str, str]]) -> pa.Array:
    if not texts:
        return raw
    rows = raw.to_pylist()
    for row, more in texts.items():
        rows[row] = list((dict(rows[row] or ()) | more).items())
    return pa.array(rows, raw.type)
