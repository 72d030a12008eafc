"""The numbered conformance cases of types, as the JSON of events: 143 to 171, on each major, from one real stream.

Each value is streamed alone, in an array of its type and beside a NULL. The whole database is set up against us (case
153): role and database ask for other notations of every type that has any.

No server that can be had brings PostGIS (168): its bytes are held by `test_defined_types`. pgvector (169) comes with
PostgreSQL 18 only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import psycopg
from harness.database import Database
from harness.slot import Slot
from psycopg import sql

from pgoutput_source import peek

HOSTILE = {
    "DateStyle": "German",
    "TimeZone": "Asia/Kolkata",
    "IntervalStyle": "sql_standard",
    "extra_float_digits": "-15",
    "bytea_output": "escape",
    "search_path": "pg_catalog",
    "quote_all_identifiers": "on",
    "lc_monetary": "C",
}

DEFINITIONS = r"""
CREATE EXTENSION hstore SCHEMA public; CREATE EXTENSION citext SCHEMA public; CREATE EXTENSION ltree SCHEMA public;
CREATE EXTENSION cube SCHEMA public; CREATE EXTENSION seg SCHEMA public; CREATE EXTENSION isn SCHEMA public;
CREATE TYPE public.mood AS ENUM ('ok', 'a,b', 'NULL');
CREATE DOMAIN public.amount AS numeric(10,2);
CREATE DOMAIN public.price AS public.amount CHECK (VALUE >= 0);
CREATE TYPE public.part AS (a int, gone int, b text);
ALTER TYPE public.part DROP ATTRIBUTE gone;
CREATE TYPE public.whole AS (p public.part, ps public.part[], at timestamptz);
"""


@dataclass(frozen=True)
class Raw:
    """A value that its Arrow type can't hold: an event has its text, or what Python makes of it."""

    value: Any


SAME = object()
ONE_RANGE = {"lower": 1, "upper": 6, "lower_inc": True, "upper_inc": False, "empty": False}
EMPTY = {"lower": None, "upper": None, "lower_inc": False, "upper_inc": False, "empty": True}
UNBOUNDED = {"lower": None, "upper": None, "lower_inc": False, "upper_inc": False, "empty": False}


def interval(months: int, days: int, microseconds: int) -> dict[str, int]:
    return {"months": months, "days": days, "microseconds": microseconds}


# By number: type, text, and the value in an event's JSON (SAME: the text).
CASES: dict[int, list[tuple[str, str, Any]]] = {
    143: [
        ("int2", "-32768", -32768), ("int2", "32767", 32767),
        ("int4", "-2147483648", -(2**31)), ("int4", "2147483647", 2**31 - 1),
        ("int8", "-9223372036854775808", -(2**63)), ("int8", "9223372036854775807", 2**63 - 1),
        ("float4", "NaN", "NaN"), ("float4", "-Infinity", "-Infinity"), ("float4", "-0", "-0.0"),
        ("float4", "0.1", 0.1), ("float4", "1e-45", 1e-45), ("float4", "1.6777216e+07", 16777216.0),
        ("float8", "NaN", "NaN"), ("float8", "Infinity", "Infinity"), ("float8", "-0", "-0.0"),
        ("float8", "5e-324", 5e-324), ("float8", "0.30000000000000004", 0.30000000000000004),
    ],
    144: [
        ("numeric", "0.00", SAME), ("numeric", "-1e-20", "-0.00000000000000000001"),
        ("numeric", "1e130", "1" + "0" * 130), ("numeric", "NaN", SAME), ("numeric", "Infinity", SAME),
        ("numeric", "-Infinity", SAME), ("numeric", "9" * 76, SAME), ("numeric", "9" * 77, SAME),
        ("numeric(76,0)", "9" * 76, SAME),
        ("numeric(10,2)", "-99999999.99", SAME), ("numeric(10,2)", "0", "0.00"), ("numeric(10,2)", "NaN", Raw("NaN")),
        ("numeric(10,2)", "-0.001", "0.00"), ("numeric(1000,10)", "1.5", "1.5000000000"),
    ],
    145: [("numeric", "7" * 5000 + "." + "3" * 5000, SAME)],
    146: [
        ("money", "-1234567.89", SAME), ("money", "-92233720368547758.08", SAME), ("money", "0", "0.00"),
        ("money", "92233720368547758.07", SAME),
    ],
    147: [
        ("char(5)", "ab", "ab   "), ('"char"', "", ""), ('"char"', "a", "a"),
        ("name", "a" * 63, SAME), ("varchar(3)", "äöü", SAME), ("text", "", ""),
    ],
    148: [("bytea", "\\x", SAME), ("bytea", "\\x00", SAME), ("bytea", "\\x5c", SAME), ("bytea", "\\x00ff7f27", SAME)],
    149: [
        ("date", "infinity", Raw("infinity")), ("date", "-infinity", Raw("-infinity")), ("date", "0001-01-01", SAME),
        ("date", "0044-03-15 BC", SAME), ("date", "9999-12-31", SAME), ("date", "10000-01-01", SAME),
        ("date", "5874897-12-31", SAME), ("date", "2024-02-29", SAME), ("date", "4714-11-24 BC", SAME),
    ],
    150: [
        (kind, text + zone * (text[-1].isdigit()), value)
        for kind, zone in (("timestamp", ""), ("timestamptz", "+00"))
        for text, value in (
            ("infinity", Raw("infinity")), ("-infinity", Raw("-infinity")),
            ("1999-12-31 23:59:59.999999", "1999-12-31T23:59:59.999999" + zone.replace("+00", "+00:00")),
            ("294247-01-10 04:00:54.775807", "294247-01-10 04:00:54.775807" + zone),
            ("294247-01-10 04:00:54.775808", Raw("294247-01-10 04:00:54.775808" + zone)),
            ("294276-12-31 23:59:59.999999", Raw("294276-12-31 23:59:59.999999" + zone)),
        )
    ] + [
        ("timestamp", "0044-03-15 12:00:00 BC", SAME), ("timestamptz", "0044-03-15 12:00:00+00 BC", SAME),
        ("timestamptz", "2024-01-02 03:04:05+09", "2024-01-01T18:04:05+00:00"),
    ],
    151: [
        ("time", "24:00:00", Raw("24:00:00")), ("time", "23:59:59.999999", SAME), ("time", "00:00:00", SAME),
        ("timetz", "24:00:00-15:59:59", SAME), ("timetz", "12:00:00.5+05:30", SAME),
        ("timetz", "00:00:00+15:59:59", SAME),
    ],
    152: [
        ("interval", "-1 years -2 mons +3 days -04:05:06.789", interval(-14, 3, -14_706_789_000)),
        ("interval", "25:00:00", interval(0, 0, 90_000_000_000)),
        ("interval", "1 day -01:00:00", interval(0, 1, -3_600_000_000)),
        ("interval", "178000000 years", interval(2_136_000_000, 0, 0)),
        ("interval year to month", "1-2", interval(14, 0, 0)),
        ("interval", "00:00:00", interval(0, 0, 0)),
    ],
    154: [
        ("json", '{"a":1, "a":  1.10}', {"a": 1.1}), ("json", "1e400", "1" + "0" * 400), ("json", " [1 ,2]", [1, 2]),
        ("jsonb", '{"b":2, "a":1, "a":1.10}', {"a": 1.1, "b": 2}), ("jsonb", "1.10", 1.1), ("jsonb", "null", None),
        ("jsonb", "12345678901234567890.123456789", "12345678901234567890.123456789"), ("json", r'"\u0000"', "\0"),
    ],
    155: [
        ("int4[]", "{}", []), ("text[]", '{NULL,"NULL","",null}', [None, "NULL", "", None]),
        ("text[]", r'{"a,b","q\"x","back\\slash","{br}"," sp "}', ["a,b", 'q"x', "back\\slash", "{br}", " sp "]),
        ("int4[]", "{{1,2},{3,4}}", Raw("{{1,2},{3,4}}")), ("int4[]", "[0:1]={1,2}", Raw("[0:1]={1,2}")),
        ("int4[]", "[2:3][-1:0]={{1,2},{3,4}}", Raw("[2:3][-1:0]={{1,2},{3,4}}")),
        ("box[]", "{(1,1),(0,0);(3,3),(2,2)}", ["(1,1),(0,0)", "(3,3),(2,2)"]),
        ("bytea[]", r'{"\\x00","\\x5c22",NULL}', ["\\x00", "\\x5c22", None]),
        ("jsonb[]", r'{"{\"a\": [1, \"x\"]}","null"}', [{"a": [1, "x"]}, None]),
        ("public.mood[]", '{ok,"a,b","NULL",NULL}', ["ok", "a,b", "NULL", None]),
        ("public.part[]", r'{"(1,\"x,\"\"\")",NULL,"(,)"}', [{"a": 1, "b": 'x,"'}, None, {"a": None, "b": None}]),
        ("public.price[]", "{1.5,NULL}", ["1.50", None]), ("public.price[]", "{NaN}", Raw("{NaN}")),
        ("numeric(6,2)[]", "{1.5,-0.5}", ["1.50", "-0.50"]), ("numeric(6,2)[]", "{1,NaN}", Raw("{1.00,NaN}")),
        ("date[]", "{2024-01-01,infinity}", Raw("{2024-01-01,infinity}")),
    ],
    156: [("int2vector", "1 2 3", [1, 2, 3]), ("int2vector", "", []), ("oidvector", "4294967295 0", [2**32 - 1, 0])],
    157: [
        ("int4range", "empty", EMPTY), ("int4range", "(,)", UNBOUNDED), ("int4range", "[1,5]", ONE_RANGE),
        ("int4range", "[1,)", {**UNBOUNDED, "lower": 1, "lower_inc": True}),
        ("daterange", "[2024-01-01,infinity)", Raw("[2024-01-01,infinity)")),
        ("tsrange", '("2024-01-01 00:00:00",)', {**UNBOUNDED, "lower": "2024-01-01T00:00:00"}),
        ("numrange", "[1.10,2.5]", {**ONE_RANGE, "lower": "1.10", "upper": "2.5", "upper_inc": True}),
        ("int4multirange", "{}", []),
        ("int4multirange", "{[1,6),[8,9)}", [ONE_RANGE, {**ONE_RANGE, "lower": 8, "upper": 9}]),
    ],
    158: [
        ("public.part", "(,)", {"a": None, "b": None}), ("public.part", '(1,"")', {"a": 1, "b": ""}),
        ("public.part", r'(-1,"q""\\,() é")', {"a": -1, "b": 'q"\\,() é'}),
        ("public.whole", r'("(1,x)","{""(2,\\""a,b\\"")"",NULL}","2024-01-01 00:00:00+00")',
         {"p": {"a": 1, "b": "x"}, "ps": [{"a": 2, "b": "a,b"}, None], "at": "2024-01-01T00:00:00+00:00"}),
        ("public.whole", "(,,)", {"p": None, "ps": None, "at": None}),
        ("public.whole", "(,,infinity)", Raw("(,,infinity)")),
    ],
    159: [("public.price", "1.5", "1.50"), ("public.price", "NaN", Raw("NaN"))],
    160: [
        ("public.hstore", r'"a"=>"1", "b c"=>NULL, ""=>"", "q\"\\"=>" =>,"',
         {"": "", "a": "1", "b c": None, 'q"\\': " =>,"}),
        ("public.hstore", "", {}),
    ],
    161: [
        ("inet", "10.1.2.3/24", SAME), ("inet", "1.2.3.4", SAME), ("inet", "2001:db8::1/64", SAME),
        ("inet", "::ffff:1.2.3.4", SAME), ("cidr", "10.0.0.0/8", SAME), ("cidr", "1.2.3.4", "1.2.3.4/32"),
    ],
    162: [("bit(3)", "101", SAME), ("bit(9)", "101010101", SAME), ("varbit", "", SAME), ("varbit", "1", SAME)],
    163: [
        ("oid", "4294967295", 2**32 - 1), ("xid", "4294967295", 2**32 - 1), ("cid", "1", 1),
        ("xid8", "18446744073709551615", 2**64 - 1), ("pg_lsn", "FFFFFFFF/FFFFFFFF", 2**64 - 1),
        ("pg_lsn", "16/B374D848", 0x16B374D848), ("regclass", "pg_class", SAME), ("regclass", "-", SAME),
        ("regtype", "integer", SAME), ("regproc", "now", SAME), ("tid", "(1,2)", SAME),
        ("pg_snapshot", "10:20:10,14,15", SAME),
    ],
    164: [
        ("point", "(1,2.5)", {"x": 1.0, "y": 2.5}), ("point", "(-0,1e-300)", {"x": "-0.0", "y": 1e-300}),
        ("line", "{1,2,3}", SAME), ("lseg", "[(0,0),(1,0.1)]", SAME), ("box", "(1,1),(0,0)", SAME),
        ("path", "[(0,0),(1,1)]", SAME), ("path", "((0,0),(1,1))", SAME), ("polygon", "((0,0),(0,1),(1,1))", SAME),
        ("circle", "<(1,2),3>", SAME),
    ],
    165: [
        ("tsvector", "", SAME), ("tsvector", "'a':1A 'fat':2,4B", SAME), ("tsvector", "'it''s'", SAME),
        ("tsquery", "'a' & !'b'", SAME), ("tsquery", "", SAME),
    ],
    166: [
        ("uuid", "00000000-0000-0000-0000-000000000000", SAME), ("uuid", "A0EEBC999C0B4EF8BB6D6BB9BD380A11",
         "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"), ("macaddr", "08:00:2b:01:02:03", SAME),
        ("macaddr8", "08:00:2b:01:02:03:04:05", SAME),
    ],
    167: [
        ("public.ltree", "Top.Science", SAME), ("public.citext", "Ab", SAME), ("public.cube", "(1, 2),(3, 4)", SAME),
        ("public.seg", "1 .. 2", SAME),
    ],
    170: [("public.isbn13", "978-0-393-04002-9", SAME), ("public.lquery", "Top.*", SAME)],
}  # fmt: skip

SINCE: dict[int, dict[int, list[tuple[str, str, Any]]]] = {
    15: {
        144: [("numeric(5,-3)", "123456", "123000"), ("numeric(3,5)", "0.00123", SAME)],
        152: [("interval", "2562047788:00:54.775807", interval(0, 0, 2**63 - 1))],
    },
    16: {147: [('"char"', "\\377", SAME)]},
    17: {152: [("interval", "infinity", Raw("infinity")), ("interval", "-infinity", Raw("-infinity"))]},
}
PGVECTOR: list[tuple[str, str, Any]] = [
    ("public.vector(3)", "[1,2.5,-3]", [1.0, 2.5, -3.0]), ("public.vector", "[1]", [1.0]),
    ("public.halfvec(2)", "[0.5,65504]", [0.5, 65504.0]),
    ("public.sparsevec(5)", "{1:1.5,3:-2}/5", {"indices": [0, 2], "values": [1.5, -2.0], "dim": 5}),
]  # fmt: skip


def test_cases_143_to_170_as_events(any_db: Database) -> None:
    major = any_db.server.major
    assert {*CASES, 153, 168, 169} == {*range(143, 171)}
    cases = {number: list(rows) for number, rows in CASES.items()}
    for since, more in SINCE.items():
        for number, rows in more.items():
            cases[number] += rows if major >= since else []
    with any_db.connect() as c:
        if c.execute("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'").fetchone():
            c.execute("CREATE EXTENSION vector SCHEMA public")
            cases[169] = PGVECTOR
        c.execute(DEFINITIONS.encode())
        c.execute("CREATE PUBLICATION cdc FOR ALL TABLES")
        c.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
        for number, rows in cases.items():
            kinds = ", ".join(f"v{i} {kind}" for i, (kind, _, _) in enumerate(rows))
            arrays = ", ".join(f"a{i} {kind}[]" for i, (kind, _, _) in enumerate(rows) if array(kind))
            c.execute(f"CREATE TABLE public.case_{number} ({kinds}{', ' * bool(arrays)}{arrays})".encode())
            texts = [text for _, text, _ in rows]
            values = [sql.SQL("{}").format(sql.Literal(text)) for text in texts]
            values += [
                sql.SQL("ARRAY[{}, NULL]::{}[]").format(sql.Literal(text), sql.SQL(kind))
                for kind, text, _ in rows
                if array(kind)
            ]
            c.execute(sql.SQL("INSERT INTO {} VALUES ({})").format(
                sql.Identifier("public", f"case_{number}"), sql.SQL(", ").join(values)))  # fmt: skip
            c.execute(f"INSERT INTO public.case_{number} DEFAULT VALUES".encode())
        hostile(c, any_db)
    with any_db.connect() as c:  # Case 153: this is what the settings do to anyone else.
        row = c.execute("SELECT '2024-02-29'::date::text, '\\x00'::bytea::text, '1 day 1 s'::interval::text").fetchone()
        assert row == ("29.02.2024", "\\000", "1 0:00:01")
    changes = peek(any_db.dsn, slot="cdc", publication="cdc")
    filled = (event for event in changes.events() if event.after and event.after["v0"] is not None)
    found = {event.table_schema.table: event for event in filled}
    for number, rows in cases.items():
        event = found[f"case_{number}"]
        after = event.model_dump(mode="json")["after"]
        batch = changes.of(f"public.case_{number}")[0]
        raw = dict(batch.data["_raw"][0].as_py() or ())
        for i, (kind, text, value) in enumerate(rows):
            what = f"case {number}: {kind} {text[:40]}"
            held = not isinstance(value, Raw)
            expected = text if value is SAME else value if held else value.value
            # JSON has no negative zero that survives ==; an event's is told by its sign.
            assert normal(after[f"v{i}"]) == normal(expected), what
            assert batch.data[f"v{i}"][0].is_valid == held, what
            assert batch.data[f"v{i}"].is_valid().to_pylist() == [held, False], what
            assert (f"v{i}" in raw) != held, what
            if kind == "json":
                assert batch.data[f"v{i}"][0].as_py() == text, what
            if array(kind):
                assert (f"a{i}" in raw) != held, what
                if held:
                    assert normal(after[f"a{i}"]) == normal([expected, None]), what


def array(kind: str) -> bool:
    """Whether a type can be an element, of an array of one dimension."""
    return not kind.endswith("[]") and kind not in ("int2vector", "oidvector")


def normal(value: Any) -> str:
    return re.sub(r"'(-0\.0)'", r"\1", repr(value))


def hostile(c: psycopg.Connection[Any], db: Database) -> None:
    for name, value in HOSTILE.items():
        c.execute(
            sql.SQL("ALTER DATABASE {} SET {} = {}").format(
                sql.Identifier(db.name), sql.Identifier(name), sql.Literal(value)
            )
        )


def test_case_171_a_type_that_is_new_in_the_midst_of_a_stream(any_db: Database) -> None:
    slot = Slot(any_db)
    slot.run("INSERT INTO t VALUES (1, 'a')")
    first = slot.assembler.feed(slot.frames())
    slot.run("""CREATE TYPE late AS ENUM ('x', 'y')
        CREATE TYPE later AS (l late, ls late[])
        CREATE TABLE n (l later)
        INSERT INTO n VALUES (ROW('y', '{x}'))""")
    slot.assembler.reconnected()
    second = slot.assembler.feed(slot.frames())

    assert first.tables == ("public.t",)
    assert second.table("public.n")["l"].to_pylist() == [{"l": "y", "ls": ["x"]}]
