"""Keys: for all pairs of values of a type, ours are equal if and only if PostgreSQL's ``=`` says so."""

from __future__ import annotations

import json
import pickle
from typing import Any

import psycopg
import pyarrow as pa
import pytest
from harness.type_cases import CASES, PINNED

from pgoutput_source.embedded import Server
from pgoutput_source.types import type_of
from pgoutput_source.types.keys import KeyColumn, joined, key_column

# What is equal though it is written otherwise, or looks equal and is not.
PAIRS = {
    "float4": ["0", "-0", "NaN", "-NaN", "1", "Infinity", "1e-45"],
    "float8": ["0", "-0", "NaN", "-NaN", "1", "1.0000000000000002", "-Infinity"],
    "float8[]": ["{0,NaN}", "{-0,NaN}", "{0}", "{NULL}", "{}", "[0:0]={0}", "{{0}}"],
    "numeric": ["1", "1.0", "1.00", "1.01", "0", "0.000", "-1.50", "-1.5", "10", "100", "NaN", "Infinity", "1e30"],
    "numeric(10,2)": ["1", "1.00", "NaN", "0"],
    "numeric[]": ["{1.0,2}", "{1,2.00}", "{1}", "{NaN}", "[0:0]={1}", "{NULL}"],
    "numrange": ["[1.0,2)", "[1,2.00)", "(1,2)", "empty", "(,)", "[1.0,)", "(,NaN]"],
    "text": ["", " ", "a", "a ", "A", "1.0", "1.00", "NaN"],
    "character(5)": ["a", "a  ", "b"],
    "bpchar": ["a", "a  ", " a", ""],
    "bpchar[]": ['{"a"}', '{"a "}', "{NULL}"],
    "date": ["infinity", "-infinity", "2024-02-29", "0001-12-31 BC", "0001-01-01"],
    "time": ["24:00", "00:00", "12:00", "23:59:59.999999"],
    "timetz": ["12:00+00", "13:00+01", "12:00:00+00:00:00", "24:00+00", "00:00+00"],
    "timestamp": ["infinity", "-infinity", "294276-12-31 23:59:59.999999", "294276-12-31 23:59:59", "2000-01-01"],
    "timestamptz": ["infinity", "-infinity", "2000-01-01 00:00+00", "2000-01-01 01:00+01", "294276-12-31"],
    "interval": ["1 mon", "30 days", "720:00:00", "-1 mon", "-30 days", "0", "1 year", "360 days", "-1 day +24:00",
                 "178000000 years", "-00:00:00.000001", "1 day -00:00:00.000001", "23:59:59.999999"],
    "interval[]": ["{1 mon}", "{30 days}", "{NULL}"],
    "jsonb": ['{"a": 1.0}', '{"a": 1.00}', '{"a": "1.0"}', '{"a": "1.00"}', "10.0", "10", '"\\"1.0"', "null", "[]",
              '{"b": 1, "a": 2}', '{"a": 2, "b": 1}', "1e2", "100.00", '["1.0", 1.0]', '["1.0", 1]'],
    "jsonb[]": ['{"1.0"}', '{"1"}', "{NULL}", '{"null"}'],
    "bool": ["t", "f"],
    "inet": ["10.0.0.1", "10.0.0.1/32", "10.0.0.1/8", "::1", "::ffff:1.2.3.4", "1.2.3.4"],
    "varbit": ["1", "10", "01", ""],
    "bytea": ["\\x", "\\x00", "a"],
    "money": ["0", "-0.00", "1"],
    "uuid": ["00000000-0000-0000-0000-000000000000", "{00000000000000000000000000000000}", "f" * 32],
    "daterange": ["[2024-01-01,2024-01-31]", "[2024-01-01,2024-02-01)", "empty", "(,infinity)", "[-infinity,infinity]"],
}  # fmt: skip
WITHOUT_EQUALITY = {"json", "point", "line", "box[]", "point[]"}  # no index and no GROUP BY takes them


def ask(connection: psycopg.Connection[Any], sql: str, inputs: list[str]) -> tuple[KeyColumn, set[tuple[int, int]]]:
    """The values as keys, and which pairs of them the server takes for equal."""
    values = f"SELECT n::int, t::{sql} AS v FROM json_array_elements_text(%(inputs)s) WITH ORDINALITY AS u(t, n)"
    cursor = connection.execute(f"SELECT v FROM ({values}) AS q ORDER BY n", {"inputs": json.dumps(inputs)})
    result = cursor.pgresult
    assert result is not None
    row, typmod = type_of(result.ftype(0)), result.fmod(0)
    texts = pa.array([result.get_value(i, 0) for i in range(len(inputs))], pa.binary())
    cells = row.decode(texts, row.arrow(typmod))
    raw = [
        None if known else [("v", text.decode())]
        for known, text in zip(cells.is_valid().to_pylist(), texts.to_pylist(), strict=True)
    ]
    field = pa.field("v", cells.type, metadata={"pg.oid": str(row.oid)})
    # Each value's text in `_raw` comes in a batch of its own; equal keys must be equal across batches.
    parts = [
        key_column(cells.slice(i, 1), field, pa.array(raw[i : i + 1], pa.map_(pa.utf8(), pa.utf8())))
        for i in range(len(inputs))
    ]
    pairs = connection.execute(
        f"WITH q AS MATERIALIZED ({values}) SELECT a.n - 1, b.n - 1 FROM q AS a, q AS b WHERE a.v = b.v",
        {"inputs": json.dumps(inputs)},
    ).fetchall()
    return joined(parts), {(a, b) for a, b in pairs}


def cases() -> list[tuple[str, list[str]]]:
    drawn = {case.sql: [*dict.fromkeys(case.edges)] for case in CASES if case.sql not in WITHOUT_EQUALITY}
    return [(sql, PAIRS.get(sql, []) + drawn.get(sql, [])) for sql in {**PAIRS, **drawn}]


@pytest.mark.parametrize(
    ("sql", "inputs"), [(sql, found) for sql, found in cases() if found], ids=lambda v: str(v)[:20]
)
def test_keys_are_equal_where_the_server_says_so(pg: Server, sql: str, inputs: list[str]) -> None:
    with psycopg.connect(pg.dsn(), autocommit=True, options=PINNED) as connection:
        keys, equal = ask(connection, sql, inputs)
    objects = keys.objects()
    assert pickle.loads(pickle.dumps(objects)) == objects
    found = {(a, b) for a, x in enumerate(objects) for b, y in enumerate(objects) if x == y}
    assert {(inputs[a], inputs[b]) for a, b in found} == {(inputs[a], inputs[b]) for a, b in equal}
    assert len({hash(objects[a]) for a, b in equal if b == 0}) <= 1
    # The columns say the same as the objects.
    codes = [column.dictionary_encode(null_encoding="encode").indices.to_pylist() for column in keys.columns]
    by_columns = list(zip(*codes, strict=True))
    assert found == {(a, b) for a, x in enumerate(by_columns) for b, y in enumerate(by_columns) if x == y}


def test_null_is_a_key_of_its_own() -> None:
    raw = pa.array([[("v", "infinity")], None, [("w", "x")]], pa.map_(pa.utf8(), pa.utf8()))
    field = pa.field("v", pa.date32(), metadata={"pg.oid": "1082"})
    keys = key_column(pa.array([None, None, None], pa.date32()), field, raw)
    assert keys.objects() == [("infinity",), None, None]
    assert key_column(pa.nulls(2, pa.float64()), field).objects() == [None, None]
    assert key_column(pa.nulls(1, pa.date32()), field, raw.slice(0, 1), name="_before.v").texts is None


def test_composites_and_what_the_stream_can_not_tell_are_equal_if_they_are_written_alike() -> None:
    struct = pa.array([{"a": -0.0, "b": "x"}, {"a": 0.0, "b": "x"}, {"a": 0.0, "b": "X"}, None])
    assert key_column(struct, pa.field("c", struct.type, metadata={"pg.oid": "16400"})).cells.to_pylist() == [
        "(0.0, 'x')",
        "(0.0, 'x')",
        "(0.0, 'X')",
        None,
    ]
    citext = pa.array(["Bob", "bob"])
    assert key_column(citext, pa.field("c", pa.utf8(), metadata={"pg.oid": "16401"})).cells.equals(citext)
