"""The sinks beside Parquet, and exactly-once sinks of one's own: crashes at every step, and values as PostgreSQL's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import bytewax.operators as op
import pyarrow as pa
import pytest
from bytewax.dataflow import Dataflow
from bytewax.errors import BytewaxRuntimeError
from bytewax.inputs import AbortExecution, FixedPartitionedSource, StatefulSourcePartition
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.testing import run_main
from harness.database import Database
from harness.sqlite_sink import SqliteSink, orders

from pgoutput_source import ChangeBatch, peek
from pgoutput_source.dataflow.run import gate
from pgoutput_source.errors import SinkError, StateError
from pgoutput_source.sinks import IpcSink, JsonLinesSink
from pgoutput_source.testing import batch

BATCHES = 5
ROWS = 4


@pytest.fixture(autouse=True)
def _no_gate_is_left() -> Iterator[None]:
    gate.abandon()
    yield
    gate.abandon()


# -- a sink of one's own --------------------------------------------------------------------------------------------


class Crash(Exception):
    """The process is gone."""


class Fragile(SqliteSink):
    """Counts the steps of a run, before and after each call, and crashes at one of them."""

    steps = 0
    crash_at: int | None = None

    def step(self) -> None:
        if self.steps == self.crash_at:
            raise Crash
        self.steps += 1

    def stage(self, token: str, items: list[ChangeBatch]) -> None:
        self.step()
        super().stage(token, items)
        self.step()

    def publish(self, token: str) -> None:
        self.step()
        super().publish(token)
        self.step()

    def discard(self, token: str) -> None:
        self.step()
        super().discard(token)
        self.step()


class Hasty(Fragile):
    """A sink that shows what may still be lost."""

    def stage(self, token: str, items: list[ChangeBatch]) -> None:
        super().stage(token, items)
        super().publish(token)


class Slot(FixedPartitionedSource[ChangeBatch, int]):
    """A slot that is acknowledged behind the gate, as `PgOutputSource` does it: batches with the ids 0, 1, 2 …"""

    def __init__(self, aborts: tuple[int, ...] = ()) -> None:
        self.acknowledged = 0
        self.aborts = set(aborts)

    def list_parts(self) -> list[str]:
        return ["orders"]

    def build_part(self, step_id: str, for_part: str, resume_state: int | None) -> SlotPart:
        return SlotPart(self, self.acknowledged if resume_state is None else resume_state)


class SlotPart(StatefulSourcePartition[ChangeBatch, int]):
    def __init__(self, slot: Slot, position: int) -> None:
        self.slot, self.position = slot, position
        self.staged: int | None = None
        gate.source_opened("orders")

    def _gate(self) -> None:
        if self.staged is not None:
            gate.opened("orders")
            self.slot.acknowledged, self.staged = self.staged, None

    def next_batch(self) -> list[ChangeBatch]:
        self._gate()
        if self.position in self.slot.aborts:
            self.slot.aborts.remove(self.position)
            raise AbortExecution
        if self.position == BATCHES:
            if self.slot.acknowledged < BATCHES:
                return []
            gate.source_finished("orders")
            raise StopIteration
        self.position += 1
        return [made(self.position - 1)]

    def snapshot(self) -> int:
        self._gate()
        self.staged = self.position
        return self.position

    def close(self) -> None:
        gate.source_closed("orders")


def made(number: int) -> ChangeBatch:
    first = number * ROWS
    return batch("public.orders", [("I", {"id": i}) for i in range(first, first + ROWS)], lsn=1000 + first)


IDS = list(range(BATCHES * ROWS))


def run(slot: Slot, sink: Any, store: Path | None) -> None:
    flow = Dataflow("orders")
    op.output("out", op.key_on("key", op.input("in", flow, slot), lambda item: item.table), sink)
    recovery = RecoveryConfig(str(store)) if store else None  # type: ignore[no-untyped-call]
    run_main(flow, epoch_interval=timedelta(0), recovery_config=recovery)  # type: ignore[no-untyped-call]
    gate.finish()


def new_store(folder: Path) -> Path:
    init_db_dir(folder, 1)  # type: ignore[no-untyped-call]
    return folder


def crashed_and_resumed(folder: Path, kind: type[Fragile], crash_at: int | None, *, recovery: bool = True) -> Fragile:
    """The sink of a flow that crashed at a step, and was started again."""
    folder.mkdir()
    store = new_store(folder) if recovery else None
    slot, sink = Slot(), kind(folder / "orders.db")
    sink.crash_at = crash_at
    if crash_at is not None:
        with pytest.raises(BytewaxRuntimeError):
            run(slot, sink, store)
        gate.abandon()
        sink.crash_at = None
    run(slot, sink, store)
    return sink


def test_a_sink_of_thirty_lines_is_exactly_once_whatever_step_it_crashes_at(tmp_path: Path) -> None:
    steps = crashed_and_resumed(tmp_path / "whole", Fragile, None).steps
    assert steps == 4 * BATCHES
    for crash_at in range(steps):
        sink = crashed_and_resumed(tmp_path / str(crash_at), Fragile, crash_at)
        assert (orders(sink), sink.staged()) == (IDS, []), f"crashed at step {crash_at}"


def test_without_recovery_it_loses_nothing_and_publishes_what_was_acknowledged_once(tmp_path: Path) -> None:
    for crash_at in range(0, 4 * BATCHES, 3):
        sink = crashed_and_resumed(tmp_path / str(crash_at), Fragile, crash_at, recovery=False)
        assert (sorted(set(orders(sink))), sink.staged()) == (IDS, [])
        assert len(orders(sink)) <= len(IDS) + ROWS


def test_the_crashes_would_show_a_sink_that_publishes_too_early(tmp_path: Path) -> None:
    assert orders(crashed_and_resumed(tmp_path / "early", Hasty, 3)) == sorted(IDS + IDS[:ROWS])


def test_aborts_and_resumes_in_any_epoch_publish_each_item_once(tmp_path: Path) -> None:
    slot, sink, store = Slot(aborts=(0, 1, 3, 4)), SqliteSink(tmp_path / "orders.db"), new_store(tmp_path)
    for _ in range(5):
        run(slot, sink, store)
    assert (orders(sink), sink.staged()) == (IDS, [])


def test_what_a_process_without_a_gate_staged_is_published_by_the_next_start(tmp_path: Path) -> None:
    sink = SqliteSink(tmp_path / "orders.db")
    part = sink.build_part("orders.out", "two-phase", None)
    for number in range(2):
        part.write_batch([made(number)])
        part.snapshot()
    part.close()
    assert orders(sink) == IDS[:ROWS], "a snapshot proves the one before"
    sink.build_part("orders.out", "two-phase", None).close()
    assert (orders(sink), sink.staged()) == (IDS[: 2 * ROWS], [])
    with pytest.raises(StateError, match="another version"):
        sink.build_part("orders.out", "two-phase", {"v": 99})


# -- Arrow IPC ------------------------------------------------------------------------------------------------------


def arrows(folder: Path) -> list[pa.Table]:
    return [pa.ipc.open_stream(file).read_all() for file in sorted(folder.glob("*.arrows"))]


def test_ipc_files_hold_each_row_once_in_order_after_aborts(tmp_path: Path) -> None:
    slot, sink, store = Slot(aborts=(1, 3)), IpcSink(tmp_path / "out"), new_store(tmp_path)
    for _ in range(3):
        run(slot, sink, store)
    assert [id for table in arrows(tmp_path / "out") for id in table["id"].to_pylist()] == IDS
    assert list((tmp_path / "out" / "_staging").iterdir()) == []


def test_ipc_files_keep_the_schema_and_hold_one_version_of_a_table_each(tmp_path: Path) -> None:
    wider = batch("public.orders", [("I", {"id": 1, "note": "x"})])
    sink = IpcSink(tmp_path)
    sink.stage("0-1", [made(0), wider, made(1), pa.table({"n": [1]})])
    assert arrows(tmp_path) == []
    sink.publish("0-1")
    one, two, three = arrows(tmp_path)
    assert one.equals(pa.Table.from_batches([made(0).data, made(1).data]))
    assert (one.schema.metadata, two.schema) == (made(0).data.schema.metadata, wider.data.schema)
    assert three.to_pylist() == [{"n": 1}]
    sink.publish("0-1")
    sink.stage("0-1", [wider])
    with pytest.raises(SinkError, match="ahead of the recovery folder"):
        sink.publish("0-1")
    with pytest.raises(SinkError, match="not dict"):
        sink.stage("0-2", [{"id": 1}])


def test_ipc_files_that_a_crash_left_half_written_are_never_published(tmp_path: Path) -> None:
    sink = IpcSink(tmp_path)
    sink.stage("0-00000001-unproven", [made(0)])
    whole = next((tmp_path / "_staging").glob("*.arrows")).read_bytes()
    (tmp_path / "_staging" / "0-00000002-unproven-0000.writing").write_bytes(whole[:100])
    sink.build_part("flow.out", "two-phase", None).close()
    assert [table["id"].to_pylist() for table in arrows(tmp_path)] == [IDS[:ROWS]]
    assert list((tmp_path / "_staging").iterdir()) == []


# -- lines of JSON --------------------------------------------------------------------------------------------------


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: Path | None, *items: Any) -> None:
    part = JsonLinesSink(file).build_part("flow.out", "jsonl", None)
    try:
        part.write_batch(list(items))
        part.snapshot()
    finally:
        part.close()


def test_lines_come_at_least_once_and_whole(tmp_path: Path) -> None:
    file, store = tmp_path / "out" / "orders.jsonl", new_store(tmp_path)
    slot = Slot(aborts=(1, 3))
    for number in range(3):
        run(slot, JsonLinesSink(file), store)
        if number < 2:
            with file.open("a") as torn:
                torn.write('{"id": 1' + "7" * 70_000 * number)
    assert sorted({row["id"] for row in lines(file)}) == IDS


TABLE = """
CREATE TABLE t (
    id int PRIMARY KEY, n numeric, p numeric(12,2), r real, d double precision, x text, b bytea, j jsonb, l text[],
    day date, at timestamptz, u uuid, doc text
);
ALTER TABLE t ALTER doc SET STORAGE EXTERNAL;
CREATE PUBLICATION t FOR TABLE t;
SELECT pg_create_logical_replication_slot('t', 'pgoutput');
INSERT INTO t VALUES
 (1, 12345678901234567890.123456789, 1.50, 0.1, 1e300, E'\\u0141 "\\n', '\\x00ff',
  '{"n": 0.1, "m": [1, null]}', '{a,NULL,"b c"}', '2024-02-29', '2024-02-29 12:00:00.123456+00',
  '00000000-0000-0000-0000-000000000001', repeat('long ', 2000)),
 (2, 'NaN', 'NaN', 'NaN', '-Infinity', '', '', 'null', '{}', 'infinity', '-infinity', NULL, NULL),
 (3, NULL, NULL, NULL, NULL, NULL, NULL, NULL, '{{a,b},{c,d}}', '0044-03-15 BC', '10000-01-01 00:00+00', NULL, '');
"""


def test_postgresql_reads_the_same_rows_back_from_the_lines(db: Database, tmp_path: Path) -> None:
    connection = db.connect()
    for statement in TABLE.split(";\n"):
        connection.execute(statement.encode())
    (changes,) = peek(db.dsn, slot="t", publication="t")
    write(tmp_path / "t.jsonl", changes)
    connection.execute("CREATE TABLE back (LIKE t)")
    for row in lines(tmp_path / "t.jsonl"):
        row |= dict(row.get("_raw") or {})
        populate = "INSERT INTO back SELECT * FROM jsonb_populate_record(NULL::back, %s::jsonb)"
        connection.execute(populate, [json.dumps(row)])
    # As text, for NaN and the null of jsonb; that null and NULL are one in JSON.
    rows = "SELECT t::text FROM (SELECT id, n, p, r, d, x, b, nullif(j, 'null') j, l, day, at, u, doc FROM {}) t"
    there, back = (sorted(connection.execute(rows.format(name).encode()).fetchall()) for name in ("t", "back"))
    assert back == there


def test_what_postgresql_did_not_send_is_absent(db: Database, tmp_path: Path) -> None:
    connection = db.connect()
    for statement in TABLE.split(";\n"):
        connection.execute(statement.encode())
    connection.execute("UPDATE t SET p = 2 WHERE id = 1")
    connection.execute("UPDATE t SET id = 9 WHERE id = 2")
    connection.execute("DELETE FROM t WHERE id = 3")
    (changes,) = peek(db.dsn, slot="t", publication="t")
    write(tmp_path / "t.jsonl", changes)
    update, moved, delete = lines(tmp_path / "t.jsonl")[3:]
    assert (update["p"], update["_unchanged"], "doc" in update, "_before" in update) == ("2.00", ["doc"], False, False)
    assert (moved["id"], moved["_before"], moved["doc"]) == (9, {"id": 2}, None)
    assert (delete["_op"], delete["id"], delete["_before"]) == ("D", 3, {"id": 3})


def test_events_dicts_and_tables_become_lines_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    event = next(made(0).events())
    write(None, event, {"city": "Ōsaka", "raw": b"\x01", "n": float("nan")}, pa.table({"n": [1, None]}))
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == event.model_dump_json()
    assert rest == ['{"city": "Ōsaka", "raw": "\\\\x01", "n": "NaN"}', '{"n": 1}', '{"n": null}']


def test_what_is_not_json_is_refused_and_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(SinkError, match="not of int"):
        write(tmp_path / "x", 1)
    with pytest.raises(SinkError, match="timedelta"):
        write(tmp_path / "x", {"t": timedelta(1)})
    with pytest.raises(SinkError, match="not Unicode"):
        write(tmp_path / "x", {"t": "\ud800"})
    with pytest.raises(SinkError, match="can't write to"):
        write(tmp_path / "x" / "y", {"t": 1})
