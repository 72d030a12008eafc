"""Columns whose type changes: `read` has every value, in a common type or a second column; `current` what is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness.database import Database
from harness.one_table import consumed

from pgoutput_source import ChangeBatch, current, read
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.postgres.definitions import Definitions

TYPES = """
CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE TYPE state AS ENUM ('ok', 'done', 'sad');
CREATE DOMAIN small AS int CHECK (VALUE < 1000);
CREATE DOMAIN code AS text;
CREATE TYPE pair AS (x int, y text);
CREATE TYPE triple AS (x bigint, y text, z date);
"""


class Change(NamedTuple):
    """A column's type, a value of it, the new type, and how the one becomes the other; None: dropped and added."""

    was: str
    value: str
    new: str
    using: str | None = "{c}"


CHANGES = [
    *(
        Change("int", "5", new)
        for new in ("bigint", "smallint", "numeric", "numeric(8,2)", "text", "float8", "small", "oid")
    ),
    Change("int", "5", "boolean", "{c} > 1"),
    Change("int", "5", "int[]", "ARRAY[{c}]"),
    Change("int", "5", "mood", "'sad'::mood"),
    Change("int", "5", "uuid", "'00000000-0000-0000-0000-000000000005'::uuid"),
    Change("int", "5", "timestamptz", "to_timestamp({c})"),
    Change("int", "5", "pair", "ROW({c}, 'y')::pair"),
    Change("bigint", "5", "int"),
    Change("bigint", "9007199254740993", "float8"),
    Change("bigint", "9007199254740993", "numeric(30,4)"),
    Change("bigint[]", "'{9007199254740993}'", "float8[]", "'{0.5}'::float8[]"),
    Change("numeric(30,10)", "0.0000000001", "float8"),
    Change("numeric(8,2)", "5.25", "numeric(4,1)"),
    Change("varchar(5)", "'abc'", "varchar(2)", "left({c}, 2)"),
    Change("numeric", "5.25", "numeric(3,1)"),
    Change("small", "5", "int"),
    Change("numeric(8,2)", "5.25", "numeric"),
    Change("numeric(8,2)", "5.25", "numeric(10,4)"),
    Change("numeric(30,2)", "5.25", "numeric(30,20)"),
    Change("numeric(8,2)", "5.25", "int"),
    Change("numeric", "5.25", "float8"),
    Change("numeric", "5.25", "numeric(70,30)"),
    Change("float8", "0.5", "numeric"),
    Change("float8", "0.5", "real"),
    Change("real", "0.5", "text"),
    Change("boolean", "true", "int", "{c}::int"),
    Change("boolean", "true", "text"),
    Change("boolean", "true", "timestamptz", "now()"),
    Change("varchar(5)", "'abc'", "varchar(20)"),
    Change("varchar(5)", "'abc'", "text"),
    Change("char(5)", "'abc'", "text"),
    Change("text", "'7'", "int", "{c}::int"),
    Change("text", "'7'", "numeric(8,2)", "{c}::numeric"),
    Change("text", "'7'", "text[]", "ARRAY[{c}]"),
    Change("text", "'7'", "jsonb", "to_jsonb({c})"),
    Change("text", "'ok'", "mood", "{c}::mood"),
    Change("text", "'ok'", "bytea", "{c}::bytea"),
    Change("text", "'ok'", "code"),
    Change("text", "'2020-01-01'", "date", "{c}::date"),
    Change("text", "'2020-01-01'", "tstzrange", "tstzrange({c}::timestamptz, NULL)"),
    Change("text", "'00000000-0000-0000-0000-000000000005'", "uuid", "{c}::uuid"),
    Change("uuid", "'00000000-0000-0000-0000-000000000005'", "text"),
    Change("bytea", "'\\x6f6b'", "text", "encode({c}, 'escape')"),
    Change("mood", "'ok'", "text"),
    Change("mood", "'ok'", "state", "{c}::text::state"),
    Change("mood[]", "'{ok}'", "text[]", "{c}::text[]"),
    Change("code", "'x'", "varchar(9)"),
    Change("json", "'{\"a\": 1}'", "jsonb"),
    Change("jsonb", "'[1]'", "int[]", "ARRAY[1]"),
    Change("jsonb", "'[1]'", "text"),
    Change("date", "'2020-01-01'", "timestamp"),
    Change("date", "'2020-01-01'", "text"),
    Change("timestamp", "'2020-01-01 10:00'", "timestamptz"),
    Change("timestamptz", "'2020-01-01 10:00+00'", "timestamp"),
    Change("timestamp", "'2020-01-01 10:00'", "date"),
    Change("timestamp", "'2020-01-01 10:00'", "boolean", "{c} IS NOT NULL"),
    Change("timestamp", "'2020-01-01 10:00'", "bigint", "extract(epoch from {c})::bigint"),
    Change("time", "'10:00'", "interval"),
    Change("time", "'10:00'", "timetz"),
    Change("interval", "'1 day'", "text"),
    Change("interval", "'1 day'", "int", "5"),
    Change("int[]", "'{1,NULL}'", "bigint[]"),
    Change("int[]", "'{1,NULL}'", "numeric(8,2)[]"),
    Change("int[]", "'{1,NULL}'", "text[]"),
    Change("int[]", "'{1,NULL}'", "text"),
    Change("int[]", "'{1,NULL}'", "int", "{c}[1]"),
    Change("text[]", "'{1,NULL}'", "int[]", "{c}::int[]"),
    Change("date[]", "'{2020-01-01}'", "timestamp[]"),
    Change("pair", "ROW(1, 'y')", "text"),
    Change("pair", "ROW(1, 'y')", "triple", "ROW(({c}).x, ({c}).y, NULL)::triple"),
    Change("pair[]", "ARRAY[ROW(1, 'y')::pair]", "text[]", "{c}::text[]"),
    Change("int4range", "'[1,5)'", "int8range", "int8range(lower({c}), upper({c}))"),
    Change("int4range", "'[1,5)'", "text"),
    Change("inet", "'10.0.0.1'", "text"),
    Change("inet", "'10.0.0.1'", "cidr"),
    Change("point", "'(1,2)'", "text"),
    Change("money", "'5'", "numeric"),
    Change("bit(3)", "B'101'", "int"),
    *(Change("int", "5", new, None) for new in ("text", "bigint", "uuid", "int[]", "pair", "date")),
    *(Change("text", "'x'", new, None) for new in ("int", "text[]", "mood", "jsonb", "bytea", "text")),
    *(Change("mood", "'ok'", new, None) for new in ("int", "state", "timestamptz")),
]


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
def test_a_type_that_changes_loses_no_value_and_makes_none_up(db: Database, tmp_path: Path, identity: str) -> None:
    connection = db.connect()
    connection.execute(TYPES.encode())
    columns = ", ".join(f"c{i} {change.was}" for i, change in enumerate(CHANGES))
    connection.execute(f"CREATE TABLE t (id int PRIMARY KEY, v text, {columns})".encode())
    connection.execute(f"ALTER TABLE t REPLICA IDENTITY {identity}; CREATE PUBLICATION p FOR TABLE t".encode())
    connection.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    assembler = Assembler(look_up=Definitions(db.dsn))
    batches: list[ChangeBatch] = []

    def write() -> None:
        for made in assembler.feed(consumed(connection, "s")).batches:
            pq.write_table(pa.table(made), tmp_path / f"{len(batches):04}.parquet")
            batches.append(made)

    values = ", ".join(change.value for change in CHANGES)
    connection.execute(f"INSERT INTO t VALUES (1, 'a', {values}), (2, 'b', {values})".encode())
    connection.execute("INSERT INTO t (id, v) VALUES (3, 'c')")
    connection.execute("UPDATE t SET v = 'A' WHERE id = 1")
    write()
    for i, change in enumerate(CHANGES):
        if change.using is None:
            connection.execute(f"ALTER TABLE t DROP c{i}, ADD c{i} {change.new}".encode())
        else:
            using = change.using.replace("{c}", f"c{i}")
            connection.execute(f"ALTER TABLE t ALTER c{i} TYPE {change.new} USING ({using})::{change.new}".encode())
    connection.execute("UPDATE t SET v = 'B' WHERE id = 2")
    write()
    before = {row["id"]: row for row in current(tmp_path, key="id").to_pylist()}
    connection.execute("UPDATE t SET v = v")
    write()

    names = [f"c{i}" for i in range(len(CHANGES))]
    sent = {row["id"]: row for row in batches[-1].data.to_pylist()}
    after = {row["id"]: row for row in current(tmp_path, key="id").to_pylist()}
    assert sorted(before) == sorted(after) == sorted(sent) == [1, 2, 3]
    for key in sent:
        for name, change in zip(names, CHANGES, strict=True):
            assert after[key][name] == sent[key][name], change
            if name not in (before[key]["_unchanged"] or ()):
                assert before[key][name] == sent[key][name], change
        assert after[key]["_unchanged"] is None
    assert before[2]["_unchanged"] is None
    history = read(tmp_path).to_table().sort_by([("_commit_lsn", "ascending"), ("_seq", "ascending")])
    written = [row for made in batches for row in made.data.to_pylist()]
    types = [{field.name: field.type for field in made.data.schema} for made in batches for _ in range(len(made))]
    assert len(history) == len(written)
    for row, was, kinds in zip(history.to_pylist(), written, types, strict=True):
        for name, change in zip(names, CHANGES, strict=True):
            assert found(row, name, history.schema) == expected(was[name], kinds[name], row, name, history.schema), (
                change
            )
        if was["_before"] is not None and identity == "FULL":
            for name, change in zip(names, CHANGES, strict=True):
                inner = pa.schema(list(history.schema.field("_before").type))
                old = row["_before"]
                assert found(old, name, inner) == expected(was["_before"][name], kinds[name], old, name, inner), change


def found(row: dict[str, Any], name: str, schema: pa.Schema) -> list[tuple[str, Any]]:
    """The values that a row has of a column, in whichever of its columns."""
    mine = [each for each in schema.names if each == name or each.startswith(f"{name} (")]
    return [(each, row[each]) for each in mine if row[each] is not None]


def expected(value: Any, kind: pa.DataType, row: dict[str, Any], name: str, schema: pa.Schema) -> list[tuple[str, Any]]:
    """The same value, once: under the column's name if its type holds it, else under the second."""
    if value is None:
        return []
    target = schema.field(name).type
    if kind == target:
        return [(name, value)]
    second = [each for each in schema.names if each.startswith(f"{name} (") and schema.field(each).type == kind]
    if second:
        return [(second[0], value)]
    return [(name, pa.array([value], kind).cast(target)[0].as_py())]


KEYS = [
    ("int", "bigint", "1", "2", "3"),
    ("int", "text", "1", "2", "3"),
    ("bigint", "numeric(20,2)", "1", "2", "3"),
    ("numeric(8,2)", "numeric(10,4)", "1", "2.5", "3"),
    ("numeric", "numeric(10,4)", "1", "2.5", "3"),
    ("varchar(9)", "varchar(12)", "'a'", "'b'", "'c'"),
    ("uuid", "text", *(f"'00000000-0000-0000-0000-00000000000{n}'" for n in "123")),
    ("mood", "text", "'sad'", "'ok'", "'so'"),
    ("mood", "varchar(9)", "'sad'", "'ok'", "'so'"),
    ("char(5)", "text", "'a'", "'b'", "'c'"),
    ("text", "char(5)", "'a'", "'b'", "'c'"),
    ("inet", "text", "'1.2.3.4'", "'::1'", "'1.2.3.0/24'"),
    ("numeric(8,2)", "text", "1", "2.5", "3"),
    ("date", "timestamp", "'2024-01-01'", "'2024-01-02'", "'0944-03-15'"),
    ("timestamp(3)", "timestamp", "'2024-01-01 10:00'", "'2024-01-02 11:00:00.5'", "'2024-02-03'"),
]


@pytest.mark.parametrize(("was", "new", "one", "two", "three"), KEYS, ids=[f"{key[0]}-{key[1]}" for key in KEYS])
def test_a_key_whose_type_changes_goes_on_identifying_its_rows(
    db: Database, tmp_path: Path, was: str, new: str, one: str, two: str, three: str
) -> None:
    connection = db.connect()
    connection.execute("CREATE TYPE mood AS ENUM ('sad', 'ok', 'so')")
    connection.execute(f"CREATE TABLE t (id {was} PRIMARY KEY, v text); CREATE PUBLICATION p FOR TABLE t".encode())
    connection.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    assembler, files = Assembler(look_up=Definitions(db.dsn)), 0
    connection.execute(f"INSERT INTO t VALUES ({one}, 'a'), ({two}, 'a'), ({three}, 'a')".encode())
    for _ in range(2):
        for made in assembler.feed(consumed(connection, "s")).batches:
            pq.write_table(pa.table(made), tmp_path / f"{files:04}.parquet")
            files += 1
        if files == 1:
            connection.execute(f"ALTER TABLE t ALTER id TYPE {new}".encode())
            ids = [row[0] for row in connection.execute("SELECT id FROM t ORDER BY id")]
            connection.execute("UPDATE t SET v = 'b' WHERE id = %s", [ids[1]])
            connection.execute("DELETE FROM t WHERE id = %s", [ids[2]])

    rows = current(tmp_path, key="id").sort_by("id").select(["id", "v", "_unchanged"]).to_pylist()
    want = connection.execute("SELECT id, v FROM t ORDER BY id").fetchall()
    assert [tuple(row.values()) for row in rows] == [(*row, None) for row in want]
