"""`cdc.aggregate` against GROUP BY on PostgreSQL, at every moment at which both can be compared."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import bytewax.operators as op
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from bytewax.dataflow import Dataflow
from bytewax.testing import TestingSink, TestingSource
from harness.database import Database
from harness.one_table import Checkpoints, at, ordered, refused, run_flow

import pgoutput_source.operators as cdc
from pgoutput_source.changes import ChangeBatch, ChangeSet
from pgoutput_source.changes.schema import Position
from pgoutput_source.embedded import Server
from pgoutput_source.errors import ConfigurationError, DecodeError, StateError
from pgoutput_source.testing import batch

Row = tuple[Any, ...]
MEASURES: dict[str, Any] = {
    "count": True,
    "sum": ["amount", "free", "big", "region", "score"],
    "min": ["score", "status", "day", "amount"],
    "max": ["score", "amount", "free", "part", "day"],
    "mean": ["amount", "big", "score"],
}
SELECT = """count(*), sum(amount), sum(free), sum(big), sum(region), array_agg(score),
    min(score), min(status COLLATE "C"), min(day), min(amount),
    max(score), max(amount), max(free), max(part), max(day),
    avg(amount)::float8, avg(big)::float8, array_agg(score)"""


def run(
    items: Sequence[Any], *, recovery: Path | None = None, workers: int = 0, operator: Any = None, **asked: Any
) -> list[Any]:
    """What the operator gives; items may be change sets, batches and TestingSource's signals."""
    out: list[Any] = []
    flow = Dataflow("test")
    changes = op.input("in", flow, TestingSource(items))
    ups = op.flat_map("batches", changes, lambda item: item.of("public.t") if isinstance(item, ChangeSet) else [item])
    op.output("out", (operator or cdc.aggregate)("step", ups, **asked), TestingSink(out))
    run_flow(flow, recovery=recovery, workers=workers)
    return out


def exact(answers: list[Row]) -> list[Row]:
    """PostgreSQL's own sum of floats depends on the order of the rows; this is the true sum, and the true mean."""
    rows = []
    for row in answers:
        *front, scores = row
        i = next(i for i, value in enumerate(front) if isinstance(value, list))
        values = [v for v in scores if v is not None]
        odd = [v for v in values if not math.isfinite(v)]
        if odd:
            total = mean = sum(odd)
        else:
            total, mean = (float(sum(map(Fraction, values)) / n) if values else None for n in (1, max(1, len(values))))
        rows.append((*front[:i], total, *front[i + 1 :], mean))
    return ordered(rows)


WHERES: list[tuple[list[str], pc.Expression | None, str]] = [
    (["status"], None, "true"),
    ([], None, "true"),
    (["region", "status"], pc.field("amount") > Decimal(0), "amount > 0"),
    (["free"], pc.field("note") != "short", "note <> 'short'"),
    (["score"], None, "true"),
]


def query(by: Sequence[str], where: str) -> str:
    columns = "".join(f"{name}, " for name in by)
    grouped = f"GROUP BY {', '.join(by)}" if by else "HAVING count(*) > 0"
    return f"SELECT {columns} {SELECT} FROM t WHERE {where} {grouped}"


QUERIES = [query(by, where) for by, _, where in WHERES]


@pytest.fixture(scope="module", params=["DEFAULT", "FULL"])
def checkpoints(request: pytest.FixtureRequest, pg: Server) -> Iterator[Checkpoints]:
    database = Database(pg)
    yield Checkpoints(database.connect(), request.param, 11 if request.param == "FULL" else 12, QUERIES)
    database.drop()


@pytest.mark.parametrize("case", range(len(WHERES)), ids=[",".join(by) + ":" + where for by, _, where in WHERES])
def test_at_every_commit_it_equals_group_by_on_the_source(checkpoints: Checkpoints, case: int) -> None:
    by, where, _ = WHERES[case]
    results = run(checkpoints.sets, by=by, where=where, **MEASURES)
    assert len(checkpoints.known) > 30
    for position, answers in checkpoints.known:
        assert at(position, results, by) == exact(answers[case])


def test_over_crashes_every_change_counts_once(checkpoints: Checkpoints, tmp_path: Path) -> None:
    by, where, _ = WHERES[2]
    results: list[Any] = []
    sets = checkpoints.sets
    for end in (len(sets) // 3, len(sets) * 2 // 3, len(sets)):
        crash = [TestingSource.ABORT()] if end < len(sets) else []
        results += run([*sets[:end], *crash], recovery=tmp_path / "r", by=by, where=where, **MEASURES)
    position, answers = checkpoints.known[-1]
    assert at(position, results, by) == exact(answers[2])


def test_two_workers_give_the_same(checkpoints: Checkpoints) -> None:
    results = run(checkpoints.sets, workers=2, by="status", **MEASURES)
    position, answers = checkpoints.known[-1]
    assert at(position, results, ["status"]) == exact(answers[0])


def test_on_each_major_it_equals_group_by(any_db: Database) -> None:
    made = Checkpoints(any_db.connect(), "DEFAULT", 31, QUERIES[2:3], rounds=8)
    by, where, _ = WHERES[2]
    results = run(made.sets, by=by, where=where, **MEASURES)
    for position, answers in made.known:
        assert at(position, results, by) == exact(answers[0])


def last(results: Sequence[pa.RecordBatch]) -> dict[str, Any]:
    row: dict[str, Any] = results[-1].to_pylist()[-1]
    return row


def rows(*amounts: Any, op: str = "I", **kind: Any) -> ChangeBatch:
    return batch("public.t", [(op, {"id": i, "amount": a}) for i, a in enumerate(amounts)], **kind)


def test_floats_that_are_taken_back_leave_nothing_behind() -> None:
    full: dict[str, Any] = {"identity": "f", "types": {"id": pa.int64(), "amount": pa.float64()}}
    gone = [("D", {"id": i, "amount": a}, {"id": i, "amount": a}) for i, a in enumerate([1e300, -1e300, 5e-324, 1e16])]
    ups = [rows(1e300, -1e300, 5e-324, 1e16, 0.1, 0.2, **full), batch("public.t", gone, **full)]
    row = last(run(ups, sum="amount", mean="amount", count=True))
    assert (row["amount_sum"], row["amount_mean"], row["count"]) == (0.1 + 0.2, (0.1 + 0.2) / 2, 2)


@pytest.mark.parametrize("seed", range(5))
def test_kept_rows_give_what_old_rows_give(seed: int) -> None:
    """The same changes with identity FULL and with only the key, in batches of any size; both against a plain dict."""
    r = random.Random(seed)
    table: dict[int, int | None] = {}
    keyed: list[Any] = []
    full: list[Any] = []
    for _ in range(400):
        old = r.choice(sorted(table)) if table else None
        kind = r.choice("IIIUUUKKDDT"[: 10 + (r.random() < 0.05)])
        amount = r.choice([None, r.randrange(-9, 9)])
        if kind == "T":
            table.clear()
            keyed.append(("T", None))
            full.append(("T", None))
        elif kind == "I" or old is None:
            new = r.choice([k for k in range(500) if k not in table])
            table[new] = amount
            keyed.append(("I", {"id": new, "amount": amount}))
            full.append(keyed[-1])
        elif kind == "D":
            before = {"id": old, "amount": table.pop(old)}
            keyed.append(("D", {"id": old}, {"id": old}))
            full.append(("D", before, before))
        else:
            before = {"id": old, "amount": table.pop(old)}
            new = old if kind == "U" else r.choice([k for k in range(500) if k not in table])
            table[new] = amount
            row = {"id": new, "amount": amount}
            keyed.append(("U", row, {"id": old}) if new != old else ("U", row))
            full.append(("U", row, before))
    types = {"id": pa.int64(), "amount": pa.int64()}
    asked: dict[str, Any] = {"by": "amount", "count": True, "sum": "id", "min": "id", "max": "id", "mean": "id"}
    found = []
    for changes, identity in ((keyed, "d"), (full, "f")):
        low, ups = 0, []
        while low < len(changes):
            high = low + r.choice([1, 5, 50, 400])
            ups.append(batch("public.t", changes[low:high], types=types, identity=identity, lsn=low))
            low = high
        found.append(at(Position(ups[-1].last.commit_lsn, 0), run(ups, **asked), ["amount"]))
    groups: dict[int | None, list[int]] = {}
    for key, amount in table.items():
        groups.setdefault(amount, []).append(key)
    wanted = [(a, len(k), sum(k), min(k), max(k), sum(k) / len(k)) for a, k in groups.items()]
    assert found[0] == found[1] == ordered(wanted)


def test_an_identity_that_becomes_full_goes_on_and_one_that_stops_being_full_is_refused() -> None:
    types = {"id": pa.int64(), "amount": pa.int64()}
    before = [("U", {"id": 0, "amount": 7}, {"id": 0, "amount": 1}), ("D", {"id": 1}, {"id": 1, "amount": 2})]
    turned = batch("public.t", before, identity="f", types=types)
    assert last(run([rows(1, 2, types=types), turned], sum="amount", count=True))["amount_sum"] == 7
    back = batch("public.t", [("D", {"id": 0}, {"id": 0})], types=types)
    refused(StateError, lambda: run([rows(1, 2, types=types), turned, back], sum="amount"))


def test_a_flow_that_begins_in_the_middle_measures_what_it_has_seen() -> None:
    unseen = batch(
        "public.t", [("U", {"id": 5, "amount": 3}), ("D", {"id": 6}, {"id": 6}), ("I", {"id": 7, "amount": 4})]
    )
    assert last(run([unseen], sum="amount", count=True))["amount_sum"] == 7
    full = batch("public.t", [("U", {"id": 5, "amount": 3}, {"id": 5, "amount": 1})], identity="f")
    assert run([full], sum="amount", count=True) == []  # one row came and one went: nothing is known to be there


def test_what_can_not_be_right_is_refused() -> None:
    unknown = batch("public.t", [("U", {"id": 1, "note": None})], types={"id": pa.int64(), "note": pa.utf8()},
                    unchanged={0: ["note"]})  # fmt: skip
    refused(StateError, lambda: run([unknown], by="note", count=True))
    run([unknown], by="id", count=True)
    refused(ConfigurationError, lambda: run([rows(1)], by="nothing", count=True))
    refused(ConfigurationError, lambda: run([rows(1)], count=True, where=pc.field("nothing") == 1))
    refused(ConfigurationError, lambda: run([rows([1])], by="amount", count=True))
    refused(ConfigurationError, lambda: run([rows("x")], sum="amount"))
    refused(
        ConfigurationError, lambda: run([rows(1), batch("public.u", [("I", {"id": 1, "amount": 1})])], sum="amount")
    )
    refused(StateError, lambda: run([rows(1), rows("x")], min="amount"))
    refused(DecodeError, lambda: run([rows(2**62, 2**62)], sum="amount"))
    flow = Dataflow("test")
    with pytest.raises(ConfigurationError):
        cdc.aggregate("a", op.input("in", flow, TestingSource([])), by="_op", count=True)


def test_types_that_grow_go_on() -> None:
    def money(scale: int, amount: str) -> ChangeBatch:
        return rows(Decimal(amount), types={"id": pa.int64(), "amount": pa.decimal128(12, scale)})

    results = run([rows(3), money(2, "1.25"), money(4, "1.2505"), money(2, "7.00")], sum="amount", max="amount")
    assert [r.to_pylist()[0]["amount_sum"] for r in results] == [3, Decimal("1.25"), Decimal("1.2505"), 7]
