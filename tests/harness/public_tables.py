"""Tables as projects have them: schemas, odd names, many types, composite keys, references, partitions, and rows."""

from __future__ import annotations

import random
from typing import Any

import psycopg
from psycopg import sql

SCHEMAS = ("public", "App Data", "ünï.x", "billing")

TYPES: dict[str, str] = {
    "smallint": "(n % 30000)::smallint",
    "bigint": "n::bigint * 1000000007",
    "numeric": "CASE WHEN n % 7 = 0 THEN 'NaN' ELSE n * 1.000001 END",
    "numeric(10,2)": "n * 1.01",
    "real": "n / 3.0",
    "double precision": "sqrt(n)",
    "boolean": "n % 2 = 0",
    "text": "repeat(md5(n::text), n % 5)",
    "varchar(40)": "md5(n::text)",
    "char(8)": "left(md5(n::text), 5)",
    "bytea": "decode(md5(n::text), 'hex')",
    "uuid": "md5(n::text)::uuid",
    "date": "CASE WHEN n % 11 = 0 THEN 'infinity' ELSE '2020-01-01'::date + n % 1000 END",
    "time": "'12:00'::time + n * interval '1 second'",
    "timestamp": "'2024-02-29'::timestamp + n * interval '1 hour'",
    "timestamptz(3)": "'2024-02-29 12:00+02'::timestamptz + n * interval '1 hour'",
    "interval": "n * interval '1 day 2 hours'",
    "jsonb": "jsonb_build_object('n', n, 'list', ARRAY[n, NULL])",
    "json": "json_build_object('ü', n)",
    "inet": "'10.0.0.0'::inet + n",
    "int[]": "ARRAY[n, NULL, n + 1]",
    "text[]": """ARRAY['a "b"', NULL, n::text]""",
    "int4range": "int4range(n, n + 5)",
    "tsvector": "to_tsvector('english', 'dogs ' || n)",
    "point": "point(n, 0.5)",
    "mood": "CASE WHEN n % 2 = 0 THEN 'glad' ELSE 'very, sad' END::mood",
    "mood[]": "ARRAY['glad', NULL, 'very, sad']::mood[]",
    "positive": "n + 1",
    "address": "ROW('Main \"St\"', n)::address",
    "money": "n::money",
    "bit varying": "n::bit(8)",
}
"""Types, and an expression over the number `n` of a row."""

PREPARE = """
CREATE TYPE mood AS ENUM ('glad', 'very, sad');
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
"""
COMPOSITE = "CREATE TYPE address AS (street text, number int)"
"""A destination that has it, too, writes its values in the same way; another has them as text with other quotes."""


def create(connection: psycopg.Connection[Any], count: int, *, rows: int = 50, seed: int = 1) -> list[tuple[str, str]]:
    """Create so many tables with rows, and give the names of those that have them."""
    rng = random.Random(seed)
    connection.execute(f"{PREPARE}{COMPOSITE}".encode())
    for schema in SCHEMAS[1:]:
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
    made: list[tuple[str, str]] = []
    first: sql.Identifier | None = None
    number = 0
    while len(made) < count:
        number += 1
        schema = rng.choice(SCHEMAS)
        name = rng.choice(["orders_{}", "Order Items {}", 'quote"{}', "select_{}", "dotted.name.{}", "große_{}"])
        name = name.format(number)
        table = sql.Identifier(schema, name)
        kinds = rng.sample(list(TYPES), rng.randint(2, 9))
        columns: list[sql.Composable] = [
            sql.SQL("{} {}").format(sql.Identifier(f"{k} {i}"), sql.SQL(k)) for i, k in enumerate(kinds)
        ]
        key = ["id"]
        columns.insert(0, sql.SQL("id bigint"))
        if rng.random() < 0.25:
            key.append("Part Two")
            columns.append(sql.SQL('"Part Two" text'))
        if rng.random() < 0.2:
            columns.append(sql.SQL("twice bigint GENERATED ALWAYS AS (id * 2) STORED"))
        if first is not None and rng.random() < 0.2:
            columns.append(sql.SQL("ref bigint REFERENCES {}").format(first))
        columns.append(sql.SQL("PRIMARY KEY ({})").format(sql.SQL(", ").join(map(sql.Identifier, key))))
        split = rng.random() < 0.05
        connection.execute(
            sql.SQL("CREATE TABLE {} ({}) {}").format(
                table, sql.SQL(", ").join(columns), sql.SQL("PARTITION BY HASH (id)" if split else "")
            )
        )
        leaves = [f"{name} {i}" for i in range(2)] if split else [name]
        for i, leaf in enumerate(leaves if split else ()):
            connection.execute(
                sql.SQL("CREATE TABLE {} PARTITION OF {} FOR VALUES WITH (MODULUS 2, REMAINDER {})").format(
                    sql.Identifier(schema, leaf), table, sql.Literal(i)
                )
            )
        made += [(schema, leaf) for leaf in leaves]
        if first is None and key == ["id"] and not split:
            first = table
        names = [sql.Identifier(f"{k} {i}") for i, k in enumerate(kinds)]
        values: list[sql.Composable] = [
            sql.SQL("CASE WHEN n % 9 <> 4 THEN {} END").format(sql.SQL(TYPES[k])) for k in kinds
        ]
        if len(key) == 2:
            names.append(sql.Identifier("Part Two"))
            values.append(sql.SQL("'p' || n % 3"))
        connection.execute(
            sql.SQL("INSERT INTO {} (id, {}) SELECT n, {} FROM generate_series(1, {}) AS n").format(
                table, sql.SQL(", ").join(names), sql.SQL(", ").join(values), sql.Literal(rows)
            )
        )
    return made


def change(connection: psycopg.Connection[Any], tables: list[tuple[str, str]]) -> None:
    """Change and delete some rows of each table, in one transaction."""
    with connection.transaction():
        for schema, name in tables:
            table = sql.Identifier(schema, name)
            connection.execute(sql.SQL("UPDATE {} SET id = id WHERE id % 5 = 0").format(table))
            # Others refer to the first table.
            connection.execute(sql.SQL("DELETE FROM {} WHERE id % 7 = 0").format(table))
