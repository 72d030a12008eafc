"""A dataflow for tests: every table into its folder of Parquet files. Its environment names its faults."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import bytewax.operators as op
from bytewax.dataflow import Dataflow

import pgoutput_source.operators as cdc
from harness import faults
from pgoutput_source import ParquetSink, PgOutputSource

options: dict[str, Any] = {
    "max_age": timedelta(seconds=float(os.environ.get("MAX_AGE", "0"))),
    "max_rows": int(os.environ.get("MAX_ROWS", "1000000")),
    "on_table_error": os.environ.get("ON_TABLE_ERROR", "stop"),
    "partition_by": os.environ.get("PARTITION_BY"),
    "exclude": tuple(filter(None, os.environ.get("EXCLUDE", "").split(","))),
}

faults.install()
flow = Dataflow("into_folders")
changes = op.input("in", flow, PgOutputSource.from_env())
cdc.output("out", changes, ParquetSink(os.environ["PGOUTPUT_OUT"] + "/{schema}/{table}", **options))
