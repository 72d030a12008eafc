"""`cdc.output`: writes batches to a sink, with all changes of a table in one partition."""

from __future__ import annotations

from typing import Any, TypeAlias

import pyarrow as pa
from bytewax import operators as op
from bytewax.dataflow import Stream, operator
from bytewax.outputs import FixedPartitionedSink

from pgoutput_source.changes.batches import ChangeBatch, ChangeSet
from pgoutput_source.dataflow.taken import take_matching

Item: TypeAlias = ChangeBatch | ChangeSet | pa.RecordBatch


@operator
def output(step_id: str, up: Stream[Item], sink: FixedPartitionedSink[Any, Any]) -> None:
    """Write batches to a sink of this package, or to any sink with fixed partitions that takes batches.

    Batches are keyed by table, so that all changes of a table go to one partition of the sink, in order.

    Args:
        step_id: Unique name of the step; the sink's state is kept under it.
        up: Batches; or, for a sink of many tables such as `PostgresSink`, the stream of the source as it is.
        sink: The destination, such as ``ParquetSink("out/orders")``.

    Example:
        >>> import tempfile
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSource, run_main
        >>> from pgoutput_source import JsonLinesSink
        >>> from pgoutput_source.testing import batch
        >>> flow, file = Dataflow("shop"), tempfile.NamedTemporaryFile("r")
        >>> orders = op.input("orders", flow, TestingSource([batch("public.orders", [("I", {"id": 1})])]))
        >>> output("lines", orders, JsonLinesSink(file.name))
        >>> run_main(flow)
        >>> with file:
        ...     print(file.read()[:20])
        {"id": 1, "_op": "I"
    """
    take_matching(up, getattr(sink, "patterns", ()))
    keyed = op.key_on("key", up, lambda batch: batch.table if isinstance(batch, ChangeBatch) else "")
    op.output("write", keyed, sink)
