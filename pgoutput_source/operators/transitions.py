"""`cdc.entered` and `cdc.left`: the changes that make a row start or stop satisfying a condition.

The row before a change comes from `_before` if the replica identity is FULL, and otherwise from kept rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from bytewax import operators as op
from bytewax.dataflow import Stream, operator
from bytewax.operators import StatefulBatchLogic

from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.compute.columns import matching, referenced, refuse_misfits
from pgoutput_source.compute.keyed_changes import Found, KeyedChanges
from pgoutput_source.compute.metadata import DELETE, TRUNCATE, Bools, operations, own_columns, spans
from pgoutput_source.compute.old_rows import OldRows
from pgoutput_source.errors import check_version

STATE_VERSION: Final = 1


@operator
def entered(step_id: str, up: Stream[ChangeBatch], where: pc.Expression) -> Stream[ChangeBatch]:
    """The changes that make a row satisfy a condition: ``where`` is true of the new row, and was not true before.

    A row comes once for each time that it enters: an order that is updated while it is paid does not come again. An
    insert enters if it satisfies the condition, and so does a row that a snapshot reads (`R`). If a flow first sees a
    row in an update, the row counts as not satisfying the condition before, unless the identity is FULL and the old row
    tells.

    Changes come unmodified, in position order. Together with `left` they tell which rows satisfy the condition now: the
    ones whose last such change is an entry.

    It must see every change of one table: put other conditions after it, not before.

    Args:
        step_id: Unique name of the step; the state is kept under it.
        up: All changes of one table, none filtered out.
        where: An Arrow expression of the table's own columns, such as ``pc.field("status") == "paid"``. Compare a
            numeric with a ``Decimal``. Null counts as false.

    Guarantees:
        With recovery a row enters once, even across restarts.

    State:
        None while the identity is FULL. Otherwise one row per key with the columns of the condition, about 200 bytes,
        in memory on one worker, and written to the recovery store in each epoch in which something changes.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from pgoutput_source.testing import batch
        >>> orders = [("I", {"id": 1, "status": "new"}), ("U", {"id": 1, "status": "paid"})]
        >>> orders += [("U", {"id": 1, "status": "paid"}), ("I", {"id": 2, "status": "paid"})]
        >>> flow, out = Dataflow("shop"), []
        >>> up = op.input("orders", flow, TestingSource([batch("public.orders", orders)]))
        >>> op.output("out", entered("paid", up, pc.field("status") == "paid"), TestingSink(out))
        >>> run_main(flow)
        >>> [(row["_op"], row["id"]) for made in out for row in made.data.to_pylist()]
        [('U', 1), ('I', 2)]

    Raises:
        ConfigurationError: Once batches come: the condition does not fit the table, or batches are of several tables.
        DecodeError: The condition can't be computed with a value (see `_raw`).
        StateError: An old row or value is needed that was never sent.
    """
    return _transitions(up, lambda state: _Transitions(step_id, where, True, state))


@operator
def left(step_id: str, up: Stream[ChangeBatch], where: pc.Expression) -> Stream[ChangeBatch]:
    """The changes after which a row no longer satisfies a condition: it was true of the old row, and is not any more.

    An update gives its new row; the old one is in `_before` as far as PostgreSQL sends it. A delete leaves if the row
    satisfied the condition. A truncate comes unmodified: all rows leave, and PostgreSQL does not name them.

    See `entered` for arguments, guarantees, state and errors.

    Args:
        step_id: Unique name of the step; the state is kept under it.
        up: All changes of one table, none filtered out.
        where: An Arrow expression of the table's own columns.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from pgoutput_source.testing import batch
        >>> orders = [("I", {"id": 1, "status": "paid"}), ("I", {"id": 2, "status": "new"})]
        >>> orders += [("D", {"id": 1}, {"id": 1}), ("D", {"id": 2}, {"id": 2})]
        >>> flow, out = Dataflow("shop"), []
        >>> up = op.input("orders", flow, TestingSource([batch("public.orders", orders)]))
        >>> op.output("out", left("no_longer_paid", up, pc.field("status") == "paid"), TestingSink(out))
        >>> run_main(flow)
        >>> [(row["_op"], row["id"]) for made in out for row in made.data.to_pylist()]
        [('D', 1)]
    """
    return _transitions(up, lambda state: _Transitions(step_id, where, False, state))


def _transitions(up: Stream[ChangeBatch], build: Callable[[Any | None], _Transitions]) -> Stream[ChangeBatch]:
    return op.key_rm("unkey", op.stateful_batch("rows", op.key_on("key", up, lambda _: "0"), build))


class _Transitions(StatefulBatchLogic[ChangeBatch, ChangeBatch, dict[str, Any]]):
    """Finds the changes, and keeps old rows if PostgreSQL does not send them."""

    def __init__(self, step_id: str, where: pc.Expression, into: bool, state: dict[str, Any] | None) -> None:
        self.step_id, self.where, self.into = step_id, where, into
        if state is not None:
            check_version(state, STATE_VERSION, f"step {step_id!r}")
        self.old = OldRows(state)
        self._schema: pa.Schema | None = None
        self._columns: tuple[str, ...] = ()

    def on_batch(self, values: list[ChangeBatch]) -> tuple[Iterable[ChangeBatch], bool]:
        found = [batch.replace(self._found(batch)) for batch in values if len(batch)]
        return [batch for batch in found if len(batch)], self.RETAIN

    def snapshot(self) -> dict[str, Any]:
        return {"v": STATE_VERSION, **self.old.snapshot()}

    def _found(self, batch: ChangeBatch) -> pa.RecordBatch:
        data, ops = batch.data, operations(batch.data)
        if data.schema is not self._schema:
            own = pa.schema([data.schema.field(name) for name in own_columns(data.schema)])
            self._columns, self._schema = referenced(self.where, own), data.schema
        self.old.know(self.step_id, batch, self._columns)
        refuse_misfits(data, self._columns)
        wanted = np.zeros(len(data), np.bool_)
        if not self.into:
            wanted[ops == TRUNCATE] = True
        for span in spans(ops):
            if span.truncated:
                self.old.clear()
            part = data.slice(span.start, span.end - span.start)
            if len(part):
                is_, was = self._from_kept(part) if self.old.kept is not None else self._from_before(part)
                wanted[span.start : span.end] = is_ & ~was if self.into else was & ~is_
        return data.filter(pa.array(wanted))

    def _from_before(self, data: pa.RecordBatch) -> tuple[Bools, Bools]:
        """For each change, whether the condition is true of the new row, and whether it was true of the old one."""
        has_before, old = self.old.sent(data, self._columns)
        is_ = matching(pa.Table.from_batches([data]), self.where) & (operations(data) != DELETE)
        was = np.zeros(len(data), np.bool_)
        was[has_before] = matching(old, self.where)
        return is_, was

    def _from_kept(self, data: pa.RecordBatch) -> tuple[Bools, Bools]:
        assert self.old.kept is not None
        key = self.old.kept.key
        changes = KeyedChanges(data, key)
        found = Found(self.old.kept, changes)
        columns = tuple(dict.fromkeys([*key, *self._columns]))
        rows = self.old.filled(changes, columns, None, found)
        is_ = matching(rows, self.where) & (changes.ops != DELETE)
        kept = np.zeros(changes.count, np.bool_)
        if found.rows is not None:
            kept[found.of_key >= 0] = matching(found.rows, self.where)[found.of_key[found.of_key >= 0]]
        was = _before_each(changes, is_, kept)
        self.old.keep(changes, rows.take(pa.array(changes.there[1])))
        return is_, was


def _before_each(changes: KeyedChanges, is_: Bools, kept: Bools) -> Bools:
    """Whether the condition was true before each change; `kept` tells it for each key before the first change."""
    lives = changes.lives
    if not len(lives.code):
        return np.zeros(0, np.bool_)
    event = np.arange(len(lives.code))
    goes_on = lives.start != event
    was = np.where(goes_on, is_[lives.row[event - 1]], kept[lives.code] & ~lives.born)
    brought = lives.parent >= 0
    was[brought] = was[lives.parent[brought]]
    found = np.zeros(len(is_), np.bool_)
    found[lives.row[~lives.leaves]] = was[~lives.leaves]
    return found
