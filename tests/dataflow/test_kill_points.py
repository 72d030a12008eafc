"""A flow that dies at a named place goes on at its next start as if nothing had been, and mistakes are noticed."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from harness.database import Database
from harness.faults import LARGE, PLACES, STREAMED
from harness.flow import Flow, publish
from harness.workload import Workload, differences, replayed, tables
from psycopg.conninfo import make_conninfo

# Pieces of a thousand messages, so that transactions are cut; every epoch is published by itself.
SMALL = {"PGOUTPUT_MAX_FRAMES": "1000", "MAX_AGE": "0", "PGOUTPUT_UNTIL": "current"}

CELLS = [(place, "1", "off") for place in PLACES if place not in STREAMED]
# Threads make a difference to who knows of an epoch, and streaming to what a large transaction is.
CELLS += [(place, "2", "off") for place in PLACES if place.startswith(("epoch", "in a large"))]
CELLS += [(place, "1", "on") for place in STREAMED]
CELLS += [(place, "2", "parallel") for place in (*LARGE, "mid-spill")]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "workers", "streaming"), CELLS)
def test_a_death_loses_and_repeats_nothing(
    db: Database, tmp_path: Path, place: str, workers: str, streaming: str
) -> None:
    publish(db)
    flow = Flow(db, tmp_path, **SMALL)
    if streaming != "off":
        flow.environ |= {"PGOUTPUT_STREAMING": streaming, "PGOUTPUT_STREAMING_MEMORY": "100000"}
        # A piece of a streamed transaction is so many bytes, whatever the number of its messages.
        flow.environ["PGOUTPUT_MAX_BYTES"] = "200000"
        flow.environ["PGOUTPUT_DSN"] = make_conninfo(db.dsn, options="-c logical_decoding_work_mem=64kB")
    with Workload(db.dsn, seed=7, tables=3, largest=300) as workload:
        workload.run(1_000)
        if place.startswith("start"):
            flow.run("-s", "0", *flow.recovery())  # so that there is a state to start from
        workload.largest = 8_000
        workload.run(8_000)
        workload.largest = 300
        workload.run(500)
        passes = 1 if place.startswith("start") else 2 if place in LARGE + STREAMED else 3

        died = flow.start("-s", "0", "-w", workers, *flow.recovery(), KILL_AT=f"{place}:{passes}")
        _, said = died.communicate(timeout=120)
        assert died.returncode == -signal.SIGKILL, said
        workload.run(500)
        flow.run("-s", "0", *flow.recovery())

        found, count = replayed(flow.out)

        assert differences(found, tables(workload)) == []
        assert count > 9_000


def died_by_mistake(db: Database, flow: Flow, workload: Workload, mistake: str, place: str) -> subprocess.Popen[str]:
    """The run after one that made a mistake and died; it makes the same."""
    flow.environ["BREAK"] = mistake
    workload.run(1_000)
    workload.largest = 8_000
    workload.run(8_000)
    died = flow.start("-s", "0", *flow.recovery(), KILL_AT=f"{place}:3")
    _, said = died.communicate(timeout=120)
    assert died.returncode == -signal.SIGKILL, said
    return flow.start("-s", "0", *flow.recovery())


def test_forgetting_what_was_given_out_would_be_noticed(db: Database, tmp_path: Path) -> None:
    publish(db)
    flow = Flow(db, tmp_path, **SMALL)
    with Workload(db.dsn, seed=8, tables=3, largest=300) as workload:
        again = died_by_mistake(db, flow, workload, "forget", "in a large transaction")
        _, said = again.communicate(timeout=120)
        assert again.returncode == 0, said

        with pytest.raises(AssertionError, match="a change came twice"):
            replayed(flow.out)


def test_publishing_before_the_epoch_is_durable_would_be_noticed(db: Database, tmp_path: Path) -> None:
    publish(db)
    flow = Flow(db, tmp_path, **SMALL)
    with Workload(db.dsn, seed=8, tables=3, largest=300) as workload:
        again = died_by_mistake(db, flow, workload, "publish early", "after staging")
        _, said = again.communicate(timeout=120)

        assert again.returncode == 1
        assert "is ahead of the recovery folder" in said
