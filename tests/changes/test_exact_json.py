"""JSON of events and of `JsonLinesSink`: every number with the digits that PostgreSQL wrote."""

from __future__ import annotations

import json
import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from harness.database import Database
from hypothesis import given
from hypothesis import strategies as st

from pgoutput_source import ChangeEvent, peek
from pgoutput_source.changes import exact_json
from pgoutput_source.changes.exact_json import JsonDecimal, JsonFloat, JsonWriter, dumps
from pgoutput_source.errors import SinkError
from pgoutput_source.sinks import JsonLinesSink

NUMBERS = ("0", "-0", "1.0", "1.10", "1e400", "1e-400", "1E5", "1e5", "-0.0", "12345678901234567890.10", "1.5",
           "9223372036854775807", "9007199254740993", "1" * 5000, "0.1",
           "100000000000000000000.0", "2.50e-7")  # fmt: skip


def tokens(text: str) -> Any:
    """A JSON text with every number as its own characters; what is an object, as its pairs."""
    return json.loads(text, parse_float=lambda t: ("number", t), parse_int=lambda t: ("number", t),
                      parse_constant=lambda t: pytest.fail(f"{t} is no JSON"))  # fmt: skip


def lines(item: Any, tmp_path: Path) -> list[str]:
    part = JsonLinesSink(tmp_path / "out.jsonl").build_part("flow.out", "jsonl", None)
    try:
        part.write_batch([item])
        part.snapshot()
    finally:
        part.close()
    return (tmp_path / "out.jsonl").read_text().splitlines()


def test_numbers_of_documents_are_written_as_postgresql_writes_them(any_db: Database, tmp_path: Path) -> None:
    with any_db.connect() as c:
        c.execute("CREATE TABLE t (id int, j json, b jsonb, js json[], bs jsonb[], k jsonb)")
        c.execute("CREATE PUBLICATION p FOR ALL TABLES")
        c.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        for i, number in enumerate(NUMBERS):
            document = f'{{"n" : {number},\r\n "l": [{number}, "{number}", null], "":{{"\\u00e9": [{number}]}}}}'
            c.execute(
                "INSERT INTO t VALUES (%s, %s, %s::text::jsonb, ARRAY[%s::json, NULL], ARRAY[%s::text::jsonb],"
                " %s::text::jsonb)",
                [i, document, document, document, number, number],
            )
        server = c.execute(
            "SELECT j::text, b::text, to_json(js)::text, to_json(bs)::text, k::text FROM t ORDER BY id"
        ).fetchall()
    changes = peek(any_db.dsn, slot="s", publication="p")
    names = ["j", "b", "js", "bs", "k"]
    expected = [dict(zip(names, map(tokens, row), strict=True)) for row in server]
    events = list(changes.events())
    assert [e.model_dump_json() for e in events] == [JsonWriter(",", ":")(e.model_dump()) for e in events]
    for text in ([e.model_dump_json() for e in events], [e.model_dump_json(indent=3) for e in events],
                 [e.json() for e in events], [e.json(indent=1, sort_keys=True) for e in events]):  # fmt: skip
        found = [tokens(line)["after"] for line in text]
        assert [{name: row[name] for name in names} for row in found] == expected
    rows = lines(changes.batches[0], tmp_path)
    assert [{name: tokens(row)[name] for name in names} for row in rows] == expected
    # Not only the numbers: what is one document in `json` is its text, but for its line breaks.
    assert all(row[0].replace("\r\n", "  ") in line for row, line in zip(server, rows, strict=True))
    # Read back, an event holds the same, and writes the same.
    again = [ChangeEvent.model_validate_json(event.model_dump_json()) for event in events]
    assert [e.model_dump_json() for e in again] == [e.model_dump_json() for e in events]
    assert [repr(e.after) for e in again] == [repr(e.after) for e in events]
    assert [pickle.loads(pickle.dumps(e)).model_dump_json() for e in events] == [e.model_dump_json() for e in events]


DEFINITIONS = """
CREATE TYPE public.money_of AS (amount numeric, at int8, ratio float8);
CREATE DOMAIN public.wallet AS public.money_of;
CREATE TYPE public.nothing AS ();
CREATE TYPE public.floats AS RANGE (subtype = float8);
CREATE TABLE t (
    id int PRIMARY KEY, n numeric, d numeric(30,10), ns numeric[], r numrange, f4 float4, f8 float8, f8s float8[],
    i int8, m money, c public.money_of, cs public.money_of[], w public.wallet, z public.nothing, zs public.nothing[],
    fr public.floats, dr daterange, drs daterange[]
);
"""
ROW = """VALUES (1, 12345678901234567890.10, 0.0000000001, '{1.0,NULL,-0.00,1e400,NaN}', '[1.10,2.50)', '1e-45', '1e15',
    '{-0,NaN,Infinity,5e-324}', 9223372036854775807, '-92233720368547758.08', '(1.50,9007199254740993,-0)',
    '{"(1.0,1,NaN)",NULL,"(,,)"}', '(NaN,-9223372036854775808,0.1)', '()', '{"()",NULL}', '[-0,1e300]',
    '[2024-01-01,infinity)', '{"[2024-01-01,infinity)"}')"""
AFTER = r"""{"id": 1, "n": "12345678901234567890.10", "d": "0.0000000001", "ns": ["1.0", null, "0.00", "%s", "NaN"],
 "r": {"lower": "1.10", "upper": "2.50", "lower_inc": true, "upper_inc": false, "empty": false},
 "f4": 1e-45, "f8": 1000000000000000.0, "f8s": [-0.0, "NaN", "Infinity", 5e-324], "i": 9223372036854775807,
 "m": "-92233720368547758.08", "c": {"amount": "1.50", "at": 9007199254740993, "ratio": -0.0},
 "cs": [{"amount": "1.0", "at": 1, "ratio": "NaN"}, null, {"amount": null, "at": null, "ratio": null}],
 "w": {"amount": "NaN", "at": -9223372036854775808, "ratio": 0.1}, "z": "()", "zs": ["()", null],
 "fr": {"lower": -0.0, "upper": 1e+300, "lower_inc": true, "upper_inc": true, "empty": false}""" % ("1" + "0" * 400)


def test_numbers_of_columns_wherever_they_are(any_db: Database, tmp_path: Path) -> None:
    """In arrays, ranges, composites and domains over them; composites without attributes; misfits within."""
    with any_db.connect(options="-c lc_monetary=C") as c:
        c.execute(DEFINITIONS)
        c.execute("CREATE PUBLICATION p FOR ALL TABLES")
        c.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        c.execute(f"INSERT INTO t {ROW}".encode())
    misfits = {"dr": "[2024-01-01,infinity)", "drs": '{"[2024-01-01,infinity)"}'}
    changes = peek(any_db.dsn, slot="s", publication="p")
    (event,), (line,) = changes.events(), lines(changes.batches[0], tmp_path)
    row = tokens(line)
    assert row.pop("_raw") == misfits
    assert row["dr"] is None is row["drs"]
    expected = tokens(AFTER + "}")
    assert tokens(event.model_dump_json())["after"] == expected | misfits
    assert {name: row[name] for name in expected} == expected


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)), st.booleans(),
    st.none() | st.integers(0, 4))  # fmt: skip
def test_other_values_are_written_as_json_writes_them(value: Any, ascii: bool, indent: int | None) -> None:
    assert dumps(value) == json.dumps(value, ensure_ascii=False)
    written = JsonWriter(indent=indent, ascii=ascii, sort_keys=ascii)(value)
    assert written == json.dumps(value, ensure_ascii=ascii, indent=indent, sort_keys=ascii)


def test_keys_and_values_of_other_kinds() -> None:
    assert dumps({2: 2, True: (3,), None: {}, 1.5: []}) == json.dumps({2: 2, True: (3,), None: {}, 1.5: []})
    for value in (object(), {b"x": 1}, {"x": {1, 2}}, [1j]):
        with pytest.raises(TypeError):
            dumps(value)


def test_the_sink_says_what_has_no_form(tmp_path: Path) -> None:
    for item in ({"x": object()}, {"x": float}, {(1, 2): 3}):
        with pytest.raises(SinkError, match="no form in JSON"):
            lines(item, tmp_path)


def test_numbers_of_documents_are_numbers_to_python() -> None:
    values = exact_json.loads("[1.10, -0, 1e400, 1.5, 3]")
    assert values == [1.1, 0, Decimal("1e400"), 1.5, 3]
    assert [type(v) for v in values] == [JsonFloat, JsonFloat, JsonDecimal, float, int]
    assert values[0] * 2 == 2.2
    assert hash(values[0]) == hash(1.1)
    assert exact_json.to_json(values) == [1.1, -0.0, "1" + "0" * 400, 1.5, 3]
