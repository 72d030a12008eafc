"""States of an epoch that never became durable stay in Bytewax's recovery store, and would be loaded later.

A process dies after it has written an epoch's states, and before it has written that the epoch is over. The next one
does this epoch again. A key that gets nothing in it leaves its old state where it is; once the epoch is over, that is
the key's last state before the next.
"""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import psycopg
import pyarrow as pa
import pytest
from bytewax.recovery import init_db_dir
from harness.database import Database
from harness.flow import Flow, publish
from harness.sqlite_sink import SqliteSink, orders
from harness.workload import Workload, differences, replayed, tables

from pgoutput_source.dataflow.recovery import drop_void
from pgoutput_source.errors import StateError

SMALL = {"PGOUTPUT_MAX_FRAMES": "1000", "MAX_AGE": "0"}
# Without backups nothing old is removed from the store, as if the process had died before it came to that.
EPOCHS = ("-s", "0", "-b", "60")
# As it is where no process has all parts of the store. What is left are the sinks' own precautions.
KEPT = {"BREAK": "keep void states"}


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


@pytest.mark.parametrize(
    ("environ", "second"),
    [({}, "before the next epoch:1"), (KEPT, "before the next epoch:1"), (KEPT, "staged")],
    ids=["dropped", "kept, nothing staged", "kept, staged again"],
)
@pytest.mark.parametrize(
    ("module", "staged"), [("all_tables", "after staging:1"), ("every_sink", "a sink behind staging:1")]
)
def test_a_sink_writes_once_what_an_epoch_wrote_that_never_was(
    db: Database, tmp_path: Path, module: str, staged: str, environ: dict[str, str], second: str
) -> None:
    publish(db)
    flow = Flow(db, tmp_path, module=f"harness.{module}", **SMALL, **environ)
    recovery = Path(flow.recovery()[1])
    with Workload(db.dsn, seed=9, tables=3, largest=3_000) as workload:
        workload.run(10_000)
        died(flow, recovery, "epoch durable, nothing committed:3")
        void_last_epoch(recovery)
        # The first epoch of the next process is over before anything has come from the server.
        died(flow, recovery, staged if second == "staged" else second, LATE="1")
        flow.run(*EPOCHS, "-r", str(recovery), PGOUTPUT_UNTIL="current")
        expected = tables(workload)

    if module == "all_tables":
        assert differences(replayed(flow.out)[0], expected) == []
        return
    ids: list[int] = []
    positions: Counter[tuple[int, int]] = Counter()
    for file in (flow.out / "ipc").glob("*.arrows"):
        table = pa.ipc.open_stream(file).read_all()
        ids += table["id"].to_pylist()
        positions.update(zip(table["_commit_lsn"].to_pylist(), table["_seq"].to_pylist(), strict=True))
    assert set(positions.values()) == {1}
    assert len(positions) >= workload.changes
    assert Counter(orders(SqliteSink(flow.out / "sqlite.db"))) == Counter(i for i in ids if i is not None)


def counted(db: Database, tmp_path: Path, **environ: str) -> tuple[dict[str, int], dict[str, int]]:
    """What a stateful step counted, and what there was."""
    publish(db)
    with psycopg.connect(db.dsn, autocommit=True) as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
        for first in range(0, 10_000, 500):
            connection.execute(f"INSERT INTO t SELECT generate_series({first}, {first + 499})".encode())
    flow = Flow(db, tmp_path, module="harness.counted", **SMALL, **environ)
    flow.out.mkdir()
    recovery = Path(flow.recovery()[1])
    died(flow, recovery, "epoch durable, nothing committed:3")
    void_last_epoch(recovery)
    died(flow, recovery, "before the next epoch:1", LATE="1")
    flow.run(*EPOCHS, "-r", str(recovery), PGOUTPUT_UNTIL="current")
    found: Counter[str] = Counter()
    for line in (flow.out / "counts.jsonl").read_text().splitlines():
        row = json.loads(line)
        found[row["table"]] = max(found[row["table"]], row["count"])
    return dict(found), {"public.t": 10_000}


def test_a_stateful_step_counts_once_what_came_in_an_epoch_that_never_was(db: Database, tmp_path: Path) -> None:
    found, made = counted(db, tmp_path)

    assert found == made


def test_a_stateful_step_would_count_it_twice(db: Database, tmp_path: Path) -> None:
    found, made = counted(db, tmp_path, **KEPT)

    assert found["public.t"] > made["public.t"]


def test_only_a_store_that_is_whole_and_that_nobody_uses_loses_states(tmp_path: Path) -> None:
    init_db_dir(tmp_path, 2)  # type: ignore[no-untyped-call]
    with closing(sqlite3.connect(tmp_path / "part-1.sqlite3")) as store, store:
        store.execute("INSERT INTO exs (ex_num, worker_count, resume_epoch) VALUES (0, 2, 1)")
        store.execute("INSERT INTO fronts (ex_num, worker_index, worker_frontier) VALUES (0, 0, 8), (0, 1, 7)")
        rows = [("flow.out", "parquet", epoch) for epoch in (5, 6, 7, 8)]
        store.executemany("INSERT INTO snaps (step_id, state_key, snap_epoch) VALUES (?, ?, ?)", rows)

    look = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT * FROM exs'); print(flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{look}; input()", tmp_path / "part-1.sqlite3"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert drop_void(tmp_path) == 0
        other.kill()
    away = (tmp_path / "part-0.sqlite3").rename(tmp_path / "elsewhere")
    assert drop_void(tmp_path) == 0
    away.rename(tmp_path / "part-0.sqlite3")
    assert drop_void(tmp_path) == 2
    assert drop_void(tmp_path) == 0

    with closing(sqlite3.connect(tmp_path / "part-1.sqlite3")) as store:
        assert store.execute("SELECT snap_epoch FROM snaps ORDER BY 1").fetchall() == [(5,), (6,)]
    (tmp_path / "part-0.sqlite3").write_bytes(b"nothing of SQLite's")
    with pytest.raises(StateError, match=r"part-0\.sqlite3 can't be used"):
        drop_void(tmp_path)
