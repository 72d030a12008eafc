"""The demonstration tells the truth: it passes on the real flow, and its check finds how files can lie."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import duckdb
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness.database import Database

from pgoutput_source.cli import demo
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.embedded import shop
from pgoutput_source.errors import PgOutputError
from pgoutput_source.protocol.wire import XLOG_DATA_HEADER


class Captured:
    """A shop after some traffic, and the changes of its orders in two Parquet files."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.folder = folder
        self.connection: psycopg.Connection[Any] = database.connect()
        self.slot = f"s_{database.name}"
        self.assembler = Assembler()
        shop.create(database.dsn)
        self.connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [self.slot])
        for _ in range(2):
            left = iter(range(60))
            shop.Workload(database.dsn, seed=5).run(lambda _, left=left: next(left, None) is None)  # type: ignore[misc]
            self.capture()

    def capture(self) -> None:
        query = (
            "SELECT int8send((lsn - '0/0')::bigint), data FROM pg_logical_slot_get_binary_changes(%s, NULL, NULL,"
            " 'proto_version', '1', 'publication_names', 'shop')"
        )
        rows = self.connection.execute(query, [self.slot]).fetchall()
        frames = [b"w" + bytes(lsn) + bytes(XLOG_DATA_HEADER - 9) + bytes(data) for lsn, data in rows]
        for batch in self.assembler.feed(frames).batches:
            if batch.table == "public.orders":
                pq.write_table(pa.table(batch.data), self.folder / f"{len(self.files):04}.parquet")

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.parquet"))

    def differences(self) -> list[str]:
        return demo.verify(self.connection, duckdb.connect(), self.folder).differences


@pytest.fixture
def captured(db: Database, tmp_path: Path) -> Captured:
    return Captured(db, tmp_path)


@pytest.mark.slow
def test_the_demonstration_passes_on_the_real_flow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bytewax")
    # A `flows` package of the user's own must not matter, nor may what is configured outside.
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("PGOUTPUT_DSN", "host=nowhere")
    monkeypatch.setenv("PGOUTPUT_UNTIL", "0/1")
    assert demo.run(3, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "agree with the tables, in every row of" in said
    (out,) = (tmp_path / "out").iterdir()
    ops = [
        op for file in out.glob("orders/*.parquet") for op in pq.read_table(file, columns=["_op"])["_op"].to_pylist()
    ]
    assert ops.count("R") > 100
    assert "I" in ops
    assert str(out) in said


def test_a_flow_that_ends_early_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bytewax")
    (tmp_path / "closed.py").write_text("raise SystemExit('closed for today')")
    monkeypatch.setattr(demo, "FLOW", "closed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    with pytest.raises(PgOutputError, match=r"the flow ended with code 1:\n.*closed for today"):
        demo.run(60, tmp_path / "out")


def test_files_that_hold_every_change_agree_with_the_tables(captured: Captured) -> None:
    # A note that is stored out of line isn't sent with this update, and must be found in an earlier change.
    captured.connection.execute(
        "INSERT INTO orders (id, customer_id, status, amount, note)"
        " SELECT 1000000, 1, 'new', 9.99, string_agg(md5(i::text), '') FROM generate_series(1, 300) i"
    )
    captured.connection.execute("UPDATE orders SET status = 'paid' WHERE id = 1000000")
    captured.capture()
    verdict = demo.verify(captured.connection, duckdb.connect(), captured.folder)
    assert verdict.differences == []
    assert verdict.tables == verdict.files
    assert sum(orders for _, orders, _ in verdict.tables) > 20
    assert verdict.changes > 40


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ("INSERT INTO orders (id, customer_id, status, amount) VALUES (-1, 1, 'new', 1)", "1 orders are missing"),
        ("DELETE FROM orders WHERE id = (SELECT max(id) FROM orders)", "1 orders are in the files but not"),
        ("UPDATE orders SET note = 'other' WHERE id = (SELECT max(id) FROM orders)", "1 orders have other values"),
        ("UPDATE orders SET placed_at = placed_at + '1 us' WHERE id = (SELECT max(id) FROM orders)", "1 orders have"),
        ("UPDATE orders SET amount = amount + 0.01 WHERE id = (SELECT max(id) FROM orders)", "counts or sums differ"),
    ],
)
def test_a_change_that_the_files_do_not_hold_is_found(captured: Captured, change: str, finding: str) -> None:
    captured.connection.execute(change)
    assert any(finding in difference for difference in captured.differences())


def test_lost_and_doubled_files_are_found(captured: Captured) -> None:
    assert len(captured.files) > 1
    shutil.copy(captured.files[0], captured.folder / "twice.parquet")
    assert [d for d in captured.differences() if "more than once" in d]
    (captured.folder / "twice.parquet").unlink()
    assert captured.differences() == []
    captured.files[0].unlink()
    assert [d for d in captured.differences() if "are missing" in d]
    for file in captured.files:
        file.unlink()
    assert captured.differences() == [f"there is no Parquet file in {captured.folder}"]
