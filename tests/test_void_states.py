"""States of an epoch that never became durable stay in Bytewax's recovery store, and may be loaded later.

A process dies after it has written an epoch's states, and before it has written that the epoch is over. The next one
does this epoch again. A part of a sink that gets nothing in it leaves its old state where it is; once the epoch is
over, that is the last state of the part before the next. What it lists was discarded long ago, and comes again.
"""

from __future__ import annotations

import signal
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import Database
from test_flow import Flow, publish
from test_sinks import SqliteSink, orders
from workload import Workload, differences, replayed, tables

SMALL = {"PGOUTPUT_MAX_FRAMES": "1000", "MAX_AGE": "0"}
# Without backups nothing old is removed from the store, as if the process had died before it came to that.
EPOCHS = ("-s", "0", "-b", "60")


def died(flow: Flow, recovery: Path, place: str, **environ: str) -> None:
    process = flow.start(*EPOCHS, "-r", str(recovery), KILL_AT=place, **environ)
    _, said = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, said


def void_last_epoch(recovery: Path) -> None:
    """As if the last process had died between the states of its last epoch and the end of that epoch."""
    with closing(sqlite3.connect(recovery / "part-0.sqlite3")) as store, store:
        done = store.execute(
            "UPDATE fronts SET worker_frontier = worker_frontier - 1 WHERE ex_num = (SELECT max(ex_num) FROM exs)"
        )
        assert done.rowcount == 1


STAGED = {"all_tables": "after staging:1", "every_sink": "a sink behind staging:1"}


@pytest.mark.parametrize("again", [False, True], ids=["nothing staged", "staged again"])
@pytest.mark.parametrize("module", ["all_tables", "every_sink"])
def test_a_state_of_an_epoch_that_never_was_is_not_taken_for_one(
    db: Database, tmp_path: Path, module: str, again: bool
) -> None:
    publish(db)
    flow = Flow(db, tmp_path, module=f"tests.{module}", **SMALL)
    recovery = Path(flow.recovery()[1])
    with Workload(db.dsn, seed=9, tables=3, largest=3_000) as workload:
        workload.run(10_000)
        died(flow, recovery, "epoch durable, nothing committed:3")
        void_last_epoch(recovery)
        # The first epoch of the next process is over before anything has come from the server.
        died(flow, recovery, STAGED[module] if again else "before the next epoch:1")
        flow.run(*EPOCHS, "-r", str(recovery), PGOUTPUT_UNTIL="current")
        expected = tables(workload)

    if module == "all_tables":
        assert differences(replayed(flow.out)[0], expected) == []
    else:
        ids: list[int] = []
        positions: Counter[tuple[int, int]] = Counter()
        for file in (flow.out / "ipc").glob("*.arrows"):
            table = pa.ipc.open_stream(file).read_all()
            ids += table["id"].to_pylist()
            positions.update(zip(table["_commit_lsn"].to_pylist(), table["_seq"].to_pylist(), strict=True))
        assert set(positions.values()) == {1}
        assert len(positions) >= workload.changes
        assert Counter(orders(SqliteSink(flow.out / "sqlite.db"))) == Counter(i for i in ids if i is not None)
