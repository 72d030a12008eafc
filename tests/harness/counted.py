"""A dataflow for tests: a stateful step counts the changes of each table, and each count is a line of JSON."""

from __future__ import annotations

import os
from pathlib import Path

import bytewax.operators as op
from bytewax.dataflow import Dataflow

import pgoutput_source.operators as cdc
from harness import faults
from harness.all_tables import batches
from pgoutput_source import ChangeBatch, JsonLinesSink, PgOutputSource


def count(so_far: int | None, batch: ChangeBatch) -> tuple[int, int]:
    """The state, and what comes out."""
    number = (so_far or 0) + len(batch)
    return number, number


faults.install()
flow = Dataflow("counted")
changes = op.flat_map_batch("batches", op.input("in", flow, PgOutputSource.from_env()), batches)
counts = op.stateful_map("count", op.key_on("table", changes, lambda batch: batch.schema.table), count)
lines = op.map("line", counts, lambda pair: {"table": pair[0], "count": pair[1]})
cdc.output("out", lines, JsonLinesSink(Path(os.environ["PGOUTPUT_OUT"]) / "counts.jsonl"))
