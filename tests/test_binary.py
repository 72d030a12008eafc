"""Values in binary: for each the server's own bytes give what its own text gives, in a column and to the letter."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psycopg
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_types import PINNED, plain
from type_cases import CASES, Case

from pgoutput_source.embedded import Server
from pgoutput_source.types import PgType, types_of
from pgoutput_source.types.base import Sent

RELAXED = settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


class Oracle:
    """The server: what it writes for a text read as a type, in text and in binary."""

    def __init__(self, server: Server) -> None:
        self.major = server.major
        self.connection = psycopg.connect(server.dsn(), autocommit=True, options=PINNED)

    def ask(self, sql: str, inputs: list[str]) -> tuple[PgType, pa.DataType, list[bytes], list[bytes]]:
        """The type's row and Arrow type, and of each input the server's text and what its send function writes."""
        query = f"SELECT t::{sql} FROM json_array_elements_text(%s) WITH ORDINALITY AS u(t, n) ORDER BY n"
        answers = []
        for binary in (False, True):
            result = self.connection.execute(query, [json.dumps(inputs)], binary=binary).pgresult
            assert result is not None
            answers.append([bytes(result.get_value(i, 0) or b"") for i in range(result.ntuples)])
            oid, typmod = result.ftype(0), result.fmod(0)
        row = types_of(self.major * 10_000)[oid]
        return row, row.arrow(typmod), answers[0], answers[1]


@pytest.fixture(scope="module")
def every_oracle(any_pg: Server) -> Iterator[Oracle]:
    oracle = Oracle(any_pg)
    yield oracle
    oracle.connection.close()


def same(one: pa.Array, other: pa.Array) -> bool:
    """Equal in type and in values, where NaN equals itself and -0 differs from 0."""
    return one.type == other.type and repr(plain(one)) == repr(plain(other))


@pytest.mark.parametrize("case", CASES, ids=str)
@given(data=st.data())
@RELAXED
def test_what_is_sent_in_binary_is_what_the_text_says(case: Case, every_oracle: Oracle, data: st.DataObject) -> None:
    if every_oracle.major < case.since:
        pytest.skip(f"only since PostgreSQL {case.since}")
    value = st.one_of(case.inputs, st.sampled_from(case.edges)) if case.edges else case.inputs
    inputs = data.draw(st.lists(value, max_size=60))
    row, arrow, texts, sent = every_oracle.ask(case.sql, inputs)
    if row.binary is None:
        assert row.name in ("tsquery", "regclass")
        return
    assert list(map(row.binary.text, sent)) == texts
    decoded = row.binary.decode(Sent.of(sent), arrow)
    decoded.validate(full=True)
    assert same(decoded, row.decode(pa.array(texts, pa.binary()), arrow))
