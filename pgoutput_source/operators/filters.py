"""`cdc.filter`, `cdc.inserts`, `cdc.updates` and `cdc.deletes`: some rows of each batch, without any state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
from bytewax import operators as op
from bytewax.dataflow import Stream, operator

from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.compute.columns import filtered
from pgoutput_source.compute.metadata import of_operations

Predicate: TypeAlias = Callable[[pa.RecordBatch], pa.BooleanArray]


@operator
def filter(step_id: str, up: Stream[ChangeBatch], where: pc.Expression | Predicate) -> Stream[ChangeBatch]:
    """The rows for which `where` is true. Rows for which it is null are dropped, and so are empty batches.

    If the replica identity sends only the key, a delete has null in all other columns. So a condition on these drops
    it, and it drops truncates too: filter what you sum, not what you mirror.

    Args:
        step_id: Unique name of the step.
        up: Batches.
        where: An Arrow expression, such as ``pc.field("status") == "paid"``, or a function from a record batch to a
            boolean array. Compare a numeric with a ``Decimal``.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from pgoutput_source.testing import batch
        >>> made = batch("public.orders", [("I", {"id": 1, "status": "new"}), ("U", {"id": 1, "status": "paid"})])
        >>> flow, out = Dataflow("shop"), []
        >>> orders = op.input("orders", flow, TestingSource([made]))
        >>> op.output("out", filter("paid", orders, pc.field("status") == "paid"), TestingSink(out))
        >>> run_main(flow)
        >>> out[0].data.column("_op").to_pylist()
        ['U']
    """

    def rows(batches: list[ChangeBatch]) -> list[ChangeBatch]:
        kept = []
        for batch in batches:
            if isinstance(where, pc.Expression):
                data = filtered(batch.data, where)
            else:
                data = batch.data.filter(where(batch.data))
            if data.num_rows:
                kept.append(batch.replace(data))
        return kept

    return op.flat_map_batch("rows", up, rows)


@operator
def inserts(step_id: str, up: Stream[ChangeBatch]) -> Stream[ChangeBatch]:
    """Only inserts (`I`), without the rows that a snapshot read (`R`).

    Args:
        step_id: Unique name of the step.
        up: Batches.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from pgoutput_source.testing import batch
        >>> made = batch("public.orders", [("I", {"id": 1}), ("U", {"id": 1}), ("D", {"id": 1})])
        >>> flow, out = Dataflow("shop"), []
        >>> orders = op.input("orders", flow, TestingSource([made]))
        >>> for name, step in (("i", inserts), ("u", updates), ("d", deletes)):
        ...     op.output(f"out_{name}", step(name, orders), TestingSink(out))
        >>> run_main(flow)
        >>> sorted(batch.data.column("_op")[0].as_py() for batch in out)
        ['D', 'I', 'U']
    """
    return op.flat_map_batch("rows", up, _of("I"))


@operator
def updates(step_id: str, up: Stream[ChangeBatch]) -> Stream[ChangeBatch]:
    """Only updates (`U`): the new rows. The old ones are in `_before`, as far as PostgreSQL sends them.

    Args:
        step_id: Unique name of the step.
        up: Batches.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from pgoutput_source.testing import batch
        >>> made = batch("public.orders", [("I", {"id": 1}), ("U", {"id": 1}), ("D", {"id": 1}), ("T", None)])
        >>> flow, out = Dataflow("shop"), []
        >>> op.output("out", updates("updates", op.input("orders", flow, TestingSource([made]))), TestingSink(out))
        >>> run_main(flow)
        >>> [batch.data.column("_op").to_pylist() for batch in out]
        [['U']]
    """
    return op.flat_map_batch("rows", up, _of("U"))


@operator
def deletes(step_id: str, up: Stream[ChangeBatch]) -> Stream[ChangeBatch]:
    """Only deletes (`D`): the old rows, as far as the replica identity sends them. Truncates are not included.

    Args:
        step_id: Unique name of the step.
        up: Batches.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from pgoutput_source.testing import batch
        >>> made = batch("public.orders", [("I", {"id": 1}), ("U", {"id": 1}), ("D", {"id": 1}), ("T", None)])
        >>> flow, out = Dataflow("shop"), []
        >>> op.output("out", deletes("deletes", op.input("orders", flow, TestingSource([made]))), TestingSink(out))
        >>> run_main(flow)
        >>> [batch.data.column("_op").to_pylist() for batch in out]
        [['D']]
    """
    return op.flat_map_batch("rows", up, _of("D"))


def _of(name: str) -> Callable[[list[ChangeBatch]], list[ChangeBatch]]:
    def rows(batches: list[ChangeBatch]) -> list[ChangeBatch]:
        kept = [batch.replace(of_operations(batch.data, name)) for batch in batches]
        return [batch for batch in kept if len(batch)]

    return rows
