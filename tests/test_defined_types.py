"""Types that a database defines arrive typed, from its catalogue, and never wrong when the catalogue is newer."""

from __future__ import annotations

from decimal import Decimal

import pyarrow as pa
from conftest import Database

from pgoutput_source import peek


def test_enums_domains_composites_ranges_and_extensions_are_typed(any_db: Database) -> None:
    with any_db.connect() as c:
        c.execute("CREATE EXTENSION hstore; CREATE EXTENSION citext")
        c.execute("CREATE TYPE mood AS ENUM ('sad', 'happy')")
        c.execute("CREATE DOMAIN price AS numeric(10,2) CHECK (VALUE >= 0)")
        c.execute("CREATE TYPE part AS (name text, price price, moods mood[])")
        c.execute("CREATE TYPE floats AS RANGE (subtype = float8)")
        c.execute(
            "CREATE TABLE t (id int PRIMARY KEY, m mood, p price, c part, cs part[], f floats, h hstore, ci citext)"
        )
        c.execute("CREATE PUBLICATION cdc FOR ALL TABLES")
        c.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
        c.execute(
            """INSERT INTO t VALUES (1, 'happy', 2.50, ROW('a,"b', 1.25, '{sad,NULL}'),
                                     ARRAY[ROW('x', NULL, '{}')::part],
                                     '[1.5,2)', 'a=>1, b=>NULL', 'Ab')"""
        )
    batch = peek(any_db.dsn, slot="cdc", publication="cdc").table("public.t")
    row = batch.drop_columns([name for name in batch.column_names if name.startswith("_")]).to_pylist()[0]

    assert row == {
        "id": 1,
        "m": "happy",
        "p": Decimal("2.50"),
        "c": {"name": 'a,"b', "price": Decimal("1.25"), "moods": ["sad", None]},
        "cs": [{"name": "x", "price": None, "moods": []}],
        "f": {"lower": 1.5, "upper": 2.0, "lower_inc": True, "upper_inc": False, "empty": False},
        "h": [("a", "1"), ("b", None)],
        "ci": "Ab",
    }
    assert batch.schema.field("p").type == pa.decimal128(10, 2)
    assert batch.schema.field("m").metadata[b"pg.type"] == b"public.mood"


def test_a_catalogue_newer_than_the_values_makes_misfits_and_nothing_wrong(db: Database) -> None:
    with db.connect() as c:
        c.execute("CREATE TYPE pair AS (a text, b text)")
        c.execute("CREATE TYPE mood AS ENUM ('sad')")
        c.execute("CREATE TABLE t (id int PRIMARY KEY, p pair)")
        c.execute("CREATE TABLE gone (id int PRIMARY KEY, m mood)")
        c.execute("CREATE PUBLICATION cdc FOR ALL TABLES")
        c.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
        c.execute("INSERT INTO t VALUES (1, ROW('x', 'y')), (2, ROW('7', 'z'))")
        c.execute("INSERT INTO gone VALUES (1, 'sad')")
        c.execute("DROP TABLE gone; DROP TYPE mood")
        c.execute("ALTER TABLE t ALTER p TYPE text USING (p).a")
        c.execute("ALTER TYPE pair ALTER ATTRIBUTE a TYPE int CASCADE")
        c.execute("INSERT INTO t VALUES (3, 'text now')")
    found = peek(db.dsn, slot="cdc", publication="cdc")
    first, second = found.of("public.t")

    assert first.data["p"].to_pylist() == [None, {"a": 7, "b": "z"}]
    assert first.data["_raw"].to_pylist() == [[("p", "(x,y)")], None]
    assert second.data["p"].to_pylist() == ["text now"]
    assert found.table("public.gone")["m"].to_pylist() == ["sad"]
