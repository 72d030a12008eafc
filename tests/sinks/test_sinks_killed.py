"""The sinks beside Parquet on the real path: a flow that is killed again and again writes what the tables hold."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness.database import Database
from harness.faults import SINK_PLACES, slow_fsyncs
from harness.flow import Busy, Flow, following, publish, wait_for
from harness.sqlite_sink import SqliteSink, orders
from harness.workload import differences, replayed, tables
from psycopg.conninfo import make_conninfo


@pytest.mark.slow
def test_kill_9_loses_nothing_and_doubles_only_lines(db: Database, tmp_path: Path) -> None:
    rng = random.Random(3)
    flow = Flow(db, tmp_path, module="harness.every_sink", PGOUTPUT_STREAMING_MEMORY="100000")
    flow.environ["PGOUTPUT_DSN"] = make_conninfo(db.dsn, options="-c logical_decoding_work_mem=64kB")
    publish(db)
    with Busy(db.dsn, seed=3, tables=6, largest=1_000) as workload:
        for place in ["", "", *SINK_PLACES]:
            environ = {"PGOUTPUT_STREAMING": rng.choice(["off", "parallel"])}
            environ |= {"KILL_AT": f"{place}:{rng.randint(2, 5)}"} if place else {}
            environ |= slow_fsyncs(tmp_path, 0.5) if rng.random() < 0.3 else {}
            process = flow.start("-s", rng.choice(["0", "1"]), *flow.recovery(), **environ)
            with following(process) as lines:
                if place:
                    assert process.wait(60) == -signal.SIGKILL, "".join(lines)
                    continue
                if rng.random() < 0.8:
                    wait_for(lines, "streaming from", process)
                time.sleep(rng.uniform(0, 2))
                process.send_signal(signal.SIGKILL)
        workload.stop()
        flow.run("-s", "1", *flow.recovery(), PGOUTPUT_UNTIL="current")
        expected = tables(workload)

    folder = tmp_path / "parquet"
    folder.mkdir()
    ids: list[int] = []
    positions: Counter[tuple[int, int]] = Counter()
    for file in (flow.out / "ipc").glob("*.arrows"):
        table = pa.ipc.open_stream(file).read_all()
        pq.write_table(table, folder / f"{file.stem}.parquet")
        ids += table["id"].to_pylist()
        positions.update(zip(table["_commit_lsn"].to_pylist(), table["_seq"].to_pylist(), strict=True))
    rows = [json.loads(line) for line in (flow.out / "lines.jsonl").read_text().splitlines()]
    lines_positions = Counter((row["_commit_lsn"], row["_seq"]) for row in rows)

    found, count = replayed(folder)

    assert differences(found, expected) == []
    assert count > 3_000
    assert Counter(orders(SqliteSink(flow.out / "sqlite.db"))) == Counter(id for id in ids if id is not None)
    assert lines_positions.keys() == positions.keys()
    assert lines_positions.total() > positions.total(), "no crash came between a line and its epoch"
