"""A dataflow for tests: every change of every table into each sink beside Parquet, under the folder `PGOUTPUT_OUT`.

`PARQUET` adds Parquet; `STEP` is the beginning of the names of the sinks' steps.
"""

from __future__ import annotations

import os
from pathlib import Path

import bytewax.operators as op
from bytewax.dataflow import Dataflow

import pgoutput_source.operators as cdc
from harness import faults
from harness.all_tables import batches
from harness.sqlite_sink import SqliteSink
from pgoutput_source import IpcSink, JsonLinesSink, ParquetSink, PgOutputSource

OUT = Path(os.environ.get("PGOUTPUT_OUT", "out"))
OUT.mkdir(exist_ok=True)

faults.install()
flow = Dataflow("every_sink")
changes = op.flat_map_batch("batches", op.input("in", flow, PgOutputSource.from_env()), batches)
step = os.environ.get("STEP", "")
if "PARQUET" in os.environ:
    cdc.output(f"{step}parquet", changes, ParquetSink(OUT / "parquet"))
cdc.output(f"{step}ipc", changes, IpcSink(OUT / "ipc"))
cdc.output(f"{step}lines", changes, JsonLinesSink(OUT / "lines.jsonl"))
cdc.output(f"{step}sqlite", changes, SqliteSink(OUT / "sqlite.db"))
