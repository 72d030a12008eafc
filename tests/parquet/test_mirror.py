"""`current` against the tables themselves: the rows that a folder's changes leave are those that PostgreSQL has."""

from __future__ import annotations

import json
import os
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import bytewax.operators as op
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bytewax.dataflow import Dataflow
from harness.database import Database
from harness.workload import Row, Workload, differences, row_of, tables

import pgoutput_source.operators as cdc
from pgoutput_source import ChangeBatch, ParquetSink, PgOutputSource, current, read, run
from pgoutput_source.compute.old_rows import OldRows
from pgoutput_source.embedded import shop
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.testing import batch

SEEDS = [int(seed) for seed in os.environ.get("MIRROR_SEEDS", "1 2").split()]


def captured(database: Database, out: Path, **options: Any) -> None:
    """All changes of all tables in a folder."""
    flow = Dataflow("all_tables")
    source = PgOutputSource(database.dsn, slot="cdc", publication="cdc", until="current")
    batches = op.flat_map("batches", op.input("in", flow, source), list)
    cdc.output("out", batches, ParquetSink(out, **options))
    run(flow, epoch=timedelta(seconds=1))


def mirrored(folder: Path, name: str, key: list[str]) -> Counter[Row]:
    table = current(folder, key=key, table=name)
    own = [column for column in table.column_names if not column.startswith("_")]
    return Counter(
        row_of({column: row[column] for column in own}, dict(row["_raw"] or ()), row["_unchanged"] or ())
        for row in table.to_pylist()
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_current_rows_are_those_of_the_tables(db: Database, tmp_path: Path, seed: int) -> None:
    with Workload(db.dsn, seed=seed, tables=9, largest=300, publication="cdc") as workload:
        workload.connection.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
        workload.run(6_000)
        captured(db, tmp_path, max_rows=300)
        changed = {pq.read_schema(file).metadata[b"pg.table"].decode() for file in tmp_path.glob("*.parquet")}
        history = read(tmp_path, table="public.t1").to_table()

        found = {
            name: mirrored(tmp_path, name, table.key)
            for table in workload.tables
            if (name := str(table.name)) in changed
        }

        assert differences({name: rows for name, rows in found.items() if rows}, tables(workload)) == []
        assert {"I", "U", "D"} <= set(history["_op"].to_pylist())


@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_rows_of_latest_are_those_of_the_tables(db: Database, tmp_path: Path, seed: int) -> None:
    """Put and removed in order, as a mirror elsewhere would."""
    flow = Dataflow("latest")
    source = PgOutputSource(db.dsn, slot="cdc", publication="cdc", until="current", max_frames=500)
    changes = op.input("in", flow, source)
    with Workload(db.dsn, seed=seed, tables=9, largest=300, publication="cdc") as workload:
        workload.connection.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
        workload.run(4_000)
        for number, table in enumerate(workload.tables):
            batches = cdc.table(f"table {number}", changes, table.identifier.as_string(None))
            last = cdc.latest(f"latest {number}", batches, key=None if table.keyed else table.key)
            cdc.output(f"out {number}", last, ParquetSink(tmp_path / str(number)))
        run(flow, epoch=timedelta(seconds=1))

        found = {
            str(table.name): mirrored(tmp_path / str(number), str(table.name), table.key)
            for number, table in enumerate(workload.tables)
            if any((tmp_path / str(number)).glob("*.parquet"))
        }
        assert differences({name: rows for name, rows in found.items() if rows}, tables(workload)) == []


@pytest.mark.parametrize("default", ["", " DEFAULT 'x'", " DEFAULT md5(random()::text)"])
def test_a_column_that_comes_amid_a_transaction_does_not_keep_rows_alive(
    db: Database, tmp_path: Path, default: str
) -> None:
    """With identity FULL the old row has the new column, and the change that inserted the row has not."""
    with db.connect() as connection:
        connection.execute("CREATE TABLE t (id int, v text); ALTER TABLE t REPLICA IDENTITY FULL")
        connection.execute("CREATE PUBLICATION cdc FOR ALL TABLES")
        connection.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
        with connection.transaction():
            connection.execute(
                "INSERT INTO t VALUES (0, 'z'), (1, 'a'), (2, 'b'), (3, 'c'); DELETE FROM t WHERE id = 0"
            )
            connection.execute(f"ALTER TABLE t ADD w text{default}".encode())
            connection.execute("DELETE FROM t WHERE id = 1; UPDATE t SET id = 4 WHERE id = 2; INSERT INTO t VALUES (5)")
        captured(db, tmp_path)
        rows = current(tmp_path, key="id").select(["id", "v"]).to_pylist()

        assert [tuple(row.values()) for row in rows] == connection.execute("SELECT id, v FROM t ORDER BY id").fetchall()


def test_current_rows_of_latest_and_of_aggregate_are_what_postgresql_says(db: Database, tmp_path: Path) -> None:
    shop.create(db.dsn)
    connection = db.connect()
    connection.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
    work = shop.Workload(db.dsn, seed=3)
    work.run(lambda _: work.totals.changes > 8_000)
    flow = Dataflow("orders")
    source = PgOutputSource(db.dsn, slot="cdc", publication="shop", until="current", max_frames=1000)
    orders = cdc.table("orders", op.input("in", flow, source), "public.orders")
    cdc.output("history", orders, ParquetSink(tmp_path / "history"))
    cdc.output("mirror", cdc.latest("latest", orders), ParquetSink(tmp_path / "mirror"))
    sales = cdc.aggregate("group", orders, by="status", count=True, sum="amount")
    cdc.output("sales", sales, ParquetSink(tmp_path / "sales"))
    run(flow, epoch=timedelta(seconds=1))

    own = ["id", "customer_id", "status", "amount", "note", "placed_at", "updated_at"]
    expected = connection.execute(f"SELECT {', '.join(own)} FROM orders ORDER BY id".encode()).fetchall()
    for folder in ("history", "mirror"):
        rows = current(tmp_path / folder, key="id").select(own).sort_by("id").to_pylist()
        assert [tuple(row.values()) for row in rows] == expected
    groups = current(tmp_path / "sales", key="status").select(["status", "count", "amount_sum"]).sort_by("status")
    query = "SELECT status, count(*), sum(amount) FROM orders GROUP BY status ORDER BY status"
    assert [tuple(row.values()) for row in groups.to_pylist()] == connection.execute(query).fetchall()
    assert read(tmp_path / "history").count_rows() > read(tmp_path / "mirror").count_rows() > len(expected)


TYPES = {"id": pa.int64(), "n": pa.int64(), "note": pa.utf8()}


def write(folder: Path, *batches: ChangeBatch) -> Path:
    for number, each in enumerate(batches):
        pq.write_table(pa.table(each), folder / f"{number}.parquet")
    return folder


def change(*changes: Any, **kind: Any) -> ChangeBatch:
    return batch("public.t", list(changes), **{"types": TYPES, **kind})


def rows(folder: Path, key: Any = "id") -> list[tuple[Any, ...]]:
    table = current(folder, key=key)
    return [tuple(row.values()) for row in table.select(["id", "n", "note", "_unchanged"]).to_pylist()]


def test_a_value_follows_its_row_through_changes_of_its_key_even_when_files_hold_them_twice(tmp_path: Path) -> None:
    changes = [
        ("I", {"id": 1, "n": 1, "note": "one"}),
        ("I", {"id": 2, "n": 1, "note": "two"}),
        ("U", {"id": 3, "n": 1}, {"id": 1}),
        ("U", {"id": 1, "n": 2}, {"id": 2}),
        ("U", {"id": 2, "n": 3}, {"id": 3}),
        ("U", {"id": 4, "n": 3}, {"id": 2}),
        ("I", {"id": 2, "n": 9, "note": "new"}),
        ("D", {"id": 2}, {"id": 2}),
    ]
    twice = change(*changes, unchanged={i: ["note"] for i in range(2, 6)})
    assert rows(write(tmp_path, twice, twice)) == [(1, 2, "two", None), (4, 3, "one", None)]


def test_what_the_files_never_had_is_not_known_and_no_null(tmp_path: Path) -> None:
    few = {"id": pa.int64(), "n": pa.int64()}
    folder = write(
        tmp_path,
        change(("U", {"id": 1, "n": 1}), ("I", {"id": 2, "n": 1}), types=few),
        change(
            ("U", {"id": 1, "n": 2}),
            ("U", {"id": 2, "n": 2}),
            ("I", {"id": 3, "n": 3}),
            ("U", {"id": 3, "n": 4}),
            unchanged={0: ["note"], 1: ["note"], 3: ["note"]},
            lsn=2000,
        ),
    )
    assert rows(folder) == [(1, 2, None, ["note"]), (2, 2, None, ["note"]), (3, 4, None, None)]


def test_a_text_that_its_type_can_not_hold_is_filled_in_as_that_text(tmp_path: Path) -> None:
    made = change(("I", {"id": 1, "n": 1}), ("U", {"id": 1, "n": 2}), unchanged={1: ["note"]})
    index = made.data.schema.get_field_index("_raw")
    field = made.data.schema.field(index)
    raw = pa.array([[("note", "{{1}}")], None], field.type)
    folder = write(tmp_path, made.replace(made.data.set_column(index, field, raw)))
    assert current(folder, key="id")["_raw"].to_pylist() == [[("note", "{{1}}")]]


def test_a_truncate_forgets_and_what_comes_after_it_stays(tmp_path: Path) -> None:
    made = change(("I", {"id": 1, "n": 1}), ("T", None), ("I", {"id": 2, "n": 1}))
    assert rows(write(tmp_path, made)) == [(2, 1, None, None)]
    assert rows(write(tmp_path, change(("I", {"id": 1}), ("T", None)))) == []


def test_a_key_of_several_columns_with_nulls(tmp_path: Path) -> None:
    made = change(("I", {"id": 1}), ("I", {"id": 1, "n": 1}), ("U", {"id": 1, "note": "x"}), identity="f")
    assert rows(write(tmp_path, made), key=["id", "n"]) == [(1, 1, None, None), (1, None, "x", None)]


def test_what_can_not_be_answered_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no changes of any table"):
        current(tmp_path, key="id")
    write(
        tmp_path, change(("I", {"id": 1, "n": 1}), ("D", {"id": 1}, {"id": 1})), batch("public.u", [("I", {"id": 1})])
    )
    with pytest.raises(ConfigurationError, match=r"several tables\n.*public.t, public.u"):
        current(tmp_path, key="id")
    with pytest.raises(ConfigurationError, match="no column 'nr'"):
        current(tmp_path, key="nr", table="public.t")
    with pytest.raises(ConfigurationError, match="deletes come without n"):
        current(tmp_path, key="n", table="public.t")


def test_files_of_other_tables_are_not_opened_where_the_index_names_them(tmp_path: Path) -> None:
    write(tmp_path, change(("I", {"id": 1, "n": 1})), change(("I", {"id": 2, "n": 2}), lsn=2000))
    (tmp_path / "9.parquet").write_bytes(b"no Parquet file at all")
    entries = [
        {"file": f"{i}.parquet", "table": "public.u" if i == 9 else "public.t", "schema": "x"} for i in (0, 1, 9)
    ]
    (tmp_path / "_index.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert read(tmp_path, table="public.t").count_rows() == 2
    with pytest.raises(pa.ArrowInvalid):
        read(tmp_path, table="public.u")


DOTTED = ('a."b.c"', '"a.b".c')


def test_a_table_is_its_schema_and_its_name(db: Database, tmp_path: Path) -> None:
    connection = db.connect()
    connection.execute('CREATE SCHEMA a; CREATE SCHEMA "a.b"')
    for name in DOTTED:
        connection.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, v text, n int)".encode())
    connection.execute("CREATE PUBLICATION cdc FOR ALL TABLES")
    connection.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
    for i, name in enumerate(DOTTED):
        for statement in (
            f"INSERT INTO {name} SELECT g, 'of {i}', g FROM generate_series(1, {3 + i}) g",
            f"UPDATE {name} SET n = n + {10 * (i + 1)} WHERE id > 1",
            f"DELETE FROM {name} WHERE id = {2 + i}",
        ):
            connection.execute(statement.encode())
    flow = Dataflow("dotted")
    changes = op.input("in", flow, PgOutputSource(db.dsn, slot="cdc", publication="cdc", until="current"))
    cdc.output("history", op.flat_map("batches", changes, list), ParquetSink(tmp_path / "history"))
    cdc.output("mirror", cdc.latest("latest", op.flat_map("all", changes, list)), ParquetSink(tmp_path / "mirror"))
    for i, name in enumerate((DOTTED[0], '"a.b"."c"')):
        orders = cdc.table(f"table{i}", changes, name)
        cdc.output(f"sums{i}", cdc.aggregate(f"sum{i}", orders, by="v", sum="n"), ParquetSink(tmp_path / f"sums{i}"))
    run(flow, epoch=timedelta(seconds=1))

    old = tmp_path / "of 0.1.0"
    old.mkdir()
    for file in (tmp_path / "history").glob("*.parquet"):
        table = pq.read_table(file)
        if table.schema.metadata[b"pg.table"].decode() == DOTTED[0]:
            lacks = {b"pg.namespace", b"pg.name"}
            metadata = {k: v for k, v in table.schema.metadata.items() if k not in lacks} | {b"pg.table": b"a.b.c"}
            pq.write_table(table.replace_schema_metadata(metadata), old / file.name)

    for i, name in enumerate(DOTTED):
        rows = connection.execute(f"SELECT id, v, n FROM {name} ORDER BY id".encode()).fetchall()
        for folder in ("history", "mirror"):
            table = current(tmp_path / folder, key="id", table=name).select(["id", "v", "n"]).sort_by("id")
            assert [tuple(row.values()) for row in table.to_pylist()] == rows, (folder, name)
            assert set(read(tmp_path / folder, table=name).to_table()["v"].to_pylist()) <= {f"of {i}", None}
        sums = current(tmp_path / f"sums{i}", key="v").select(["v", "n_sum"]).to_pylist()
        assert [tuple(row.values()) for row in sums] == connection.execute(
            f"SELECT v, sum(n) FROM {name} GROUP BY v".encode()
        ).fetchall()
    for step in (read, lambda folder, table: current(folder, key="id", table=table)):
        with pytest.raises(ConfigurationError, match="can be read in several ways"):
            step(tmp_path / "history", table="a.b.c")
    whole = current(tmp_path / "history", key="id", table=DOTTED[0])
    for named in ({"table": DOTTED[0]}, {"table": "a.b.c"}, {}):
        assert current(old, key="id", **named).to_pylist() == whole.to_pylist(), named
    assert read(old, table=DOTTED[0]).count_rows() == read(tmp_path / "history", table=DOTTED[0]).count_rows() > 0

    for file in (tmp_path / "history").glob("*.parquet"):
        (old / f"later {file.name}").write_bytes(file.read_bytes())
    assert current(old, key="id", table=DOTTED[0]).num_rows == whole.num_rows


def test_a_state_that_names_its_table_without_quotes_is_of_the_same_table() -> None:
    first, second = (batch(name, [("I", {"id": 1})]) for name in DOTTED)
    step = OldRows()
    step.know("step", first, ["id"])
    OldRows(step.snapshot() | {"table": "a.b.c"}).know("step", first, ["id"])
    with pytest.raises(ConfigurationError, match="one step for each table"):
        step.know("step", second, ["id"])
