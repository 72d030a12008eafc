"""Aggregate, latest and window in one flow that is killed again and again: in the end each says what SQL says."""

from __future__ import annotations

import random
import signal
import threading
import time
from pathlib import Path
from typing import Any, Self

import pytest
from harness.database import Database
from harness.flow import Flow, following, wait_for
from harness.measured import EVERY
from harness.one_table import LOG, Row, Workload, at, ordered, plain

from pgoutput_source.changes.schema import Position
from pgoutput_source.parquet.current import current
from pgoutput_source.parquet.read import read
from pgoutput_source.protocol.wire import Lsn

GROUPS = "SELECT status, count(*), sum(amount), sum(big), min(score), min(day), max(amount), avg(big)::float8"
WINDOWS = """
    SELECT start, start + %(every)s AS end, status, count(*), sum(amount), sum(big), max(day)
    FROM (SELECT *, date_bin(%(every)s, pg_xact_commit_timestamp(xid::xid), '2000-01-03 00:00+00') start FROM log) log
    GROUP BY start, status
"""


class Busy(Workload):
    """A workload that goes on in a thread until it is stopped."""

    def __enter__(self) -> Self:
        self.transactions = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        return self

    def _work(self) -> None:
        while not self.stopped.wait(0.02):
            self.transaction(self.random.choice([1, 1, 2, 5, 20]))
            self.transactions += 1

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()


def rows(table: Any) -> list[Row]:
    return ordered(tuple(plain(v) for n, v in row.items() if n[:1] != "_") for row in table.to_pylist())


@pytest.mark.slow
def test_killed_again_and_again_on_one_worker_or_two_they_equal_sql(db: Database, tmp_path: Path) -> None:
    rng = random.Random(5)
    flow = Flow(db, tmp_path, module="harness.measured", PGOUTPUT_PUBLICATION="p")
    connection = db.connect()
    workload = Busy(connection, "cdc", seed=5)
    connection.execute(LOG)
    with workload:
        for workers in ("1", "2", "1", "2", "2"):
            process = flow.start("-s", rng.choice(["0", "1"]), "-w", workers, *flow.recovery())
            with following(process) as lines:
                wait_for(lines, "streaming from", process)
                time.sleep(rng.uniform(0.3, 1.5))
                process.send_signal(signal.SIGKILL)
    flow.run("-s", "1", "-w", "2", *flow.recovery(), PGOUTPUT_UNTIL="current")

    assert workload.transactions > 100
    connection.execute("SET timezone = 'UTC'; SET extra_float_digits = 3")
    answer = connection.execute(f"{GROUPS} FROM t GROUP BY status").fetchall()
    results = read(flow.out / "groups").to_table().sort_by([("_commit_lsn", "ascending"), ("_seq", "ascending")])
    assert at(Position(Lsn(2**63), 0), results.to_batches(), ["status"]) == ordered(answer)
    assert rows(current(flow.out / "groups", key="status")) == ordered(answer)
    free = 5  # a numeric without bounds, which comes as text
    table = [(*row[:free], row[free] and str(row[free]), *row[free + 1 :]) for row in connection.execute("TABLE t")]
    assert rows(current(flow.out / "latest", key=("id", "part"))) == ordered(table)
    answer = connection.execute(WINDOWS, {"every": EVERY}).fetchall()
    assert len(answer) > 20
    assert rows(read(flow.out / "windows").to_table()) == ordered(answer)
    assert not list((flow.out / "late").glob("*.parquet"))
