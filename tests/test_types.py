"""Every value of every type: the server writes it, the table decodes it, and what came out is held against the server.

The way back is independent of the decoders: Arrow's values are packed as PostgreSQL's *binary* format, which the server
is asked for beside the text.
"""

from __future__ import annotations

import decimal
import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import psycopg
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgoutput_source.embedded import Server
from pgoutput_source.types import OPAQUE, TYPES, PgType, type_of
from pgoutput_source.types.base import nulled
from pgoutput_source.wire import PG_EPOCH_US

PINNED = (
    "-c DateStyle=ISO,YMD -c IntervalStyle=postgres -c TimeZone=UTC -c extra_float_digits=3 "
    "-c bytea_output=hex -c lc_monetary=C -c search_path="
)
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
    storage: pa.DataType | None = None  # compare these integers instead of Python objects
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
         misfit=lambda text: text.lstrip(b"-") == b"infinity", storage=pa.int32()),
    Case("time", TIMES, packed(">q"), "time_send(v)", ("24:00:00", "00:00:00", "23:59:59.999999", "12:00:00.5"),
         misfit=lambda text: text == b"24:00:00", storage=pa.int64()),
    Case("timestamp", MOMENTS, packed(">q", PG_EPOCH_US), "timestamp_send(v)", MOMENT_EDGES, late, pa.int64()),
    Case("timestamptz", MOMENTS, packed(">q", PG_EPOCH_US), "timestamptz_send(v)", MOMENT_EDGES, late, pa.int64()),
    Case("uuid", st.uuids().map(str), lambda s: bytes.fromhex(s.replace("-", "")), "uuid_send(v)",
         ("0" * 32, "f" * 32)),
]  # fmt: skip

CHECKED = [case for case in CASES if case.parsed]


class Oracle:
    """The server: what it writes for a text read as a type, in text and in binary."""

    def __init__(self, server: Server) -> None:
        self.major = server.major
        self.connection = psycopg.connect(server.dsn(), autocommit=True, options=PINNED)

    def ask(
        self, case: Case, inputs: list[str | None], only_valid: bool = False
    ) -> tuple[PgType, pa.DataType, list[Any]]:
        """The type's row and Arrow type, and of each input the server's (text, binary), or None."""
        guard = "CASE WHEN pg_input_is_valid(t, %s) THEN t END" if only_valid else "t"
        cursor = self.connection.execute(
            f"SELECT v, encode({case.send}, 'hex') FROM (SELECT ({guard})::{case.sql} AS v, n"
            " FROM json_array_elements_text(%s) WITH ORDINALITY AS u(t, n)) AS rows ORDER BY n",
            [*([case.sql] if only_valid else []), json.dumps(inputs)],
        )
        result = cursor.pgresult
        assert result is not None
        row = type_of(result.ftype(0))
        cells = [(result.get_value(i, 0), result.get_value(i, 1)) for i in range(result.ntuples)]
        answers = [None if t is None or b is None else (t, bytes.fromhex(b.decode())) for t, b in cells]
        return row, row.arrow(result.fmod(0)), answers


def _oracle(server: Server) -> Iterator[Oracle]:
    oracle = Oracle(server)
    yield oracle
    oracle.connection.close()


@pytest.fixture(scope="module")
def every_oracle(any_pg: Server) -> Iterator[Oracle]:
    yield from _oracle(any_pg)


@pytest.fixture(scope="module")
def oracle(pg: Server) -> Iterator[Oracle]:
    yield from _oracle(pg)


def binaries(case: Case, array: pa.Array) -> list[bytes | None]:
    """Each value as PostgreSQL would write it in binary, None where it is null."""
    values = (array if case.storage is None else array.view(case.storage)).to_pylist()
    return [None if value is None else case.pack(value) for value in values]


RELAXED = settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.parametrize("case", CASES, ids=str)
@given(data=st.data())
@RELAXED
def test_a_decoded_value_is_the_servers_value(case: Case, every_oracle: Oracle, data: st.DataObject) -> None:
    if every_oracle.major < case.since:
        pytest.skip(f"only since PostgreSQL {case.since}")
    value = st.one_of(st.none(), case.inputs, st.sampled_from(case.edges)) if case.edges else st.none() | case.inputs
    inputs = data.draw(st.lists(value, max_size=60))
    row, arrow, answers = every_oracle.ask(case, inputs)
    assert row is not OPAQUE
    assert row.oid in TYPES
    texts = pa.array([a and a[0] for a in answers], pa.binary())
    decoded = row.decode(texts, arrow)
    assert decoded.type == arrow
    decoded.validate(full=True)
    got = binaries(case, decoded)
    assert got == [None if a is None or case.misfit(a[0]) else a[1] for a in answers]
    start = data.draw(st.integers(0, len(inputs)))
    assert binaries(case, row.decode(texts.slice(start, 7), arrow)) == got[start : start + 7]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_columns_of_nothing_and_of_nulls(case: Case, oracle: Oracle) -> None:
    row, arrow, _ = oracle.ask(case, [])
    for values in (pa.array([], pa.binary()), pa.nulls(3, pa.binary()), pa.array([b"?", b"!"], pa.binary()).slice(2)):
        assert row.decode(values, arrow).equals(pa.nulls(len(values), arrow))
    # The bytes under a NULL are no value: they may be anything.
    assert row.decode(
        nulled(pa.array([b"?", b"\xff"], pa.binary()), ~pa.array([False, False]).to_numpy(False)), arrow
    ).equals(pa.nulls(2, arrow))


def outcome(row: PgType, arrow: pa.DataType, value: bytes) -> pa.Array | None:
    try:
        return row.decode(pa.array([value], pa.binary()), arrow)
    except ValueError:
        return None


@pytest.mark.parametrize("case", CHECKED, ids=str)
@given(data=st.data())
@RELAXED
def test_hostile_text_is_refused_or_means_what_the_server_reads(
    case: Case, oracle: Oracle, data: st.DataObject
) -> None:
    """Valid texts with a few bytes changed, and arbitrary bytes: alone and in a column they fare the same."""
    seeds = data.draw(
        st.lists(case.inputs | st.sampled_from(case.edges) if case.edges else case.inputs, min_size=1, max_size=5)
    )
    row, arrow, answers = oracle.ask(case, [*seeds])
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    hostile = [mutated(answer[0], rng) for answer in answers for _ in range(30) if len(answer[0]) < 200] + data.draw(
        st.lists(st.binary(max_size=40))
    )
    alone = [outcome(row, arrow, value) for value in hostile]
    accepted = [(value, array) for value, array in zip(hostile, alone, strict=True) if array is not None]
    sendable = [(v, array) for v, array in accepted if b"\0" not in v and (v.isascii() or case.sql != '"char"')]
    reads = replace(case, sql=case.reads or case.sql)
    _, _, read = oracle.ask(reads, [v.decode() for v, _ in sendable], only_valid=True)
    for (value, array), answer in zip(sendable, read, strict=True):
        assert answer is not None, f"the server refuses {value!r}, but it became {array}"
        (got,) = binaries(case, array)
        if got is None:
            assert case.misfit(answer[0]), value
        else:
            assert case.unpack(got) == case.unpack(answer[1]), value
    column = pa.array([v for v, _ in accepted], pa.binary())
    assert binaries(case, row.decode(column, arrow)) == [b for _, array in accepted for b in binaries(case, array)]
    refused = [value for value, array in zip(hostile, alone, strict=True) if array is None]
    if refused:
        with pytest.raises(ValueError):  # noqa: PT011
            row.decode(pa.array([*(v for v, _ in accepted), rng.choice(refused)], pa.binary()), arrow)


def mutated(text: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(0, 3)):
        at, byte = rng.randint(0, len(text)), bytes([rng.choice(b"0123456789-+:. eETZBCxXinfityNa\\_,/'\"{}()\xff")])
        text = rng.choice((text[:at] + byte + text[at:], text[:at] + byte + text[at + 1 :], text[:at] + text[at + 1 :]))
    return text


def test_an_unknown_type_is_its_exact_text() -> None:
    assert type_of(999_999) is OPAQUE
    assert OPAQUE.decode(pa.array([b"a", None, "é".encode()], pa.binary()), OPAQUE.arrow(-1)).to_pylist() == [
        "a",
        None,
        "é",
    ]


def test_char_above_127_is_the_same_from_every_server() -> None:
    decoded = type_of(18).decode(pa.array([b"\xff", b"\\377", b"\x80", b"a", b"", None], pa.binary()), pa.utf8())
    assert decoded.to_pylist() == ["\\377", "\\377", "\\200", "a", "", None]
