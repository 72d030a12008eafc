"""The initial copy in a dataflow that dies and a server that crashes: what the files say, replayed, is the tables."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from harness.database import SETTINGS, Database
from harness.flow import Busy, Flow, following, publish, wait_for
from harness.workload import Workload, differences, replayed, tables

from pgoutput_source.embedded import Server


def copied(flow: Flow) -> int:
    """How many rows of the files were read by the copy."""
    return sum(
        pq.read_table(file, columns=["_op"])["_op"].to_pylist().count("R") for file in flow.out.glob("*.parquet")
    )


def test_files_replayed_equal_the_tables(any_db: Database, tmp_path: Path) -> None:
    flow = Flow(any_db, tmp_path, PGOUTPUT_SNAPSHOT="initial", PGOUTPUT_UNTIL="current", CHUNK_ROWS="200")
    with Workload(any_db.dsn, seed=any_db.server.major, tables=6, largest=1000, recreates=False) as workload:
        workload.run(3_000)
        publish(any_db)
        workload.run(1_000)
        flow.run("-s", "0", *flow.recovery())
        before = copied(flow)
        workload.run(1_000)
        flow.run("-s", "0", *flow.recovery())

        found, _ = replayed(flow.out)

        assert differences(found, tables(workload)) == []
        assert copied(flow) == before > 0


@pytest.mark.slow
def test_kill_9_of_flow_and_server_in_the_midst_of_the_copy(tmp_path: Path) -> None:
    rng = random.Random(12)
    with Server(settings=SETTINGS) as server:
        db = Database(server)
        flow = Flow(db, tmp_path, PGOUTPUT_SNAPSHOT="initial", CHUNK_ROWS="1000")
        with Busy(db.dsn, seed=12, tables=6, largest=500, recreates=False) as workload:
            time.sleep(2)
            publish(db)
            for turn in range(8):
                process = flow.start("-s", rng.choice(["1", "0"]), *flow.recovery())
                with following(process) as lines:
                    wait_for(lines, "streaming from", process)
                    time.sleep(rng.uniform(0, 1.5))
                    if turn in (2, 5):
                        workload.stop()
                        server.halt("kill")
                        server.start(60)
                        workload.again(db.dsn)
                        time.sleep(1)
                    process.send_signal(signal.SIGKILL)
            workload.stop()
            flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")

            found, _ = replayed(flow.out)

            assert copied(flow) > 0
            assert differences(found, tables(workload)) == []
        db.close()
