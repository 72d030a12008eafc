"""Dataflow operators over whole batches: ``import pgoutput_source.operators as cdc``.

Each works on `ChangeBatch`es, thousands of rows at a time, and composes with Bytewax's own operators, because a
stream of batches is an ordinary Bytewax stream. None of them keeps state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
from bytewax import operators as op
from bytewax.dataflow import Stream, operator
from bytewax.outputs import FixedPartitionedSink

from pgoutput_source.aggregates import aggregate
from pgoutput_source.changes import ChangeBatch, ChangeSet
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.events import ChangeEvent
from pgoutput_source.latest import latest
from pgoutput_source.windows import WindowStream, window

__all__ = ["WindowStream", "aggregate", "events", "filter", "latest", "output", "table", "window"]

Predicate: TypeAlias = Callable[[pa.RecordBatch], pa.BooleanArray]
Batch: TypeAlias = ChangeBatch | pa.RecordBatch


@operator
def table(step_id: str, up: Stream[ChangeSet], name: str) -> Stream[ChangeBatch]:
    """The changes of one table, as batches in position order; a change of its schema starts a new batch.

    Args:
        step_id: Unique name of the step.
        up: What `PgOutputSource` gives.
        name: Schema and table: ``public.orders``.

    Raises:
        ConfigurationError: `name` has no schema.
    """
    if "." not in name:
        raise ConfigurationError(f"table {name!r} has no schema", hint=f"write 'public.{name}'")

    def of_table(sets: list[ChangeSet]) -> list[ChangeBatch]:
        return [batch for s in sets for batch in s.of(name)]

    return op.flat_map_batch("of_table", up, of_table)


@operator
def filter(step_id: str, up: Stream[ChangeBatch], where: pc.Expression | Predicate) -> Stream[ChangeBatch]:
    """The rows for which `where` is true. Rows for which it is null are dropped, and batches left empty as well.

    A delete whose replica identity sends only the key has null in all other columns, so a condition on these drops
    it, as it drops truncates: filter what you sum up, not what you mirror.

    Args:
        step_id: Unique name of the step.
        up: Batches.
        where: An Arrow expression, such as ``pc.field("status") == "paid"``, or a function from a record batch to a
            boolean array.
    """

    def rows(batches: list[ChangeBatch]) -> list[ChangeBatch]:
        kept = []
        for batch in batches:
            data = batch.data.filter(where if isinstance(where, pc.Expression) else where(batch.data))
            if data.num_rows:
                kept.append(batch.replace(data))
        return kept

    return op.flat_map_batch("rows", up, rows)


@operator
def events(step_id: str, up: Stream[ChangeSet] | Stream[ChangeBatch]) -> Stream[ChangeEvent]:
    """Each change as a `ChangeEvent`, for Bytewax's own operators: of all tables, in the order of their positions.

    A row costs some microseconds as an object, where a column's value costs nanoseconds: filter batches first.

    Args:
        step_id: Unique name of the step.
        up: What `PgOutputSource` gives, or batches of it.

    Example:
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from bytewax.dataflow import Dataflow
        >>> from pgoutput_source.testing import batch
        >>> flow, out = Dataflow("example"), []
        >>> orders = op.input("orders", flow, TestingSource([batch("public.orders", [("I", {"id": 1}), ("T", None)])]))
        >>> op.output("out", op.map("row", events("events", orders), lambda e: (e.op, e.after)), TestingSink(out))
        >>> run_main(flow)
        >>> out
        [('I', {'id': 1}), ('T', None)]
    """
    changes: Stream[Any] = up
    return op.flat_map("events", changes, _events)


def _events(changes: ChangeSet | ChangeBatch) -> Iterator[ChangeEvent]:
    return changes.events()


@operator
def output(step_id: str, up: Stream[Batch], sink: FixedPartitionedSink[Any, Any]) -> None:
    """Write batches to a sink of this package, or to any sink with fixed partitions that takes batches.

    Batches are keyed by their table, so that all changes of a table go to one partition of the sink, in order.

    Args:
        step_id: Unique name of the step; the sink's state is kept under it.
        up: Batches.
        sink: The destination, such as ``ParquetSink("out/orders")``.
    """
    keyed = op.key_on("key", up, lambda batch: batch.table if isinstance(batch, ChangeBatch) else "")
    op.output("write", keyed, sink)
