"""The net effect of changes against a table whose rows are changed one by one, and against PostgreSQL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness.database import Database
from harness.one_table import consumed
from harness.replay import TYPES, Row, Table

from pgoutput_source.changes import ChangeBatch
from pgoutput_source.compute.net_effect import Crowd, Standing
from pgoutput_source.compute.net_rows import net_rows
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.operators.latest import _Latest
from pgoutput_source.parquet.current import current


class Mirror:
    """What a sink makes of `cdc.latest` that knows nothing but put and remove."""

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.latest = _Latest("step", ("id",), True, None)
        self.rows: dict[Any, Row] = {}

    def take(self, batch: ChangeBatch) -> None:
        thinned, _ = self.latest.on_batch([batch])
        for one in thinned:
            for row in one.data.to_pylist():
                if row["_op"] == "T":
                    self.rows.clear()
                elif row["_op"] == "D":
                    self.rows.pop(row["id"], None)
                else:
                    assert not row["_unchanged"]
                    own = [column.name for column in one.schema.columns]
                    self.rows[row["id"]] = {name: row[name] for name in own}
        self.latest = _Latest("step", ("id",), True, self.latest.snapshot())

    def now(self) -> list[Row]:
        return [self.rows[key] for key in sorted(self.rows)]


class Destination:
    """What holds one row per key, and knows how to carry out `NetRows`."""

    def __init__(self, identity: str) -> None:
        self.whole = identity == "f"
        self.standing: Standing | None = None
        self.rows: dict[Any, Row] = {}

    def take(self, *batches: ChangeBatch) -> None:
        data = pa.Table.from_batches([batch.data for batch in batches]).combine_chunks().to_batches()[0]
        net, self.standing = net_rows(data, ["id"], whole=self.whole, standing=self.standing)
        before = {} if net.emptied else self.rows
        rows = {} if net.emptied else dict(self.rows)
        puts = net.puts.to_pylist()
        for key in [*net.gone.to_pylist(), *puts]:
            rows.pop(key["id"], None)
        for put, source in zip(puts, net.sources.to_pylist(), strict=True):
            unsent = {name: before[source["id"]][name] for name in put["_unchanged"] or ()}
            assert put["id"] not in rows
            rows[put["id"]] = {name: put[name] for name in TYPES} | unsent
        self.rows = rows

    def now(self) -> list[Row]:
        return [self.rows[key] for key in sorted(self.rows)]


@pytest.mark.parametrize("mirror_of", [Mirror, Destination])
@pytest.mark.parametrize("identity", ["f", "d"])
@pytest.mark.parametrize("seed", range(12))
def test_after_each_transaction_the_mirror_is_the_table(
    mirror_of: type[Mirror | Destination], identity: str, seed: int
) -> None:
    table, mirror = Table(seed, identity), mirror_of(identity)
    for made, rows in table.batches(60, split=identity == "d"):
        mirror.take(made)
        if rows is not None:
            assert mirror.now() == rows


@pytest.mark.parametrize("identity", ["f", "d"])
@pytest.mark.parametrize("seed", range(12))
def test_several_batches_at_once_come_to_the_table(identity: str, seed: int) -> None:
    table, mirror = Table(seed, identity), Destination(identity)
    waiting: list[ChangeBatch] = []
    for made, rows in table.batches(60, split=identity == "d"):
        waiting.append(made)
        if rows is not None and table.random.random() < 0.3:
            mirror.take(*waiting)
            waiting = []
            assert mirror.now() == rows


@pytest.mark.parametrize("mirror_of", [Mirror, Destination])
@pytest.mark.parametrize("seed", range(12))
def test_a_shift_that_batches_cut_in_two_is_the_table_after_its_end(
    mirror_of: type[Mirror | Destination], seed: int
) -> None:
    table, mirror = Table(seed, "f"), mirror_of("f")
    table._there_and_back = table._shift  # type: ignore[method-assign]  # what no batch alone can tell
    for made, rows in table.batches(60):
        mirror.take(made)
        if rows is not None:
            assert mirror.now() == rows


@pytest.mark.parametrize("identity", ["f", "d"])
@pytest.mark.parametrize("seed", range(6))
def test_current_rows_of_files_are_the_table(tmp_path: Path, identity: str, seed: int) -> None:
    table = Table(seed, identity)
    batches = list(table.batches(80))
    for i, (made, _) in enumerate(batches):
        pq.write_table(pa.table(made), tmp_path / f"{i:04}.parquet")
        if i % 7 == 0:
            pq.write_table(pa.table(made), tmp_path / f"{i:04}-again.parquet")
    found = current(tmp_path, key="id").sort_by("id").select(list(TYPES)).to_pylist()
    assert found == table.now()


def test_control_without_telling_rows_apart_some_mirror_is_not_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Crowd, "in_order", lambda *_: None)
    wrong = 0
    for seed in range(4):
        table, mirror = Table(seed, "f"), Mirror("f")
        for made, rows in table.batches(60, split=False):
            mirror.take(made)
            wrong += rows is not None and mirror.now() != rows
    assert wrong


SHIFTS = """
CREATE TABLE k (id int PRIMARY KEY DEFERRABLE, v text);
ALTER TABLE k REPLICA IDENTITY FULL;
INSERT INTO k VALUES (1, 'a'), (2, 'b'), (3, 'c'), (4, NULL);
UPDATE k SET id = id + 1;
UPDATE k SET id = id - 1 WHERE id > 1;
BEGIN; SET CONSTRAINTS ALL DEFERRED; UPDATE k SET id = 2 WHERE v = 'a'; UPDATE k SET id = 9 WHERE v = 'a'; COMMIT;
BEGIN; SET CONSTRAINTS ALL DEFERRED; UPDATE k SET id = 5 WHERE v = 'c'; UPDATE k SET id = 3 WHERE v IS NULL; COMMIT;
BEGIN; SET CONSTRAINTS ALL DEFERRED; INSERT INTO k VALUES (9, 'x'); DELETE FROM k WHERE v = 'a'; COMMIT;
UPDATE k SET id = 10 - id, v = v || v;
"""


def test_keys_that_shift_in_postgresql(any_db: Database, tmp_path: Path) -> None:
    connection = any_db.connect()
    connection.execute("CREATE PUBLICATION p FOR ALL TABLES")
    assembler, mirror = Assembler(), Mirror("f")
    statements = [s for s in SHIFTS.splitlines() if s]
    connection.execute(statements[0])
    connection.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    for i, statement in enumerate(statements[1:]):
        for part in statement.split(";"):
            if part.strip():
                connection.execute(part)
        for made in assembler.feed(consumed(connection, "s")).batches:
            mirror.take(made)
            pq.write_table(pa.table(made), tmp_path / f"{i}.parquet")
        expected = connection.execute("SELECT id, v FROM k ORDER BY id").fetchall()
        assert [tuple(row.values()) for row in mirror.now()] == expected
        if expected:
            found = current(tmp_path, key="id").sort_by("id").select(["id", "v"]).to_pylist()
            assert [tuple(row.values()) for row in found] == expected
