"""Dataflow operators over whole batches: ``import pgoutput_source.operators as cdc``.

Each works on `ChangeBatch`es, thousands of rows at a time, and composes with Bytewax's own operators, because a
stream of batches is an ordinary Bytewax stream. Only `window`, `aggregate` and `latest` keep state; the others cost
what Arrow needs to copy the rows that stay, and give with every run what they gave before.
"""

from __future__ import annotations

import pgoutput_source.dataflow.needs_bytewax  # noqa: F401

# isort: split
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from bytewax import operators as op
from bytewax.dataflow import Stream, operator
from bytewax.operators import KeyedStream
from bytewax.outputs import FixedPartitionedSink

from pgoutput_source.changes.batches import ChangeBatch, ChangeSet, Message
from pgoutput_source.changes.events import ChangeEvent
from pgoutput_source.changes.schema import OP_CODE
from pgoutput_source.compute.grouping import column_of, filtered
from pgoutput_source.compute.keyed_rows import encode, operations
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.operators.aggregates import aggregate
from pgoutput_source.operators.latest import latest
from pgoutput_source.operators.projections import mask, rename, select
from pgoutput_source.operators.windows import CommitClock, WindowStream, window

__all__ = [
    "CommitClock",
    "WindowStream",
    "aggregate",
    "deletes",
    "events",
    "filter",
    "inserts",
    "key_by",
    "latest",
    "map_batches",
    "mask",
    "messages",
    "output",
    "rename",
    "select",
    "table",
    "updates",
    "window",
]

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

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from pgoutput_source.testing import batch
        >>> poll = ChangeSet((batch("public.orders", [("I", {"id": 1})]), batch("public.items", [("I", {"id": 7})])))
        >>> flow, out = Dataflow("shop"), []
        >>> op.output("out", table("orders", op.input("in", flow, TestingSource([poll])), "public.orders"),
        ...           TestingSink(out))
        >>> run_main(flow)
        >>> [(batch.table, batch.data["id"].to_pylist()) for batch in out]
        [('public.orders', [1])]
    """
    if "." not in name:
        raise ConfigurationError(f"table {name!r} has no schema", hint=f"write 'public.{name}'")

    def of_table(sets: list[ChangeSet]) -> list[ChangeBatch]:
        return [batch for s in sets for batch in s.of(name)]

    return op.flat_map_batch("of_table", up, of_table)


@operator
def messages(step_id: str, up: Stream[ChangeSet], *, prefix: str = "") -> Stream[Message]:
    """Logical decoding messages: what ``pg_logical_emit_message(transactional, prefix, content)`` wrote.

    A transactional one comes with its transaction, and only if this commits; the others come at once. Within a set
    they stand in the order of the WAL. With `streaming`, a transactional message that was written behind a savepoint
    which was rolled back comes nevertheless: PostgreSQL does not say of which subtransaction a message is.

    Args:
        step_id: Unique name of the step.
        up: What `PgOutputSource` gives.
        prefix: Only messages whose prefix begins with this; "" for all.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from pgoutput_source.protocol.wire import Lsn
        >>> made = [Message(Lsn(n), prefix, b"hello", False) for n, prefix in enumerate(["audit.login", "beat"])]
        >>> flow, out = Dataflow("shop"), []
        >>> changes = op.input("changes", flow, TestingSource([ChangeSet((), tuple(made))]))
        >>> op.output("out", messages("audit", changes, prefix="audit."), TestingSink(out))
        >>> run_main(flow)
        >>> [(message.prefix, message.content) for message in out]
        [('audit.login', b'hello')]
    """

    def of_prefix(sets: list[ChangeSet]) -> list[Message]:
        return [message for s in sets for message in s.messages if message.prefix.startswith(prefix)]

    return op.flat_map_batch("of_prefix", up, of_prefix)


@operator
def filter(step_id: str, up: Stream[ChangeBatch], where: pc.Expression | Predicate) -> Stream[ChangeBatch]:
    """The rows for which `where` is true. Rows for which it is null are dropped, and batches left empty as well.

    A delete whose replica identity sends only the key has null in all other columns, so a condition on these drops
    it, as it drops truncates: filter what you sum up, not what you mirror.

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
    """Only rows that were inserted (`I`), not those that a snapshot read (`R`).

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
    """Only updates (`U`): rows as they are now; what they were is in `_before`, as far as PostgreSQL sends it.

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
    """Only deletes (`D`): the old row, as far as the replica identity sends it. Truncates are not among them.

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
        kept = [
            batch.replace(batch.data.filter(pa.array(operations(batch.data) == OP_CODE[name]))) for batch in batches
        ]
        return [batch for batch in kept if len(batch)]

    return rows


@operator
def map_batches(
    step_id: str, up: Stream[ChangeBatch], mapper: Callable[[pa.RecordBatch], pa.RecordBatch]
) -> Stream[ChangeBatch]:
    """Batches through a function of your own: other rows, other values, columns more or less.

    Leave the metadata columns as they are. A column that you add stands in the new rows only, not in `_before`.

    Args:
        step_id: Unique name of the step.
        up: Batches.
        mapper: Gives a record batch for a record batch; one without rows is dropped.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
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

    The key of one column is its value as text; of several, and of NULL, a JSON array. Slices hold copies of their rows,
    not views, so that they are small when they are sent to another process. Order is kept within a key.

    An update that changes these columns goes to its new key, and the old one does not hear of it. Truncates, which
    have no values, go to the key of NULL.

    A slice costs about 30 µs: for thousands of keys a batch, let Arrow group first, as `aggregate` and `window` do.

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
        ConfigurationError: No column is named; once batches come: there is no such column.
    """
    if not columns:
        raise ConfigurationError("no column to key by", hint="name one or several")

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
    keyed = op.key_on("key", up, lambda batch: batch.table if isinstance(batch, ChangeBatch) else "")
    op.output("write", keyed, sink)
