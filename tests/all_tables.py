"""A dataflow for tests: every change of every table into one folder of Parquet files.

`BREAK` names a deliberate mistake, to prove that the tests would notice it: see `break_on_purpose`.
"""

from __future__ import annotations

import os
import time
from typing import Any

import bytewax.operators as op
from bytewax.dataflow import Dataflow

import pgoutput_source.operators as cdc
from pgoutput_source import ChangeBatch, ChangeSet, ParquetSink, PgOutputSource, source


def break_on_purpose(mistake: str) -> None:
    """Make a mistake: acknowledge in snapshot(), or forget at a resume which changes were given out already."""
    partition = source._Partition
    if mistake == "acknowledge early":
        snapshot = partition.snapshot

        def early(self: Any) -> Any:
            state = snapshot(self)
            self.stream.acknowledge(self.staged, now=True)
            time.sleep(0.1)
            return state

        partition.snapshot = early  # type: ignore[method-assign]
    elif mistake == "forget":
        reconcile = source._reconcile
        source._reconcile = lambda *a: (None, reconcile(*a)[1])
    elif mistake:
        raise ValueError(mistake)


def batches(sets: list[ChangeSet]) -> list[ChangeBatch]:
    """All batches, whatever their table."""
    return [batch for s in sets for batch in s]


break_on_purpose(os.environ.get("BREAK", ""))
flow = Dataflow("all_tables")
changes = op.input("in", flow, PgOutputSource.from_env())
cdc.output("out", op.flat_map_batch("batches", changes, batches), ParquetSink(os.environ.get("PGOUTPUT_OUT", "out")))
