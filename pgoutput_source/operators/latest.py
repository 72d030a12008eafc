"""`cdc.latest`: only the last change of each key, as a whole row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from bytewax import operators as op
from bytewax.dataflow import Stream, operator
from bytewax.operators import StatefulBatchLogic

from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.changes.schema import OPS, MetadataNames, TableSchema
from pgoutput_source.compute.kept_rows import KNOWN, RAW, KeptRows
from pgoutput_source.compute.keyed_changes import Filled, Found, KeyedChanges
from pgoutput_source.compute.metadata import DELETE, TRUNCATE, operations, own_columns, row_texts, unsent
from pgoutput_source.compute.net_effect import Standing
from pgoutput_source.compute.versions import Seen
from pgoutput_source.errors import ConfigurationError, check_version

STATE_VERSION: Final = 1

_FULL = "f"


@operator
def latest(
    step_id: str, up: Stream[ChangeBatch], *, key: str | Sequence[str] | None = None, fill: bool = True
) -> Stream[ChangeBatch]:
    """The last change of each key, to mirror a table: insert or update means put, delete means remove.

    Each batch gives at most one row per key, in position order: the key's current row (`I`, `U`, `R`), or its deletion
    (`D`). An update that changes the key also gives a `D` of the old key, at the same position. A truncate gives a `T`
    first and nothing from before it. So does a table that was recreated, or that took over another's name. Put and
    remove these rows in order, and after the last change of each transaction you have the source's table, even if keys
    trade places (``SET id = id + 1``).

    One case is not covered. With identity FULL, rows of earlier transactions are not kept. If a row moves onto the key
    of such a row and away again within one transaction, and the transaction is split into two batches between these two
    changes, the mirror loses the row that had the key before. Only a deferrable key allows that, and such a key can't
    be a replica identity itself. `current` sees the whole transaction and is right even then.

    Rows are whole. PostgreSQL does not send a TOASTed value that an update left unchanged, so the value comes from an
    earlier change. A value that was never seen stays named in `_unchanged`: it is unknown, so leave it alone; its null
    is not a NULL. ALTER TABLE changes rows without sending them, and what can be known of that is applied: a renamed
    column keeps its values, an added column has its default in older rows, and after a change of type the values of
    rows that were not sent again are unknown.

    It must see every change: put conditions after it, not before.

    Args:
        step_id: Unique name of the step; the state is kept under it.
        up: All changes of one or several tables, none filtered out.
        key: Columns that identify a row, by default those of the replica identity; needed with identity FULL.
        fill: False keeps no rows. Values are then filled in from the same batch only; others stay named in
            `_unchanged`.

    State:
        With `fill`, and unless the identity is FULL: per key one row with the columns that can be TOASTed (text,
        bytea, json, arrays, numeric …): their values plus about 200 bytes. It is in memory on one worker per table, and
        is written to the recovery store in each epoch in which the table changes. A table of only integers, floats,
        times and booleans needs none. With identity FULL: about 200 bytes for each row that the last transaction
        inserted or moved to another key.

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
        StateError: The identity changed to columns that are not kept, or a column to an incompatible type.
    """
    keys = None if key is None else (key,) if isinstance(key, str) else tuple(key)

    def build(state: Any | None) -> _Latest:
        return _Latest(step_id, keys, fill, state)

    return op.key_rm("unkey", op.stateful_batch("rows", op.key_on("key", up, lambda batch: batch.table), build))


class _Latest(StatefulBatchLogic[ChangeBatch, ChangeBatch, dict[str, Any]]):
    """Keeps the values of one table that an update may leave out."""

    def __init__(self, step_id: str, key: tuple[str, ...] | None, fill: bool, state: dict[str, Any] | None) -> None:
        self.step_id, self.key, self.fill = step_id, key, fill
        self.kept: KeptRows | None = None
        self.standing = Standing()
        if state is not None:
            check_version(state, STATE_VERSION, f"step {step_id!r}")
            self.kept = None if state["kept"] is None else KeptRows.restore(state["kept"])
            self.standing = Standing(*state.get("standing", ()))
        self.seen = Seen(None if state is None else state.get("schema"))

    def on_batch(self, values: list[ChangeBatch]) -> tuple[Iterable[ChangeBatch], bool]:
        thinned = [self._thin(batch) for batch in values if len(batch)]
        return [batch for batch in thinned if len(batch)], self.RETAIN

    def snapshot(self) -> dict[str, Any]:
        return {
            "v": STATE_VERSION,
            "kept": None if self.kept is None else self.kept.snapshot(),
            "schema": self.seen.pack(),
            "standing": (self.standing.commit_lsn, dict(self.standing.rows)),
        }

    def _thin(self, batch: ChangeBatch) -> ChangeBatch:
        data = batch.data
        key = _key(self.step_id, self.key, batch.schema)
        whole = batch.schema.replica_identity == _FULL
        before, other = self.seen.changed(data.schema)
        kept_columns = self._kept_columns(batch.schema, key, None if other else before)
        truncates = np.flatnonzero(operations(data) == TRUNCATE)
        head = []
        if other and not len(truncates):
            head = [_truncate(data.slice(0, 1))]
            self.standing = Standing()
            if self.kept is not None:
                self.kept.clear()
        if len(truncates):
            last = int(truncates[-1])
            head, data = [data.slice(last, 1)], data.slice(last + 1)
            self.standing = Standing()
            if self.kept is not None:
                self.kept.clear()
            if not len(data):
                return batch.replace(head[0])
        changes = KeyedChanges(data, key, whole=whole, standing=self.standing if whole else None)
        found = Found(self.kept, changes)
        there, unknown = _whole(changes, found)
        if self.kept is not None:
            self.kept.drop(changes.keys)
            self.kept.put(changes.names(changes.there[0]), _to_keep(there, kept_columns, unknown))
        if whole:
            self.standing = changes.standing_after()
        return batch.replace(pa.concat_batches([*head, _outcomes(changes, there)]))

    def _kept_columns(self, schema: TableSchema, key: tuple[str, ...], before: pa.Schema | None) -> list[str]:
        """The columns to keep; a type of fixed width is never TOASTed. Kept rows become rows of this version."""
        wide = {c.name: c.arrow for c in schema.columns if not pa.types.is_primitive(c.arrow) and c.name not in key}
        if not self.fill or schema.replica_identity == _FULL or not wide:
            # With FULL the old row has what the new one leaves out. Kept values would go out of date.
            self.kept = None
            return []
        columns = [*key, *wide]
        if self.kept is None:
            self.kept = KeptRows(key)
        elif before is not None and self.seen.schema is not None:
            self.kept.become(before, self.seen.schema, key, columns)
        elif self.kept.key != key:
            self.kept.rekey(key)
        have = self.kept.types
        if any(have.get(name, kind) != kind for name, kind in wide.items()):
            # ALTER COLUMN … TYPE may have computed new values, which are not streamed.
            self.kept.clear()
        return columns


def _truncate(first: pa.RecordBatch) -> pa.RecordBatch:
    """A truncate at the position of a table's first change: no earlier row of the table exists any more."""
    arrays, op_name = [], MetadataNames.of(first.schema).op
    for field, column in zip(first.schema, first.columns, strict=True):
        if field.name == op_name:
            arrays.append(pa.DictionaryArray.from_arrays(pa.array([TRUNCATE], pa.int8()), pa.array(OPS, pa.utf8())))
        else:
            arrays.append(pa.nulls(1, field.type) if field.nullable else column)
    return pa.RecordBatch.from_arrays(arrays, schema=first.schema)


def _key(step_id: str, asked: tuple[str, ...] | None, schema: TableSchema) -> tuple[str, ...]:
    """The columns that identify a row.

    Raises:
        ConfigurationError: The columns are unknown, or PostgreSQL does not send them for deletes.
    """
    full = schema.replica_identity == _FULL
    if asked is None and (full or not schema.key):
        raise ConfigurationError(
            f"step {step_id!r} does not know what identifies a row",
            table=schema.table,
            hint='the replica identity does not tell: pass key="id"',
        )
    key = schema.key if asked is None else asked
    own = {c.name for c in schema.columns}
    sent = own if full or schema.replica_identity == "n" else own & set(schema.key)
    if not set(key) <= sent:
        raise ConfigurationError(
            f"step {step_id!r}: deletes come without {', '.join(sorted(set(key) - sent))}",
            table=schema.table,
            hint=f"the replica identity has {', '.join(schema.key)}: choose among these, or set it to FULL",
        )
    return key


def _whole(changes: KeyedChanges, found: Found) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """The last change of each key that has a row, as a whole row; and by column the rows whose value is unknown."""
    data, rows = changes.data, changes.there[1]
    there = data.take(pa.array(rows))
    partly = [name for name in own_columns(data.schema) if name in unsent(data, data.schema.names)]
    filled = changes.filled(partly, rows, found)
    for name, column in filled.items():
        there = there.set_column(there.schema.get_field_index(name), data.schema.field(name), column.values)
    unknown = {name: column.unknown for name, column in filled.items() if column.unknown is not None}
    if partly:
        named = [[n for n, mask in unknown.items() if mask[i]] or None for i in range(len(there))]
        there = _with(there, changes.metadata.unchanged, named)
    if any(column.texts for column in filled.values()):
        raw = changes.metadata.raw
        there = _with(there, raw, _texts(there.column(raw).to_pylist(), filled))
    return there, unknown


def _texts(raw: list[list[tuple[str, str]] | None], filled: dict[str, Filled]) -> list[list[tuple[str, str]] | None]:
    for name, column in filled.items():
        for row, text in column.texts.items():
            raw[row] = [*(raw[row] or ()), (name, text)]
    return raw


def _with(rows: pa.RecordBatch, name: str, values: list[Any]) -> pa.RecordBatch:
    index = rows.schema.get_field_index(name)
    return rows.set_column(index, rows.schema.field(index), pa.array(values, rows.schema.field(index).type))


def _to_keep(there: pa.RecordBatch, columns: list[str], unknown: dict[str, Any]) -> pa.Table:
    rows = pa.Table.from_batches([there.select(columns)])
    for name, mask in unknown.items():
        if name in columns:
            rows = rows.append_column(KNOWN + name, pa.array(~mask))
    metadata = MetadataNames.of(there.schema)
    raw = row_texts(there.column(metadata.raw), metadata.old)
    return rows if raw.null_count == len(raw) else rows.append_column(RAW, raw)


def _outcomes(changes: KeyedChanges, there: pa.RecordBatch) -> pa.RecordBatch:
    """The outcome for each key, in order: a row or a delete."""
    deleted, left = changes.deleted[1], changes.left[1]
    # The delete of an old key comes before the change that moves its row to the new key.
    order = np.concatenate([changes.there[1] * 2 + 1, deleted * 2 + 1, left * 2])
    parts = [there, changes.data.take(pa.array(deleted))]
    if len(left):
        parts.append(_deletes(changes.data.take(pa.array(left))))
    return pa.concat_batches(parts).take(pa.array(np.argsort(order, kind="stable")))


def _deletes(updates: pa.RecordBatch) -> pa.RecordBatch:
    """The deletes of the old keys of updates."""
    metadata = MetadataNames.of(updates.schema)
    before, raw = updates.column(metadata.before), updates.column(metadata.raw)
    columns = {name: pc.struct_field(before, [name]) for name in own_columns(updates.schema)}
    ops = pa.array(OPS, pa.utf8())
    columns[metadata.op] = pa.DictionaryArray.from_arrays(pa.array(np.full(len(updates), DELETE, np.int8)), ops)
    columns[metadata.unchanged] = pa.nulls(len(updates), updates.schema.field(metadata.unchanged).type)
    if raw.null_count < len(raw):
        columns[metadata.raw] = pa.array([_of_old_row(known, metadata.old) for known in raw.to_pylist()], raw.type)
    arrays = [columns.get(name, updates.column(name)) for name in updates.schema.names]
    return pa.RecordBatch.from_arrays(arrays, schema=updates.schema)


def _of_old_row(known: list[tuple[str, str]] | None, old: str) -> list[tuple[str, str]] | None:
    """The entries of `_raw` for the old row, which is the row of a delete."""
    olds = [(name, text) for name, text in known or () if name.startswith(old)]
    return [*((name.removeprefix(old), text) for name, text in olds), *olds] or None
