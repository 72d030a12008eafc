"""Destinations, one per file. Each class states its guarantee in its first paragraph."""

from __future__ import annotations

import pgoutput_source.dataflow.needs_bytewax  # noqa: F401

# isort: split
from pgoutput_source.parquet.read import read
from pgoutput_source.sinks.base import TwoPhaseSink
from pgoutput_source.sinks.delta import DeltaSink
from pgoutput_source.sinks.duckdb import DuckDBSink
from pgoutput_source.sinks.iceberg import IcebergSink
from pgoutput_source.sinks.ipc import IpcSink
from pgoutput_source.sinks.jsonl import JsonLinesSink
from pgoutput_source.sinks.parquet import ParquetSink
from pgoutput_source.sinks.postgres import PostgresSink

__all__ = [
    "DeltaSink",
    "DuckDBSink",
    "IcebergSink",
    "IpcSink",
    "JsonLinesSink",
    "ParquetSink",
    "PostgresSink",
    "TwoPhaseSink",
    "read",
]
