"""PostgreSQL change data capture for Python: pgoutput, columnar, as a Bytewax source.

The names here are loaded when they are first used: the reader, `peek` and the nouns work without Bytewax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pgoutput_source.changes import ChangeBatch, ChangeSet, Position, TableSchema
    from pgoutput_source.errors import PgOutputError
    from pgoutput_source.events import ChangeEvent
    from pgoutput_source.mirror import current
    from pgoutput_source.pypgoutput import LogicalReplicationReader
    from pgoutput_source.reader import PgOutputReader, peek
    from pgoutput_source.sinks.base import TwoPhaseSink
    from pgoutput_source.sinks.ipc import IpcSink
    from pgoutput_source.sinks.jsonl import JsonLinesSink
    from pgoutput_source.sinks.parquet import ParquetSink, read
    from pgoutput_source.source import PgOutputSource
    from pgoutput_source.wire import Lsn

__version__ = "0.1.0"

_HOME: Final = {
    "ChangeBatch": "changes",
    "ChangeEvent": "events",
    "ChangeSet": "changes",
    "IpcSink": "sinks.ipc",
    "JsonLinesSink": "sinks.jsonl",
    "LogicalReplicationReader": "pypgoutput",
    "Lsn": "wire",
    "ParquetSink": "sinks.parquet",
    "PgOutputError": "errors",
    "PgOutputReader": "reader",
    "PgOutputSource": "source",
    "Position": "changes",
    "TableSchema": "changes",
    "TwoPhaseSink": "sinks.base",
    "current": "mirror",
    "peek": "reader",
    "read": "sinks.parquet",
}

__all__ = [
    "ChangeBatch",
    "ChangeEvent",
    "ChangeSet",
    "IpcSink",
    "JsonLinesSink",
    "LogicalReplicationReader",
    "Lsn",
    "ParquetSink",
    "PgOutputError",
    "PgOutputReader",
    "PgOutputSource",
    "Position",
    "TableSchema",
    "TwoPhaseSink",
    "__version__",
    "current",
    "peek",
    "read",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
