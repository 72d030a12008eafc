"""`cdc.aggregate`: a GROUP BY that stays correct while rows are updated and deleted.

The old row of a change comes from `_before` if the replica identity is FULL, and otherwise from kept rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from bytewax import operators as op
from bytewax.dataflow import Stream, operator
from bytewax.operators import StatefulBatchLogic

from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.changes.schema import OPS, MetadataNames
from pgoutput_source.compute.accumulators import (
    MOST_ROWS,
    Accumulator,
    Count,
    FloatSum,
    Sum,
    Values,
    counted,
    goes_with,
    grown,
)
from pgoutput_source.compute.columns import (
    column_of,
    group_key,
    operand,
    referenced,
    refuse_misfits,
    sorted_batch,
)
from pgoutput_source.compute.grouping import Columns, Grouping
from pgoutput_source.compute.kept_rows import joined
from pgoutput_source.compute.keyed_changes import Found, KeyedChanges
from pgoutput_source.compute.keys import arrow, as_keys, encode, plain
from pgoutput_source.compute.metadata import (
    DELETE,
    INSERT,
    TRUNCATE,
    UPDATE,
    Ints,
    operations,
    own_columns,
)
from pgoutput_source.compute.old_rows import OldRows
from pgoutput_source.compute.state import AFRESH
from pgoutput_source.dataflow.taken import prefixes
from pgoutput_source.errors import StateError, check_version

STATE_VERSION: Final = 1

_OPS: Final = pa.array(OPS, pa.utf8())


@operator
def aggregate(
    step_id: str,
    up: Stream[ChangeBatch],
    *,
    by: Columns = (),
    count: bool | Columns = False,
    sum: Columns = (),
    min: Columns = (),
    max: Columns = (),
    mean: Columns = (),
    where: pc.Expression | None = None,
) -> Stream[pa.RecordBatch]:
    """The results of a GROUP BY over the current table. Each batch of changes gives the groups that it touched.

    After the last change of each transaction the results equal ``SELECT by, … FROM table WHERE … GROUP BY by`` on the
    source at that moment, if the flow has seen the table from its beginning: empty, or with a snapshot (`R` rows). A
    flow that begins in the middle knows nothing of older rows. With identity FULL it measures what has changed since,
    and counts may be negative. With other identities it measures the rows that it has seen.

    The output has the columns of `by`, ``count`` and ``<column>_<function>``, then ``_op`` (`I` for a new group, `U`
    for new values, `D` when the group's last row is gone: its count is 0 and its measures are NULL), and
    ``_commit_lsn``, ``_seq`` and ``_commit_ts`` of the batch's last change. The results include everything up to that
    change. So the last row of each group is its current state. Without `by` there is one group, of all rows.

    Sums are exact, even of floats (the true sum, rounded once; PostgreSQL's own depends on the order). Types, NULLs and
    means are as with `cdc.window`.

    Don't put it after `cdc.filter`: the update that makes a row fail the condition would be lost, and the row would
    count for ever. Put conditions in `where`.

    Args:
        step_id: Unique name of the step; the state is kept under it.
        up: All changes of one table, none filtered out.
        by: Columns to group by.
        count: True counts rows, as ``count``; a column's name counts its values that are not NULL.
        sum: Columns to sum. This and the following ignore NULLs.
        min: Columns whose minimum to find. This and `max` keep how often each value of a group occurs.
        max: Columns whose maximum to find.
        mean: Columns whose mean to compute.
        where: Only rows for which this Arrow expression of the table's own columns is true count.

    Guarantees:
        With recovery every change counts exactly once.

    State:
        Per group its key and some numbers, about 500 bytes; per distinct value of a group under `min` and `max` about
        150 bytes. If the identity is not FULL, also one row per key with the columns named here, about 200 bytes. The
        state is in memory on one worker, and is written to the recovery store in each epoch in which something
        changes. For more than a few million rows set ``REPLICA IDENTITY FULL``.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from pgoutput_source.testing import batch
        >>> ups = [batch("public.orders", [("I", {"id": 1, "status": "new"}), ("I", {"id": 2, "status": "new"})])]
        >>> ups += [batch("public.orders", [("U", {"id": 1, "status": "paid"}), ("D", {"id": 2})])]
        >>> flow, out = Dataflow("shop"), []
        >>> orders = op.input("orders", flow, TestingSource(ups))
        >>> op.output("out", aggregate("by_status", orders, by="status", count=True), TestingSink(out))
        >>> run_main(flow)
        >>> [(row["_op"], row["status"], row["count"]) for batch in out for row in batch.to_pylist()]
        [('I', 'new', 2), ('D', 'new', 0), ('I', 'paid', 1)]

    Raises:
        ConfigurationError: The arguments are invalid. Once batches come: a column is missing, or its type can't be
            grouped, summed or compared, or batches are of several tables.
        DecodeError: A sum exceeds its type, or a value can't be computed with (see `_raw`).
        StateError: An old row is needed that was never sent, or a column changed to a type that can't be added.
    """
    grouping = Grouping.of(by, count=count, sum=sum, min=min, max=max, mean=mean)
    for prefix in prefixes(up):
        grouping.check(_stands(MetadataNames.with_prefix(prefix)))

    def build(state: Any | None) -> _Aggregate:
        return _Aggregate(step_id, grouping, where, state)

    keyed = op.key_on("key", up, lambda _: "0")
    return op.key_rm("unkey", op.stateful_batch("groups", keyed, build))


def _stands(metadata: MetadataNames) -> tuple[str, ...]:
    """The columns after an aggregate's own: what happened to the group, and as of which change."""
    return metadata.op, metadata.commit_lsn, metadata.seq, metadata.commit_ts


class _Groups:
    """The groups: a slot for each, with its measures."""

    def __init__(self, grouping: Grouping) -> None:
        self.grouping = grouping
        self.fields: dict[str, pa.Field] = {}
        self.slots: dict[Hashable, int] = {}
        self.keys: list[Hashable] = []
        self.free: list[int] = []
        self.rows = np.zeros(0, np.int64)
        self.shown = np.zeros(0, np.bool_)  # whether the group was delivered and still exists
        self.measured: dict[str, Accumulator] = {}

    def know(self, schema: pa.Schema) -> None:
        """Note the columns' types, which may have changed."""
        for name in self.grouping.columns:
            column_of(pa.RecordBatch.from_pylist([], schema), name)
            field = schema.field(name)
            known = self.fields.get(name)
            if known is not None and known.equals(field, check_metadata=True):
                continue
            if known is not None and not goes_with(known.type, field.type):
                raise StateError(
                    f"a column has changed its type from {known.type} to {field.type}",
                    column=name,
                    hint=AFRESH,
                )
            self.fields[name] = field
            for key, accumulator in self._accumulators(field):
                if key in self.measured:
                    self.measured[key].changed(field)
                else:
                    accumulator.grow(len(self.keys))
                    self.measured[key] = accumulator

    def _accumulators(self, field: pa.Field) -> Iterator[tuple[str, Accumulator]]:
        for m in self.grouping.measures:
            if m.column != field.name:
                continue
            empty = pa.array([], field.type)
            if m.function in ("min", "max"):
                operand(m.function, empty, field)
                yield f"values {field.name}", Values(field)
            else:
                yield f"count {field.name}", Count(field)
            if m.function in ("sum", "mean"):
                floating = pa.types.is_floating(operand("sum", empty, field).type)
                yield f"sum {field.name}", FloatSum(field) if floating else Sum(field)

    def add(self, rows: pa.Table, sign: Ints) -> Ints:
        """Add rows (1) or take them back (-1), and return the touched slots."""
        keys = [group_key(_array(rows, name), self.fields[name]) for name in self.grouping.by]
        if keys:
            group, some = encode(keys)
            names = as_keys([plain(key.take(pa.array(some))) for key in keys])
        else:
            group, names = np.zeros(rows.num_rows, np.int64), [()]
        slots = self._slots(names)
        self.rows[slots] += counted(group, sign, len(slots))
        for key, accumulator in self.measured.items():
            accumulator.add(slots, group, _array(rows, key.partition(" ")[2]), sign)
        return slots

    def _slots(self, names: Sequence[Hashable]) -> Ints:
        slots = np.fromiter(map(self.slots.get, names, itertools.repeat(-1)), np.int64, len(names))
        for i in np.flatnonzero(slots < 0).tolist():
            if self.free:
                slot = self.free.pop()
                self.keys[slot] = names[i]
            else:
                slot = len(self.keys)
                self.keys.append(names[i])
            slots[i] = self.slots[names[i]] = slot
        self.rows, self.shown = grown(self.rows, len(self.keys)), grown(self.shown, len(self.keys))
        for accumulator in self.measured.values():
            accumulator.grow(len(self.keys))
        return slots

    def reset(self) -> Ints:
        """Empty every group, and return their slots."""
        slots = np.fromiter(self.slots.values(), np.int64, len(self.slots))
        self.rows[slots] = 0
        for accumulator in self.measured.values():
            accumulator.clear(slots)
        return slots

    def forget_empty(self, touched: Sequence[Ints]) -> None:
        """Free the slots of empty groups among these."""
        slots = np.unique(np.concatenate([np.zeros(0, np.int64), *touched]))
        slots = slots[self.rows[slots] == 0]
        for accumulator in self.measured.values():
            accumulator.clear(slots)
        for slot in slots.tolist():
            del self.slots[self.keys[slot]]
            self.keys[slot] = None
            self.free.append(slot)

    def results(self, slots: Ints) -> dict[str, pa.Array]:
        """The result columns of these slots."""
        columns = self._key_columns(slots)
        for m in self.grouping.measures:
            kept = {part: self.measured.get(f"{part} {m.column}") for part in ("count", "sum", "values")}
            match kept["count"], kept["sum"], kept["values"]:
                case _ if m.column is None:
                    columns[m.name] = pa.array(self.rows[slots])
                case _, _, Values() as values if m.function in ("min", "max"):
                    columns[m.name] = values.least(slots) if m.function == "min" else values.greatest(slots)
                case Count() as count, (Sum() | FloatSum()) as total, _ if m.function in ("sum", "mean"):
                    counts = count.counts[slots]
                    columns[m.name] = total.of(slots, counts) if m.function == "sum" else total.means(slots, counts)
                case Count() as count, _, _:
                    columns[m.name] = count.of(slots)
        return columns

    def _key_columns(self, slots: Ints) -> dict[str, pa.Array]:
        by = self.grouping.by
        keys = [self.keys[slot] for slot in slots.tolist()]
        lists: list[Any] = [keys] if len(by) == 1 else [[key[i] for key in keys] for i in range(len(by))]
        return {name: arrow(values, self._key_type(name)) for name, values in zip(by, lists, strict=True)}

    def _key_type(self, name: str) -> pa.DataType:
        field = self.fields[name]
        return group_key(pa.array([], field.type), field).type

    def state(self) -> dict[str, Any]:
        slots = np.fromiter(self.slots.values(), np.int64, len(self.slots))
        return {
            "columns": pa.schema(list(self.fields.values())).serialize().to_pybytes(),
            "keys": list(self.slots),
            "rows": self.rows[slots].tobytes(),
            "measured": {name: accumulator.state(slots) for name, accumulator in self.measured.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.know(pa.ipc.read_schema(pa.py_buffer(state["columns"])))
        self.keys = list(state["keys"])
        self.slots = {key: slot for slot, key in enumerate(self.keys)}
        self.rows = np.frombuffer(state["rows"], np.int64).copy()
        self.shown = np.ones(len(self.rows), np.bool_)
        if set(state["measured"]) != set(self.measured):
            raise StateError(
                "the state has other measures than the step",
                hint="give the step another name, or start afresh with a new recovery folder",
            )
        for name, kept in state["measured"].items():
            self.measured[name].restore(kept)


def _array(rows: pa.Table, name: str) -> pa.Array:
    return rows.column(name).combine_chunks()


class _Aggregate(StatefulBatchLogic[ChangeBatch, pa.RecordBatch, dict[str, Any]]):
    """Keeps the groups and, if the identity requires it, the rows."""

    def __init__(
        self, step_id: str, grouping: Grouping, where: pc.Expression | None, state: dict[str, Any] | None
    ) -> None:
        self.step_id, self.where = step_id, where
        self.groups = _Groups(grouping)
        self._schema: pa.Schema | None = None
        self._columns: tuple[str, ...] = ()
        if state is not None:
            check_version(state, STATE_VERSION, f"step {step_id!r}")
            self.groups.restore(state["groups"])
        self.old = OldRows(state)

    def on_batch(self, values: list[ChangeBatch]) -> tuple[Iterable[pa.RecordBatch], bool]:
        results = [self._changed(batch) for batch in values if len(batch)]
        return [batch for batch in results if batch is not None], self.RETAIN

    def snapshot(self) -> dict[str, Any]:
        return {"v": STATE_VERSION, "groups": self.groups.state(), **self.old.snapshot()}

    def _changed(self, batch: ChangeBatch) -> pa.RecordBatch | None:
        other = self._know(batch)
        groups, data = self.groups, batch.data
        refuse_misfits(data, self._columns)
        touched = []
        truncates = np.flatnonzero(operations(data) == TRUNCATE)
        if other or len(truncates):
            touched.append(groups.reset())
        if len(truncates):
            self.old.clear()
            data = data.slice(int(truncates[-1]) + 1)
        if len(data):
            parts = self._from_kept(data) if self.old.kept is not None else self._from_before(data)
            counting = [rows if self.where is None else rows.filter(self.where) for rows in parts]
            rows = joined(counting)
            sign = np.repeat([1, -1][: len(parts)], [part.num_rows for part in counting])
            for low in range(0, len(sign), MOST_ROWS):
                touched.append(groups.add(rows.slice(low, MOST_ROWS), sign[low : low + MOST_ROWS]))
        return self._results(batch, touched)

    def _results(self, batch: ChangeBatch, touched: list[Ints]) -> pa.RecordBatch | None:
        """The current results of the touched groups; None if none of them exists or existed."""
        groups = self.groups
        slots = np.unique(np.concatenate(touched)) if touched else np.zeros(0, np.int64)
        there, shown = groups.rows[slots] != 0, groups.shown[slots]
        slots, there, shown = (array[there | shown] for array in (slots, there, shown))
        code = np.where(there, np.where(shown, UPDATE, INSERT), DELETE).astype(np.int8)
        results = None
        metadata = batch.schema.metadata_names
        if len(slots):
            last = batch.data.slice(len(batch) - 1)
            columns: dict[str, Any] = groups.results(slots)
            op_name, *position = _stands(metadata)
            columns[op_name] = pa.DictionaryArray.from_arrays(pa.array(code), _OPS)
            for name in position:
                columns[name] = last.column(name).take(pa.array(np.zeros(len(slots), np.int64)))
            results = sorted_batch(columns, groups.grouping.by, metadata)
        groups.shown[slots] = there
        groups.forget_empty(touched)
        return results

    def _know(self, batch: ChangeBatch) -> bool:
        """Note a batch's columns and version; see `OldRows.know`."""
        if batch.data.schema is not self._schema:
            own = pa.schema([batch.data.schema.field(name) for name in own_columns(batch.data.schema)])
            self.groups.grouping.check(_stands(batch.schema.metadata_names))
            self._columns = tuple(dict.fromkeys([*self.groups.grouping.columns, *referenced(self.where, own)]))
            self.groups.know(batch.data.schema)
            self._schema = batch.data.schema
        return self.old.know(self.step_id, batch, self._columns)

    def _from_kept(self, data: pa.RecordBatch) -> list[pa.Table]:
        """The rows of all changed keys, as they are now and as they were."""
        assert self.old.kept is not None
        columns = tuple(dict.fromkeys([*self.old.kept.key, *self._columns]))
        changes = KeyedChanges(data, self.old.kept.key)
        found = Found(self.old.kept, changes)
        new = self.old.filled(changes, columns, changes.there[1], found)
        self.old.keep(changes, new)
        return [new] if found.rows is None else [new, found.rows.select(new.column_names)]

    def _from_before(self, data: pa.RecordBatch) -> list[pa.Table]:
        """The new row and the old row of each change."""
        has_before, old = self.old.sent(data, self._columns)
        new = data.select(self._columns) if self._columns else data.select([MetadataNames.of(data.schema).op])
        parts = [pa.Table.from_batches([new.filter(pa.array(operations(data) != DELETE))])]
        return [*parts, old] if has_before.any() else parts
