"""COPY in binary, decoded: what is not a value, what is not COPY, and what only some databases hold.

That each type's columns are the stream's is held in tests/types/test_types_stream.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import psycopg
import pyarrow as pa
import pytest
from harness.database import Database
from harness.type_cases import PINNED
from psycopg import sql

from pgoutput_source.changes.schema import Column
from pgoutput_source.decode.copied import TEXT_OF, CopiedColumn, DecodedTuples, Tuples, as_text, decode_copied
from pgoutput_source.embedded import Server
from pgoutput_source.errors import DecodeError, PgOutputError, ProtocolError
from pgoutput_source.types import TYPES


def column(name: str, oid: int, typmod: int = -1, text: bool = False) -> CopiedColumn:
    row = TYPES[oid]
    return CopiedColumn(Column(name, oid, typmod, False, row.name, row.arrow(typmod)), row, text or as_text(row))


def copied(connection: psycopg.Connection[Any], columns: Sequence[CopiedColumn], source: str) -> list[bytes]:
    asked = ", ".join(TEXT_OF.format(c.column.name) if c.as_text else c.column.name for c in columns)
    with connection.cursor().copy(f"COPY (SELECT {asked} FROM {source}) TO STDOUT (FORMAT binary)".encode()) as copy:
        return [bytes(frame) for frame in copy]


def decode(frames: Sequence[bytes], columns: Sequence[CopiedColumn], **options: Any) -> DecodedTuples:
    return decode_copied(Tuples(frames, list(map(len, frames)), first=True), columns, "public.t", **options)


SIX = [column("a", 20), column("b", 25), column("c", 1700, (12 << 16 | 2) + 4), column("d", 1082), column("e", 1007),
       column("f", 3615)]  # fmt: skip
VALUES = """(VALUES (1::bigint, 'x'::text, 1.5::numeric(12,2), 'infinity'::date, '{1,NULL}'::int[], 'a & b'::tsquery),
    (NULL, NULL, 'NaN', NULL, NULL, NULL), (-1, '', -0.01, '2024-02-29', '{{1},{2}}', '')) AS t(a, b, c, d, e, f)"""


def test_rows_nulls_and_misfits(pg: Server) -> None:
    with psycopg.connect(pg.dsn(), options=PINNED) as c:
        found = decode(frames := copied(c, SIX, VALUES), SIX)
        nothing = decode(copied(c, SIX, f"{VALUES} WHERE false"), SIX)
    assert [each.to_pylist() for each in found.columns[:3]] == [
        [1, None, -1],
        ["x", None, ""],
        [
            pa.scalar("1.50").cast(pa.decimal128(12, 2)).as_py(),
            None,
            pa.scalar("-0.01").cast(pa.decimal128(12, 2)).as_py(),
        ],
    ]
    assert found.columns[5].to_pylist() == ["'a' & 'b'", None, ""]
    assert [dict(raw) for raw in found.raw.to_pylist()] == [{"d": "infinity"}, {"c": "NaN"}, {"e": "{{1},{2}}"}]
    assert [(len(each), each.type) for each in nothing.columns] == [(0, each.type) for each in found.columns]
    with pytest.raises(DecodeError, match="can't hold") as error:
        decode(frames, SIX, on_misfit="error")
    assert (error.value.table, error.value.column) == ("public.t", "c")


@pytest.mark.parametrize("text", [False, True])
def test_a_value_that_is_none_of_its_type_is_named(pg: Server, text: bool) -> None:
    columns = [column("a", 25, text=text)]
    with psycopg.connect(pg.dsn(), options=PINNED) as c:
        frames = copied(c, columns, "(VALUES ('1'), (NULL), ('2'), ('no number')) AS t(a)")
    oid = 23 if text else 1082
    with pytest.raises(DecodeError, match=r"not a value of its type: '?(no number|1 bytes)") as error:
        decode(frames, [column("a", oid, text=text)])
    assert (error.value.table, error.value.column, error.value.type_name) == ("public.t", "a", TYPES[oid].name)


def test_any_bytes_give_rows_or_an_error_of_ours(pg: Server) -> None:
    rng = random.Random(1)
    with psycopg.connect(pg.dsn(), options=PINNED) as c:
        frames = copied(c, SIX, VALUES)
    outcomes = {"rows": 0, "refused": 0}
    for _ in range(3000):
        hostile = [bytearray(frame) for frame in frames]
        for _ in range(rng.randint(1, 3)):
            frame = rng.choice(hostile)
            at = rng.randrange(len(frame))
            match rng.randrange(3):
                case 0:
                    frame[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
                case 1:
                    del frame[at : at + rng.randint(1, 4)]
                case 2:
                    frame[at:at] = rng.randbytes(rng.randint(1, 4))
            if not frame:
                frame[:] = b"\0"
        try:
            found = decode(list(map(bytes, hostile)), SIX)
        except PgOutputError:
            outcomes["refused"] += 1
        else:
            outcomes["rows"] += 1
            for each in found.columns:
                each.validate(full=True)
    assert min(outcomes.values()) > 100, outcomes


def test_what_is_no_copy_is_refused(pg: Server) -> None:
    with psycopg.connect(pg.dsn(), options=PINNED) as c:
        frames = copied(c, SIX, VALUES)
    for hostile, problem in [
        ([frames[0][1:], *frames[1:]], "header"),
        ([frames[0][:19], *frames[1:]], "header"),
        ([*frames, b"\0"], "without a tuple"),
        ([*frames[:-1], frames[-1] + b"\0"], "after the trailer"),
        ([*frames[:-1], frames[1] + b"\0"], "after the last column"),
        ([frames[0][:-1]], "longer than its tuple"),
        ([*frames[:-1], frames[1][:-3]], "ends early"),
        ([*frames[:-1], b"\0\7" + frames[1][2:]], "not 6 columns"),
        ([*frames[:-1], b"\0\6\xff\xff\xff\xfe" + bytes(80)], "negative length"),
    ]:
        with pytest.raises(ProtocolError, match=problem):
            decode(hostile, SIX)
    with pytest.raises(ProtocolError, match="expected 2 bytes, got 1"):
        Tuples([b"x"], [2], first=False)


@pytest.mark.parametrize("text", [False, True])
def test_bytes_that_are_not_utf8_stay_as_their_escaped_text(pg: Server, text: bool) -> None:
    database = Database(pg)
    name = f"{database.name}_ascii"
    try:
        with database.connect() as c:
            c.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'").format(
                    sql.Identifier(name)
                )
            )
        columns = [column("a", 25, text=text)]
        with psycopg.connect(pg.dsn(name), options=PINNED) as c:
            frames = copied(c, columns, r"(VALUES ('x'), (E'h\344t'), (NULL)) AS t(a)")
        found = decode(frames, columns)
        assert found.columns[0].to_pylist() == ["x", None, None]
        assert found.raw.to_pylist() == [None, [("a", "h\\344t")], None]
    finally:
        with database.connect() as c:
            c.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
        database.drop()
