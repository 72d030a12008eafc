"""`cdc.map_batches`, `cdc.key_by` and `cdc.events`: batches for your own functions and Bytewax's own operators."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from bytewax import operators as op
from bytewax.dataflow import Stream, operator
from bytewax.operators import KeyedStream

from pgoutput_source.changes.batches import ChangeBatch, ChangeSet
from pgoutput_source.changes.events import ChangeEvent
from pgoutput_source.compute.columns import column_of
from pgoutput_source.compute.keys import encode
from pgoutput_source.errors import ConfigurationError


@operator
def map_batches(
    step_id: str, up: Stream[ChangeBatch], mapper: Callable[[pa.RecordBatch], pa.RecordBatch]
) -> Stream[ChangeBatch]:
    """Apply your own function to batches. It may change rows and values, and add or remove columns.

    Leave the metadata columns as they are. A column that you add exists only in the new rows, not in `_before`.

    Args:
        step_id: Unique name of the step.
        up: Batches.
        mapper: Maps a record batch to a record batch. Empty ones are dropped.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> import pyarrow.compute as pc
        >>> from pgoutput_source.testing import batch
        >>> def with_cents(data):
        ...     return data.append_column("cents", pc.multiply(data.column("amount"), 100))
        >>> flow, out = Dataflow("shop"), []
        >>> made = batch("public.orders", [("I", {"id": 1, "amount": 5})])
        >>> orders = op.input("orders", flow, TestingSource([made]))
        >>> op.output("out", map_batches("cents", orders, with_cents), TestingSink(out))
        >>> run_main(flow)
        >>> out[0].data.column("cents").to_pylist()
        [500]
    """

    def mapped(batches: list[ChangeBatch]) -> list[ChangeBatch]:
        made = [batch.replace(mapper(batch.data)) for batch in batches]
        return [batch for batch in made if len(batch)]

    return op.flat_map_batch("rows", up, mapped)


@operator
def key_by(step_id: str, up: Stream[ChangeBatch], *columns: str) -> KeyedStream[ChangeBatch]:
    """Split batches by the values of columns, for Bytewax's stateful operators and for the workers of a cluster.

    With one column the key is its value as text; with several, or for NULL, it is a JSON array. Slices hold copies of
    their rows, not views, so they are small when sent to another process. The order within a key is kept.

    An update that changes these columns goes to the new key only; the old key is not told. Truncates, which have no
    values, go to the key of NULL.

    A slice costs about 30 µs. With thousands of keys per batch, let Arrow group first, as `aggregate` and `window` do.

    Args:
        step_id: Unique name of the step.
        up: Batches.
        columns: Names of columns.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from pgoutput_source.testing import batch
        >>> made = batch("public.orders", [("I", {"id": i, "customer": "ann" if i % 2 else "bob"}) for i in range(5)])
        >>> flow, out = Dataflow("shop"), []
        >>> orders = op.input("orders", flow, TestingSource([made]))
        >>> op.output("out", key_by("customers", orders, "customer"), TestingSink(out))
        >>> run_main(flow)
        >>> [(key, batch.data.column("id").to_pylist()) for key, batch in sorted(out, key=lambda item: item[0])]
        [('ann', [1, 3]), ('bob', [0, 2, 4])]

    Raises:
        ConfigurationError: No column is named. Once batches come: there is no such column.
    """
    if not columns:
        raise ConfigurationError("there is no column to key by", hint="name one or several")

    def split(batches: list[ChangeBatch]) -> list[tuple[str, ChangeBatch]]:
        return [slice_ for batch in batches if len(batch) for slice_ in _split(batch, columns)]

    return op.flat_map_batch("slices", up, split)


def _split(batch: ChangeBatch, names: tuple[str, ...]) -> Iterator[tuple[str, ChangeBatch]]:
    columns = [column_of(batch.data, name) for name in names]
    code, some = encode(columns)
    order = np.argsort(code, kind="stable")
    ends = np.cumsum(np.bincount(code))
    keys = zip(*(column.take(pa.array(some)).to_pylist() for column in columns), strict=True)
    for key, rows in zip(keys, np.split(order, ends[:-1]), strict=True):
        text = str(key[0]) if len(key) == 1 and key[0] is not None else json.dumps(key, default=str)
        yield text, batch.replace(batch.data.take(pa.array(rows)))


@operator
def events(step_id: str, up: Stream[ChangeSet] | Stream[ChangeBatch]) -> Stream[ChangeEvent]:
    """Each change of all tables as a `ChangeEvent`, in the order of positions, for Bytewax's own operators.

    A row costs a few microseconds as an object, while a value in a column costs nanoseconds: filter batches first.

    Args:
        step_id: Unique name of the step.
        up: The output of `PgOutputSource`, or batches of it.

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
