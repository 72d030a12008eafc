"""A dataflow for tests: every change of every table into each sink beside Parquet, under the folder `PGOUTPUT_OUT`."""

from __future__ import annotations

import os
from pathlib import Path

import bytewax.operators as op
from bytewax.dataflow import Dataflow

import pgoutput_source.operators as cdc
from harness import faults
from harness.all_tables import batches
from harness.sqlite_sink import SqliteSink
from pgoutput_source import IpcSink, JsonLinesSink, PgOutputSource

OUT = Path(os.environ.get("PGOUTPUT_OUT", "out"))
OUT.mkdir(exist_ok=True)

faults.install()
flow = Dataflow("every_sink")
changes = op.flat_map_batch("batches", op.input("in", flow, PgOutputSource.from_env()), batches)
cdc.output("ipc", changes, IpcSink(OUT / "ipc"))
cdc.output("lines", changes, JsonLinesSink(OUT / "lines.jsonl"))
cdc.output("sqlite", changes, SqliteSink(OUT / "sqlite.db"))
