"""`cdc.latest`: changes thinned out to the last one of each key, each a whole row."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from bytewax import operators as op
from bytewax.dataflow import Stream, operator
from bytewax.operators import StatefulBatchLogic

from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.changes.schema import OP_CODE, OPS, TableSchema
from pgoutput_source.compute.grouping import check_version
from pgoutput_source.compute.keyed_rows import KNOWN, KeptRows, Segment, operations, segments
from pgoutput_source.errors import ConfigurationError

STATE_VERSION: Final = 1

_DELETE, _TRUNCATE = OP_CODE["D"], OP_CODE["T"]


@operator
def latest(
    step_id: str, up: Stream[ChangeBatch], *, key: str | Sequence[str] | None = None, fill: bool = True
) -> Stream[ChangeBatch]:
    """The last change of each key, for whoever mirrors a table: insert or update means put, delete means remove.

    Of each batch it gives at most one row per key, in position order: what the key's row is now (`I`, `U`, `R`), or
    that it is gone (`D`). An update that changes the key gives a `D` of the old key as well, at the same position. A
    truncate gives its `T` first and nothing of what was before it. Put and remove these rows in order, and after the
    last change of each transaction you have the source's table.

    Rows are whole: a TOASTed value that an update left unchanged, and that PostgreSQL therefore did not send, comes
    from the change before. What was never seen stays named in `_unchanged`: it is not known, so leave it alone, as
    its null is no NULL.

    It must see every change: conditions belong behind it, not before.

    Args:
        step_id: Unique name of the step; the state is kept under it.
        up: All changes of one table or of several, none filtered out.
        key: Columns that identify a row, by default those of the replica identity; needed with identity FULL.
        fill: False keeps no rows: values are filled in from the same batch only, others stay named in `_unchanged`.

    State:
        With `fill`, and unless the identity is FULL: per key one row with the columns that can be TOASTed (text,
        bytea, json, arrays, numeric …), as large as their values and about 200 bytes. It is in memory on one worker per
        table, and written into the recovery store in each epoch in which the table changes. A table of only integers,
        floats, times and booleans needs none. A column that changes its type makes it forget all.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from pgoutput_source.testing import batch
        >>> changes = [("I", {"id": 1, "name": "ann"}), ("I", {"id": 2, "name": "bob"})]
        >>> changes += [("U", {"id": 3, "name": "ann"}, {"id": 1}), ("D", {"id": 2}), ("U", {"id": 3, "name": "eve"})]
        >>> flow, out = Dataflow("shop"), []
        >>> customers = op.input("customers", flow, TestingSource([batch("public.customers", changes)]))
        >>> op.output("out", latest("mirror", customers), TestingSink(out))
        >>> run_main(flow)
        >>> [(row["_op"], row["id"], row["name"]) for batch in out for row in batch.data.to_pylist()]
        [('D', 1, None), ('D', 2, None), ('U', 3, 'eve')]

    Raises:
        ConfigurationError: Once batches come: the identity is FULL and there is no `key`, or PostgreSQL does not send
            the `key` of deleted rows.
        StateError: The identity changed to columns that are not kept, or a column to a type that does not go with it.
    """
    keys = None if key is None else (key,) if isinstance(key, str) else tuple(key)

    def build(state: Any | None) -> _Latest:
        return _Latest(step_id, keys, fill, state)

    return op.key_rm("unkey", op.stateful_batch("rows", op.key_on("key", up, lambda batch: batch.table), build))


class _Latest(StatefulBatchLogic[ChangeBatch, ChangeBatch, dict[str, Any]]):
    """Keeps, of one table, what an update may leave out."""

    def __init__(self, step_id: str, key: tuple[str, ...] | None, fill: bool, state: dict[str, Any] | None) -> None:
        self.step_id, self.key, self.fill = step_id, key, fill
        self.kept: KeptRows | None = None
        if state is not None:
            check_version(state, STATE_VERSION, step_id)
            self.kept = None if state["kept"] is None else KeptRows.restore(state["kept"])

    def on_batch(self, values: list[ChangeBatch]) -> tuple[Iterable[ChangeBatch], bool]:
        return [self._thin(batch) for batch in values if len(batch)], self.RETAIN

    def snapshot(self) -> dict[str, Any]:
        return {"v": STATE_VERSION, "kept": None if self.kept is None else self.kept.snapshot()}

    def _thin(self, batch: ChangeBatch) -> ChangeBatch:
        key = self._key(batch.schema)
        kept_columns, added = self._kept_columns(batch.schema, key)
        own = [c.name for c in batch.schema.columns]
        pieces: list[tuple[list[Hashable], pa.RecordBatch]] = []
        for segment in segments(batch.data, key):
            if segment.truncated:
                pieces.clear()
                if self.kept is not None:
                    self.kept.clear()
            old, found = (None, segment.last) if self.kept is None else segment.found(self.kept)
            there, whole = _whole(segment, own, old, found)
            if self.kept is not None:
                self.kept.drop(segment.keys)
                known = pc.and_(pc.is_null(there.column("_unchanged")), pc.is_null(there.column("_raw")))
                mask = known.to_numpy(zero_copy_only=False).tolist()
                rows = pa.Table.from_batches([there.select(kept_columns).filter(known)])
                for name in added:
                    rows = rows.append_column(KNOWN + name, pa.array(np.ones(len(rows), np.bool_)))
                self.kept.put([k for k, is_known in zip(segment.there, mask, strict=True) if is_known], rows)
            pieces.append(whole)
        truncates = np.flatnonzero(operations(batch.data) == _TRUNCATE)
        head = [batch.data.slice(int(truncates[-1]), 1)] if len(truncates) else []
        return batch.replace(pa.concat_batches([*head, *_last(pieces)]))

    def _key(self, schema: TableSchema) -> tuple[str, ...]:
        full = schema.replica_identity == "f"
        if self.key is None and (full or not schema.key):
            raise ConfigurationError(
                f"step {self.step_id!r} does not know what identifies a row",
                table=schema.table,
                hint='the replica identity does not say it: pass key="id"',
            )
        key = schema.key if self.key is None else self.key
        own = {c.name for c in schema.columns}
        sent = own if full or schema.replica_identity == "n" else own & set(schema.key)
        if not set(key) <= sent:
            raise ConfigurationError(
                f"step {self.step_id!r}: deletes come without {', '.join(sorted(set(key) - sent))}",
                table=schema.table,
                hint=f"the replica identity sends {', '.join(schema.key)}: choose among these, or set it to FULL",
            )
        return key

    def _kept_columns(self, schema: TableSchema, key: tuple[str, ...]) -> tuple[list[str], list[str]]:
        """The columns to keep, as what has a fixed width is never TOASTed; and which of them were added later."""
        wide = {c.name: c.arrow for c in schema.columns if not pa.types.is_primitive(c.arrow) and c.name not in key}
        if not self.fill or schema.replica_identity == "f" or not wide:
            # With FULL the old row brings what the new one leaves out. What was kept would be out of date later on.
            self.kept = None
            return [], []
        if self.kept is None:
            self.kept = KeptRows(key)
        elif self.kept.key != key:
            self.kept.rekey(key)
        have = self.kept.types
        if any(have.get(name, kind) != kind for name, kind in wide.items()):
            # ALTER COLUMN … TYPE may have made other values, which are not streamed.
            self.kept.clear()
            have = {}
        added = [name for name in wide if have and (name not in have or KNOWN + name in have)]
        return [*key, *wide], added


def _whole(
    segment: Segment, own: Sequence[str], old: pa.Table | None, found: Any
) -> tuple[pa.RecordBatch, tuple[list[Hashable], pa.RecordBatch]]:
    """The rows that are there in the end, in the order of their keys; and all outcomes with their keys, in order."""
    data = segment.data
    there = data.take(pa.array(segment.last[~segment.gone]))
    unknown: dict[str, Any] = {}
    for name, (values, not_known) in segment.filled(own, old, found).items():
        there = there.set_column(there.schema.get_field_index(name), data.schema.field(name), values)
        if not_known is not None:
            unknown[name] = not_known
    if data.column("_unchanged").null_count < len(data):
        names = [[n for n, mask in unknown.items() if mask[i]] or None for i in range(len(there))]
        index = there.schema.get_field_index("_unchanged")
        there = there.set_column(index, data.schema.field(index), pa.array(names, data.schema.field(index).type))
    moved = dict(zip((old for old, _ in segment.renames), segment.moved, strict=True))
    away = [code for code, row in moved.items() if segment.gone[code] and segment.last[code] == row]
    gone = np.setdiff1d(np.flatnonzero(segment.gone), away)
    parts = [there, data.take(pa.array(segment.last[gone]))]
    codes = [*np.flatnonzero(~segment.gone).tolist(), *gone.tolist(), *away]
    # The end of an old key comes before the change that brought the new one.
    order = np.concatenate([segment.last[~segment.gone] * 2 + 1, segment.last[gone] * 2 + 1, segment.last[away] * 2])
    if away:
        parts.append(_deletes(data.take(pa.array(segment.last[away])), own))
    sort = np.argsort(order, kind="stable")
    keys = [segment.keys[codes[i]] for i in sort.tolist()]
    return there, (keys, pa.concat_batches(parts).take(pa.array(sort)))


def _deletes(updates: pa.RecordBatch, own: Sequence[str]) -> pa.RecordBatch:
    """The deletes of the old keys of updates."""
    before = updates.column("_before")
    columns = {name: pc.struct_field(before, name) for name in own}
    ops = pa.array(OPS, pa.utf8())
    columns["_op"] = pa.DictionaryArray.from_arrays(pa.array(np.full(len(updates), _DELETE, np.int8)), ops)
    for name in ("_unchanged", "_raw"):
        columns[name] = pa.nulls(len(updates), updates.schema.field(name).type)
    arrays = [columns.get(name, updates.column(name)) for name in updates.schema.names]
    return pa.RecordBatch.from_arrays(arrays, schema=updates.schema)


def _last(pieces: Sequence[tuple[list[Hashable], pa.RecordBatch]]) -> list[pa.RecordBatch]:
    """Outcomes that no later piece has another of."""
    if len(pieces) < 2:
        return [rows for _, rows in pieces]
    seen: set[Hashable] = set()
    out = []
    for keys, rows in reversed(pieces):
        out.append(rows.filter(pa.array([key not in seen for key in keys], pa.bool_())))
        seen.update(keys)
    return out[::-1]
