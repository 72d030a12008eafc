"""Types that a database defines: their rows are made from the catalogue, and their values held against the server."""

from __future__ import annotations

from typing import Any

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pgoutput_source.types import EXTENSIONS, FACTS, OPAQUE, TYPES, TypeFacts, from_catalogue, markdown_table

DEFINITIONS = """
CREATE TYPE mood AS ENUM ('sad', 'a,b', 'it''s "so"');
CREATE DOMAIN amount AS numeric(10,2);
CREATE DOMAIN price AS amount CHECK (VALUE >= 0);
CREATE DOMAIN scores AS int[];
CREATE TYPE inner_t AS (a int, "b c" text);
CREATE TYPE outer_t AS (i inner_t, at timestamptz, gone int, moods mood[], p price);
ALTER TYPE outer_t DROP ATTRIBUTE gone;
CREATE TYPE price_range AS RANGE (subtype = price);
CREATE EXTENSION hstore; CREATE EXTENSION citext; CREATE EXTENSION ltree; CREATE EXTENSION seg;
"""

VALUES: list[tuple[str, str, Any]] = [
    ("mood", """'it''s "so"'""", 'it\'s "so"'),
    ("mood[]", "ARRAY['a,b', NULL, 'it''s \"so\"']::mood[]", ["a,b", None, 'it\'s "so"']),
    ("price", "1.5", "Decimal('1.50')"),
    ("price", "'NaN'", None),
    ("price[]", "ARRAY[1.5, NULL]::price[]", "[Decimal('1.50'), None]"),
    ("scores", "'{1,2}'", [1, 2]),
    ("scores", "'{{1,2},{3,4}}'", None),
    ("inner_t", "ROW(1, 'x')", {"a": 1, "b c": "x"}),
    ("inner_t", "ROW(NULL, '')", {"a": None, "b c": ""}),
    ("inner_t", "ROW(NULL, NULL)", {"a": None, "b c": None}),
    ("inner_t", r"""ROW(-1, E'q"\\,() ''é\n')""", {"a": -1, "b c": "q\"\\,() 'é\n"}),
    ("inner_t[]", r"""ARRAY[ROW(1, 'a "b" \'), NULL]::inner_t[]""", [{"a": 1, "b c": 'a "b" \\'}, None]),
    (
        "outer_t",
        "ROW(ROW(7, 'a, \"b\"'), NULL, ARRAY['a,b']::mood[], 2)",
        "{'i': {'a': 7, 'b c': 'a, \"b\"'}, 'at': None, 'moods': ['a,b'], 'p': Decimal('2.00')}",
    ),
    ("outer_t", "ROW(NULL, 'infinity', NULL, 2)", None),
    ("price_range", "'[1,2.5)'", "{'lower': Decimal('1.00'), 'upper': Decimal('2.50'), 'lower_inc': True, "
     "'upper_inc': False, 'empty': False}"),
    ("price_multirange", "'{}'", []),
    ("hstore", r"""hstore(ARRAY['a', 'q"\', ''], ARRAY[NULL, ' =>,"', ''])""",
     [("", ""), ("a", None), ('q"\\', ' =>,"')]),
    ("hstore", "''", []),
    ("hstore[]", r"""ARRAY[hstore('a"', 'b\')]""", [[('a"', "b\\")]]),
    ("citext", "'Ab'", "Ab"),
    ("ltree", "'Top.Science'", "Top.Science"),
    ("seg", "'1 .. 2'", "1 .. 2"),
]  # fmt: skip


def rows_of(connection: Any, oids: list[int]) -> dict[int, Any]:
    facts = [TypeFacts(*row) for row in connection.execute(FACTS, {"oids": oids}).fetchall()]
    return dict(TYPES) | from_catalogue(facts, TYPES)


def test_values_of_types_that_the_database_defines(any_db: Any) -> None:
    with any_db.connect(options="-c TimeZone=UTC -c DateStyle=ISO,YMD") as connection:
        connection.execute(DEFINITIONS)
        for name, expression, expected in VALUES:
            if name == "price_multirange" and any_db.server.major < 14:
                continue
            cursor = connection.execute(f"SELECT ({expression})::{name}")
            # The result of a query has the domain's base type; a Relation message has the domain.
            (oid,) = connection.execute("SELECT %s::regtype::oid", [name]).fetchone()
            row = rows_of(connection, [oid])[oid]
            decoded = row.decode(pa.array([cursor.pgresult.get_value(0, 0), None], pa.binary()), row.arrow(-1))
            decoded.validate(full=True)
            got = decoded.to_pylist()
            assert got[1] is None
            assert (str(got[0]) if isinstance(expected, str) else got[0]) == expected or repr(got[0]) == expected, name


def test_a_composite_of_another_shape_is_a_misfit_and_no_error() -> None:
    row = from_catalogue([TypeFacts(99_999, "t", "t", "c", attributes=[["a", 23, -1], ["b", 25, -1]])], TYPES)[99_999]
    texts = pa.array([b"(1,x)", b"(1,x,2)", b"(1)", b"(,)"], pa.binary())
    assert row.decode(texts, row.arrow(-1)).to_pylist() == [{"a": 1, "b": "x"}, None, None, {"a": None, "b": None}]
    with pytest.raises(ValueError, match="t"):
        row.decode(pa.array([b"(1,x"], pa.binary()), row.arrow(-1))


def test_a_type_that_the_catalogue_does_not_tell_is_text() -> None:
    rows = from_catalogue(
        [TypeFacts(99_999, "x", "x", "b", extension="x"), TypeFacts(99_998, "d", "d", "d", base=5)], TYPES
    )
    for oid in (99_999, 99_998):
        assert rows[oid].decode(pa.array([b"?"], pa.binary()), rows[oid].arrow(-1)).to_pylist() == ["?"]


def test_the_table_knows_every_type_of_every_server_by_its_name(any_db: Any) -> None:
    with any_db.connect() as connection:
        served = connection.execute(
            """SELECT t.oid::bigint, format_type(t.oid, NULL), t.typarray::bigint, t.typdelim::text FROM pg_type AS t
            WHERE typnamespace = 'pg_catalog'::regnamespace AND typtype IN ('b', 'r', 'm') AND typarray <> 0
            AND typname NOT IN ('gtsvector') AND typrelid = 0"""
        ).fetchall()
    unknown = {name: oid for oid, name, _, _ in served if oid not in TYPES}
    assert not unknown
    for oid, name, array, delimiter in served:
        assert (TYPES[oid].name, TYPES[oid].array, TYPES[oid].delimiter) == (name, array, delimiter)
        assert array in TYPES


def test_the_table_for_people_names_every_row() -> None:
    table = markdown_table()
    for row in TYPES.values():
        assert row.name in table or row.name.endswith("[]")
    assert OPAQUE.name not in table


@pytest.mark.parametrize("typmod", [-1, 3])
def test_vectors_of_pgvector(typmod: int) -> None:
    row = from_catalogue([TypeFacts(99_999, "vector", "vector", "b", extension="vector")], TYPES)[99_999]
    decoded = row.decode(pa.array([b"[1,2.5,-3]", None, b"[0,1e-45,-0]"], pa.binary()), row.arrow(typmod))
    assert decoded.to_pylist() == [[1, 2.5, -3], None, [0, 1.401298464324817e-45, -0.0]]
    with pytest.raises(ValueError, match="vector"):
        row.decode(pa.array([b"[1,2.5,x]"], pa.binary()), row.arrow(typmod))


def test_every_arrow_type_of_the_table_goes_through_parquet_polars_and_duckdb(tmp_path: Any) -> None:
    rows = [*TYPES.values(), *(make(0, name) for (_, name), make in EXTENSIONS.items())]
    every = dict.fromkeys(row.arrow(typmod) for row in rows for typmod in (-1, (38 << 16 | 10) + 4))
    kinds = [kind for kind in every if not (pa.types.is_fixed_size_list(kind) and kind.list_size > 1000)]
    in_memory = pa.table({f"c{i}": pa.nulls(2, kind) for i, kind in enumerate(kinds)})
    pq.write_table(in_memory, tmp_path / "t.parquet")
    assert pq.read_table(tmp_path / "t.parquet").schema.equals(in_memory.schema)
    assert polars.from_arrow(in_memory).shape == polars.read_parquet(tmp_path / "t.parquet").shape == (2, len(kinds))
    for source in ("in_memory", f"'{tmp_path}/t.parquet'"):
        relation = duckdb.sql(f"FROM {source}")
        assert relation is not None
        assert len(relation.columns) == len(relation.fetchall()[0]) == len(kinds)
