"""`ParquetSink` on real files: crashes at every step, through Bytewax, and what other programs read."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import bytewax.operators as op
import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from bytewax.dataflow import Dataflow
from bytewax.inputs import AbortExecution, FixedPartitionedSource, StatefulSourcePartition
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.testing import run_main
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgoutput_source.changes import OPS, Column, TableSchema, metadata_fields
from pgoutput_source.dataflow.run import gate
from pgoutput_source.errors import ConfigurationError, SinkError, StateError
from pgoutput_source.parquet import folder as folder_module
from pgoutput_source.parquet import writer as writing_module
from pgoutput_source.sinks import ParquetSink, read
from pgoutput_source.sinks import parquet as parquet_module

ORIGIN = (("system", "7300000000000000001"), ("database", "shop"), ("slot", "orders"))


@pytest.fixture(autouse=True)
def _no_gate_is_left() -> Iterator[None]:
    gate.abandon()
    yield
    gate.abandon()


def schema(name: str = "orders", *extra: str, origin: tuple[tuple[str, str], ...] = ORIGIN) -> pa.Schema:
    columns = (
        Column("id", 20, -1, True, "bigint", pa.int64()),
        Column("note", 25, -1, False, "text", pa.utf8()),
        *(Column(column, 23, -1, False, "integer", pa.int32()) for column in extra),
    )
    return TableSchema(16400, "public", name, "d", columns, origin).arrow


ORDERS, WIDER, ITEMS = schema(), schema("orders", "discount"), schema("items")


def changes(kind: pa.Schema, start: int, count: int, ops: str = "I") -> pa.RecordBatch:
    """Inserts (or whatever `ops` says, in turn) with the ids start, start + 1 … at positions in the same order."""
    ids = range(start, start + count)
    row = kind.field("_before").type
    letters = [ops[i % len(ops)] for i in ids]
    values: dict[str, Any] = {
        "id": pa.array(ids, pa.int64()),
        "note": pa.array([f"note {i % 7}" for i in ids]),
        "discount": pa.array([i % 3 for i in ids], pa.int32()),
        "_op": pa.DictionaryArray.from_arrays(pa.array([OPS.index(x) for x in letters], pa.int8()), pa.array(OPS)),
        "_commit_lsn": pa.array([0x1000 + i // 10 * 0x100 for i in ids], pa.uint64()),
        "_seq": pa.array([i % 10 for i in ids], pa.uint64()),
        "_lsn": pa.array([0x1000 + i * 0x10 for i in ids], pa.uint64()),
        "_xid": pa.array([700 + i // 10 for i in ids], pa.uint32()),
        "_commit_ts": pa.array([1_790_000_000_000_000 + i // 10 for i in ids], pa.timestamp("us", "UTC")),
        "_before": pa.array(
            [{"id": i, "note": None} if x in "UD" else None for i, x in zip(ids, letters, strict=True)], row
        ),
        "_unchanged": pa.array([["note"] if x == "U" else None for x in letters], pa.list_(pa.utf8())),
        "_raw": pa.array([[("note", "x")] if x == "D" else None for x in letters], pa.map_(pa.utf8(), pa.utf8())),
    }
    return pa.record_batch([values[name] for name in kind.names], schema=kind)


def run(flow: Dataflow, store: Path | None = None) -> None:
    """One run in this process, every batch an epoch, with recovery if there is a store."""
    recovery = RecoveryConfig(str(store)) if store else None  # type: ignore[no-untyped-call]
    run_main(flow, epoch_interval=timedelta(0), recovery_config=recovery)  # type: ignore[no-untyped-call]


def new_store(folder: Path) -> Path:
    init_db_dir(folder, 1)  # type: ignore[no-untyped-call]
    return folder


def published(folder: Path) -> list[int]:
    return (
        sorted(read(folder).to_table(columns=["id"]).column("id").to_pylist()) if list(folder.glob("*.parquet")) else []
    )


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.parquet"))


def staged(folder: Path) -> list[str]:
    return sorted(path.suffix for path in (folder / "_staging").iterdir() if path.name not in (".lock", "void"))


def index(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "_index.jsonl").read_text().splitlines()]


# -- crashes at every step ------------------------------------------------------------------------------------------


class Dead(BaseException):
    """The process is gone: nothing after this reaches the disk."""


class Disk:
    """Stands before `os` in the folder's module, counts what changes the disk, and dies at one of these steps."""

    STEPS = ("rename", "fsync", "unlink", "write", "truncate", "ftruncate")

    def __init__(self, die_at: int | None = None) -> None:
        self.die_at = die_at
        self.steps: list[str] = []

    def step(self, name: str) -> None:
        if self.die_at is not None and len(self.steps) >= self.die_at:
            raise Dead(f"before {name}, after {self.steps[-3:]}")
        self.steps.append(name)

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in self.STEPS:
            return function

        def counted(*args: Any) -> Any:
            what = " ".join(Path(a).suffix or Path(a).name for a in args if isinstance(a, str | Path))
            try:
                self.step(f"{name} {what}".strip())
            except Dead:
                if name == "write":
                    function(args[0], args[1][: len(args[1]) // 2])  # torn
                raise
            # The page cache outlives a process: only the order of syncs is of interest here, and they are slow.
            return None if name == "fsync" else function(*args)

        return counted


class World:
    """What outlives a process: the folder, the recovery store and the slot. Change number i inserts id i."""

    def __init__(self, folder: Path, total: int, *, recovery: bool, seed: int, **options: Any) -> None:
        self.sink = ParquetSink(folder, **options)
        self.folder = folder
        self.total = total
        self.recovery = recovery
        self.random = random.Random(seed)
        self.store: tuple[int, Any] = (0, None)
        self.slot = 0

    def run(self, disk: Disk) -> None:
        """One process, from its start to the end of the changes or its death."""
        position, state = self.store if self.recovery else (self.slot, None)
        state = json.loads(json.dumps(state))  # nothing live and builtins only
        part: Any = None
        patch = pytest.MonkeyPatch()
        patch.setattr(folder_module, "os", disk)
        try:
            gate.source_opened("orders")
            part = self.sink.build_part("flow.out", "parquet", state)
            waiting = False
            while position < self.total:
                if waiting:
                    gate.opened("orders")
                    disk.step("acknowledge")
                    self.slot, waiting = position, False
                for _ in range(self.random.randint(1, 3)):
                    count = min(self.random.randint(1, 9), self.total - position)
                    if count:
                        kind = (ORDERS, WIDER, ITEMS)[position // 7 % 3]
                        part.write_batch([changes(kind, position, count)])
                    position += count
                last = position == self.total
                if last:
                    gate.drain()
                    gate.source_finished("orders")
                    gate.source_closed("orders")
                state = part.snapshot()
                if last:
                    part.close()
                    part = None
                disk.step("the epoch becomes durable")
                self.store = (position, state)
                waiting = True
            if part is not None:
                gate.drain()  # nothing was left to do
            disk.step("finish")
            gate.finish()
        finally:
            patch.undo()
            if part is not None:
                part.folder.close()
            gate.abandon()

    def verify(self) -> None:
        found = Counter(published(self.folder))
        assert sorted(found) == list(range(self.total)), "changes are missing"
        if self.recovery:
            assert max(found.values()) == 1, "changes are doubled"
        assert staged(self.folder) == [], "something was left behind"
        assert {line["file"] for line in index(self.folder)} == set(files(self.folder))
        assert sum(line["rows"] for line in index(self.folder)) == found.total()


OPTIONS: dict[str, dict[str, Any]] = {
    "every epoch is published": {"max_age": timedelta(0)},
    "several parts are merged": {"max_rows": 20, "max_age": timedelta(hours=1)},
    "parts are closed in the epoch": {"max_rows": 5},
}


@pytest.mark.parametrize("recovery", [True, False], ids=["with recovery", "without"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_crash_before_any_step_loses_nothing_and_doubles_nothing(
    tmp_path: Path, options: dict[str, Any], recovery: bool
) -> None:
    whole = Disk()
    World(tmp_path / "whole", 26, recovery=recovery, seed=1, **options).run(whole)
    names = {step.split()[0] for step in whole.steps}
    assert names >= {"rename", "fsync", "write", "acknowledge", "finish"}
    for die_at, name in enumerate(whole.steps):
        world = World(tmp_path / str(die_at), 26, recovery=recovery, seed=1, **options)
        with pytest.raises(Dead):
            world.run(Disk(die_at))
        try:
            world.run(Disk())
            world.verify()
        except (AssertionError, SinkError) as e:
            raise AssertionError(
                f"killed at step {die_at}, before {name!r}, after {whole.steps[die_at - 3 : die_at]}"
            ) from e


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    deaths=st.lists(st.integers(0, 120), max_size=6),
    options=st.sampled_from(list(OPTIONS.values())),
    recovery=st.booleans(),
)
def test_any_sequence_of_crashes_loses_nothing_and_doubles_nothing(
    tmp_path_factory: pytest.TempPathFactory, seed: int, deaths: list[int], options: dict[str, Any], recovery: bool
) -> None:
    world = World(tmp_path_factory.mktemp("world"), 80, recovery=recovery, seed=seed, **options)
    for die_at in deaths:
        try:
            world.run(Disk(die_at))
        except Dead:
            continue
        break
    world.run(Disk())
    world.verify()


def test_the_crash_test_catches_a_sink_that_publishes_in_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = parquet_module._ParquetPartition.snapshot

    def hasty(self: Any) -> Any:
        state = honest(self)
        self._commit()
        self.drain()
        return state

    monkeypatch.setattr(parquet_module._ParquetPartition, "snapshot", hasty)
    with pytest.raises(AssertionError, match="killed at step"):
        test_a_crash_before_any_step_loses_nothing_and_doubles_nothing(tmp_path, {}, True)


# -- through Bytewax ------------------------------------------------------------------------------------------------


class Gated(FixedPartitionedSource[pa.RecordBatch, int]):
    """Gives out `items` one by one and opens the gate as `PgOutputSource` does. Aborts once before each of `aborts`."""

    def __init__(self, items: list[pa.RecordBatch], aborts: Iterable[int] = ()) -> None:
        self.items = items
        self.aborts = set(aborts)

    def list_parts(self) -> list[str]:
        return ["orders"]

    def build_part(self, step_id: str, for_part: str, resume_state: int | None) -> GatedPart:
        return GatedPart(self, resume_state or 0)


class GatedPart(StatefulSourcePartition[pa.RecordBatch, int]):
    def __init__(self, source: Gated, position: int) -> None:
        self.source = source
        self.position = position
        self.waiting = False
        gate.source_opened("orders")

    def _gate(self) -> None:
        if self.waiting:
            self.waiting = False
            gate.opened("orders")

    def next_batch(self) -> list[pa.RecordBatch]:
        self._gate()
        if self.position in self.source.aborts:
            self.source.aborts.remove(self.position)
            raise AbortExecution
        if self.position == len(self.source.items):
            gate.drain()
            gate.source_finished("orders")
            raise StopIteration
        self.position += 1
        return [self.source.items[self.position - 1]]

    def snapshot(self) -> int:
        self._gate()
        self.waiting = True
        return self.position

    def close(self) -> None:
        gate.source_closed("orders")


def orders_flow(source: Gated, out: Path, **options: Any) -> Dataflow:
    """Every batch to out/orders; at the end of the input, the number of rows to out/totals."""
    flow = Dataflow("orders")
    batches = op.input("in", flow, source)
    op.output("orders", op.key_on("keyed", batches, lambda b: "x"), ParquetSink(out / "orders", **options))
    sizes = op.key_on("sized", op.map("size", batches, len), lambda n: "x")
    totals = op.fold_final("total", sizes, lambda: 0, lambda a, b: a + b)
    rows = op.map_value("row", totals, lambda n: pa.RecordBatch.from_pylist([{"id": n}]))
    op.output("totals", rows, ParquetSink(out / "totals"))
    return flow


def test_a_flow_that_is_aborted_and_resumed_publishes_each_change_once(tmp_path: Path) -> None:
    source = Gated([changes(ORDERS, i * 10, 10) for i in range(12)], aborts=[3, 6, 9])
    store = new_store(tmp_path)
    for number in range(4):
        run(orders_flow(source, tmp_path / "out", max_rows=85, max_age=timedelta(hours=1)), store)
        gate.finish()
        assert len(published(tmp_path / "out/orders")) == (0, 0, 80, 120)[number]
    assert published(tmp_path / "out/orders") == list(range(120))
    assert published(tmp_path / "out/totals") == [120]
    assert staged(tmp_path / "out/orders") == staged(tmp_path / "out/totals") == []


def test_what_a_flow_emits_at_its_end_is_visible_only_when_the_run_has_returned(tmp_path: Path) -> None:
    run(orders_flow(Gated([changes(ORDERS, 0, 5)]), tmp_path))
    assert published(tmp_path / "totals") == []
    assert staged(tmp_path / "totals") == [".committed"]
    gate.finish()
    assert published(tmp_path / "totals") == [5]
    assert published(tmp_path / "orders") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("recovery", [True, False], ids=["with recovery", "without"])
def test_what_was_not_finished_is_published_by_the_next_start(tmp_path: Path, recovery: bool) -> None:
    store = new_store(tmp_path) if recovery else None
    run(orders_flow(Gated([changes(ORDERS, 0, 5)]), tmp_path / "out"), store)
    gate.abandon()
    assert published(tmp_path / "out/totals") == []
    items = [changes(ORDERS, 0, 5), changes(ORDERS, 5, 5)] if recovery else [changes(ORDERS, 5, 5)]
    run(orders_flow(Gated(items), tmp_path / "out"), store)
    gate.finish()
    assert published(tmp_path / "out/orders") == list(range(10))
    assert published(tmp_path / "out/totals") == [5, 5]


PLACES = [str(each) for each in Path(__file__).parents[:2]]  # of this module and the harness

SCRIPT = """
import sys
sys.path[:0] = {tests!r}
from test_parquet import *
flow = orders_flow(Gated([changes(ORDERS, i * 10, 10) for i in range(5)]), Path({out!r}))
if {workers} == 1:
    run(flow)
else:
    from bytewax.testing import cluster_main
    cluster_main(flow, [], 0, epoch_interval=timedelta(0), worker_count_per_proc={workers})
{then}
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_the_end_of_the_program_publishes_the_last_files(tmp_path: Path, workers: int) -> None:
    script = SCRIPT.format(tests=PLACES, out=str(tmp_path), workers=workers, then="")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert published(tmp_path / "totals") == [50]
    assert published(tmp_path / "orders") == list(range(50))


def test_an_exception_after_the_run_leaves_the_last_files_to_the_next_start(tmp_path: Path) -> None:
    script = SCRIPT.format(
        tests=PLACES,
        out=str(tmp_path),
        workers=1,
        then="raise RuntimeError",
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60).returncode == 1
    assert published(tmp_path / "totals") == []
    ParquetSink(tmp_path / "totals").build_part("f.totals", "parquet", None).close()
    assert published(tmp_path / "totals") == [50]


# -- rolling --------------------------------------------------------------------------------------------------------


class Epochs:
    """A sink part between a source and a recovery store that never fail."""

    def __init__(self, folder: Path, **options: Any) -> None:
        gate.source_opened("orders")
        self.part = ParquetSink(folder, **options).build_part("flow.out", "parquet", None)

    def write(self, *batches: pa.RecordBatch) -> None:
        self.part.write_batch(list(batches))
        self.part.snapshot()
        gate.opened("orders")


def test_small_epochs_are_merged_until_a_limit_is_reached(tmp_path: Path) -> None:
    epochs = Epochs(tmp_path, max_rows=100, max_age=timedelta(hours=1))
    for i in range(32):
        epochs.write(changes(ORDERS, i * 10, 10))
    assert [line["rows"] for line in index(tmp_path)] == [100, 100, 100]
    gate.drain()
    assert [line["rows"] for line in index(tmp_path)] == [100, 100, 100, 20]
    assert published(tmp_path) == list(range(320))
    assert [line["first"] for line in index(tmp_path)] == ["0/1000#0", "0/1A00#0", "0/2400#0", "0/2E00#0"]
    assert index(tmp_path)[-1]["last"] == "0/2F00#9"
    assert files(tmp_path) == [line["file"] for line in index(tmp_path)], "names sort by position"


def test_a_row_waits_no_longer_than_max_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1_790_000_000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    epochs = Epochs(tmp_path, max_age=timedelta(seconds=60))
    for i in range(6):
        epochs.write(changes(ORDERS, i * 10, 10))
        clock[0] += 9
    assert files(tmp_path) == []
    clock[0] += 6
    gate.opened("orders")  # an epoch without data
    assert [line["rows"] for line in index(tmp_path)] == [60]


def test_no_more_than_64_epochs_wait(tmp_path: Path) -> None:
    epochs = Epochs(tmp_path, max_age=timedelta(hours=1))
    for i in range(70):
        epochs.write(changes(ORDERS, i, 1))
    assert [line["rows"] for line in index(tmp_path)] == [64]


def test_a_large_part_is_renamed_and_never_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_module, "merge", None)
    epochs = Epochs(tmp_path, max_rows=1000)
    epochs.write(changes(ORDERS, 0, 5200))
    assert [line["rows"] for line in index(tmp_path)] == [1000] * 5 + [200]
    assert published(tmp_path) == list(range(5200))


def test_a_file_holds_one_version_of_one_table_and_a_tables_files_appear_in_order(tmp_path: Path) -> None:
    epochs = Epochs(tmp_path, max_rows=100, max_age=timedelta(hours=1))
    epochs.write(changes(ORDERS, 0, 5), changes(ITEMS, 5, 5), changes(ORDERS, 10, 5))
    epochs.write(changes(WIDER, 15, 20))
    assert [(line["table"], line["rows"]) for line in index(tmp_path)] == [("public.orders", 10), ("public.orders", 20)]
    gate.drain()
    assert [line["table"] for line in index(tmp_path)] == ["public.orders", "public.orders", "public.items"]
    table = read(tmp_path).to_table().sort_by("id")
    assert table.column("discount").to_pylist() == [None] * 15 + [i % 3 for i in range(15, 35)]
    assert pq.read_schema(tmp_path / files(tmp_path)[-1]).metadata[b"pg.table"] == b"public.orders"


def test_data_without_positions_is_named_by_time(tmp_path: Path) -> None:
    epochs = Epochs(tmp_path, max_age=timedelta(0))
    for i in range(3):
        epochs.write(pa.record_batch({"id": [i]}))
    assert published(tmp_path) == [0, 1, 2]
    assert [line["first"] for line in index(tmp_path)] == [None] * 3
    assert files(tmp_path) == [line["file"] for line in index(tmp_path)]


def test_memory_holds_no_more_than_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_module, "ROW_GROUP_BYTES", 1 << 20)
    monkeypatch.setattr(parquet_module, "ROW_GROUP_ROWS", 2000)
    epochs = Epochs(tmp_path)
    kinds = [schema(f"t{i}") for i in range(20)]
    for i in range(200):
        epochs.part.write_batch([changes(kinds[i % 20], i * 1000, 1000)])
        assert sum(writing.waiting_rows for writing in epochs.part.open) <= 20_000
        assert sum(writing.waiting_bytes for writing in epochs.part.open) < 1 << 20
    epochs.write()
    gate.drain()
    assert published(tmp_path) == list(range(200_000))


def test_a_very_large_value_gets_a_part_and_columns_that_hold_one_no_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow would hold it many times over, only to leave its statistics out of the file."""
    monkeypatch.setattr(parquet_module, "ROW_GROUP_BYTES", 1 << 16)
    monkeypatch.setattr(writing_module, "ROW_GROUP_BYTES", 1 << 16)
    small, noise = changes(ORDERS, 0, 10), random.Random(0).randbytes(1 << 16).hex()
    large = changes(ORDERS, 10, 2).set_column(1, ORDERS.field("note"), pa.array(["small", noise]))
    epochs = Epochs(tmp_path, max_age=timedelta(hours=1))
    epochs.write(small, large, changes(ORDERS, 12, 10))
    assert len(epochs.part.committed_parts) == 2
    first, second = (pq.read_metadata(epochs.part.folder.staged[part.name]) for part in epochs.part.committed_parts)
    gate.drain()

    def with_statistics(file: pq.FileMetaData, column: str) -> set[bool]:
        at = {file.row_group(0).column(i).path_in_schema: i for i in range(file.num_columns)}[column]
        return {file.row_group(i).column(at).is_stats_set for i in range(file.num_row_groups)}

    assert (first.num_rows, second.num_rows) == (10, 12)
    merged = pq.read_metadata(tmp_path / files(tmp_path)[0])
    for file, notes in ((first, {True}), (second, {False}), (merged, {False})):
        assert with_statistics(file, "note") == notes
        assert with_statistics(file, "id") == with_statistics(file, "_before.id") == {True}
    assert merged.num_rows == 22
    assert read(tmp_path).to_table(columns=["note"]).column("note")[11].as_py() == noise


# -- what others read -----------------------------------------------------------------------------------------------


def test_every_value_survives_and_other_programs_read_it(tmp_path: Path) -> None:
    batches = [changes(ORDERS, i * 50, 50, "IUDR") for i in range(4)]
    epochs = Epochs(tmp_path, max_age=timedelta(hours=1))
    for batch in batches:
        epochs.write(batch)
    gate.drain()
    expected = pa.Table.from_batches(batches)
    assert len(files(tmp_path)) == 1, "merged"
    assert read(tmp_path).to_table().equals(expected)
    kept = pq.read_schema(tmp_path / files(tmp_path)[0])
    assert (kept, kept.metadata) == (ORDERS, ORDERS.metadata)
    assert len(json.loads(pq.read_metadata(tmp_path / files(tmp_path)[0]).metadata[b"pgoutput_source"])["names"]) == 4
    assert [kept.field(name).metadata for name in ORDERS.names] == [
        ORDERS.field(name).metadata for name in ORDERS.names
    ]
    glob = f"{tmp_path}/**/*.parquet"
    rows = duckdb.execute(
        f"SELECT id, note, _op, _commit_lsn, _seq, _before.id, _unchanged FROM '{glob}' ORDER BY id"
    ).fetchall()
    assert rows == [
        (r["id"], r["note"], r["_op"], r["_commit_lsn"], r["_seq"], (r["_before"] or {}).get("id"), r["_unchanged"])
        for r in expected.to_pylist()
    ]
    frame = pl.read_parquet(glob).sort("id")
    assert frame.drop("_raw").to_dicts() == expected.drop(["_raw"]).to_pylist()


def test_staged_files_are_out_of_sight(tmp_path: Path) -> None:
    epochs = Epochs(tmp_path)
    epochs.write(changes(ORDERS, 0, 10))
    epochs.part.write_batch([changes(ORDERS, 10, 10)])
    epochs.part.snapshot()
    assert staged(tmp_path) == [".committed", ".staged"]
    assert list(tmp_path.rglob("*.parquet")) == []


# -- what a run finds -----------------------------------------------------------------------------------------------


def close(epochs: Epochs) -> None:
    epochs.part.close()
    gate.source_closed("orders")


def test_a_fresh_run_goes_on_behind_old_files_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Epochs(tmp_path, max_age=timedelta(0))
    first.write(changes(ORDERS, 0, 10))
    close(first)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with caplog.at_level("INFO"):
        second = Epochs(tmp_path, max_age=timedelta(0))
    assert "holds 1 files, 10 rows up to 0/1000#9; continuing after them" in caplog.text
    second.write(changes(ORDERS, 10, 10))
    assert published(tmp_path) == list(range(20))
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())


def test_changes_of_another_slot_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    first = Epochs(tmp_path, max_age=timedelta(0))
    first.write(changes(ORDERS, 0, 10))
    close(first)
    other = schema(origin=(*ORIGIN[:2], ("slot", "other")))
    second = Epochs(tmp_path)
    with pytest.raises(
        SinkError, match=r"holds changes of database 'shop', slot 'orders'.*these are of .*slot 'other'"
    ):
        second.part.write_batch([changes(other, 10, 10)])
    assert staged(tmp_path) == []
    second.part.write_batch([pa.record_batch({"id": [99]})])  # does not say where it comes from


def test_a_parquet_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1]}), tmp_path / "mine.parquet")
    with pytest.raises(SinkError, match=r"mine\.parquet was not written by this sink"):
        Epochs(tmp_path)
    (tmp_path / "mine.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(SinkError, match="damaged"):
        Epochs(tmp_path)
    assert not (tmp_path / "_index.jsonl").exists()


def test_the_index_is_repaired_from_the_files(tmp_path: Path) -> None:
    first = Epochs(tmp_path, max_age=timedelta(0))
    for i in range(4):
        first.write(changes(ORDERS, i * 10, 10))
    close(first)
    whole = index(tmp_path)
    path = tmp_path / "_index.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{}\n" + lines[2] + lines[3][:40])
    close(Epochs(tmp_path))
    (tmp_path / "_index.jsonl").write_text("\n".join(x for x in path.read_text().splitlines() if x != "{}") + "\n")
    keys = ("file", "rows", "first", "last", "parts", "table", "bytes", "origin")
    mended = sorted(({k: line[k] for k in keys} for line in index(tmp_path)), key=lambda line: line["file"])
    assert mended == [{k: line[k] for k in keys} for line in whole]


def test_two_sinks_on_one_folder_are_refused(tmp_path: Path) -> None:
    first = Epochs(tmp_path)
    with pytest.raises(SinkError, match=f"is in use by process {os.getpid()}"):
        ParquetSink(tmp_path).build_part("flow.other", "parquet", None)
    first.part.close()
    ParquetSink(tmp_path).build_part("flow.other", "parquet", None).close()


def test_a_process_without_a_gate_publishes_with_the_next_snapshot_and_leaves_the_rest(tmp_path: Path) -> None:
    part = ParquetSink(tmp_path, max_age=timedelta(0)).build_part("flow.out", "parquet", None)
    part.write_batch([changes(ORDERS, 0, 10)])
    part.snapshot()
    assert published(tmp_path) == []
    part.write_batch([changes(ORDERS, 10, 10)])
    part.snapshot()
    assert published(tmp_path) == list(range(10))
    part.close()
    assert staged(tmp_path) == [".unproven"]
    ParquetSink(tmp_path).build_part("flow.out", "parquet", None).close()
    assert published(tmp_path) == list(range(20))


def test_a_recovery_folder_that_is_older_than_the_files_is_refused(tmp_path: Path) -> None:
    gate.source_opened("orders")
    sink = ParquetSink(tmp_path, max_age=timedelta(0))
    part = sink.build_part("flow.out", "parquet", None)
    states = []
    for i in range(3):
        part.write_batch([changes(ORDERS, i * 10, 10)])
        states.append(part.snapshot())
        gate.opened("orders")
    part.close()
    with pytest.raises(SinkError, match="ahead of the recovery folder") as caught:
        sink.build_part("flow.out", "parquet", states[0])
    for name in files(tmp_path)[1:]:
        assert name in str(caught.value)
        (tmp_path / name).rename(tmp_path / f"{name}.away")
    again = sink.build_part("flow.out", "parquet", states[0])
    again.write_batch([changes(ORDERS, 10, 20)])
    state = again.snapshot()
    again.close()
    sink.build_part("flow.out", "parquet", state).drain()
    assert published(tmp_path) == list(range(30))


def test_a_part_that_somebody_removed_is_missed(tmp_path: Path) -> None:
    gate.source_opened("orders")
    sink = ParquetSink(tmp_path)
    part = sink.build_part("flow.out", "parquet", None)
    part.write_batch([changes(ORDERS, 0, 10)])
    state = part.snapshot()
    part.close()
    next((tmp_path / "_staging").glob("*.staged")).unlink()
    with pytest.raises(SinkError, match=r"part .* with 10 rows is gone"):
        sink.build_part("flow.out", "parquet", state)
    with pytest.raises(StateError, match="another version"):
        sink.build_part("flow.out", "parquet", {"v": 99})


def test_a_folder_that_can_not_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SinkError, match=r"can't write to .*Not a directory") as caught:
        ParquetSink(tmp_path / "file/out").build_part("flow.out", "parquet", None)
    assert caught.value.hint


def test_a_full_disk_is_an_error_and_nothing_of_it_is_visible_or_lost(tmp_path: Path) -> None:
    gate.source_opened("orders")
    sink = ParquetSink(tmp_path, max_rows=2000, max_age=timedelta(0))
    part = sink.build_part("flow.out", "parquet", None)
    part.write_batch([changes(ORDERS, 0, 1000)])
    state = part.snapshot()
    gate.opened("orders")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(SinkError, match=r"can't write .*File too large"):
            part.write_batch([changes(ORDERS, 1000 + i * 2000, 2000) for i in range(10)])
        part.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert published(tmp_path) == list(range(1000))
    assert staged(tmp_path) == []
    sink.build_part("flow.out", "parquet", state).close()
    assert published(tmp_path) == list(range(1000))


def test_options_that_make_no_sense_are_refused_where_they_are_written() -> None:
    for wrong in ({"max_rows": 0}, {"max_bytes": -1}, {"max_age": timedelta(-1)}, {"compression": "zip"}):
        with pytest.raises(ConfigurationError):
            ParquetSink("never/made", **wrong)
    ParquetSink("never/made", compression="snappy")
    assert not Path("never").exists()


def test_only_batches_are_taken(tmp_path: Path) -> None:
    with pytest.raises(SinkError, match="not dict"):
        Epochs(tmp_path).part.write_batch([{"id": 1}])


def test_columns_whose_types_can_not_be_widened_are_read_as_text(tmp_path: Path) -> None:
    epochs = Epochs(tmp_path, max_age=timedelta(0))
    epochs.write(pa.record_batch({"id": [1]}), pa.record_batch({"id": ["one"]}))
    found = read(tmp_path).to_table().column("id")
    assert (found.type, sorted(found.to_pylist())) == (pa.utf8(), ["1", "one"])


def test_dictionaries_and_deltas_go_where_they_pay(tmp_path: Path) -> None:
    row = pa.struct([pa.field("id", pa.int64()), pa.field("note", pa.utf8())])
    kind = pa.schema([*row, *metadata_fields(row)])
    epochs = Epochs(tmp_path)
    epochs.write(changes(kind, 0, 200_000))
    chunk = pq.ParquetFile(tmp_path / files(tmp_path)[0]).metadata.row_group(0)
    found = {chunk.column(i).path_in_schema: chunk.column(i).encodings for i in range(chunk.num_columns)}
    assert {name for name, encodings in found.items() if "RLE_DICTIONARY" in encodings} == {"note", "_op"}
    assert {name for name, encodings in found.items() if "DELTA_BINARY_PACKED" in encodings} >= {
        "id",
        "_commit_lsn",
        "_seq",
    }
    assert pc.sum(read(tmp_path).to_table().column("id")).as_py() == sum(range(200_000))
