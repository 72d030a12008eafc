"""A dataflow for tests: one table through each operator that keeps a state, every result as Parquet."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import bytewax.operators as op
from bytewax.dataflow import Dataflow

import pgoutput_source.operators as cdc
from pgoutput_source import ParquetSink, PgOutputSource

OUT = Path(os.environ.get("PGOUTPUT_OUT", "out"))
EVERY = timedelta(milliseconds=200)

flow = Dataflow("measured")
rows = cdc.table("rows", op.input("in", flow, PgOutputSource.from_env()), "public.t")
groups = cdc.aggregate(
    "groups", rows, by="status", count=True, sum=["amount", "big"], min=["score", "day"], max="amount", mean="big"
)
cdc.output("groups_out", groups, ParquetSink(OUT / "groups"))
cdc.output("latest_out", cdc.latest("latest", rows, key=("id", "part")), ParquetSink(OUT / "latest"))
windows = cdc.window("windows", rows, every=EVERY, by="status", count=True, sum=["amount", "big"], max="day", shards=3)
cdc.output("windows_out", windows, ParquetSink(OUT / "windows"))
cdc.output("late_out", windows.late, ParquetSink(OUT / "late"))
