"""`cdc.latest` against the table itself: put and removed in order, its rows are the table's, at every commit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import bytewax.operators as op
import pyarrow as pa
import pytest
from bytewax.dataflow import Dataflow
from bytewax.testing import TestingSink, TestingSource
from harness.database import Database
from harness.one_table import Checkpoints, ordered, refused, run_flow

import pgoutput_source.operators as cdc
from pgoutput_source.changes import ChangeBatch, ChangeSet
from pgoutput_source.changes.schema import Position
from pgoutput_source.embedded import Server
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.testing import batch

KEY = ("id", "part")
Row = tuple[Any, ...]


@pytest.fixture(scope="module", params=["DEFAULT", "FULL"])
def checkpoints(request: pytest.FixtureRequest, pg: Server) -> Iterator[Checkpoints]:
    database = Database(pg)
    yield Checkpoints(database.connect(), request.param, 21, ["SELECT * FROM t"])
    database.drop()


def run(items: Sequence[Any], *, recovery: Path | None = None, workers: int = 0, **asked: Any) -> list[ChangeBatch]:
    out: list[ChangeBatch] = []
    flow = Dataflow("test")
    changes = op.input("in", flow, TestingSource(items))
    ups = op.flat_map("batches", changes, lambda item: item.of("public.t") if isinstance(item, ChangeSet) else [item])
    op.output("out", cdc.latest("step", ups, **asked), TestingSink(out))
    run_flow(flow, recovery=recovery, workers=workers)
    return out


def mirror(results: Sequence[ChangeBatch], until: Position | None = None, *, whole: bool = True) -> list[Row]:
    """What a sink makes of it that knows nothing but put and remove; and, unless rows are whole, to leave alone."""
    rows: dict[Row, dict[str, Any]] = {}
    for made in results:
        own = [c.name for c in made.schema.columns]
        seen: set[Row] = set()
        for row in made.data.to_pylist():
            if until is not None and (row["_commit_lsn"], row["_seq"]) > until:
                return ordered(tuple(row.values()) for row in rows.values())
            key = tuple(row[name] for name in KEY if name in row)
            assert key not in seen, "a key comes twice in a batch"
            seen.add(key)
            if row["_op"] == "T":
                assert len(seen) == 1
                rows.clear()
            elif row["_op"] == "D":
                rows.pop(key, None)
            else:
                assert not (whole and row["_unchanged"])
                sent = {name: row[name] for name in own if name not in (row["_unchanged"] or ())}
                rows[key] = {**rows.get(key, {}), **sent}
    return ordered(tuple(row.values()) for row in rows.values())


def numbers(rows: Sequence[Row]) -> list[Row]:
    """`free` is a numeric without bounds, which comes as text."""
    return ordered(tuple(str(v) if i == 5 and v is not None else v for i, v in enumerate(row)) for row in rows)


def test_put_and_removed_in_order_it_is_the_table_at_every_commit(checkpoints: Checkpoints) -> None:
    results = run(checkpoints.sets, key=KEY)
    assert sum(map(len, results)) < sum(map(len, checkpoints.sets))
    for position, [answer] in checkpoints.known:
        assert mirror(results, position) == numbers(answer)


def test_over_crashes_it_is_the_table(checkpoints: Checkpoints, tmp_path: Path) -> None:
    results: list[ChangeBatch] = []
    sets = checkpoints.sets
    for end in (len(sets) // 3, len(sets) * 2 // 3, len(sets)):
        crash = [TestingSource.ABORT()] if end < len(sets) else []
        results += run([*sets[:end], *crash], recovery=tmp_path / "r", key=KEY)
    assert mirror(results) == numbers(checkpoints.known[-1][1][0])


def test_two_workers_give_the_table(checkpoints: Checkpoints) -> None:
    assert mirror(run(checkpoints.sets, key=KEY, workers=2)) == numbers(checkpoints.known[-1][1][0])


def test_on_each_major_it_is_the_table(any_db: Database) -> None:
    made = Checkpoints(any_db.connect(), "DEFAULT", 51, ["SELECT * FROM t"], rounds=8)
    results = run(made.sets, key=KEY)
    for position, [answer] in made.known:
        assert mirror(results, position) == numbers(answer)


TYPES = {"id": pa.int64(), "n": pa.int64(), "note": pa.utf8()}


def change(*changes: Any, **kind: Any) -> ChangeBatch:
    return batch("public.t", list(changes), **{"types": TYPES, **kind})


def last(results: Sequence[ChangeBatch]) -> dict[str, Any]:
    row: dict[str, Any] = results[-1].data.to_pylist()[-1]
    return row


def test_without_fill_what_was_not_sent_stays_named() -> None:
    insert = ("I", {"id": 1, "n": 1, "note": "long"})
    update = ("U", {"id": 1, "n": 2})
    one = change(insert, update, unchanged={1: ["note"]})
    two = [change(insert), change(update, unchanged={0: ["note"]}, lsn=2000)]
    assert (last(run([one], fill=False))["note"], last(run([one], fill=False))["_unchanged"]) == ("long", None)
    assert (last(run(two, fill=False))["note"], last(run(two, fill=False))["_unchanged"]) == (None, ["note"])
    assert (last(run(two))["note"], last(run(two))["_unchanged"]) == ("long", None)


def test_what_was_never_seen_is_not_known_and_no_null() -> None:
    update = change(("U", {"id": 1, "n": 2}), unchanged={0: ["note"]})
    again = change(("U", {"id": 1, "n": 3}), unchanged={0: ["note"]}, lsn=2000)
    for results in (run([update, again]), run([change(("D", {"id": 1}, {"id": 1})), update])):
        assert (last(results)["note"], last(results)["_unchanged"]) == (None, ["note"])
    assert mirror(run([change(("I", {"id": 1, "n": 1, "note": "x"})), update]), whole=False) == [(1, 2, "x")]


def test_a_column_that_is_added_later_is_not_known_of_rows_from_before() -> None:
    wider = {**TYPES, "more": pa.utf8()}
    ups = [
        change(("I", {"id": 1, "n": 1, "note": "x"}), ("I", {"id": 2, "n": 1, "note": "y"})),
        change(("U", {"id": 2, "n": 2, "more": "z"}), unchanged={0: ["note"]}, types=wider, lsn=2000),
        change(("U", {"id": 1, "n": 2}), unchanged={0: ["note", "more"]}, types=wider, lsn=3000),
        change(("U", {"id": 2, "n": 3}), unchanged={0: ["note", "more"]}, types=wider, lsn=4000),
    ]
    one, two = (made.data.to_pylist()[0] for made in run(ups)[2:])
    assert (one["note"], one["more"], one["_unchanged"]) == ("x", None, ["more"])
    assert (two["note"], two["more"], two["_unchanged"]) == ("y", "z", None)


def test_a_value_that_arrow_can_not_hold_is_not_taken_for_null() -> None:
    first = change(("I", {"id": 1, "n": 1}), ("U", {"id": 1, "n": 2}), unchanged={1: ["note"]})
    index = first.data.schema.get_field_index("_raw")
    field = first.data.schema.field(index)
    raw = first.replace(first.data.set_column(index, field, pa.array([[("note", "{{1}}")], None], field.type)))
    later = change(("U", {"id": 1, "n": 3}), unchanged={0: ["note"]}, lsn=2000)
    for results in (run([raw]), run([raw, later])):
        assert (last(results)["_unchanged"], last(results)["_raw"]) == (None, [("note", "{{1}}")])


def test_a_key_that_changes_ends_the_old_one() -> None:
    results = run([change(("I", {"id": 1, "note": "x"})), change(("U", {"id": 2}, {"id": 1}), unchanged={0: ["note"]})])
    assert [(r["_op"], r["id"], r["note"]) for r in results[1].data.to_pylist()] == [("D", 1, None), ("U", 2, "x")]
    swap = [("I", {"id": 1, "note": "x"}), ("I", {"id": 2, "note": "y"}), ("U", {"id": 3, "note": "x"}, {"id": 1})]
    swap += [("U", {"id": 1, "note": "y"}, {"id": 2}), ("U", {"id": 2, "note": "x"}, {"id": 3})]
    assert mirror(run([change(*swap)])) == [(1, None, "y"), (2, None, "x")]


def test_tables_are_kept_apart() -> None:
    other = batch("public.u", [("U", {"id": 1})], types=TYPES, unchanged={0: ["note"]})
    assert last(run([change(("I", {"id": 1, "note": "x"})), other]))["_unchanged"] == ["note"]


def test_keys_that_can_not_work_are_refused() -> None:
    full = change(("I", {"id": 1}), identity="f")
    refused(ConfigurationError, lambda: run([full]))
    refused(ConfigurationError, lambda: run([change(("I", {"id": 1}))], key="n"))
    assert mirror(run([full], key="id")) == [(1, None, None)]
