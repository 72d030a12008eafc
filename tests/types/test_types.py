"""Every value of every type: the server writes it, the table decodes it, and what came out is held against the server.

The way back is independent of the decoders: Arrow's values are packed as PostgreSQL's *binary* format, which the server
is asked for beside the text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psycopg
import pyarrow as pa
import pytest
from harness.type_cases import CASES, PINNED, Case, plain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgoutput_source.embedded import Server
from pgoutput_source.types import EXTENSIONS, OPAQUE, PgType, type_of
from pgoutput_source.types.base import nulled
from pgoutput_source.types.composite import composite_of


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
    return [None if value is None else case.pack(value) for value in plain(array)]


RELAXED = settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
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


@pytest.mark.parametrize("case", CASES, ids=str)
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
    sendable = [(v, array) for v, array in accepted if b"\0" not in v and (v.isascii() or '"char"' not in case.sql)]
    reads = replace(case, sql=case.reads or case.sql)
    _, _, read = oracle.ask(reads, [v.decode() for v, _ in sendable], only_valid=True) if case.parsed else (0, 0, [])
    for (value, array), answer in zip(sendable, read, strict=case.parsed):
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


SPLIT = {
    "array": (type_of(1009), b'{"%b"}', ["é"]),
    "array of two dimensions": (type_of(1009), b'{{"%b"}}', None),
    "composite": (composite_of([("a", type_of(25), -1)], 1, "c", type_of), b'("%b")', {"a": "é"}),
    "key of an hstore": (EXTENSIONS["hstore", "hstore"](1, "hstore"), b'"%b"=>NULL', [("é", None)]),
    "value of an hstore": (EXTENSIONS["hstore", "hstore"](1, "hstore"), b'"k"=>"%b"', [("k", "é")]),
}


@pytest.mark.parametrize(("row", "around", "expected"), SPLIT.values(), ids=SPLIT)
def test_a_backslash_within_a_character_is_refused(row: PgType, around: bytes, expected: Any) -> None:
    r"""Without the backslash ``\xc3\\\xa9`` would be the é that nobody sent."""
    for good in ("é".encode(), b"\\" + "é".encode()):
        assert row.decode(pa.array([around % good], pa.binary()), row.arrow(-1)).to_pylist() == [expected]
    for bad in (b"\xc3\\\xa9", b"\xc3\\\\\xa9", b"\xe2\x82\\\xac", b"\xf0\\\x9f\x98\x80"):
        with pytest.raises(ValueError, match=r"not a value of type|UTF8"):
            row.decode(pa.array([around % bad], pa.binary()), row.arrow(-1))
