"""`cdc.window` against GROUP BY on PostgreSQL, by the commit times that PostgreSQL itself keeps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias

import bytewax.operators as op
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from bytewax.dataflow import Dataflow
from bytewax.errors import BytewaxRuntimeError
from bytewax.testing import TestingSink, TestingSource
from harness.database import Database
from harness.one_table import LOG, Workload, ordered, plain, run_flow

import pgoutput_source.operators as cdc
from pgoutput_source.changes import ChangeSet
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.embedded import Server
from pgoutput_source.errors import ConfigurationError, DecodeError, StateError
from pgoutput_source.testing import START, batch

MINUTE = timedelta(minutes=1)
MILLISECOND = timedelta(milliseconds=1)


Work: TypeAlias = tuple[psycopg.Connection[Any], list[ChangeSet]]


def worked(connection: psycopg.Connection[Any], seed: int, transactions: int) -> Work:
    """Transactions over a second or so, and the change sets that they come to, cut at random."""
    workload = Workload(connection, f"windows{seed}", seed)
    connection.execute(LOG)
    for i in range(transactions):
        workload.transaction(workload.random.choice([1, 1, 2, 5, 20]))
        if i % 10 == 0:
            time.sleep(0.03)
    return connection, list(workload.feed(Assembler(), workload.frames()))


@pytest.fixture(scope="module")
def work(pg: Server) -> Iterator[Work]:
    database = Database(pg)
    yield worked(database.connect(), 7, 150)
    database.drop()


def run(
    items: Sequence[Any],
    *,
    recovery: Path | None = None,
    epochs: timedelta | None = None,
    workers: int = 0,
    **asked: Any,
) -> tuple[list[pa.RecordBatch], list[pa.RecordBatch]]:
    """What the window gives in time and too late; items may be change sets, batches and TestingSource's signals."""
    down: list[pa.RecordBatch] = []
    late: list[pa.RecordBatch] = []
    flow = Dataflow("test")
    source = TestingSource(items)
    changes = op.input("in", flow, source)
    sets = op.flat_map("batches", changes, lambda item: item.of("public.t") if isinstance(item, ChangeSet) else [item])
    result = cdc.window("w", sets, **asked)
    op.output("down", result, TestingSink(down))
    op.output("late", result.late, TestingSink(late))
    run_flow(flow, recovery=recovery, epochs=epochs, workers=workers)
    return down, late


def rows(batches: Sequence[pa.RecordBatch]) -> list[tuple[Any, ...]]:
    return [tuple(plain(v) for v in row.values()) for b in batches for row in b.to_pylist()]


MEASURES: dict[str, Any] = {
    "count": True,
    "sum": ["amount", "free", "big", "region"],
    "min": ["score", "status", "day"],
    "max": ["score", "amount", "free", "part"],
    "mean": ["amount", "big"],
}


def expected(
    connection: psycopg.Connection[Any], every: timedelta, hop: timedelta, by: Sequence[str], where: str = "true"
) -> list[tuple[Any, ...]]:
    columns = "".join(f"{name}, " for name in by)
    copies = math.ceil(every / hop)
    query = f"""
        SELECT start, start + %(every)s AS end, {columns} count(*),
            sum(amount), sum(free), sum(big), sum(region), min(score), min(status COLLATE "C"), min(day),
            max(score), max(amount), max(free), max(part), avg(amount)::float8, avg(big)::float8
        FROM (
            SELECT *, pg_xact_commit_timestamp(xid::xid) AS time,
                date_bin(%(hop)s, pg_xact_commit_timestamp(xid::xid), '2000-01-03 00:00+00') - n * %(hop)s AS start
            FROM log, generate_series(0, {copies}) AS n
        ) AS log
        WHERE time < start + %(every)s AND {where}
        GROUP BY {columns} start
    """
    connection.execute("SET timezone = 'UTC'")
    found = connection.execute(query, {"every": every, "hop": hop}).fetchall()
    return ordered(found)


@pytest.mark.parametrize(
    ("every", "hop", "by"),
    [(20, 20, ["status"]), (20, 20, []), (40, 10, ["region", "status"]), (30, 20, ["free", "score"])],
)
def test_windows_equal_group_by_of_the_commits(work: Work, every: int, hop: int, by: list[str]) -> None:
    connection, sets = work
    down, late = run(sets, every=every * MILLISECOND, hop=hop * MILLISECOND, by=by, **MEASURES)
    assert not late
    got = rows(down)
    assert ordered(got) == expected(connection, every * MILLISECOND, hop * MILLISECOND, by)
    assert len(down) > 1  # windows were closed on the way, not all at the end
    starts = [row[0] for row in got]
    assert starts == sorted(starts)


def test_where_and_ops_choose_what_counts(work: Work) -> None:
    connection, sets = work
    every = 50 * MILLISECOND
    down, _ = run(sets, every=every, by="part", where=pc.field("status") == "paid", ops=["U"], **MEASURES)
    assert ordered(rows(down)) == expected(connection, every, every, ["part"], "status = 'paid' AND op = 'U'")


def test_two_workers_and_shards_give_the_same(work: Work) -> None:
    connection, sets = work
    every = 50 * MILLISECOND
    down, late = run(sets, every=every, by="status", shards=3, workers=2, **MEASURES)
    assert not late
    assert ordered(rows(down)) == expected(connection, every, every, ["status"])


def test_every_change_counts_once_over_crashes(work: Work, tmp_path: Path) -> None:
    connection, sets = work
    every = 50 * MILLISECOND
    got = []
    for end in (len(sets) // 3, len(sets) * 2 // 3, len(sets)):
        crash = [TestingSource.ABORT()] if end < len(sets) else []
        down, late = run([*sets[:end], *crash], recovery=tmp_path / "r", every=every, by="status", **MEASURES)
        assert not late
        got += rows(down)
    assert ordered(got) == expected(connection, every, every, ["status"])


def test_on_each_major_windows_equal_group_by(any_db: Database) -> None:
    connection, sets = worked(any_db.connect(), 41, 50)
    down, late = run(sets, every=40 * MILLISECOND, hop=20 * MILLISECOND, by="status", **MEASURES)
    assert not late
    assert ordered(rows(down)) == expected(connection, 40 * MILLISECOND, 20 * MILLISECOND, ["status"])


def order(amount: Any, seconds: float, customer: str = "ann", **types: Any) -> Any:
    return batch(
        "public.t", [("I", {"id": 1, "customer": customer, "amount": amount})], at=START + timedelta(seconds=seconds),
        **types,
    )  # fmt: skip


def causes(error: BaseException | None) -> list[BaseException]:
    """An error and all that it was caused by."""
    return [] if error is None else [error, *causes(error.__cause__)]


def counted(batches: Sequence[pa.RecordBatch]) -> list[tuple[str, int]]:
    return [(f"{r['window_start']:%H:%M:%S}", r["count"]) for b in batches for r in b.to_pylist()]


def test_what_comes_too_late_is_measured_apart_and_opens_no_window_again(caplog: pytest.LogCaptureFixture) -> None:
    items = [order(1, 10), order(1, 70), order(1, 20), order(1, 30), order(1, 75), order(1, 130), order(1, 119)]
    with caplog.at_level(logging.WARNING):
        down, late = run(items, every=MINUTE, count=True)
    assert counted(down) == [("12:00:00", 1), ("12:01:00", 2), ("12:02:00", 1)]
    assert counted(late) == [("12:00:00", 1), ("12:00:00", 1), ("12:01:00", 1)]
    assert "1 changes came after their window was closed" in caplog.text
    down, late = run(items, every=MINUTE, count=True, wait=MINUTE)
    assert counted(down) == [("12:00:00", 3), ("12:01:00", 3), ("12:02:00", 1)]
    assert not late


def test_hopping_windows_are_late_one_by_one() -> None:
    items = [order(1, 10), order(1, 65), order(1, 40)]  # at 12:00:40 the window of 12:00:30 is still open
    down, late = run(items, every=MINUTE, hop=MINUTE / 2, count=True)
    assert counted(late) == [("12:00:00", 1)]
    assert counted(down) == [("11:59:30", 1), ("12:00:00", 1), ("12:00:30", 2), ("12:01:00", 1)]


def test_weeks_begin_on_mondays_and_days_at_midnight() -> None:
    for every, start in (
        (timedelta(days=7), datetime(2024, 1, 1, tzinfo=UTC)),
        (timedelta(days=1), START.replace(hour=0)),
    ):
        down, _ = run([order(1, 0)], every=every, count=True)
        assert down[0].to_pylist()[0]["window_start"] == start


def test_silence_closes_windows_but_an_outage_makes_nothing_late(tmp_path: Path) -> None:
    pause = TestingSource.PAUSE(timedelta(seconds=0.6))
    asked: dict[str, Any] = {"every": MINUTE, "count": True, "idle": timedelta(seconds=0.2)}
    # The wall clock is years past these windows, so silence closes them, and what then comes for them is late.
    down, late = run([order(1, 10), pause, order(1, 20), order(1, 70)], **asked)
    assert counted(down) == [("12:00:00", 1), ("12:01:00", 1)]
    assert counted(late) == [("12:00:00", 1)]
    # A process that starts again after years waits for what the slot kept for it.
    abort = TestingSource.ABORT()
    items = [order(1, 10), abort, pause, order(1, 20), order(1, 70)]
    down, late = run(items, recovery=tmp_path / "r", **asked)
    assert (down, late) == ([], [])
    down, late = run(items, recovery=tmp_path / "r", **asked)
    assert counted(down) == [("12:00:00", 2), ("12:01:00", 1)]
    assert not late


def test_a_step_that_is_held_up_is_no_silence() -> None:
    flow = Dataflow("test")
    down: list[pa.RecordBatch] = []
    ups = op.input("in", flow, TestingSource([order(1, i) for i in range(5)]))
    result = cdc.window("w", ups, every=MINUTE, count=True, idle=timedelta(seconds=0.1))
    op.output("down", result, TestingSink(down))

    def slow(item: Any) -> Any:
        time.sleep(0.2)
        return item

    op.output("slow", op.map("slow_map", ups, slow), TestingSink([]))
    run_flow(flow)
    assert counted(down) == [("12:00:00", 5)]


def test_sums_are_exact_or_an_error() -> None:
    big = Decimal("9" * 34 + ".99")
    money: dict[str, Any] = {"types": {"id": pa.int64(), "customer": pa.utf8(), "amount": pa.decimal128(36, 2)}}
    down, _ = run([order(big, 0, **money)] * 90, every=MINUTE, sum="amount")
    assert down[0].to_pylist()[0]["amount_sum"] == Decimal("8" + "9" * 33 + "9" * 2 + ".10")
    narrow: dict[str, Any] = {"types": {"id": pa.int64(), "customer": pa.utf8(), "amount": pa.decimal128(12, 2)}}
    down, _ = run([order(Decimal("9999999999.99"), 0, **narrow)] * 1000, every=MINUTE, sum="amount")
    assert down[0].to_pylist()[0]["amount_sum"] == Decimal("9999999999990.00")
    half = 2**62
    down, _ = run([order(half, 0), order(half - 1, 1)], every=MINUTE, sum="amount")
    assert down[0].to_pylist()[0]["amount_sum"] == 2**63 - 1
    # Beyond int64 on the way, but not in the end.
    both = batch("public.t", [("I", {"id": 1, "amount": n}) for n in (half, half, -half)])
    down, _ = run([both], every=MINUTE * 5, sum="amount")
    assert down[0].to_pylist()[0]["amount_sum"] == half
    with pytest.raises(BytewaxRuntimeError) as raised:
        run([order(half, 0), order(half, 1)], every=MINUTE, sum="amount")
    assert any(isinstance(e, DecodeError) for e in causes(raised.value))


def test_a_value_that_arrow_can_not_hold_is_an_error_and_no_null() -> None:
    made = order(Decimal(1), 0)
    index = made.data.schema.get_field_index("_raw")
    field = made.data.schema.field(index)
    raw = pa.array([[("amount", "NaN")]], field.type)
    odd = made.replace(made.data.set_column(index, field, raw))
    with pytest.raises(BytewaxRuntimeError) as raised:
        run([odd], every=MINUTE, sum="amount")
    assert any(isinstance(e, DecodeError) for e in causes(raised.value))
    down, _ = run([odd, order(Decimal(2), 1)], every=MINUTE, sum="amount", where=pc.field("_raw").is_null())
    assert down[0].to_pylist()[0]["amount_sum"] == 2


def test_a_state_of_another_version_is_refused() -> None:
    from pgoutput_source.compute.grouping import Grouping
    from pgoutput_source.operators.windows import Spans, _Windows

    with pytest.raises(StateError, match="another version"):
        _Windows("w", Spans.of(MINUTE, MINUTE), Grouping.of((), count=True), timedelta(0), None, {"v": 0})


@pytest.mark.parametrize(
    "asked",
    [
        {"every": MINUTE},
        {"every": MINUTE, "hop": 2 * MINUTE, "count": True},
        {"every": timedelta(0), "count": True},
        {"every": MINUTE, "count": True, "ops": "T"},
        {"every": MINUTE, "count": True, "by": "count"},
        {"every": MINUTE, "sum": ["amount", "amount"]},
        {"every": MINUTE, "count": True, "shards": 0},
    ],
)
def test_arguments_without_a_meaning_are_refused_at_once(asked: dict[str, Any]) -> None:
    flow = Dataflow("test")
    with pytest.raises(ConfigurationError):
        cdc.window("w", op.input("in", flow, TestingSource([])), **asked)
