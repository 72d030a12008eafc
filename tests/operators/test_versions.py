"""What DDL does to rows without sending them: `latest`, `current`, `aggregate` and `entered` are right or say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from harness.database import Database
from harness.one_table import consumed

from pgoutput_source.changes import ChangeBatch
from pgoutput_source.compute.grouping import Grouping
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.errors import StateError
from pgoutput_source.operators.aggregates import _Aggregate
from pgoutput_source.operators.latest import _Latest
from pgoutput_source.operators.transitions import _Transitions
from pgoutput_source.parquet.current import current
from pgoutput_source.parquet.read import read
from pgoutput_source.postgres.definitions import Definitions

BIG = "repeat('{} ', 3000)"


class Source:
    """A database whose table `t` is captured batch by batch."""

    def __init__(self, database: Database, *ddl: str) -> None:
        self.connection = database.connect()
        self.run(*ddl, "CREATE PUBLICATION p FOR ALL TABLES")
        self.run("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        self.assembler = Assembler(look_up=Definitions(database.dsn))
        self.batches: list[ChangeBatch] = []

    def run(self, *statements: str) -> list[ChangeBatch]:
        """Run statements; the batches of table `t`."""
        for statement in statements:
            self.connection.execute(statement)
        if not hasattr(self, "assembler"):
            return []
        made = [b for b in self.assembler.feed(consumed(self.connection, "s")).batches if b.schema.name == "t"]
        self.batches += made
        return made

    def table(self, columns: str) -> list[tuple[Any, ...]]:
        return self.connection.execute(f"SELECT {columns} FROM t ORDER BY id").fetchall()


def mirror(batches: list[ChangeBatch]) -> list[dict[str, Any]]:
    """Rows that put and remove leave, over a restart before each batch; what is not known is left alone."""
    rows: dict[Any, dict[str, Any]] = {}
    state = None
    for made in batches:
        step = _Latest("step", None, True, state)
        for thinned in step.on_batch([made])[0]:
            for row in thinned.data.to_pylist():
                if row["_op"] == "T":
                    rows.clear()
                elif row["_op"] == "D":
                    rows.pop(row["id"], None)
                else:
                    rows[row["id"]] = row
        state = step.snapshot()
    return [rows[key] for key in sorted(rows)]


def written(folder: Path, batches: list[ChangeBatch]) -> Path:
    for i, made in enumerate(batches):
        pq.write_table(pa.table(made), folder / f"{i:04}.parquet")
    return folder


def right(rows: list[dict[str, Any]], columns: str, table: list[tuple[Any, ...]], unknown: set[str]) -> None:
    """Each value is the table's, or is named: and only those of `unknown` are."""
    names = columns.split(", ")
    assert len(rows) == len(table)
    named = set()
    for row, wanted in zip(rows, table, strict=True):
        for name, value in zip(names, wanted, strict=True):
            if name in (row["_unchanged"] or ()):
                assert row[name] is None
                named.add(name)
            else:
                assert row[name] == value, name
    assert named == unknown


def rows_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = current(folder, key="id", table="public.t").sort_by("id").to_pylist()
    return found


def test_a_table_that_was_recreated_has_no_row_of_the_one_before(db: Database, tmp_path: Path) -> None:
    source = Source(db, "CREATE TABLE t (id int PRIMARY KEY, v text)")
    source.run("INSERT INTO t VALUES (1, 'old'), (2, 'old')")
    source.run("DROP TABLE t", "CREATE TABLE t (id int PRIMARY KEY, v text)", "INSERT INTO t VALUES (2, 'new')")
    for rows in (mirror(source.batches), rows_of(written(tmp_path, source.batches))):
        right(rows, "id, v", source.table("id, v"), set())
    groups = _Aggregate("step", Grouping.of("v", count=True), None, None)
    results = [row for made in groups.on_batch(source.batches)[0] for row in made.to_pylist()]
    assert [(r["_op"], r["v"], r["count"]) for r in results] == [("I", "old", 2), ("I", "new", 1), ("D", "old", 0)]
    entered = _Transitions("step", pc.field("v").is_valid(), True, None)
    assert [len(made) for made in entered.on_batch(source.batches)[0]] == [2, 1]


def test_a_table_that_takes_anothers_name_brings_its_own_changes(db: Database, tmp_path: Path) -> None:
    source = Source(db, "CREATE TABLE t (id int PRIMARY KEY, v text)", "CREATE TABLE fresh (LIKE t INCLUDING ALL)")
    source.run("INSERT INTO t VALUES (1, 'old'), (2, 'old')")
    source.run("ALTER TABLE t RENAME TO gone", "ALTER TABLE fresh RENAME TO t", "INSERT INTO t VALUES (3, 'new')")
    for rows in (mirror(source.batches), rows_of(written(tmp_path, source.batches))):
        right(rows, "id, v", source.table("id, v"), set())


def test_columns_that_change_names_keep_their_own_values(db: Database, tmp_path: Path) -> None:
    source = Source(
        db,
        "CREATE TABLE t (id int PRIMARY KEY, body text, views int)",
        "ALTER TABLE t ALTER body SET STORAGE EXTERNAL",
    )
    source.run(f"INSERT INTO t VALUES (1, {BIG.format('old')}, 0), (2, {BIG.format('two')}, 0)")
    source.run("ALTER TABLE t ADD body_new text", "ALTER TABLE t ALTER body_new SET STORAGE EXTERNAL")
    source.run(f"UPDATE t SET body_new = {BIG.format('new')} WHERE id = 1")
    source.run("ALTER TABLE t RENAME body TO body_old", "ALTER TABLE t RENAME body_new TO body")
    source.run("UPDATE t SET views = 1")
    columns = "id, body, body_old, views"
    for rows in (mirror(source.batches), rows_of(written(tmp_path, source.batches))):
        right(rows, columns, source.table(columns), set())
    with pytest.raises(StateError, match="another one now"):
        _Aggregate("step", Grouping.of("body", count=True), None, None).on_batch(source.batches)
    with pytest.raises(StateError, match="another one now"):
        _Transitions("step", pc.field("body").is_valid(), True, None).on_batch(source.batches)


def test_a_column_that_was_added_has_its_default_in_older_rows(db: Database, tmp_path: Path) -> None:
    source = Source(db, "CREATE TABLE t (id int PRIMARY KEY, v text)")
    source.run("INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    source.run("ALTER TABLE t ADD n int NOT NULL DEFAULT 42, ADD d numeric(8,2) DEFAULT 1.5, ADD note text DEFAULT 'x'")
    source.run("ALTER TABLE t ADD nothing text", "ALTER TABLE t ALTER n SET DEFAULT 7", "INSERT INTO t VALUES (3, 'c')")
    columns = "id, v, n, d, note, nothing"
    right(rows_of(written(tmp_path, source.batches)), columns, source.table(columns), set())


def test_a_type_that_changed_leaves_values_unknown_and_nothing_is_refused(db: Database, tmp_path: Path) -> None:
    source = Source(db, "CREATE TABLE t (id int PRIMARY KEY, n int, s varchar(5), a text, v text)")
    source.run("INSERT INTO t VALUES (1, 10, 's', 'a', NULL), (2, 20, 's', 'a', 'v')")
    source.run(
        "ALTER TABLE t ALTER n TYPE bigint USING n * 100, ALTER s TYPE varchar(20), ALTER a TYPE text[] USING ARRAY[a]",
    )
    source.run("UPDATE t SET v = 'w' WHERE id = 2")
    columns = "id, n, s, a, v"
    right(rows_of(written(tmp_path, source.batches)), columns, source.table(columns), {"n", "a"})
    history = read(tmp_path, table="public.t").to_table()
    assert history["n"].to_pylist() == [10, 20, 2000]
    assert history["a"].to_pylist() == [None, None, ["a"]]
    assert history["a (text)"].to_pylist() == ["a", "a", None]
    source.run("UPDATE t SET v = v")
    right(rows_of(written(tmp_path, source.batches)), columns, source.table(columns), set())


def test_keys_that_no_arrow_type_holds_are_keys(db: Database, tmp_path: Path) -> None:
    ddl = "CREATE TABLE t (id int, day date, price numeric(8,2), f float8, v text, PRIMARY KEY (id, day, price, f))"
    source = Source(db, ddl)
    source.run("INSERT INTO t VALUES (1, '-infinity', 1, 'NaN', 'a'), (1, 'infinity', 1, 'NaN', 'b')")
    source.run("INSERT INTO t VALUES (1, '2020-01-01', 'NaN', '-0', 'c'), (2, '2020-01-01', 'NaN', 0, 'd')")
    source.run("UPDATE t SET day = '2021-01-01' WHERE v = 'a'", "UPDATE t SET day = 'infinity', v = 'C' WHERE v = 'c'")
    source.run("UPDATE t SET f = 0, v = 'D' WHERE v = 'd'", "DELETE FROM t WHERE v = 'b'")
    wanted = sorted(v for (v,) in source.connection.execute("SELECT v FROM t").fetchall())
    key = ["id", "day", "price", "f"]
    found = current(written(tmp_path, source.batches), key=key)
    assert sorted(found["v"].to_pylist()) == wanted
    assert (
        sorted(row["v"] for row in current(thinned(tmp_path / "latest", source.batches), key=key).to_pylist()) == wanted
    )
    groups = _Aggregate("step", Grouping.of((), count=True, max="v"), None, None)
    [*_, result] = [row for made in groups.on_batch(source.batches)[0] for row in made.to_pylist()]
    assert (result["count"], result["v_max"]) == (len(wanted), max(wanted))


def thinned(folder: Path, batches: list[ChangeBatch]) -> Path:
    """What `cdc.latest` gives, in files, over a restart before each batch."""
    folder.mkdir()
    out: list[ChangeBatch] = []
    state = None
    for made in batches:
        step = _Latest("step", None, True, state)
        out += step.on_batch([made])[0]
        state = step.snapshot()
    return written(folder, out)


def test_a_row_that_comes_back_through_a_filter_has_no_value_from_before(db: Database, tmp_path: Path) -> None:
    if db.server.major < 15:
        pytest.skip("row filters come with PostgreSQL 15")
    source = Source(db, "CREATE TABLE t (id int, live bool, big text, PRIMARY KEY (id, live))")
    source.run("ALTER TABLE t ALTER big SET STORAGE EXTERNAL", "DROP PUBLICATION p")
    source.run("CREATE PUBLICATION p FOR TABLE t WHERE (live)")
    source.run(f"INSERT INTO t VALUES (2, true, {BIG.format('one')})", "UPDATE t SET live = false")
    source.run(f"UPDATE t SET big = {BIG.format('two')}", "UPDATE t SET live = true")
    for rows in (mirror(source.batches), rows_of(written(tmp_path, source.batches))):
        right(rows, "id, live, big", source.table("id, live, big"), {"big"})
    with pytest.raises(StateError, match="not sent"):
        _Aggregate("step", Grouping.of((), count="big"), None, None).on_batch(source.batches)
