"""PostgreSQL change data capture for Python: pgoutput, columnar, as a Bytewax source.

Names are loaded on first use, so that the reader, `peek` and the nouns work without Bytewax.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pgoutput_source.changes import ChangeBatch, ChangeSet, Position, TableSchema
    from pgoutput_source.changes.events import ChangeEvent
    from pgoutput_source.dataflow.run import run
    from pgoutput_source.dataflow.source import PgOutputSource
    from pgoutput_source.destinations.waiting import wait_for
    from pgoutput_source.errors import PgOutputError
    from pgoutput_source.parquet.current import current
    from pgoutput_source.parquet.read import read
    from pgoutput_source.protocol.wire import Lsn
    from pgoutput_source.pypgoutput import LogicalReplicationReader
    from pgoutput_source.reader import PgOutputReader, peek
    from pgoutput_source.settings import SourceSettings
    from pgoutput_source.sinks.base import TwoPhaseSink
    from pgoutput_source.sinks.delta import DeltaSink
    from pgoutput_source.sinks.duckdb import DuckDBSink
    from pgoutput_source.sinks.iceberg import IcebergSink
    from pgoutput_source.sinks.ipc import IpcSink
    from pgoutput_source.sinks.jsonl import JsonLinesSink
    from pgoutput_source.sinks.parquet import ParquetSink
    from pgoutput_source.sinks.postgres import PostgresSink

__version__ = "0.1.0"

_HOME: Final = {
    "ChangeBatch": "changes",
    "ChangeEvent": "changes.events",
    "ChangeSet": "changes",
    "DeltaSink": "sinks.delta",
    "DuckDBSink": "sinks.duckdb",
    "IcebergSink": "sinks.iceberg",
    "IpcSink": "sinks.ipc",
    "JsonLinesSink": "sinks.jsonl",
    "LogicalReplicationReader": "pypgoutput",
    "Lsn": "protocol.wire",
    "ParquetSink": "sinks.parquet",
    "PgOutputError": "errors",
    "PgOutputReader": "reader",
    "PgOutputSource": "dataflow.source",
    "Position": "changes",
    "PostgresSink": "sinks.postgres",
    "SourceSettings": "settings",
    "TableSchema": "changes",
    "TwoPhaseSink": "sinks.base",
    "current": "parquet.current",
    "gate": "dataflow.run",  # for programs that end their runs themselves
    "peek": "reader",
    "read": "parquet.read",
    "run": "dataflow.run",
    "wait_for": "destinations.waiting",
}

__all__ = [
    "ChangeBatch",
    "ChangeEvent",
    "ChangeSet",
    "DeltaSink",
    "DuckDBSink",
    "IcebergSink",
    "IpcSink",
    "JsonLinesSink",
    "LogicalReplicationReader",
    "Lsn",
    "ParquetSink",
    "PgOutputError",
    "PgOutputReader",
    "PgOutputSource",
    "Position",
    "PostgresSink",
    "SourceSettings",
    "TableSchema",
    "TwoPhaseSink",
    "__version__",
    "current",
    "peek",
    "read",
    "run",
    "wait_for",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    # help() and completion load every name in this list, and fail on one that can't be imported.
    if importlib.util.find_spec("bytewax") is not None:
        return __all__
    return [name for name in __all__ if not _HOME.get(name, "").startswith(("dataflow", "sinks"))]
