"""The initial copy in a dataflow that dies and a server that crashes: what the files say, replayed, is the tables."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from harness.database import SETTINGS, Database
from harness.flow import Busy, Flow, failure, following, publish, wait_for
from harness.waiting import until
from harness.workload import Workload, differences, replayed, tables

from pgoutput_source import current
from pgoutput_source.embedded import MAJORS, Server

KILLS = int(os.environ.get("COPY_KILLS", "5"))


def copied(flow: Flow) -> Counter[str]:
    """How many rows of the files were read by the copy, by relation."""
    found: Counter[str] = Counter()
    for file in flow.out.glob("*.parquet"):
        table = pq.read_table(file, columns=["_op"])
        found[table.schema.metadata[b"pg.relation_id"].decode()] += table["_op"].to_pylist().count("R")
    return +found


def test_files_replayed_equal_the_tables(any_db: Database, tmp_path: Path) -> None:
    flow = Flow(any_db, tmp_path, PGOUTPUT_SNAPSHOT="initial", PGOUTPUT_UNTIL="current", CHUNK_ROWS="200")
    with Workload(any_db.dsn, seed=any_db.server.major, tables=6, largest=1000) as workload:
        workload.run(3_000)
        publish(any_db)
        workload.run(1_000)
        flow.run("-s", "0", *flow.recovery())
        before = copied(flow)
        workload.run(1_000)
        flow.run("-s", "0", *flow.recovery())

        found, _ = replayed(flow.out)

        assert differences(found, tables(workload)) == []
        after = copied(flow)
        assert before
        assert {relation: after[relation] for relation in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("major", [min(MAJORS), max(MAJORS)])
def test_kill_9_of_flow_and_server_in_the_midst_of_the_copy(major: int, tmp_path: Path) -> None:
    rng = random.Random(major)
    with Server(major, settings=SETTINGS) as server:
        db = Database(server)
        flow = Flow(db, tmp_path, PGOUTPUT_SNAPSHOT="initial", CHUNK_ROWS="500")
        with Busy(db.dsn, seed=major, tables=6, largest=500) as workload:
            workload.stop()
            workload.run(10_000)
            publish(db)
            workload.again(db.dsn)
            for turn in range(KILLS):
                process = flow.start("-s", rng.choice(["1", "0"]), *flow.recovery())
                with following(process) as lines:
                    wait_for(lines, "streaming from", process)
                    time.sleep(rng.uniform(0, 1.5))
                    if turn % 3 == 1:
                        workload.stop()
                        server.halt("kill")
                        server.start(60)
                        workload.again(db.dsn)
                        time.sleep(rng.uniform(0, 1))
                    process.send_signal(signal.SIGKILL)
            workload.stop()
            flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")

            found, _ = replayed(flow.out)

            assert copied(flow)
            assert differences(found, tables(workload)) == []
        db.close()


def test_a_run_that_only_copies_ends_and_leaves_no_slot(db: Database, tmp_path: Path) -> None:
    flow = Flow(db, tmp_path, PGOUTPUT_SNAPSHOT="only", CHUNK_ROWS="50")
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        c.execute("INSERT INTO t SELECT n, 'there' FROM generate_series(1, 20000) AS n")
        c.execute("CREATE PUBLICATION cdc FOR ALL TABLES")

        process = flow.start("-s", "0", *flow.recovery())
        with following(process) as lines:
            wait_for(lines, "streaming from", process)
            until(lambda: list(flow.out.glob("*.parquet")), lines)
            c.execute("DELETE FROM t WHERE id <= 10")
            process.kill()
        flow.run("-s", "0", *flow.recovery())
        flow.run("-s", "0", *flow.recovery())  # nothing is left to do

        rows = current(flow.out, key="id")
        assert rows.num_rows == 19_990
        assert set(rows["_op"].to_pylist()) == {"R"}
        assert c.execute("SELECT slot_name FROM pg_replication_slots WHERE database = %s", [db.name]).fetchall() == []
    said, code = failure(flow, *flow.recovery(), PGOUTPUT_SNAPSHOT="initial")
    assert code == 1
    assert "had snapshot='only'" in said


def test_a_signal_stops_the_copy_at_once_and_the_next_run_continues_it(db: Database, tmp_path: Path) -> None:
    flow = Flow(db, tmp_path, PGOUTPUT_SNAPSHOT="initial", PGOUTPUT_SNAPSHOT_ROWS_PER_SECOND="100", MAX_AGE="0.01")
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY)")
        c.execute("INSERT INTO t SELECT generate_series(1, 300)")
        c.execute("CREATE TABLE whole (id int)")
        c.execute("INSERT INTO whole SELECT generate_series(1, 12000)")
    publish(db)
    for table in ("public.t", "public.whole"):  # in the midst of a table with a key, and of one without
        process = flow.start("-s", "0", *flow.recovery())
        with following(process) as lines:
            until(lambda table=table: read(flow, table), lines)  # type: ignore[misc]
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, lines  # the rest of the copy would take two minutes
    flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current", PGOUTPUT_SNAPSHOT_ROWS_PER_SECOND="")

    assert read(flow, "public.t") == 300
    found, _ = replayed(flow.out)
    assert {name: sum(rows.values()) for name, rows in found.items()} == {"public.t": 300, "public.whole": 12_000}


def read(flow: Flow, table: str) -> int:
    """How many rows of a table the files have from the copy."""
    schemas = {file: pq.read_schema(file) for file in flow.out.glob("*.parquet")}
    mine = [file for file, schema in schemas.items() if (schema.metadata or {})[b"pg.table"].decode() == table]
    return sum(pq.read_table(file, columns=["_op"])["_op"].to_pylist().count("R") for file in mine)
