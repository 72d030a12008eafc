"""Values of every type for the tests of the type table: how to make them, and how PostgreSQL writes them in binary."""

from __future__ import annotations

import decimal
import functools
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pgoutput_source.protocol.wire import PG_EPOCH_US

LAST_TIMESTAMP_DAY = 109_203_527  # Julian day of 294276-12-31
DAY = 86_400_000_000


@dataclass(frozen=True)
class Case:
    """How to make values of a type, and how to write an Arrow value as PostgreSQL would in binary."""

    sql: str
    inputs: st.SearchStrategy[str]
    pack: Callable[[Any], bytes]
    send: str  # SQL that gives a value `v` as bytea
    edges: tuple[str, ...] = ()
    misfit: Callable[[bytes], bool] = lambda text: False
    since: int = 0
    parsed: bool = True  # False: the decoder does not look into the text
    unpack: Callable[[bytes], Any] = lambda b: b  # what must be equal, of `pack` and `send`
    reads: str = ""  # the type as which the server reads hostile text, if not `sql`: a decoder knows no typmod

    def __str__(self) -> str:
        return self.sql


def packed(layout: str, shift: int = 0) -> Callable[[Any], bytes]:
    return lambda value: struct.pack(layout, value - shift if shift else value)


def utf8(value: str) -> bytes:
    return value.encode()


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
TIMES = st.integers(0, DAY - 1).map(
    lambda us: f"{us // 3_600_000_000:02}:{us // 60_000_000 % 60:02}:{us // 10**6 % 60:02}.{us % 10**6:06}"
)
MOMENTS = st.tuples(st.one_of(st.integers(0, LAST_TIMESTAMP_DAY), st.integers(2_451_545, 2_470_000)), TIMES).map(
    lambda jt: f"J{jt[0]} {jt[1]}"
)
MOMENT_EDGES = (
    "infinity", "-infinity", "0044-03-15 12:00 BC", "0001-01-01", "0001-12-31 23:59:59.999999 BC",
    "9999-12-31 23:59:59.9", "10000-01-01", "99999-01-01", "100000-01-01 00:00:00.000001",
    "294247-01-10 04:00:54.775807", "294247-01-10 04:00:54.775808", "294276-12-31 23:59:59.999999",
    "4714-11-24 00:00:00 BC", "1999-12-31 23:59:59.999999", "2000-01-01",
    "2024-02-29 23:59:60", "1969-12-31 23:59:59.999999",
)  # fmt: skip


def late(text: bytes) -> bool:
    """Whether a timestamp is an infinity or after what a timestamp[us] can hold."""
    return text.lstrip(b"-") == b"infinity" or (
        len(text.split(b"-")[0]) == 6
        and text.removesuffix(b"+00") > b"294247-01-10 04:00:54.775807"
        and b"BC" not in text
    )


def exact(text: bytes) -> decimal.Decimal | str:
    number = decimal.Decimal(text.decode())
    return "NaN" if number.is_nan() else number


def numeric(precision: int, scale: int, since: int = 0) -> Case:
    largest = 10**precision - 1
    integers = st.one_of(
        st.integers(-largest, largest), st.integers(-(10 ** min(precision, 3)) + 1, 10 ** min(precision, 3) - 1)
    )
    return Case(
        f"numeric({precision},{scale})",
        integers.map(lambda i: f"{i}e{-scale}"),
        lambda d: format(d, "f").encode() if isinstance(d, decimal.Decimal) else d.encode(),
        "convert_to(v::text, 'UTF8')",
        ("0", f"{largest}e{-scale}", f"-{largest}e{-scale}", "NaN", "-0.001e-2"),
        misfit=lambda text: text == b"NaN" and max(precision, scale, precision - scale) <= 38,
        since=since,
        unpack=exact,
        reads="numeric",
    )


def integer(sql: str, layout: str, low: int, high: int) -> Case:
    return Case(sql, st.integers(low, high).map(str), packed(layout), f"{sql}send(v)", (str(low), str(high), "0"))


def string(sql: str, inputs: st.SearchStrategy[str] = TEXTS, send: str = "", **more: Any) -> Case:
    return Case(sql, inputs, utf8, send or f"{sql}send(v)", **more)


HEX = "0123456789abcdef"
JSON = st.recursive(
    st.one_of(
        st.sampled_from(["null", "true", "1.10", "1e400", "-0", '""', '"\\u00e9"', '{"a":1, "a":2}', "  [1 ,2]"]),
        st.integers().map(str),
    ),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: "[" + ", ".join(parts) + "]"),
    max_leaves=5,
)

CASES = [
    Case("bool", st.sampled_from(["t", "f"]), packed("?"), "boolsend(v)"),
    integer("int2", ">h", -(2**15), 2**15 - 1),
    integer("int4", ">i", -(2**31), 2**31 - 1),
    integer("int8", ">q", -(2**63), 2**63 - 1),
    integer("oid", ">I", 0, 2**32 - 1),
    Case("float4", st.floats(width=32).map(repr), packed(">f"), "float4send(v)",
         ("NaN", "Infinity", "-Infinity", "-0", "1e-45", "1.6777216e+07", "3.4028235e+38", "-1.17549435e-38")),
    Case("float8", st.floats().map(repr), packed(">d"), "float8send(v)",
         ("NaN", "Infinity", "-Infinity", "-0", "5e-324", "1e15", "1.7976931348623157e308", "2.2250738585072014e-308")),
    numeric(10, 2), numeric(1, 0), numeric(1, 1), numeric(18, 4), numeric(19, 4), numeric(38, 10), numeric(39, 0),
    numeric(76, 38), numeric(77, 5), numeric(5, -3, since=15), numeric(3, 5, since=15), numeric(1000, 10),
    Case("numeric", st.tuples(st.integers(-(10**90), 10**90), st.integers(-20, 20)).map(lambda ie: f"{ie[0]}e{ie[1]}"),
         utf8, "convert_to(v::text, 'UTF8')",
         ("NaN", "0.00", "-1e-20", "1e130", "1" * 5000, "-0." + "7" * 5000, "1e131071", "12345678901234567890.10"),
         unpack=exact),
    string("text"), string("varchar(20)", send="varcharsend(v)", parsed=False),
    string("character(20)", send="bpcharsend(v)", parsed=False),
    string("name", TEXTS.filter(lambda s: len(s.encode()) < 64), parsed=False),
    Case('"char"', st.sampled_from(["", "a", "\\", "\u007f", " "]), lambda s: bytes([int(s[1:], 8)]) if len(s) > 1 else
         s.encode() or b"\0", "charsend(v)"),
    string("json", JSON, "json_send(v)", parsed=False),
    Case("jsonb", JSON.filter(lambda j: "e400" not in j), lambda s: b"\x01" + s.encode(),
         "jsonb_send(v)", ("1e400",), parsed=False),
    Case("bytea", st.binary(max_size=20).map(lambda b: "\\x" + b.hex()), bytes, "byteasend(v)",
         ("", "\\x00", "\\\\", "\\x5c78")),
    Case("date", st.one_of(st.integers(0, 2_147_483_493), st.integers(0, 6_000_000)).map(lambda j: f"J{j}"),
         packed(">i", 10957), "date_send(v)",
         ("infinity", "-infinity", "0001-01-01", "0001-12-31 BC", "0005-02-29 BC", "4714-11-24 BC", "9999-12-31",
          "10000-01-01", "5874897-12-31", "1970-01-01", "1969-12-31", "2000-02-29", "99999-12-31"),
         misfit=lambda text: text.lstrip(b"-") == b"infinity"),
    Case("time", TIMES, packed(">q"), "time_send(v)", ("24:00:00", "00:00:00", "23:59:59.999999", "12:00:00.5"),
         misfit=lambda text: text == b"24:00:00"),
    Case("timestamp", MOMENTS, packed(">q", PG_EPOCH_US), "timestamp_send(v)", MOMENT_EDGES, late),
    Case("timestamptz", MOMENTS, packed(">q", PG_EPOCH_US), "timestamptz_send(v)", MOMENT_EDGES, late),
    Case("uuid", st.uuids().map(str), lambda s: bytes.fromhex(s.replace("-", "")), "uuid_send(v)",
         ("0" * 32, "f" * 32)),
]  # fmt: skip

# What is written as it stands: the text that the output function writes is what must come out.
AS_TEXT = "convert_to(format('%%s', v), 'UTF8')"
V4 = st.tuples(st.ip_addresses(v=4), st.integers(0, 32)).map(lambda ab: f"{ab[0]}/{ab[1]}")
V6 = st.tuples(st.ip_addresses(v=6), st.integers(0, 128)).map(lambda ab: f"{ab[0]}/{ab[1]}")
BITS = st.text("01", max_size=20)
SMALL = st.integers(-(10**6), 10**6)
FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)


def notation(sql: str, inputs: st.SearchStrategy[str], *edges: str, **more: Any) -> Case:
    return Case(sql, inputs, utf8, AS_TEXT, edges, **more)


def clock(seconds: int) -> str:
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def interval(months: int, days: int, us: int) -> str:
    sign = "-" if us < 0 else ""
    return f"{months} mons {days} days {sign}{abs(us) // 10**6}.{abs(us) % 10**6:06} s"


SCALARS = [
    integer("xid", ">I", 0, 2**32 - 1),
    replace(integer("xid8", ">Q", 0, 2**64 - 1), send="xid8send(v)"),
    Case("pg_lsn", st.integers(0, 2**64 - 1).map(lambda n: f"{n >> 32:X}/{n & 0xFFFFFFFF:X}"), packed(">Q"),
         "pg_lsn_send(v)",
         ("0/0", "FFFFFFFF/FFFFFFFF")),
    Case("money", st.integers(-(2**63), 2**63 - 1).map(lambda n: str(decimal.Decimal(n).scaleb(-2))),
         lambda d: struct.pack(">q", int(d.scaleb(2))), "cash_send(v)",
         ("-92233720368547758.08", "0", "-0.01", "999.99", "1000")),
    Case("interval",
         st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1), st.integers(-(10**15), 10**15))
         .map(lambda parts: interval(*parts)),
         lambda i: struct.pack(">qii", i["microseconds"], i["days"], i["months"]), "interval_send(v)",
         ("0", "-1 years -2 mons +3 days -04:05:06.789", "25:00:00", "1 day -01:00:00", "178000000 years",
          "-0.000001 s", "1 year 1 day", "-1 mon",
          "1 mon -1 day 00:00:01", "-178956970 years -8 mons"),
         misfit=lambda text: text.lstrip(b"-") == b"infinity"),
    Case("interval", st.sampled_from(["2562047788:00:54.775807", "-2562047788:00:54.775807", "infinity", "-infinity"]),
         lambda i: struct.pack(">qii", i["microseconds"], i["days"], i["months"]), "interval_send(v)",
         misfit=lambda text: b"infinity" in text, since=17, parsed=False),
    notation("timetz", st.tuples(TIMES, st.integers(-57599, 57599)).map(
        lambda tz: f"{tz[0]}{'-' if tz[1] < 0 else '+'}{clock(abs(tz[1]))}"),
        "24:00:00-15:59:59", "12:00:00.5+05:30", parsed=False),
    notation("inet", V4 | V6, "10.1.2.3/24", "::ffff:1.2.3.4", "1.2.3.4", parsed=False),
    notation("cidr", st.ip_addresses(v=4).map(str), "10.0.0.0/8", "::/0", parsed=False),
    notation("macaddr", st.binary(min_size=6, max_size=6).map(bytes.hex), parsed=False),
    notation("macaddr8", st.binary(min_size=8, max_size=8).map(bytes.hex), parsed=False),
    notation("bit(9)", st.text("01", min_size=9, max_size=9), parsed=False),
    notation("varbit", BITS),
    Case("point", st.tuples(FLOATS, FLOATS).map(str), lambda p: struct.pack(">dd", p["x"], p["y"]), "point_send(v)",
         ("(-0,1e-300)", "(Infinity,-Infinity)", "(NaN,NaN)", "(1e300,5e-324)")),
    notation("box", st.tuples(FLOATS, FLOATS, FLOATS, FLOATS).map(str), parsed=False),
    notation("circle", st.just("<(1,2),3>"), parsed=False),
    notation("line", st.just("{1,2,3}"), parsed=False),
    notation("path", st.sampled_from(["[(0,0),(1,1)]", "((0,0),(1,1))"]), parsed=False),
    notation("tsvector", st.sampled_from(["", "a:1A fat:2,4B", "'it''s' b"]), parsed=False),
    notation("tsquery", st.sampled_from(["", "a & !b", "'x y':*A"]), parsed=False),
    notation("regclass", st.sampled_from(["pg_catalog.pg_class", "pg_catalog.pg_type"]), parsed=False),
    notation("tid", st.just("(1,2)"), parsed=False),
    Case("int2vector", st.lists(st.integers(-9, 9), max_size=4).map(lambda v: " ".join(map(str, v))),
         lambda v: " ".join(map(str, v)).encode(), AS_TEXT, parsed=False),
    Case("oidvector", st.lists(st.integers(0, 2**32 - 1), max_size=4).map(lambda v: " ".join(map(str, v))),
         lambda v: " ".join(map(str, v)).encode(), AS_TEXT, parsed=False),
]  # fmt: skip
CASES += SCALARS


def quoted(cell: str) -> str:
    return '"' + cell.replace("\\", "\\\\").replace('"', '\\"') + '"'


def array_of(element: Case) -> Case:
    """The array type: its elements in binary, as JSON."""
    delimiter = ";" if element.sql == "box" else ","
    value = element.inputs | st.sampled_from(element.edges) if element.edges else element.inputs
    inputs = st.lists(st.none() | value, max_size=5).map(
        lambda cells: "{" + delimiter.join("NULL" if c is None else quoted(c) for c in cells) + "}"
    )

    def misfit(text: bytes) -> bool:
        cells = text.translate(None, b'{}[]()"\\').split(b",")
        return text[:1] == b"[" or text[:2] == b"{{" or any(map(element.misfit, cells))

    one = quoted(element.edges[0]) if element.edges else "NULL"
    shapes = ("{{" + one + delimiter + "NULL}}", "[0:0]={" + one + "}", "[2:3]={" + one + delimiter + one + "}")
    return Case(
        f"{element.sql}[]",
        inputs,
        lambda cells: json.dumps([None if c is None else element.pack(c).hex() for c in cells]).encode(),
        f"convert_to((SELECT coalesce(json_agg(CASE WHEN e IS NOT NULL THEN encode((SELECT {element.send}"
        " FROM (SELECT e) AS y(v)), 'hex') END ORDER BY n), '[]')"
        " FROM unnest(v) WITH ORDINALITY AS x(e, n))::text, 'UTF8')",
        ("{}", "{NULL}", *shapes),
        misfit=misfit,
        since=element.since,
        parsed=element.parsed,
        unpack=lambda b: [None if c is None else element.unpack(bytes.fromhex(c)) for c in json.loads(b)],
        reads=f"{element.reads}[]" if element.reads else "",
    )


def range_of(sql: str, pair: st.SearchStrategy[tuple[str, str]], *edges: str) -> Case:
    """A range type: bounds in binary, and how they are meant."""
    bound = BOUND[sql]

    def text(parts: tuple[tuple[str, str], str, str, int]) -> str:
        (lower, upper), opening, closing, shape = parts
        return f"{opening}{'' if shape == 1 else quoted(lower)},{'' if shape == 2 else quoted(upper)}{closing}"

    def pack(r: dict[str, Any]) -> bytes:
        bounds = [None if r[side] is None else bound.pack(r[side]).hex() for side in ("lower", "upper")]
        return json.dumps([*bounds, r["lower_inc"], r["upper_inc"], r["empty"]]).encode()

    sends = [f"encode((SELECT {bound.send} FROM (SELECT {side}(v)) AS y(v)), 'hex')" for side in ("lower", "upper")]
    return Case(
        sql,
        st.tuples(pair, st.sampled_from("[("), st.sampled_from(")]"), st.integers(0, 3)).map(text),
        pack,
        f"convert_to(json_build_array({', '.join(sends)}, lower_inc(v), upper_inc(v), isempty(v))::text, 'UTF8')",
        ("empty", "(,)", *edges),
        misfit=lambda t: any(map(bound.misfit, t.translate(None, b'[]()"').split(b","))),
        parsed=False,
        unpack=json.loads,
    )


BY_NAME = {case.sql: case for case in CASES}
INTEGER_PAIRS = st.tuples(SMALL, SMALL).map(lambda ab: (str(min(ab)), str(max(ab))))
DATE_PAIRS = st.tuples(*[st.integers(0, 6_000_000)] * 2).map(lambda ab: (f"J{min(ab)}", f"J{max(ab)}"))
MOMENT_PAIRS = st.tuples(*[st.integers(0, LAST_TIMESTAMP_DAY)] * 2).map(
    lambda ab: (f"J{min(ab)} 01:02:03.4", f"J{max(ab)} 12:00")
)
BOUND = {
    sql: BY_NAME[bound]
    for sql, bound in (
        ("int4range", "int4"), ("int8range", "int8"), ("numrange", "numeric"), ("daterange", "date"),
        ("tsrange", "timestamp"), ("tstzrange", "timestamptz"),
    )
}  # fmt: skip
RANGES = [
    range_of("int4range", INTEGER_PAIRS),
    range_of("int8range", INTEGER_PAIRS, "[-9223372036854775808,9223372036854775807)"),
    range_of("numrange", INTEGER_PAIRS, "[0.10,1.1234567890123456789]", "[1,NaN]"),
    range_of("daterange", DATE_PAIRS, "[2024-01-01,infinity)", "[-infinity,infinity]", "(,infinity)"),
    range_of("tsrange", MOMENT_PAIRS, "[2024-01-01,infinity)"),
    range_of("tstzrange", MOMENT_PAIRS, "[-infinity,2024-01-01 12:00)"),
]


def multirange_of(one: Case) -> Case:
    return replace(
        array_of(replace(one, edges=())),
        sql=one.sql.replace("range", "multirange"),
        inputs=st.lists(one.inputs | st.sampled_from(one.edges), max_size=4).map(
            lambda ranges: "{" + ",".join(ranges) + "}"
        ),
        edges=("{}",),
        misfit=lambda t: any(map(BOUND[one.sql].misfit, t.translate(None, b'{}[]()"').split(b","))),
    )


CASES += RANGES
CASES += [multirange_of(one) for one in RANGES]
CASES += [
    array_of(BY_NAME[name])
    for name in ("bool", "int4", "int8", "float8", "numeric", "numeric(10,2)", "text", '"char"', "jsonb", "bytea",
                 "date", "time", "timestamptz", "uuid", "interval", "box", "inet", "point")
]  # fmt: skip
CASES.append(array_of(RANGES[0]))
CASES.append(array_of(RANGES[5]))


PINNED = (
    "-c DateStyle=ISO,YMD -c IntervalStyle=postgres -c TimeZone=UTC -c extra_float_digits=3 "
    "-c bytea_output=hex -c lc_monetary=C -c search_path="
)


def plain(array: pa.Array) -> list[Any]:
    """The values as Python objects; dates and times as the integers that Arrow keeps, which have no limits."""
    kind = array.type
    if pa.types.is_temporal(kind):
        array = array.view(pa.int32() if pa.types.is_date32(kind) else pa.int64())
    elif pa.types.is_struct(kind):
        fields = zip(*(plain(array.field(i)) for i in range(kind.num_fields)), strict=True)
        return [
            dict(zip(kind.names, row, strict=True)) if row_ok else None
            for row, row_ok in zip(fields, valid(array), strict=True)
        ]
    elif pa.types.is_list(kind):
        return [plain(array.slice(i, 1).flatten()) if ok else None for i, ok in enumerate(valid(array))]
    return array.to_pylist()  # type: ignore[no-any-return]


def valid(array: pa.Array) -> list[bool]:
    return array.is_valid().to_pylist()  # type: ignore[no-any-return]


@functools.cache
def drawn(case: Case) -> list[str]:
    """Some values of a case, and all its edges."""
    found: list[str] = []

    @settings(max_examples=25, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case.inputs)
    def collect(value: str) -> None:
        found.append(value)

    collect()
    return found + list(case.edges)
