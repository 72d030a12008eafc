"""A dataflow for tests: every change of every table into one folder of Parquet files.

Its environment names the faults that its process makes: see `faults`.
"""

from __future__ import annotations

import os
from datetime import timedelta

import bytewax.operators as op
from bytewax.dataflow import Dataflow

import pgoutput_source.operators as cdc
from harness import faults
from pgoutput_source import ChangeBatch, ChangeSet, ParquetSink, PgOutputSource
from pgoutput_source.copy import initial


def batches(sets: list[ChangeSet]) -> list[ChangeBatch]:
    """All batches, whatever their table."""
    return [batch for s in sets for batch in s]


initial.CHUNK_ROWS = int(os.environ.get("CHUNK_ROWS", initial.CHUNK_ROWS))
faults.install()
flow = Dataflow("all_tables")
changes = op.input("in", flow, PgOutputSource.from_env())
out = ParquetSink(
    os.environ.get("PGOUTPUT_OUT", "out"), max_age=timedelta(seconds=float(os.environ.get("MAX_AGE", "60")))
)
cdc.output("out", op.flat_map_batch("batches", changes, batches), out)
