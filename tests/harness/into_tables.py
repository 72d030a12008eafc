"""A dataflow for tests: every table into a destination. Its environment says which, and names the faults it makes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import bytewax.operators as op
from bytewax.dataflow import Dataflow

import pgoutput_source.operators as cdc
from harness import faults
from pgoutput_source import PgOutputSource
from pgoutput_source.destinations.base import Job
from pgoutput_source.sinks.delta import DeltaSink
from pgoutput_source.sinks.postgres import PostgresSink

options: dict[str, Any] = {
    "mode": os.environ["MODE"],
    "spool": os.environ["SPOOL"],
    "max_age": timedelta(seconds=float(os.environ.get("MAX_AGE", "0"))),
    "key": json.loads(os.environ.get("KEY", "null")),
    "on_table_error": os.environ.get("ON_TABLE_ERROR", "stop"),
    "exclude": tuple(filter(None, os.environ.get("EXCLUDE", "").split(","))),
}

faults.install()
flow = Dataflow("into_tables")
changes = op.input("in", flow, PgOutputSource.from_env())
into = os.environ["INTO"]
kind, _, where = into.partition(":")
sink = DeltaSink(where, **options) if kind == "delta" else PostgresSink(into, **options)
if os.environ.get("TWICE"):
    apply = sink.destination.apply

    def twice(jobs: Iterable[Job]) -> None:
        for _ in range(2):
            apply(some := list(jobs))
            jobs = some

    sink.destination.apply = twice  # type: ignore[method-assign]
cdc.output("out", changes, sink)
