"""Tables and columns that few would make: every sink writes them, and what is read back is what PostgreSQL has."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import bytewax.operators as op
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from bytewax.dataflow import Dataflow
from bytewax.testing import TestingSink
from harness.database import Database
from psycopg import Connection, sql

import pgoutput_source.operators as cdc
from pgoutput_source import ChangeBatch, IpcSink, JsonLinesSink, ParquetSink, PgOutputSource, current, peek, read, run
from pgoutput_source.errors import DecodeError
from pgoutput_source.parquet.writer import Codec, PartWriter

POSITION = [("_commit_lsn", "ascending"), ("_seq", "ascending")]

NAMES = [
    *("a.b", "a.b.c", ".x", "x.", ".", "..", "a/b", "/", "[0]", "a[0]", "[]", "a[b", '"', 'a"b', "'", "`", "\\", "\\n"),
    *(" ", "  ", " lead", "trail ", "\u00a0", "\u200b", "\t", "\n", "é", "e\u0301", "日本", "🐘", "x" * 63, "é" * 31),
    *("element", "list", "item", "array", "key", "value", "key_value", "entries", "bag", "array_element"),
    *("A", "a", "ID", "Id", "*", "%", "%s", "?", "$1", "{}", "#", ",", ";", ":", "=", "-", "0", "1", "null", "NaN"),
    *(
        "_before.a",
        "_before",
        "before.",
        "_op ",
        "_row number",
        "_window",
        "_known a",
        "raw",
        "count",
        "by0",
        "rows",
        "all",
    ),
    *("window", "window_start", "sum a", "old", "row", "filename", "__index_level_0__", "pandas", "select", "table"),
]
ODD = [name for name in NAMES if name != "_before"]
TYPES = ("int", "text", "date", "int[]", "numeric(6,2)")
VALUES: dict[str, Sequence[Any]] = {
    "int": (1, None, -7),
    "text": ("x", "", None, "long " * 900),
    "date": ("2024-02-29", "infinity", None),
    "int[]": ([1, None], [], None),
    "numeric(6,2)": ("1.50", "NaN", None),
}


def columns(turn: int) -> dict[str, str]:
    """The columns of a table with all names, whose types go round."""
    kinds = {name: TYPES[(i + turn) % len(TYPES)] for i, name in enumerate(ODD)}
    # What no Arrow type holds can't be told of these: see the test of it.
    return kinds | dict.fromkeys(["a", *(name for name in ODD if name.startswith("_before."))], "int")


def made(connection: Connection[Any], identity: str, turn: int) -> None:
    """A table and its history: inserts, updates of everything and of little, a key that moves, a delete."""
    kinds = columns(turn)
    parts = [sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(kind)) for name, kind in kinds.items()]
    connection.execute(
        sql.SQL('CREATE TABLE t ("k.1" int, "[1]" text, {}, PRIMARY KEY ("k.1", "[1]"))').format(
            sql.SQL(", ").join(parts)
        )
    )
    for name, kind in kinds.items():
        if kind == "text":
            connection.execute(sql.SQL("ALTER TABLE t ALTER {} SET STORAGE EXTERNAL").format(sql.Identifier(name)))
    connection.execute(f"ALTER TABLE t REPLICA IDENTITY {identity}".encode())
    connection.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    for n in range(6):
        values = [n, str(n), *(VALUES[kind][(n + i) % len(VALUES[kind])] for i, kind in enumerate(kinds.values()))]
        written = sql.SQL(", ").join(map(sql.Literal, values))
        connection.execute(sql.SQL("INSERT INTO t VALUES ({})").format(written))
    for i, (name, kind) in enumerate(kinds.items()):
        value = sql.Literal(VALUES[kind][i % len(VALUES[kind])])
        update = sql.SQL('UPDATE t SET {} = {} WHERE "k.1" = {}')
        connection.execute(update.format(sql.Identifier(name), value, sql.Literal(i % 6)))
    connection.execute("""UPDATE t SET "k.1" = "k.1" + 1, "[1]" = "[1]" || '!' WHERE "k.1" > 3""")
    connection.execute("""DELETE FROM t WHERE "k.1" = 2""")


def rows(found: Sequence[dict[str, Any]]) -> Counter[str]:
    """Rows as PostgreSQL writes their values."""
    texts: Counter[str] = Counter()
    for row in found:
        odd = dict(row["_raw"] or ())
        texts[repr([(name, odd.get(name, text(row[name]))) for name in ("k.1", "[1]", *ODD)])] += 1
    return texts


def text(value: Any) -> str | None:
    if isinstance(value, list):
        return "{" + ",".join("NULL" if each is None else str(each) for each in value) + "}"
    return None if value is None else str(value)


def expected(connection: Connection[Any]) -> Counter[str]:
    names = ["k.1", "[1]", *ODD]
    query = sql.SQL("SELECT {} FROM t").format(
        sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(name)) for name in names)
    )
    return Counter(repr(list(zip(names, row, strict=True))) for row in connection.execute(query))


@pytest.mark.parametrize(("identity", "turn"), [("DEFAULT", 0), ("FULL", 2)])
def test_every_name_of_a_column_goes_the_whole_way(db: Database, tmp_path: Path, identity: str, turn: int) -> None:
    connection = db.connect()
    connection.execute("CREATE PUBLICATION p FOR ALL TABLES")
    made(connection, identity, turn)
    want, key = expected(connection), ["k.1", "[1]"]
    peeked = peek(db.dsn, slot="s", publication="p").table("public.t")
    flow = Dataflow("t")
    source = PgOutputSource(db.dsn, slot="s", publication="p", until="current", max_frames=40)
    changes = cdc.table("t", op.input("in", flow, source), "public.t")
    crossed: dict[str, list[ChangeBatch]] = {"entered": [], "left": []}
    for name, step in (("entered", cdc.entered), ("left", cdc.left)):
        op.output(name, step(f"crossed_{name}", changes, pc.field("k.1") > 1), TestingSink(crossed[name]))
    numbers = [name for name, kind in columns(turn).items() if kind == "int"]
    sums = cdc.aggregate("groups", changes, by=["k.1", "[1]"], sum=numbers)
    cdc.output("sums", sums, ParquetSink(tmp_path / "sums"))
    windows: list[pa.RecordBatch] = []
    of_window = cdc.window("win", changes, every=timedelta(days=1), by="[1]", sum=numbers, ops="I")
    op.output("windows", of_window, TestingSink(windows))
    cdc.output("history", changes, ParquetSink(tmp_path / "history", max_rows=30))
    cdc.output("latest", cdc.latest("l", changes, key=key), ParquetSink(tmp_path / "latest"))
    cdc.output("ipc", changes, IpcSink(tmp_path / "ipc"))
    cdc.output("lines", changes, JsonLinesSink(tmp_path / "lines.jsonl"))
    run(flow, epoch=timedelta(milliseconds=300))

    history = read(tmp_path / "history").to_table()
    assert history.schema.types == peeked.schema.types
    assert plain(history) == plain(peeked)
    streams = [pa.ipc.open_stream(file.read_bytes()).read_all() for file in (tmp_path / "ipc").glob("*.arrows")]
    assert plain(pa.concat_tables(streams)) == plain(peeked)
    assert rows(current(tmp_path / "history", key=key).to_pylist()) == want
    assert rows(current(tmp_path / "latest", key=key).to_pylist()) == want
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    for line, row in zip(lines, history.sort_by(POSITION).to_pylist(), strict=True):
        assert set(line) == set(row) - set(row["_unchanged"] or ()) - {
            name for name in ("_before", "_raw", "_unchanged") if row[name] is None
        }
        assert set(line.get("_before") or ()) <= set(row["_before"] or ())
        assert [text(line[n]) for n in key] == [text(row[n]) for n in key]
    query = sql.SQL('SELECT "k.1", "[1]", {} FROM t').format(sql.SQL(", ").join(map(sql.Identifier, numbers)))
    summed = current(tmp_path / "sums", key=key).select([*key, *(f"{name}_sum" for name in numbers)])
    assert Counter(tuple(row.values()) for row in summed.to_pylist()) == Counter(connection.execute(query))
    entered, left = (sum(map(len, crossed[name])) for name in ("entered", "left"))
    assert (entered - left,) == connection.execute('SELECT count(*) FROM t WHERE "k.1" > 1').fetchone()
    inserted = history.filter(pc.equal(history["_op"].cast(pa.utf8()), "I"))
    for name in numbers:
        assert pc.sum(pa.Table.from_batches(windows)[f"{name}_sum"]) == pc.sum(inserted[name].cast(pa.int64()))


def plain(table: pa.Table) -> list[str]:
    return [repr(sorted(row.items())) for row in table.sort_by(POSITION).to_pylist()]


def test_a_text_that_may_be_of_two_columns_is_refused_and_another_prefix_tells_them_apart(db: Database) -> None:
    connection = db.connect()
    connection.execute('CREATE TABLE t (id int PRIMARY KEY, day date, "_before.day" date)')
    connection.execute("ALTER TABLE t REPLICA IDENTITY FULL")
    connection.execute("CREATE PUBLICATION p FOR ALL TABLES")
    connection.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    connection.execute("INSERT INTO t VALUES (1, '2024-02-29', '2024-02-29')")
    assert len(peek(db.dsn, slot="s", publication="p").table("public.t")) == 1
    connection.execute("UPDATE t SET day = 'infinity'")
    connection.execute("UPDATE t SET day = NULL, \"_before.day\" = 'infinity'")
    with pytest.raises(DecodeError, match=r"may be two things[\s\S]*metadata_prefix"):
        peek(db.dsn, slot="s", publication="p").table("public.t")
    told = peek(db.dsn, slot="s", publication="p", metadata_prefix="cdc_").table("public.t")
    assert told["cdc_raw"].to_pylist()[1:] == [
        [("day", "infinity")],
        [("_before.day", "infinity"), ("cdc_before.day", "infinity")],
    ]


TABLES = {
    "none": "CREATE TABLE {} ()",
    "dropped": "CREATE TABLE {0} (a int, b text); ALTER TABLE {0} DROP a, DROP b",
    "generated": "CREATE TABLE {} (a int GENERATED ALWAYS AS (7) STORED)",
    "composite": "CREATE TABLE {} (c nothing, l nothing[], d holder, n int)",
    "grown": "CREATE TABLE {} ()",
}


@pytest.mark.parametrize("identity", ["FULL", "NOTHING"])
def test_tables_without_columns_and_types_without_attributes_go_the_whole_way(
    db: Database, tmp_path: Path, identity: str
) -> None:
    connection = db.connect()
    connection.execute("CREATE TYPE nothing AS (); CREATE TYPE holder AS (inside nothing, n int)")
    for name, ddl in TABLES.items():
        connection.execute(f"{ddl.format(name)}; ALTER TABLE {name} REPLICA IDENTITY {identity}".encode())
    publish = "" if identity == "FULL" else " WITH (publish = 'insert, truncate')"
    connection.execute(f"CREATE PUBLICATION p FOR ALL TABLES{publish}".encode())
    connection.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    for name in TABLES:
        values = "VALUES (ROW(), ARRAY[ROW()::nothing, NULL], ROW(ROW()::nothing, 3)::holder, 1)"
        rows_of = values if name == "composite" else "DEFAULT VALUES"
        connection.execute(f"INSERT INTO {name} {rows_of}; INSERT INTO {name} DEFAULT VALUES".encode())
        if name != "generated":  # of which PostgreSQL refuses it
            connection.execute(f"DELETE FROM {name} WHERE ctid = '(0,2)'".encode())
    connection.execute("ALTER TABLE grown ADD id int DEFAULT 7; INSERT INTO grown VALUES (8); TRUNCATE none")
    if identity == "FULL":
        connection.execute("UPDATE grown SET id = 9 WHERE id = 8")
    peeked = peek(db.dsn, slot="s", publication="p")
    flow = Dataflow("t")
    changes = op.input("in", flow, PgOutputSource(db.dsn, slot="s", publication="p", until="current"))
    batches = op.flat_map("batches", changes, list)
    cdc.output("files", batches, ParquetSink(tmp_path / "files"))
    cdc.output("ipc", batches, IpcSink(tmp_path / "ipc"))
    cdc.output("lines", batches, JsonLinesSink(tmp_path / "lines.jsonl"))
    run(flow, epoch=timedelta(milliseconds=300))

    events = list(peeked.events())
    assert len(events) == len(peeked)
    arrows = [pa.ipc.open_stream(file.read_bytes()).read_all() for file in (tmp_path / "ipc").glob("*.arrows")]
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert sorted((line["_commit_lsn"], line["_seq"], line["_op"]) for line in lines) == sorted(
        (event.position.commit_lsn, event.position.seq, event.op) for event in events
    )
    for name in TABLES:
        table = f"public.{name}"
        versions = [pa.Table.from_batches([each.data]) for each in peeked.of(table)]
        history = read(tmp_path / "files", table=table).to_table()
        newest = versions[-1].schema
        assert {field.name: field.type for field in history.schema} == {field.name: field.type for field in newest}
        assert plain(history) == plain(pa.concat_tables(versions, promote_options="permissive"))
        of_ipc = [each for each in arrows if each.schema.metadata[b"pg.table"].decode() == table]
        assert plain(pa.concat_tables(of_ipc, promote_options="permissive")) == plain(history)
    last = current(tmp_path / "files", key="n", table="public.composite").to_pylist()
    assert [{name: row[name] for name in "cldn"} for row in last][:1] == [
        {"c": "()", "l": ["()", None], "d": {"inside": "()", "n": 3}, "n": 1}
    ]
    grown = current(tmp_path / "files", key="id", table="public.grown").to_pylist()
    assert {row["id"] for row in grown} >= {9 if identity == "FULL" else 8}


def test_structs_without_fields_are_written_wherever_they_are(tmp_path: Path) -> None:
    none = pa.struct([])
    kinds = {
        "one": none,
        "l": pa.list_(none),
        "m": pa.map_(pa.utf8(), none),
        "s": pa.struct([("in", none), ("n", pa.int8())]),
    }
    rows_of = [
        {"one": {}, "l": [{}, None], "m": [("k", {}), ("l", None)], "s": {"in": {}, "n": 1}},
        {"one": None, "l": [], "m": None, "s": {"in": None, "n": None}},
        {"one": {}, "l": None, "m": [], "s": None},
    ]
    made = pa.RecordBatch.from_pylist(rows_of, pa.schema(kinds))
    writer = PartWriter(Codec.of("zstd", 1), "a-1", tmp_path / "1.parquet", made.schema)
    for _ in range(2):
        writer.add(made)
    writer.close()
    found = read(tmp_path).to_table()
    assert found.column_names == list(kinds)
    assert found.to_pylist() == made.to_pylist() * 2
