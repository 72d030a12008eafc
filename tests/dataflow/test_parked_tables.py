"""With on_table_error="park" a table waits, the others go on, and a replay delivers all of it, in order and once."""

from __future__ import annotations

import logging
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import bytewax.operators as op
import pyarrow as pa
import pytest
from bytewax.dataflow import Dataflow
from harness.database import Database
from harness.flow import Flow, publish
from harness.workload import Workload, differences, replayed, tables
from psycopg.conninfo import make_conninfo

import pgoutput_source.operators as cdc
from pgoutput_source import IpcSink, PgOutputReader, PgOutputSource, metrics, peek, run, stream
from pgoutput_source.changes import ChangeSet
from pgoutput_source.cli import main
from pgoutput_source.copy.requests import REQUEST
from pgoutput_source.errors import ConfigurationError, StateError
from pgoutput_source.settings import SourceSettings

Position = tuple[int, int]


class Parking:
    """A flow that takes all tables, and with on_misfit="error" can't decode a NaN in `amounts`."""

    def __init__(self, db: Database, folder: Path) -> None:
        self.db, self.out, self.store, self.folder = db, folder / "out", folder / "store", folder / "parked"
        self.c = db.connect()
        self.run_sql("CREATE TABLE orders (id int PRIMARY KEY)")
        self.run_sql("CREATE TABLE amounts (id int PRIMARY KEY, n numeric(8, 2))")
        self.run_sql("CREATE PUBLICATION p FOR ALL TABLES")
        for slot in ("s", "whole"):
            self.run_sql(f"SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')")

    def run_sql(self, *statements: str) -> None:
        for statement in statements:
            self.c.execute(statement.encode())

    def run(self, *, recovery: bool = True, workers: int = 1, dsn: str = "", **options: Any) -> None:
        given: dict[str, Any] = {"slot": "s", "publication": "p", "until": "current", "on_misfit": "error"}
        given |= {"on_table_error": "park", "park_folder": self.folder, **options}
        flow = Dataflow("flow")
        changes = op.input("pg", flow, PgOutputSource(dsn or self.db.dsn, **given))
        cdc.output("out", op.flat_map("batches", changes, lambda s: s.batches), IpcSink(self.out))
        run(flow, recovery=self.store if recovery else None, epoch=timedelta(0), workers=workers)

    def replay(self, *arguments: str) -> int:
        return main(["replay", "--folder", str(self.folder), *arguments])

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "s").iterdir())

    def delivered(self, *names: str) -> list[tuple[Position, str, Any]]:
        """Position, operation and id of the changes of a table, as they were delivered."""
        found = []
        for file in sorted(self.out.glob("*.arrows")):
            for row in _read(file):
                if row[0] in names:
                    found.append(row[1:])
        return found

    def all_of(self, *names: str) -> list[tuple[Position, str, Any]]:
        """The same, as a slot has it that nobody consumed."""
        batches = [batch for batch in peek(self.db.dsn, slot="whole", publication="p") if batch.table in names]
        return sorted(row[1:] for batch in batches for row in _rows(batch.table, batch.data))


def _read(file: Path) -> list[tuple[str, Position, str, Any]]:
    with pa.memory_map(str(file)) as source:
        table = pa.ipc.open_stream(source).read_all()
        return [
            row for batch in table.to_batches() for row in _rows(table.schema.metadata[b"pg.table"].decode(), batch)
        ]


def _rows(table: str, data: pa.RecordBatch) -> list[tuple[str, Position, str, Any]]:
    rows = data.to_pylist()
    return [(table, (row["_commit_lsn"], row["_seq"]), row["_op"], str(sorted(row.items(), key=str))) for row in rows]


@pytest.fixture
def parking(db: Database, tmp_path: Path) -> Parking:
    return Parking(db, tmp_path)


def test_a_table_is_parked_the_others_go_on_and_a_replay_delivers_it_whole(
    parking: Parking, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    parking.run_sql("INSERT INTO orders VALUES (1)", "INSERT INTO amounts VALUES (1, 1)")
    parking.run()
    assert parking.files == []
    parking.run_sql(
        "BEGIN; INSERT INTO orders VALUES (2); INSERT INTO amounts VALUES (2, 'NaN'), (3, 3);"
        "INSERT INTO orders VALUES (3); COMMIT",
        "UPDATE amounts SET n = 4 WHERE id = 3",  # could be decoded, and has to wait
        "ALTER TABLE amounts ADD note text; INSERT INTO amounts VALUES (4, 4, 'more')",
    )
    parking.run()
    parking.run_sql(
        "INSERT INTO orders VALUES (4)",
        "TRUNCATE amounts, orders",
        "CREATE TYPE mood AS ENUM ('sad')",
        "ALTER TABLE amounts ADD m mood; INSERT INTO amounts VALUES (5, 5, 'x', 'sad')",
        "ALTER TABLE amounts RENAME TO sums; INSERT INTO sums VALUES (6, 'NaN'); UPDATE sums SET n = 7 WHERE id = 6",
        "DROP TABLE sums; CREATE TABLE amounts (id int PRIMARY KEY, t text); INSERT INTO amounts VALUES (7, 'again')",
    )
    parking.run()
    both = ("public.amounts", "public.sums")
    assert parking.delivered("public.orders") == parking.all_of("public.orders")
    assert parking.delivered(*both) == parking.all_of(*both)[:1]
    waiting = len(parking.all_of(*both)) - 1
    assert metrics.PARKED.labels("s", "public.amounts")._value.get() == waiting
    assert "table public.amounts is parked: its changes go to" in caplog.text
    assert parking.replay("--list") == 0
    assert parking.replay("--table", "public.orders") == 1
    said = capsys.readouterr()
    assert "slot s: public.amounts is parked, " in said.out
    assert "column n, type numeric" in said.out
    assert "public.orders: not parked" in said.err

    # What is not mended stays parked.
    assert parking.replay() == 0
    parking.run()
    assert "0 changes of public.amounts were replayed; the next can't be decoded" in caplog.text
    assert "replay.json" not in parking.files
    assert parking.delivered(*both) == parking.all_of(*both)[:1]
    with pytest.raises(ConfigurationError, match=r"changes of public\.amounts are parked"):
        parking.run(on_table_error="stop", park_folder=None, on_misfit="raw")

    # A mend without a replay does not let anything overtake.
    parking.run_sql("INSERT INTO amounts VALUES (8, 'later')")
    parking.run(on_misfit="raw")
    assert len(parking.delivered(*both)) == 1
    assert parking.replay("--table", "public.amounts") == 0
    parking.run_sql("INSERT INTO amounts VALUES (9, 'last')", "INSERT INTO orders VALUES (5)")
    parking.run(on_misfit="raw")
    assert parking.delivered(*both) == parking.all_of(*both)
    assert parking.delivered("public.orders") == parking.all_of("public.orders")
    assert parking.files == []
    assert metrics.PARKED.labels("s", "public.amounts")._value.get() == 0

    parking.run_sql("INSERT INTO amounts VALUES (10, 'direct')")
    parking.run(on_table_error="stop", park_folder=None)
    assert parking.delivered(*both) == parking.all_of(*both)
    assert parking.replay() == 1  # nothing is parked


def test_what_a_replay_can_decode_is_delivered_and_the_rest_waits_for_the_next(parking: Parking) -> None:
    parking.run_sql("INSERT INTO amounts VALUES (1, 'NaN')")
    parking.run()
    parking.run_sql("ALTER TABLE amounts ADD d date DEFAULT 'infinity'; INSERT INTO amounts VALUES (2, 2)")
    parking.run()
    parking.run_sql("UPDATE amounts SET n = 3, d = NULL WHERE id = 1")
    parking.run()
    assert parking.delivered("public.amounts") == []
    everything = parking.all_of("public.amounts")

    # 'NaN' is fine now, and a change of shape is not: the table changes its columns after its first change.
    parking.replay()
    parking.run(on_misfit="raw", on_schema_change="fail")
    assert parking.delivered("public.amounts") == everything[:1]
    parking.run_sql("INSERT INTO amounts VALUES (4)")
    parking.run(on_misfit="raw", on_schema_change="fail")
    assert parking.delivered("public.amounts") == everything[:1]
    parking.replay()
    parking.run(on_misfit="raw")
    assert parking.delivered("public.amounts") == parking.all_of("public.amounts")
    assert parking.files == []


def test_a_table_with_a_column_named_like_one_of_ours_is_replayed_with_another_prefix(
    parking: Parking, caplog: pytest.LogCaptureFixture
) -> None:
    parking.run_sql("CREATE TABLE audit (id int, _op text, _seq int); INSERT INTO audit VALUES (1, 'x', 2)")
    parking.run_sql("INSERT INTO orders VALUES (1); INSERT INTO audit VALUES (2); DELETE FROM orders; TRUNCATE audit")
    parking.run_sql(f"SELECT pg_logical_emit_message(true, '{REQUEST}', 'public.orders')")
    parking.run()
    assert len(parking.delivered("public.orders")) == 2
    assert 'no table is copied with on_table_error="park"' in caplog.text
    parking.replay()
    parking.run(metadata_prefix="cdc_")

    found = []
    for file in sorted(parking.out.glob("*.arrows")):
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_stream(source).read_all()
        if table.schema.metadata[b"pg.table"] == b"public.audit":
            found += table.select(["id", "_op", "_seq", "cdc_op"]).to_pydict().items()
    assert dict(found) == {
        "id": [1, 2, None],
        "_op": ["x", None, None],
        "_seq": [2, None, None],
        "cdc_op": ["I", "I", "T"],
    }
    assert parking.files == []


@pytest.mark.parametrize(("streaming", "workers", "binary"), [("on", 2, "off"), ("parallel", 1, "auto")])
def test_a_transaction_in_progress_and_values_in_binary_are_parked_as_they_came(
    parking: Parking, streaming: str, workers: int, binary: str
) -> None:
    options: dict[str, Any] = {"streaming": streaming, "workers": workers, "binary": binary, "streaming_memory": 50_000}
    options["dsn"] = make_conninfo(parking.db.dsn, options="-c logical_decoding_work_mem=64kB")
    parking.run_sql(
        "CREATE TYPE pair AS (a int, b text)",
        "CREATE TABLE large (id int PRIMARY KEY, p pair, n numeric(8, 2))",
        "BEGIN; INSERT INTO large SELECT i, row(i, 'x'::text)::pair, i FROM generate_series(1, 3000) i;"
        "INSERT INTO orders SELECT generate_series(1, 3000); INSERT INTO large VALUES (0, NULL, 'NaN');"
        "SAVEPOINT lost; UPDATE large SET n = 1; ROLLBACK TO lost; UPDATE large SET n = n + 1 WHERE id < 10; COMMIT",
        "DELETE FROM large WHERE id < 5",
    )
    parking.run(**options)
    assert parking.delivered("public.orders") == parking.all_of("public.orders")
    assert metrics.PARKED.labels("s", "public.large")._value.get() > 0
    parking.replay()
    parking.run(**options | {"on_misfit": "raw"})

    assert parking.delivered("public.large") == parking.all_of("public.large")
    assert parking.files == []


def test_a_flow_without_recovery_parks_at_least_once_and_replays_each_change_once(parking: Parking) -> None:
    parking.run_sql("INSERT INTO amounts VALUES (1, 'NaN')", "INSERT INTO amounts VALUES (2, 2)")
    parking.run(recovery=False)
    kept = parking.files
    parking.run_sql("INSERT INTO amounts VALUES (3, 3)")
    parking.run(recovery=False)
    assert len(parking.files) > len(kept)
    # As if a crash had come before the acknowledgement: the same changes are parked again.
    for name in kept:
        number = 1000 + int(name.split(".")[0])
        (parking.folder / "s" / f"{number:012d}.arrows").write_bytes((parking.folder / "s" / name).read_bytes())
    parking.replay()
    parking.run(recovery=False, on_misfit="raw")
    assert parking.delivered("public.amounts") == parking.all_of("public.amounts")
    assert parking.files == []


@pytest.mark.parametrize("by_set", [True, False], ids=["sets", "events"])
def test_a_reader_parks_and_repeats_a_replay_until_it_is_acknowledged(parking: Parking, by_set: bool) -> None:
    def got(*, ack: bool, **options: Any) -> list[tuple[str, int]]:
        given: dict[str, Any] = {"slot": "s", "publication": "p", "until": "current", "on_misfit": "error"}
        given |= {"on_table_error": "park", "park_folder": parking.folder, "max_frames": 1, **options}
        found = []
        with PgOutputReader(parking.db.dsn, **given) as reader:
            for change in reader.sets() if by_set else reader:
                for event in change.events() if isinstance(change, ChangeSet) else [change]:
                    found.append((event.table, event.row["id"]))
                if ack:
                    reader.ack(change)
        return found

    parking.run_sql(
        "CREATE TABLE sums (id int, d date)", "INSERT INTO orders VALUES (1)", "INSERT INTO amounts VALUES (0)"
    )
    parking.run_sql("INSERT INTO amounts VALUES (1, 'NaN')", "INSERT INTO sums VALUES (1, 'infinity')")
    parking.run_sql("INSERT INTO amounts VALUES (2, 2)", "INSERT INTO sums VALUES (2)", "INSERT INTO orders VALUES (2)")
    assert got(ack=False) == [("public.orders", 1), ("public.amounts", 0), ("public.orders", 2)]
    # What was not acknowledged and stands before what is parked comes again, too: by the replay.
    assert got(ack=True) == [("public.orders", 1), ("public.orders", 2)]
    assert got(ack=True) == []
    assert parking.replay() == 0
    parking.run_sql("INSERT INTO amounts VALUES (3, 3)")
    parked = [*(("public.amounts", id) for id in (0, 1, 2)), ("public.sums", 1), ("public.sums", 2)]
    for ack in (False, True):
        assert got(ack=ack, on_misfit="raw") == [*parked, ("public.amounts", 3)]
    assert parking.files == []
    parking.run_sql("INSERT INTO sums VALUES (3)")
    assert got(ack=True) == [("public.sums", 3)]


def test_what_does_not_fit_is_refused(parking: Parking) -> None:
    parking.run_sql("INSERT INTO amounts VALUES (1, 'NaN')")
    parking.run()
    parking.run_sql("INSERT INTO amounts VALUES (2, 2)")
    parking.run()
    last = parking.folder / "s" / parking.files[-1]
    kept = last.read_bytes()

    # Files that a state counts on, and somebody removed.
    last.unlink()
    with pytest.raises(StateError, match=r"1 parked changes of public\.amounts are not in"):
        parking.run(on_misfit="raw")
    # Files that no state knows, whose changes don't come again.
    ahead = last.with_name(f"{999:012d}.arrows")
    ahead.write_bytes(kept)
    with pytest.raises(StateError, match="ahead of the recovery folder"):
        parking.run(on_misfit="raw")
    ahead.rename(last)
    # Files of somebody else.
    table = pa.ipc.open_stream(kept).read_all()
    said = {**table.schema.metadata, b"pg.slot": b"other"}
    with pa.OSFile(str(ahead), "wb") as file, pa.ipc.new_stream(file, table.schema.with_metadata(said)) as stream:
        stream.write_table(table)
    with pytest.raises(StateError, match="changes of slot 'other'"):
        parking.run(on_misfit="raw")
    ahead.write_bytes(b"no Arrow")
    with pytest.raises(StateError, match="not a file of parked changes"):
        parking.run(on_misfit="raw")
    ahead.unlink()
    parking.replay()
    parking.run(on_misfit="raw")
    assert parking.delivered("public.amounts") == parking.all_of("public.amounts")

    base = {"dsn": "", "slot": "s", "publication": "p"}
    for options in (
        {"on_table_error": "park"},
        {"on_table_error": "park", "park_folder": "s3://lake/parked"},
        {"on_table_error": "park", "park_folder": "/parked", "snapshot": "initial"},
    ):
        with pytest.raises(ConfigurationError):
            SourceSettings.of(**base, **options)


@pytest.mark.parametrize("kept", [False, True], ids=["deleted", "a mistake that is noticed"])
def test_what_a_lost_epoch_parked_is_void(parking: Parking, monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    parking.run_sql("INSERT INTO orders VALUES (1)")
    parking.run()
    parking.run_sql("INSERT INTO amounts VALUES (1, 'NaN')")
    state, begin = stream.parking.Parking.state, stream.parking.Parking.__init__

    def synced_and_lost(self: stream.parking.Parking) -> dict[str, Any]:
        found = state(self)
        if found["tables"]:
            raise StateError("a crash")
        return found

    def as_if_it_counted(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options | {"state": None})

    with monkeypatch.context() as patched:
        patched.setattr(stream.parking.Parking, "state", synced_and_lost)
        with pytest.raises(StateError, match="a crash"):
            parking.run()
    assert len(parking.files) == 1
    assert parking.replay() == 0
    if kept:
        monkeypatch.setattr(stream.parking.Parking, "__init__", as_if_it_counted)
    parking.run(on_misfit="raw")  # with which nothing of what comes again has to be parked

    assert parking.delivered("public.amounts") == parking.all_of("public.amounts") * (1 + kept)
    assert parking.files == []


# -- kill -9 --------------------------------------------------------------------------------------------------------


def parked_flow(db: Database, folder: Path) -> Flow:
    return Flow(
        db,
        folder,
        PGOUTPUT_ON_TABLE_ERROR="park",
        PGOUTPUT_PARK_FOLDER=str(folder / "parked"),
        PGOUTPUT_ON_SCHEMA_CHANGE="fail",
        PGOUTPUT_MAX_FRAMES="500",
        PGOUTPUT_UNTIL="current",
        MAX_AGE="0",
    )


def killed(flow: Flow, place: str, passes: int, **environ: str) -> None:
    process = flow.start("-s", "0", *flow.recovery(), KILL_AT=f"{place}:{passes}", **environ)
    _, said = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, said


@pytest.mark.slow
def test_kill_9_while_parking_and_replaying_loses_and_repeats_nothing(db: Database, tmp_path: Path) -> None:
    publish(db)
    flow = parked_flow(db, tmp_path)
    with Workload(db.dsn, seed=5, tables=3, largest=300) as workload:
        workload.run(1_000)
        flow.run("-s", "0", *flow.recovery())
        workload.connection.execute("ALTER TABLE t1 ADD added int")
        for place in ("before what is parked is synced", "what is parked is synced"):
            workload.run(2_000)
            killed(flow, place, 2)
        flow.run("-s", "0", *flow.recovery())
        found, _ = replayed(flow.out)
        assert differences(found, tables(workload)) != [], "nothing was parked"
        assert main(["replay", "--folder", str(tmp_path / "parked")]) == 0
        workload.run(1_000)
        flow.environ["PGOUTPUT_ON_SCHEMA_CHANGE"] = "evolve"
        for place, passes in (
            ("in a replay", 2),
            ("what is parked is synced", 2),
            ("what was replayed is durable", 1),
            ("what was replayed is deleted", 1),
        ):
            killed(flow, place, passes)
        flow.run("-s", "0", *flow.recovery())

        found, _ = replayed(flow.out)

        assert differences(found, tables(workload)) == []
        assert list((tmp_path / "parked" / "cdc").iterdir()) == []
