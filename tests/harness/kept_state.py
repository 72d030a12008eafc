"""A dataflow for tests that two versions of the package run: each sink and each operator that keeps something.

It imports only what `pgoutput_source` has always exported. `DIE` is the moment at which the process kills itself:
"staged:3" once the third epoch with rows is staged, "published:3" before it is published.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import bytewax.operators as op
from bytewax.dataflow import Dataflow

import pgoutput_source
import pgoutput_source.operators as cdc
from pgoutput_source import IpcSink, JsonLinesSink, ParquetSink, PgOutputSource

OUT = Path(os.environ.get("PGOUTPUT_OUT", "out"))
EVERY = timedelta(milliseconds=200)
_moment, _, _number = os.environ.get("DIE", "").partition(":")


class Mortal(IpcSink):
    """An `IpcSink` whose process dies."""

    left = int(_number or 0)

    def stage(self, token: str, items: list[Any]) -> None:
        super().stage(token, items)
        self.passed("staged")

    def publish(self, token: str) -> None:
        self.passed("published")
        super().publish(token)

    def passed(self, moment: str) -> None:
        if moment == _moment:
            Mortal.left -= 1
            if Mortal.left == 0:
                print(f"died with {pgoutput_source.__file__}", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)


flow = Dataflow("kept_state")
rows = cdc.table("rows", op.input("in", flow, PgOutputSource.from_env()), "public.t")
cdc.output("parquet", rows, ParquetSink(OUT / "parquet"))
cdc.output("ipc", rows, Mortal(OUT / "ipc"))
cdc.output("lines", rows, JsonLinesSink(OUT / "lines.jsonl"))
groups = cdc.aggregate("groups", rows, by="status", count=True, sum=["amount", "big"], max="day")
cdc.output("groups_out", groups, ParquetSink(OUT / "groups"))
cdc.output("latest_out", cdc.latest("latest", rows, key=("id", "part")), ParquetSink(OUT / "latest"))
windows = cdc.window("windows", rows, every=EVERY, by="status", count=True, sum="amount")
cdc.output("windows_out", windows, ParquetSink(OUT / "windows"))
