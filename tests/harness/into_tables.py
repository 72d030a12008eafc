"""A dataflow for tests: every table into a destination. Its environment says which, and names the faults it makes."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import bytewax.operators as op
from bytewax.dataflow import Dataflow

import pgoutput_source.operators as cdc
from harness import faults
from pgoutput_source import PgOutputSource, sinks
from pgoutput_source.destinations.base import Job
from pgoutput_source.sinks.tables import TableSink

options: dict[str, Any] = {
    "mode": os.environ["MODE"],
    "spool": os.environ["SPOOL"],
    "max_age": timedelta(seconds=float(os.environ.get("MAX_AGE", "0"))),
    **({"key": json.loads(os.environ["KEY"])} if "KEY" in os.environ else {}),
    "on_table_error": os.environ.get("ON_TABLE_ERROR", "stop"),
    "exclude": tuple(filter(None, os.environ.get("EXCLUDE", "").split(","))),
    **json.loads(os.environ.get("OPTIONS", "{}")),
}

faults.install()
flow = Dataflow("into_tables")
changes = op.input("in", flow, PgOutputSource.from_env())
into = os.environ["INTO"]
kind, _, where = into.partition(":")
by_kind: dict[str, Callable[..., TableSink]] = {
    "delta": sinks.DeltaSink,
    "duckdb": sinks.DuckDBSink,
    "iceberg": sinks.IcebergSink,
    "postgres": sinks.PostgresSink,
}
if kind not in by_kind:  # libpq's own ways to write it
    kind, where = "postgres", into
sink = by_kind[kind](where, **options)
apply = sink.destination.apply
if os.environ.get("TWICE"):

    def twice(jobs: Iterable[Job]) -> None:
        for _ in range(2):
            apply(some := list(jobs))
            jobs = some

    sink.destination.apply = twice  # type: ignore[method-assign]
if within := os.environ.get("KILL_WITHIN"):  # seconds after the destination began to apply something
    seconds = float(within)

    def dying(jobs: Iterable[Job]) -> None:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        apply(jobs)

    sink.destination.apply = dying  # type: ignore[method-assign]
cdc.output("out", changes, sink)
