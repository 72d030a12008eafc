"""What a killed run left staged: a step without a state publishes what won't come again, and a loss is an error."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import psycopg
import pyarrow as pa
import pytest
from harness.database import Database
from harness.flow import Flow, publish
from harness.sqlite_sink import SqliteSink, orders

from pgoutput_source import TwoPhaseSink, read
from pgoutput_source.dataflow.gate import MAX_RUNS
from pgoutput_source.dataflow.run import gate
from pgoutput_source.errors import SinkError

ROWS = 2_000
EPOCHS = ("-s", "0", "-b", "0")


@pytest.fixture
def flow(db: Database, tmp_path: Path) -> Flow:
    """Its first three epochs that bring something hold 300 rows each."""
    publish(db)
    with psycopg.connect(db.dsn, autocommit=True) as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
        connection.execute(f"INSERT INTO t SELECT generate_series(1, {ROWS})".encode())
    return Flow(db, tmp_path, module="harness.every_sink", PGOUTPUT_MAX_FRAMES="300", PARQUET="1")


def died(flow: Flow, place: str, **environ: str) -> None:
    process = flow.start(*EPOCHS, *flow.recovery(), KILL_AT=place, **environ)
    _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, said


def written(flow: Flow) -> dict[str, Counter[int]]:
    ipc: Counter[int] = Counter()
    for file in (flow.out / "ipc").glob("*.arrows"):
        ipc.update(pa.ipc.open_stream(file).read_all()["id"].to_pylist())
    return {
        "parquet": Counter(read(flow.out / "parquet").to_table()["id"].to_pylist()),
        "ipc": ipc,
        "sqlite": Counter(orders(SqliteSink(flow.out / "sqlite.db"))),
    }


ALL = Counter(range(1, ROWS + 1))
DURABLE = "epoch durable, nothing committed:3"
STAGED = "a sink behind staging:3"


@pytest.mark.parametrize("deaths", [(DURABLE,), (STAGED,), (DURABLE, DURABLE), (DURABLE, STAGED)], ids=len)
def test_renamed_steps_publish_what_does_not_come_again_and_nothing_twice(flow: Flow, deaths: tuple[str, ...]) -> None:
    """Each run renames the steps, there and back again."""
    for number, place in enumerate(deaths):
        died(flow, place, STEP="ab"[number % 2])
    flow.run(*EPOCHS, *flow.recovery(), PGOUTPUT_UNTIL="current", STEP="ab"[len(deaths) % 2])

    assert written(flow) == {"parquet": ALL, "ipc": ALL, "sqlite": ALL}


def test_to_take_a_step_without_state_for_a_run_without_state_would_be_noticed(flow: Flow) -> None:
    died(flow, DURABLE, STEP="a")
    flow.run(*EPOCHS, *flow.recovery(), PGOUTPUT_UNTIL="current", STEP="b", BREAK="trust no state")

    assert all(found < ALL for found in written(flow).values())


def test_without_recovery_what_is_staged_comes_again(flow: Flow) -> None:
    process = flow.start("-s", "1", KILL_AT="a sink behind staging:1")
    _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, said
    flow.run("-s", "1", PGOUTPUT_UNTIL="current")

    assert all(found.keys() == ALL.keys() for found in written(flow).values())


def lose(flow: Flow, sink: str) -> None:
    if sink == "ipc":
        files = list((flow.out / "ipc/_staging").glob("*.arrows"))
        assert files
        for file in files:
            file.unlink()
    else:
        with SqliteSink(flow.out / "sqlite.db").database() as db:
            assert db.execute("DELETE FROM staging").rowcount > 0


@pytest.mark.parametrize("sink", ["ipc", "sqlite"])
def test_what_was_staged_and_is_lost_is_an_error(flow: Flow, sink: str) -> None:
    died(flow, DURABLE)
    lose(flow, sink)
    for _ in range(2):
        process = flow.start(*EPOCHS, *flow.recovery(), PGOUTPUT_UNTIL="current")
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1, said
        assert "is in the resume state, but neither staged nor published" in said


def test_without_a_receipt_the_loss_would_be_silent(flow: Flow) -> None:
    died(flow, DURABLE)
    lose(flow, "ipc")
    flow.run(*EPOCHS, *flow.recovery(), PGOUTPUT_UNTIL="current", BREAK="ask no receipt")

    assert written(flow)["ipc"] < ALL


def test_published_files_may_be_moved_away(flow: Flow) -> None:
    died(flow, "a sink behind publishing:3")
    for file in (flow.out / "ipc").glob("*.arrows"):
        file.unlink()
    flow.run(*EPOCHS, *flow.recovery(), PGOUTPUT_UNTIL="current")


class Plain(SqliteSink):
    """A sink that does not say what it has published."""

    published = TwoPhaseSink.published  # type: ignore[assignment]


def test_a_sink_that_can_not_tell_what_it_published_starts_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate.source_opened("slot", {"commit_lsn": 1, "seq": 0, "epochs": {"r1": 9}})
    state = {"v": 1, "lineage": "0", "tokens": ["r1-00000007"]}
    Plain(tmp_path / "db").build_part("f.out", "two-phase", state).close()
    assert "can't tell whether r1-00000007 was published or lost" in caplog.text
    with pytest.raises(SinkError, match="neither staged nor published"):
        SqliteSink(tmp_path / "db").build_part("f.out", "two-phase", state)
    void = {**state, "tokens": ["r1-00000010"]}
    SqliteSink(tmp_path / "db").build_part("f.out", "two-phase", void).close()
    gate.abandon()


@pytest.mark.parametrize(
    ("epochs", "epoch", "durable"),
    [
        ({"r1": 9, "r2": 3}, "r1-00000009", True),
        ({"r1": 9, "r2": 3}, "r1-00000010", False),
        ({"r1": 9, "r2": 3}, "r3-00000001", False),
        ({"": 0, "r2": 3}, "r1-00000001", None),
        ({"": 0, "r2": 3}, "r2-00000004", False),
        ({}, "r1-00000001", False),
    ],
)
def test_the_gate_knows_durable_epochs_by_the_state_of_a_source(
    epochs: dict[str, int], epoch: str, durable: bool | None
) -> None:
    gate.abandon()
    assert gate.durable(epoch) is None, "no source"
    gate.source_opened("slot", {"commit_lsn": 5, "seq": 2, "epochs": epochs})
    assert gate.durable(epoch) is durable
    assert [gate.durable(None, first, "slot") for first in [(5, 2), (5, 3), None]] == [True, False, None]
    assert gate.durable(None, (5, 2), "other") is None
    gate.source_opened("new", None)
    assert gate.durable(epoch) is durable
    gate.abandon()
    gate.source_opened("new", None)
    assert gate.durable(epoch) is False
    gate.abandon()


def test_a_source_remembers_its_last_hundred_runs() -> None:
    state: dict[str, int] = {}
    for number in range(150):
        gate.abandon()
        gate.source_opened("slot", {"commit_lsn": 5, "seq": 2, "epochs": state})
        for _ in range(3):
            state = gate.epochs("slot")
            gate.opened("slot")
        assert len(state) == min(number + 1, MAX_RUNS) + (number >= MAX_RUNS)
    assert set(state.values()) == {0, 3}
    gate.abandon()
