"""Changes per second through each operator, inside a flow, on batches that were prepared before.

    python -m benchmarks.operators [changes] [rows per batch]

The table is like the shop's orders. Half of the changes are inserts, the others update a random row.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import bytewax.operators as op
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from bytewax.dataflow import Dataflow, Stream
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from bytewax.testing import TestingSource, run_main

import pgoutput_source.operators as cdc
from pgoutput_source.changes import ChangeBatch
from pgoutput_source.changes.schema import OP_CODE, OPS, Column, TableSchema

STATUSES = pa.array(["new", "paid", "packed", "shipped", "returned"])
START = 1_700_000_000_000_000
TYPES = {
    "id": pa.int64(),
    "customer_id": pa.int64(),
    "status": pa.utf8(),
    "amount": pa.decimal128(12, 2),
    "note": pa.utf8(),
}


class Nowhere(DynamicSink[Any]):
    """Takes everything and keeps nothing."""

    def build(self, step_id: str, worker_index: int, worker_count: int) -> StatelessSinkPartition[Any]:
        """Bytewax asks for it."""

        class Part(StatelessSinkPartition[Any]):
            def write_batch(self, items: list[Any]) -> None:
                pass

        return Part()


class Orders:
    """The table as it is: what an update finds, and leaves behind."""

    def __init__(self, most: int) -> None:
        self.random = np.random.default_rng(1)
        self.status = np.zeros(most, np.int64)
        self.cents = np.zeros(most, np.int64)
        self.rows = 1

    def columns(self, ids: Any) -> list[pa.Array]:
        """The table's own columns for these keys."""
        words = np.zeros((len(ids), 2), "<i8")
        words[:, 0] = self.cents[ids]
        return [
            pa.array(ids),
            pa.array(ids * 2_654_435_761 % 10_000),
            STATUSES.take(pa.array(self.status[ids])),
            pa.Array.from_buffers(TYPES["amount"], len(ids), [None, pa.py_buffer(words)]),
            pa.nulls(len(ids), pa.utf8()),
        ]

    def change(self, n: int) -> tuple[Any, Any]:
        """Which of n changes insert, and the keys of all; no key comes twice."""
        insert = self.random.random(n) < 0.5
        insert[: max(1, n - self.rows)] = True
        ids = self.rows + np.cumsum(insert) - 1
        ids[~insert] = self.random.choice(self.rows, int((~insert).sum()), replace=False)
        self.rows += int(insert.sum())
        return insert, ids

    def become(self, ids: Any) -> None:
        """These rows get other values."""
        self.status[ids] = self.random.integers(0, len(STATUSES), len(ids))
        self.cents[ids] = self.random.integers(100, 1_000_000, len(ids))


def batches(changes: int, size: int, identity: str) -> Iterator[ChangeBatch]:
    """One transaction per change, a thousand a second."""
    columns = tuple(Column(n, 0, -1, identity == "f" or n == "id", str(t), t) for n, t in TYPES.items())
    schema = TableSchema(1, "public", "orders", identity, columns)
    orders = Orders(changes + 1)
    for start in range(0, changes, size):
        n = min(size, changes - start)
        insert, ids = orders.change(n)
        before = pa.nulls(n, schema.row_type)
        if identity == "f":
            olds = orders.columns(ids)
            before = pa.StructArray.from_arrays(olds, fields=list(schema.row_type), mask=pa.array(insert))
        orders.become(ids)
        lsn = pa.array(np.arange(start, start + n).astype(np.uint64))
        meta = [
            pa.DictionaryArray.from_arrays(
                pa.array(np.where(insert, OP_CODE["I"], OP_CODE["U"]).astype(np.int8)), pa.array(OPS)
            ),
            lsn,
            pa.array(np.zeros(n, np.uint64)),
            lsn,
            pa.array(np.arange(start, start + n).astype(np.uint32)),
            pa.array(START + np.arange(start, start + n) * 1000).view(pa.timestamp("us", "UTC")),
            before,
            pa.nulls(n, pa.list_(pa.utf8())),
            pa.nulls(n, pa.map_(pa.utf8(), pa.utf8())),
        ]
        yield ChangeBatch(schema, pa.RecordBatch.from_arrays([*orders.columns(ids), *meta], schema=schema.arrow))


Step = Callable[[Stream[ChangeBatch]], Stream[Any]]
MINUTE = timedelta(minutes=1)
CASES: list[tuple[str, str, Step]] = [
    ("filter", "d", lambda up: cdc.filter("step", up, pc.field("status") == "paid")),
    ("window by status", "d", lambda up: cdc.window("step", up, every=MINUTE, by="status", sum="amount", count=True)),
    ("window by customer", "d", lambda up: cdc.window("step", up, every=MINUTE, by="customer_id", sum="amount")),
    ("aggregate by status, full", "f", lambda up: cdc.aggregate("step", up, by="status", sum="amount", count=True)),
    ("aggregate by customer, full", "f", lambda up: cdc.aggregate("step", up, by="customer_id", sum="amount")),
    ("aggregate min max, full", "f", lambda up: cdc.aggregate("step", up, by="status", min="amount", max="amount")),
    ("aggregate by status, kept", "d", lambda up: cdc.aggregate("step", up, by="status", sum="amount", count=True)),
    ("aggregate by customer, kept", "d", lambda up: cdc.aggregate("step", up, by="customer_id", sum="amount")),
    ("latest", "d", lambda up: cdc.latest("step", up)),
    ("latest, no fill", "d", lambda up: cdc.latest("step", up, fill=False)),
]


def measure(step: Step, made: list[ChangeBatch]) -> tuple[float, float]:
    """Changes a second through a flow of one step: by the clock on the wall, and by processor time."""
    flow = Dataflow("benchmark")
    op.output("out", step(op.input("in", flow, TestingSource(made))), Nowhere())
    wall, cpu = time.perf_counter(), time.process_time()
    run_main(flow)  # type: ignore[no-untyped-call]
    changes = sum(map(len, made))
    return changes / (time.perf_counter() - wall), changes / (time.process_time() - cpu)


def main() -> None:
    """Print a table."""
    changes = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    size = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
    made = {identity: list(batches(changes, size, identity)) for identity in "df"}
    print(f"{changes:,} changes in batches of {size:,}: changes a second, and a second of processor time")
    for name, identity, step in CASES:
        wall, cpu = measure(step, made[identity])
        print(f"{name:30} {wall:12,.0f} {cpu:12,.0f}")


if __name__ == "__main__":
    main()
