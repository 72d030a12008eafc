"""A flow continues where a released version was killed: the same recovery store and folders, each change once.

``harness/releases`` has the wheels of the releases.
"""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from harness.database import Database
from harness.flow import ROOT, Flow
from harness.kept_state import EVERY
from harness.one_table import LOG, Row, Workload, ordered, plain

from pgoutput_source import current, read

RELEASES = sorted((ROOT / "tests/harness/releases").glob("*.whl"))


def positions(table: pa.Table) -> Counter[tuple[int, int]]:
    return Counter(zip(table["_commit_lsn"].to_pylist(), table["_seq"].to_pylist(), strict=True))


def rows(table: pa.Table) -> list[Row]:
    return ordered(tuple(plain(v) for n, v in row.items() if n[:1] != "_") for row in table.to_pylist())


@pytest.mark.parametrize("death", ["staged:1", "staged:4", "published:1", "published:4"])
@pytest.mark.parametrize("wheel", RELEASES, ids=lambda wheel: wheel.name.split("-")[1])
def test_a_flow_continues_where_a_release_was_killed(db: Database, tmp_path: Path, wheel: Path, death: str) -> None:
    connection = db.connect()
    connection.execute("SET timezone = 'UTC'; SET extra_float_digits = 3")
    workload = Workload(connection, "cdc", seed=8)
    connection.execute(LOG)
    flow = Flow(db, tmp_path, module="harness.kept_state", PGOUTPUT_PUBLICATION="p", PGOUTPUT_UNTIL="current")
    flow.environ["PGOUTPUT_MAX_FRAMES"] = "100"
    flow.out.mkdir()
    flow.cwd = tmp_path  # Bytewax imports from here first

    def work(first: int) -> None:
        for _ in range(20):
            workload.transaction(workload.random.choice([1, 2, 5, 20]))
        connection.execute(  # the fourth epoch ends within it
            "INSERT INTO t (id, part, status, amount) SELECT i, 0, 'many', i FROM generate_series(%s::int, %s) i",
            [first, first + 999],
        )

    work(10_000)
    process = flow.start("-s", "0", *flow.recovery(), PYTHONPATH=f"{wheel}:{ROOT / 'tests'}", DIE=death)
    _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, said
    assert f"died with {wheel}" in said
    assert list(flow.out.glob("ipc/_staging/*.arrows"))
    assert list(flow.out.glob("parquet/_staging/*"))
    work(20_000)
    flow.run("-s", "0", *flow.recovery())

    made = connection.execute("SELECT count(*) FROM log").fetchone()
    assert made is not None
    history = read(flow.out / "parquet").to_table()
    written = positions(history)
    assert sum(history["_op"].cast(pa.string()).to_pylist().count(op) for op in "IU") == made[0]
    assert set(written.values()) == {1}
    ipc = [pa.ipc.open_stream(file).read_all() for file in (flow.out / "ipc").glob("*.arrows")]
    assert sum(map(positions, ipc), Counter()) == written
    lines = [json.loads(line) for line in (flow.out / "lines.jsonl").read_text().splitlines()]
    assert {(line["_commit_lsn"], line["_seq"]) for line in lines} == written.keys()

    table = connection.execute("SELECT status, count(*), sum(amount), sum(big), max(day) FROM t GROUP BY status")
    assert rows(current(flow.out / "groups", key="status")) == ordered(table)
    kept = current(flow.out / "latest", key=("id", "part")).select(["id", "part", "status", "amount", "big", "note"])
    assert rows(kept) == ordered(connection.execute("SELECT id, part, status, amount, big, note FROM t"))
    spans = connection.execute(
        """SELECT start, start + %(every)s, status, count(*), sum(amount)
           FROM (
               SELECT *, date_bin(%(every)s, pg_xact_commit_timestamp(xid::xid), '2000-01-03 00:00+00') start FROM log
           ) log
           GROUP BY start, status""",
        {"every": EVERY},
    )
    assert rows(read(flow.out / "windows").to_table()) == ordered(spans)
