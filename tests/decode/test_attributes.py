"""A column of a version of a table has its number in the catalogue, or none: never another column's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from harness.database import Database
from harness.notation import peeked

from pgoutput_source.changes import ChangeBatch, ChangeSet
from pgoutput_source.changes.schema import Missing, TableSchema, attnum_of, missing_of
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.decode.attributes import Attributes
from pgoutput_source.postgres.definitions import Definitions

LIVE = "SELECT attname, attnum FROM pg_attribute WHERE attrelid = 't'::regclass AND attnum > 0 AND NOT attisdropped"
STEPS = 30


def ddl(r: random.Random, names: list[str]) -> Iterator[str]:
    """One change of the table `t`, as statements; `names` are its columns besides `id`, which it keeps up to date."""
    kind = r.choice(["add", "add", "drop", "rename", "swap", "type", "replace", "nothing", "analyze"])
    name = r.choice(names) if names else ""
    new = next(n for n in iter(lambda: r.choice("abcdefghijkl"), "") if n not in names)
    if kind == "add" or not names:
        default = r.choice(["", " DEFAULT 'x'", " DEFAULT now()::text"])
        yield f"ALTER TABLE t ADD {new} text{default}"
        names.append(new)
    elif kind == "drop":
        yield f"ALTER TABLE t DROP {name}"
        names.remove(name)
    elif kind == "replace":  # the same name and type, another column
        yield f"ALTER TABLE t DROP {name}"
        yield f"ALTER TABLE t ADD {name} text"
    elif kind == "rename":
        yield f"ALTER TABLE t RENAME {name} TO {new}"
        names[names.index(name)] = new
    elif kind == "swap" and len(names) > 1:
        other = r.choice([n for n in names if n != name])
        for old, now in ((name, "tmp"), (other, name), ("tmp", other)):
            yield f"ALTER TABLE t RENAME {old} TO {now}"
    elif kind == "type":
        yield f"ALTER TABLE t ALTER {name} TYPE varchar"
    elif kind == "analyze":
        yield "ANALYZE t"


def versions(sets: list[ChangeSet]) -> list[TableSchema]:
    """The version of the table of each change, in order."""
    found = [
        (lsn, seq, batch.schema)
        for each in sets
        for batch in each.batches
        for lsn, seq in zip(batch.data["_commit_lsn"].to_pylist(), batch.data["_seq"].to_pylist(), strict=True)
    ]
    return [schema for _, _, schema in sorted(found, key=lambda row: row[:2])]


def altered(db: Database, seed: int) -> tuple[list[TableSchema], list[TableSchema], list[dict[str, int]]]:
    """Versions of each change as they were told at once, as they were told at the end, and the columns as they were."""
    r = random.Random(seed)
    connection = db.connect()
    connection.execute("CREATE TABLE t (id serial, a text, b text)")
    connection.execute("CREATE PUBLICATION p FOR TABLE t")
    connection.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    assembler, sets, truth = Assembler(look_up=Definitions(db.dsn)), [], []
    names, seen = ["a", "b"], 0
    for _ in range(STEPS):
        with connection.transaction():
            before = r.random() < 0.5  # a change before and after the table is altered in one transaction
            if before:
                truth.append(insert(connection))
            if r.random() < 0.7:
                for statement in ddl(r, names):
                    connection.execute(statement.encode())
            if not before or r.random() < 0.5:
                truth.append(insert(connection))
        frames = peeked(connection)
        sets.append(assembler.feed(frames[seen:]))
        seen = len(frames)
    late = Assembler(look_up=Definitions(db.dsn)).feed(peeked(connection))
    return versions(sets), versions([late]), truth


def insert(connection: psycopg.Connection[Any]) -> dict[str, int]:
    connection.execute("INSERT INTO t DEFAULT VALUES")
    return {str(name): int(attnum) for name, attnum in connection.execute(LIVE).fetchall()}


def wrong(found: list[TableSchema], truth: list[dict[str, int]]) -> list[str]:
    assert len(found) == len(truth)
    return [
        f"{column.name} of change {i} is {column.attnum}, not {columns[column.name]}"
        for i, (schema, columns) in enumerate(zip(found, truth, strict=True))
        for column in schema.columns
        if column.attnum not in (None, columns[column.name])
    ]


@pytest.mark.parametrize("seed", range(3))
def test_a_number_is_the_columns_own_or_not_known(db: Database, seed: int) -> None:
    at_once, late, truth = altered(db, seed)

    assert wrong(at_once, truth) == []
    assert wrong(late, truth) == []
    known = sum(c.attnum is not None for schema in at_once for c in schema.columns)
    assert known > 0.9 * sum(len(schema.columns) for schema in at_once)


def test_without_the_age_of_the_catalogues_rows_numbers_would_be_wrong(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Attributes, "_is_older", lambda self, attribute, xid: True)

    _, late, truth = altered(db, seed=1)

    assert wrong(late, truth)


def test_names_that_were_swapped_are_renames_however_late_the_changes_are_read(any_db: Database) -> None:
    connection = any_db.connect()
    for statement in (
        "CREATE TABLE page (id int PRIMARY KEY, body text, views int)",
        "CREATE PUBLICATION p FOR TABLE page",
        "SELECT pg_create_logical_replication_slot('s', 'pgoutput')",
        "INSERT INTO page VALUES (1, 'old', 0)",
        "ALTER TABLE page ADD body_new text",
        "UPDATE page SET body_new = 'new'",
        "ALTER TABLE page RENAME body TO body_old",
        "ALTER TABLE page RENAME body_new TO body",
        "UPDATE page SET views = 1",
    ):
        connection.execute(statement.encode())

    found = Assembler(look_up=Definitions(any_db.dsn)).feed(peeked(connection))

    assert [[(f.name, attnum_of(f)) for f in batch.schema.row_type] for batch in found.batches] == [
        [("id", 1), ("body", 2), ("views", 3)],
        [("id", 1), ("body", 2), ("views", 3), ("body_new", 4)],
        [("id", 1), ("body_old", 2), ("views", 3), ("body", 4)],
    ]


def test_what_rows_hold_that_are_older_than_a_column_is_in_its_field(any_db: Database) -> None:
    connection = any_db.connect()
    for statement in (
        "CREATE TABLE t (id int PRIMARY KEY)",
        "CREATE PUBLICATION p FOR TABLE t",
        "SELECT pg_create_logical_replication_slot('s', 'pgoutput')",
        "INSERT INTO t VALUES (1)",
        "ALTER TABLE t ADD n int NOT NULL DEFAULT 42, ADD none text",
        "ALTER TABLE t ADD s text DEFAULT 'ü \"', ADD l int[] DEFAULT '{1,2}'",
        "ALTER TABLE t ALTER n SET DEFAULT 7",
        "INSERT INTO t VALUES (2)",
        "ALTER TABLE t ADD r double precision DEFAULT random()",  # rewrites the table
        "INSERT INTO t VALUES (3)",
    ):
        connection.execute(statement.encode())
        if statement == "INSERT INTO t VALUES (2)":
            first = Assembler(look_up=Definitions(any_db.dsn)).feed(peeked(connection)).batches
    later = Assembler(look_up=Definitions(any_db.dsn)).feed(peeked(connection)).batches

    assert [(f.name, missing_of(f)) for f in first[1].data.schema][:5] == [
        ("id", Missing(None)),
        ("n", Missing("42")),
        ("none", Missing(None)),
        ("s", Missing('ü "')),
        ("l", Missing("{1,2}")),
    ]
    assert {missing_of(f) for f in later[2].data.schema} == {None}


def test_an_earlier_look_tells_what_the_catalogue_of_now_does_not(any_db: Database) -> None:
    """A table that has another file than at first; whoever was there knows which columns came without a rewrite."""
    connection = any_db.connect()
    there, seen = Assembler(look_up=Definitions(any_db.dsn)), 0
    connection.execute("CREATE TABLE t (id serial PRIMARY KEY)")
    connection.execute("CREATE PUBLICATION p FOR TABLE t")
    connection.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    found: tuple[ChangeBatch, ...] = ()
    for statements in (
        "",
        "TRUNCATE t",
        "ALTER TABLE t ADD plain text, ADD renamed int",
        "ALTER TABLE t ADD drawn uuid DEFAULT gen_random_uuid(); ALTER TABLE t ALTER drawn DROP DEFAULT",  # a new file
        "ALTER TABLE t RENAME renamed TO other; ALTER TABLE t ALTER other TYPE text USING id::text",
        "ALTER TABLE t ADD last int",
        "VACUUM FULL t",
        "ALTER TABLE t ADD one int DEFAULT 1",
    ):
        for statement in filter(None, statements.split("; ")):
            connection.execute(statement.encode())
        connection.execute("INSERT INTO t DEFAULT VALUES")
        frames = peeked(connection)
        found = there.feed(frames[seen:]).batches
        seen = len(frames)
    late = Assembler(look_up=Definitions(any_db.dsn)).feed(peeked(connection)).batches

    null = Missing(None)
    told = {c.name: c.missing for c in found[-1].schema.columns}
    assert told == {"id": null, "plain": null, "drawn": None, "other": None, "last": null, "one": Missing("1")}
    told = {c.name: c.missing for c in late[-1].schema.columns}
    assert told == dict.fromkeys(told) | {"one": Missing("1")}


def test_a_column_that_is_left_out_gives_its_number_to_no_other(any_db: Database) -> None:
    if any_db.server.major < 15:
        pytest.skip("column lists came with PostgreSQL 15")
    connection = any_db.connect()
    for statement in (
        "CREATE TABLE t (id int PRIMARY KEY, a text, b text, c text)",
        "CREATE PUBLICATION p FOR TABLE t (id, b)",
        "SELECT pg_create_logical_replication_slot('s', 'pgoutput')",
        "INSERT INTO t VALUES (1)",
        "ALTER TABLE t RENAME a TO a2",
        "ALTER TABLE t RENAME b TO b2",
    ):
        connection.execute(statement.encode())

    (batch,) = Assembler(look_up=Definitions(any_db.dsn)).feed(peeked(connection)).batches

    assert [c.attnum for c in batch.schema.columns] == [1, None]
