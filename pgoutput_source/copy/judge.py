"""Decides which streamed changes of a table that is being copied to deliver, and in which form.

The question is whether the copy already shows the change. The answer depends on the range that has the change's key:

    unread                     drop: what is read later shows it
    read under a snapshot      deliver if the snapshot does not show its transaction, otherwise drop
    settled                    deliver

An update that moves a key is judged for both keys, so it may become a delete, an insert, both or nothing. If its row
moves to where nothing was delivered, it can only be delivered when all its values were sent. Otherwise its key is a
*hole* and is read once more. A TRUNCATE makes the copy begin again.

There is no server and no thread here: a batch and a ledger go in, batches come out, and the ledger is updated. All rows
of a batch are judged at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pgoutput_source.changes.batches import ChangeBatch, UndecodedBatch
from pgoutput_source.changes.schema import OP_CODE, OPS
from pgoutput_source.copy.keys import Key, Keys
from pgoutput_source.copy.ledger import MOST_HOLES, TableCopy
from pgoutput_source.copy.visibility import Bools

Ints = NDArray[np.int64]

_I, _U, _D, _T = (OP_CODE[op] for op in "IUDT")
_NAMES: Final = pa.array(OPS, pa.utf8())
_UNREAD, _SHOWN, _DELIVER = range(3)


def judge(batch: ChangeBatch, copy: TableCopy, keys: Keys | None) -> list[ChangeBatch]:
    """The changes of a batch to deliver.

    Args:
        batch: Changes of one version of the table, in the order of the stream.
        copy: The table's ledger; it is updated.
        keys: Compares the table's keys; None for a table that is read as a whole.

    Returns:
        Batches in the order of their positions. They may have fewer rows, and updates may become deletes or inserts.

    Raises:
        KeyError: The batch lacks a column of the key.
    """
    if isinstance(batch, UndecodedBatch):
        return _unjudged(batch, copy)
    out: list[ChangeBatch] = []
    for part, truncates in _cut_at_truncates(batch):
        if truncates:
            out += _truncated(part, copy)
            continue
        rest: ChangeBatch | None = part
        while rest is not None:
            judged, rest = _judge(rest, copy, keys)
            if judged is not None:
                out.append(judged)
                copy.delivered = True
    return out


def _unjudged(batch: UndecodedBatch, copy: TableCopy) -> list[ChangeBatch]:
    """Changes without keys: a consumer of the table gets their error, unless nothing was read and all are dropped."""
    copy.unproven.update(np.unique(batch.metadata("xid").to_numpy()).tolist())
    copy.meanwhile = None
    found: list[ChangeBatch] = [batch] if copy.begun or copy.holes else []
    if (_codes(batch) == _T).any():
        copy.restart()
        copy.delivered = False
    return found


def _truncated(batch: ChangeBatch, copy: TableCopy) -> list[ChangeBatch]:
    """A TRUNCATE during the copy: it is delivered if any row was delivered before, and the whole table is unread."""
    copy.unproven.update(batch.metadata("xid").to_pylist())
    copy.restart()
    if not copy.delivered:
        return []
    copy.delivered = False
    return [batch.replace(batch.data.slice(len(batch) - 1, 1))]


@dataclass(slots=True)
class _Rows:
    """The rows of a batch as arrays: their operations, and their transactions."""

    batch: ChangeBatch
    code: NDArray[np.int8]
    xid: NDArray[np.uint32]
    commit_lsn: NDArray[np.uint64]


def _judge(batch: ChangeBatch, copy: TableCopy, keys: Keys | None) -> tuple[ChangeBatch | None, ChangeBatch | None]:
    """What to deliver of the rows before the first that makes a hole, and the rows after it."""
    data, names = batch.data, batch.schema.metadata_names
    rows = _Rows(batch, _codes(batch), data.column(names.xid).to_numpy(), data.column(names.commit_lsn).to_numpy())
    if not copy.begun and not copy.holes:
        # Nothing was read, so every change is dropped, whatever its key.
        copy.unproven.update(np.unique(rows.xid).tolist())
        return None, None
    old, new = _verdicts(rows, copy, keys)
    is_insert, is_update, is_delete = (rows.code == code for code in (_I, _U, _D))
    to_old = (old == _DELIVER) & ~is_insert
    to_new = (new == _DELIVER) & ~is_delete
    entering = to_new & ~to_old
    incomplete = entering & data.column(names.unchanged).is_valid().to_numpy(zero_copy_only=False)
    hole = int(np.argmax(incomplete)) if keys is not None and incomplete.any() else None
    end = len(data) if hole is None else hole + 1
    first = slice(0, end)
    unread = ((old == _UNREAD) & ~is_insert) | ((new == _UNREAD) & ~is_delete)
    copy.unproven.update(np.unique(rows.xid[first][unread[first]]).tolist())
    if hole is not None and keys is not None:
        _dig(batch, hole, rows, copy, keys)
        to_new[hole] = entering[hole] = False
    keep = (to_old | to_new)[first]
    becomes_delete = (is_update & to_old & ~to_new)[first]
    becomes_insert = (is_update & entering)[first]
    rest = batch.replace(data.slice(end)) if end < len(data) else None
    if not keep.any():
        return None, rest
    if keep.all() and not becomes_delete.any() and not becomes_insert.any():
        return batch.replace(data.slice(0, end)), rest
    at = np.flatnonzero(keep)
    return _changed(batch, at, becomes_delete[at], becomes_insert[at]), rest


def _dig(batch: ChangeBatch, row: int, rows: _Rows, copy: TableCopy, keys: Keys) -> None:
    """The row can't be completed: read its key again, under a snapshot that shows this transaction."""
    key = _new_keys(batch.replace(batch.data.slice(row, 1)), keys)[0]
    copy.unproven.add(int(rows.xid[row]))
    found = int(keys.matches([key], list(copy.holes))[0]) if copy.holes else -1
    copy.holes[key if found < 0 else list(copy.holes)[found]] = None
    if len(copy.holes) > MOST_HOLES:
        # Read the whole table again rather than key by key. A truncate is delivered before.
        copy.restart(partial=copy.delivered)


def _verdicts(rows: _Rows, copy: TableCopy, keys: Keys | None) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """The verdicts on each row's old key and new key: the copy will show the change, shows it, or does not."""
    if keys is None:
        found = _of_places(rows, np.zeros(len(rows.code), np.int64), copy)
        return found, found
    high = max((s.high for s in copy.snapshots()), default=0)
    if copy.read and not copy.holes and bool((rows.commit_lsn >= np.uint64(high)).all()):
        found = np.full(len(rows.code), _DELIVER, np.int8)
        return found, found
    new_keys = _new_keys(rows.batch, keys)
    before = rows.batch.data.column(rows.batch.schema.metadata_names.before)
    moved = np.flatnonzero(before.is_valid().to_numpy(zero_copy_only=False))
    moved = moved[rows.code[moved] == _U]
    old_keys = _old_keys(rows.batch, moved, keys)
    other = [i for i, (row, key) in enumerate(zip(moved.tolist(), old_keys, strict=True)) if new_keys[row] != key]
    moved, old_keys = moved[other], [old_keys[i] for i in other]
    asked = [*new_keys, *old_keys]
    places = keys.places(asked, copy.bounds)
    holes = keys.matches(asked, list(copy.holes))
    row = np.concatenate([np.arange(len(new_keys)), moved])
    every = _Rows(rows.batch, rows.code[row], rows.xid[row], rows.commit_lsn[row])
    found = _of_places(every, places, copy)
    for i, snapshot in enumerate(copy.holes.values()):
        at = np.flatnonzero(holes == i)
        if not len(at):
            continue
        if snapshot is None:
            found[at] = _UNREAD
        else:
            found[at] = np.where(snapshot.shows(every.xid[at], every.commit_lsn[at]), _SHOWN, _DELIVER)
    if copy.meanwhile is not None and len(unread := np.flatnonzero(found == _UNREAD)):
        copy.meanwhile.dropped([asked[i] for i in unread.tolist()], every.xid[unread], every.commit_lsn[unread])
    new = found[: len(new_keys)]
    old = new.copy()
    old[moved] = found[len(new_keys) :]
    return old, new


def _of_places(rows: _Rows, places: Ints, copy: TableCopy) -> NDArray[np.int8]:
    """The verdicts by the range of each key: `places` counts the bounds at or below it."""
    found = np.full(len(places), _UNREAD, np.int8)
    for i, part in enumerate(copy.ranges):
        inside = np.flatnonzero(places == i)
        if part.snapshot is None or not len(inside):
            found[inside] = _DELIVER
        else:
            shown = part.snapshot.shows(rows.xid[inside], rows.commit_lsn[inside])
            found[inside] = np.where(shown, _SHOWN, _DELIVER)
    return found


def _new_keys(batch: ChangeBatch, keys: Keys) -> list[Key]:
    """The key of each row; for a delete, that of the old row."""
    return keys.of(batch.data, batch.schema.columns, _raws(batch.data.column(batch.schema.metadata_names.raw), ""))


def _old_keys(batch: ChangeBatch, rows: Ints, keys: Keys) -> list[Key]:
    if not len(rows):
        return []
    at, names = pa.array(rows), batch.schema.metadata_names
    before = batch.data.column(names.before).take(at)
    return keys.of(before, batch.schema.columns, _raws(batch.data.column(names.raw).take(at), names.old))


def _raws(raw: pa.MapArray, prefix: str) -> list[dict[str, str]]:
    """The texts of misfits by column, one dictionary per row; an empty list if there are no misfits."""
    if raw.null_count == len(raw):
        return []
    return [
        {name.removeprefix(prefix): text for name, text in row or () if name.startswith(prefix)}
        for row in raw.to_pylist()
    ]


def _codes(batch: ChangeBatch) -> NDArray[np.int8]:
    column = batch.metadata("op")
    codes: NDArray[np.int8] = column.indices.to_numpy()
    if column.dictionary.equals(_NAMES):
        return codes
    return np.array([OP_CODE[op] for op in column.dictionary.to_pylist()], np.int8)[codes]


def _cut_at_truncates(batch: ChangeBatch) -> Iterator[tuple[ChangeBatch, bool]]:
    """Pieces of a batch, each with only truncates or without any."""
    is_truncate = _codes(batch) == _T
    if not is_truncate.any():
        yield batch, False
        return
    edges = [0, *(np.flatnonzero(np.diff(is_truncate)) + 1).tolist(), len(batch)]
    for low, high in pairwise(edges):
        yield batch.replace(batch.data.slice(low, high - low)), bool(is_truncate[low])


def _changed(batch: ChangeBatch, at: Ints, deletes: Bools, inserts: Bools) -> ChangeBatch:
    """The rows `at`, with some updates turned into deletes of their old row or inserts of their new row."""
    data = batch.data.take(pa.array(at))
    if not deletes.any() and not inserts.any():
        return batch.replace(data)
    size = len(at)
    names = batch.schema.metadata_names
    before: pa.StructArray = data.column(names.before)
    arrays: list[pa.Array] = []
    for field in data.schema:
        array = data.column(field.name)
        match field.name:
            case names.op:
                codes = _codes(batch.replace(data)).copy()
                codes[deletes], codes[inserts] = _D, _I
                array = pa.DictionaryArray.from_arrays(pa.array(codes), _NAMES)
            case names.before:
                array = array.take(pa.array(np.arange(size), mask=inserts))
            case names.unchanged:
                array = array.take(pa.array(np.arange(size), mask=deletes | inserts))
            case names.raw:
                array = _raw_of(array, deletes, inserts, names.old)
            case name if name not in names and deletes.any():
                both = pa.concat_arrays([array, pc.struct_field(before, [name])])
                array = both.take(pa.array(np.where(deletes, size, 0) + np.arange(size)))
        arrays.append(array)
    return batch.replace(pa.RecordBatch.from_arrays(arrays, schema=data.schema))


def _raw_of(raw: pa.MapArray, deletes: Bools, inserts: Bools, before: str) -> pa.MapArray:
    if raw.null_count == len(raw):
        return raw
    rows: list[Any] = raw.to_pylist()
    for i in np.flatnonzero(deletes | inserts).tolist():
        items: Sequence[tuple[str, str]] = rows[i] or ()
        old = [(name, text) for name, text in items if name.startswith(before)]
        if deletes[i]:
            rows[i] = [(name.removeprefix(before), text) for name, text in old] + old or None
        else:
            rows[i] = [item for item in items if item not in old] or None
    return pa.array(rows, raw.type)
