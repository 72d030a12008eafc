"""A destination that is slower than the source: what waits for it is bounded, and the connection lives on."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import bytewax.operators as op
import pytest
from bytewax.dataflow import Dataflow
from harness.database import Database
from harness.flow import publish

import pgoutput_source.operators as cdc
from pgoutput_source import PgOutputSource, run
from pgoutput_source.dataflow.gate import Gate
from pgoutput_source.destinations.base import Destination, Job, Reached
from pgoutput_source.destinations.targets import Target, Targets
from pgoutput_source.sinks import tables
from pgoutput_source.sinks.tables import TableSink

FULL = 100_000


class Slow(Destination):
    """Counts rows, slowly, and looks at how much waits meanwhile."""

    mode = "history"

    def __init__(self) -> None:
        self.rows = self.most = 0
        self.sink: TableSink | None = None

    def reached(self, target: Target) -> Reached | None:
        return None

    def apply(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self.rows += len(job.changes)
            time.sleep(0.05)
            assert self.sink is not None
            assert self.sink._spool is not None
            self.most = max(self.most, self.sink._spool.size())


def drained(db: Database, folder: Path) -> Slow:
    destination = Slow()
    destination.sink = TableSink(destination, Targets(), spool=folder / "spool")
    flow = Dataflow("slow")
    source = PgOutputSource(db.dsn, slot="cdc", publication="cdc", until="current", max_frames=200)
    changes = op.input("in", flow, source)
    cdc.output("out", changes, destination.sink)
    run(flow, recovery=folder / "store", epoch=timedelta(0))
    return destination


@pytest.mark.parametrize("held", [True, False], ids=["held", "control: not held"])
def test_sources_wait_for_a_slow_destination(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    publish(db)
    with db.connect() as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY, note text)")
        connection.execute("INSERT INTO t SELECT i, md5(i::text) || md5((-i)::text) FROM generate_series(1, 15000) i")
    # One job an epoch, so that the destination is slow for each.
    monkeypatch.setattr(tables, "MOST_BYTES", 1)
    monkeypatch.setattr(tables, "_FULL", FULL)
    if not held:
        monkeypatch.setattr(Gate, "hold", lambda gate, sink: None)

    destination = drained(db, tmp_path)

    assert destination.rows == 15_000
    assert (destination.most < 2 * FULL) is held, destination.most
