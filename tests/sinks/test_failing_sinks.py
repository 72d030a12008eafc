"""A full disk, a sink that raises or hangs: nothing is acknowledged that is not safe, and the next start goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.database import Database
from harness.flow import Flow, confirmed, publish
from harness.workload import Workload, differences, replayed, tables
from psycopg.conninfo import make_conninfo

SMALL = {"PGOUTPUT_MAX_FRAMES": "1000", "MAX_AGE": "0", "PGOUTPUT_UNTIL": "current"}
FULL = {"FILE_SIZE": str(100_000)}
SPILLING = {"PGOUTPUT_STREAMING": "on", "PGOUTPUT_STREAMING_MEMORY": "0"}


@pytest.mark.parametrize(
    ("environ", "error"),
    [(FULL, "SinkError"), (FULL | SPILLING, "SpillError"), ({"BREAK": "raise"}, "the sink has had enough")],
    ids=["full disk", "full disk for transactions in progress", "exception"],
)
def test_a_sink_that_fails(db: Database, tmp_path: Path, environ: dict[str, str], error: str) -> None:
    publish(db)
    flow = Flow(db, tmp_path, **SMALL)
    flow.environ["PGOUTPUT_DSN"] = make_conninfo(db.dsn, options="-c logical_decoding_work_mem=64kB")
    with Workload(db.dsn, seed=20, tables=2, largest=300) as workload:
        workload.run(1_000)
        workload.largest = 5_000
        workload.run(10_000)
        # In one epoch, so that nothing of it may be acknowledged.
        before = confirmed(db)
        failed = flow.start("-s", "3", *flow.recovery(), **environ)
        _, said = failed.communicate(timeout=120)

        assert failed.returncode == 1
        assert error in said
        assert confirmed(db) == before
        assert not list(flow.out.glob("*.parquet"))

        flow.run("-s", "1", *flow.recovery())
        found, _ = replayed(flow.out)

        assert differences(found, tables(workload)) == []


def test_a_full_disk_is_named_with_a_remedy(db: Database, tmp_path: Path) -> None:
    publish(db)
    flow = Flow(db, tmp_path, **SMALL)
    with Workload(db.dsn, seed=20, tables=2, largest=5_000) as workload:
        workload.run(10_000)
        failed = flow.start("-s", "3", **FULL)
        _, said = failed.communicate(timeout=120)

    assert "File too large" in said
    assert "make room" in said
    assert "Traceback" not in said


def test_a_sink_that_hangs_for_longer_than_wal_sender_timeout(db: Database, tmp_path: Path) -> None:
    publish(db)
    flow = Flow(db, tmp_path, **SMALL)
    flow.environ["PGOUTPUT_DSN"] = make_conninfo(db.dsn, options="-c wal_sender_timeout=1500")
    with Workload(db.dsn, seed=21, tables=2, largest=300) as workload:
        workload.run(10_000)
        said = flow.run("-s", "1", *flow.recovery(), BREAK="stall")

        found, _ = replayed(flow.out)

        assert "connected again" not in said
        assert differences(found, tables(workload)) == []
