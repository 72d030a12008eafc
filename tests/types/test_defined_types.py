"""Types that a database defines arrive typed, from its catalogue, and never wrong when the catalogue is newer."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from harness.database import Database

from pgoutput_source import peek
from pgoutput_source.changes import ChangeBatch
from pgoutput_source.types import DEFINED, EXTENSIONS, TYPES, PgType, always, dense
from pgoutput_source.types.base import Sent


def streamed(db: Database, setup: str, *values: str) -> ChangeBatch:
    """The batch of rows `values` that were inserted into `t`, which `setup` made; one NULL row behind them."""
    with db.connect() as c:
        c.execute(setup.encode())
        c.execute("CREATE PUBLICATION cdc FOR ALL TABLES")
        c.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
        for row in values:
            c.execute(f"INSERT INTO t VALUES ({row})".encode())
        c.execute("INSERT INTO t DEFAULT VALUES")
    return peek(db.dsn, slot="cdc", publication="cdc").of("public.t")[0]


def test_enums_domains_composites_ranges_and_extensions_are_typed(any_db: Database) -> None:
    with any_db.connect() as c:
        c.execute("CREATE EXTENSION hstore; CREATE EXTENSION citext")
        c.execute("CREATE TYPE mood AS ENUM ('sad', 'happy')")
        c.execute("CREATE DOMAIN price AS numeric(10,2) CHECK (VALUE >= 0)")
        c.execute("CREATE TYPE part AS (name text, price price, moods mood[])")
        c.execute("CREATE TYPE floats AS RANGE (subtype = float8)")
        c.execute(
            "CREATE TABLE t (id int PRIMARY KEY, m mood, p price, c part, cs part[], f floats, h hstore, ci citext)"
        )
        c.execute("CREATE PUBLICATION cdc FOR ALL TABLES")
        c.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
        c.execute(
            """INSERT INTO t VALUES (1, 'happy', 2.50, ROW('a,"b', 1.25, '{sad,NULL}'),
                                     ARRAY[ROW('x', NULL, '{}')::part],
                                     '[1.5,2)', 'a=>1, b=>NULL', 'Ab')"""
        )
    batch = peek(any_db.dsn, slot="cdc", publication="cdc").table("public.t")
    row = batch.drop_columns([name for name in batch.column_names if name.startswith("_")]).to_pylist()[0]

    assert row == {
        "id": 1,
        "m": "happy",
        "p": Decimal("2.50"),
        "c": {"name": 'a,"b', "price": Decimal("1.25"), "moods": ["sad", None]},
        "cs": [{"name": "x", "price": None, "moods": []}],
        "f": {"lower": 1.5, "upper": 2.0, "lower_inc": True, "upper_inc": False, "empty": False},
        "h": [("a", "1"), ("b", None)],
        "ci": "Ab",
    }
    assert batch.schema.field("p").type == pa.decimal128(10, 2)
    assert batch.schema.field("m").metadata[b"pg.type"] == b"public.mood"


def test_a_catalogue_newer_than_the_values_makes_misfits_and_nothing_wrong(db: Database) -> None:
    with db.connect() as c:
        c.execute("CREATE TYPE pair AS (a text, b text)")
        c.execute("CREATE TYPE mood AS ENUM ('sad')")
        c.execute("CREATE TABLE t (id int PRIMARY KEY, p pair)")
        c.execute("CREATE TABLE gone (id int PRIMARY KEY, m mood)")
        c.execute("CREATE PUBLICATION cdc FOR ALL TABLES")
        c.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
        c.execute("INSERT INTO t VALUES (1, ROW('x', 'y')), (2, ROW('7', 'z'))")
        c.execute("INSERT INTO gone VALUES (1, 'sad')")
        c.execute("DROP TABLE gone; DROP TYPE mood")
        c.execute("ALTER TABLE t ALTER p TYPE text USING (p).a")
        c.execute("ALTER TYPE pair ALTER ATTRIBUTE a TYPE int CASCADE")
        c.execute("INSERT INTO t VALUES (3, 'text now')")
    found = peek(db.dsn, slot="cdc", publication="cdc")
    first, second = found.of("public.t")

    # That "7" is no less an attribute of type text than "x" is.
    assert first.data["p"].to_pylist() == [None, None]
    assert first.data["_raw"].to_pylist() == [[("p", "(x,y)")], [("p", "(7,z)")]]
    assert second.data["p"].to_pylist() == ["text now"]
    assert found.table("public.gone")["m"].to_pylist() == ["sad"]


def test_attributes_that_were_altered_while_nobody_read_make_misfits_of_what_is_older(any_db: Database) -> None:
    with any_db.connect() as c:
        c.execute("CREATE TYPE pair AS (a text, b text)")
        c.execute("CREATE TYPE pairs AS (one pair, more pair[])")
        c.execute("CREATE DOMAIN known AS pair")
        c.execute("CREATE TABLE t (id int PRIMARY KEY, p pair, ps pair[], deep pairs, d known, other text)")
        c.execute("ALTER TABLE t REPLICA IDENTITY FULL")
        c.execute("CREATE PUBLICATION cdc FOR ALL TABLES")
        c.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
        row = "'(x,y)', '{\"(x,y)\"}', '(\"(x,y)\",{})', '(x,y)', 'here'"
        c.execute(f"INSERT INTO t VALUES (1, {row})".encode())
        c.execute(b"INSERT INTO t VALUES (2, NULL, NULL, NULL, NULL, 'here')")
        # As many attributes as before: the text of old values would fit, under wrong names.
        c.execute("ALTER TYPE pair DROP ATTRIBUTE a, ADD ATTRIBUTE c text")
        c.execute(f"INSERT INTO t VALUES (3, {row})".encode())
        c.execute("UPDATE t SET other = 'there' WHERE id = 1")
    data = peek(any_db.dsn, slot="cdc", publication="cdc").table("public.t").to_pylist()
    new = {"b": "x", "c": "y"}

    before = {"p": "(x,y)", "ps": '{"(x,y)"}', "deep": '("(x,y)",{})', "d": "(x,y)"}
    assert [dict(row["_raw"] or ()) for row in data] == [before, {}, {}, {}]
    assert [row["p"] for row in data] == [None, None, new, {"b": "y", "c": None}]
    assert [row["ps"] for row in data] == [None, None, [new], [{"b": "y", "c": None}]]
    assert [row["deep"] for row in data][:3] == [None, None, {"one": new, "more": []}]
    assert [row["d"] for row in data] == [None, None, new, {"b": "y", "c": None}]
    assert data[3]["_before"]["p"] == {"b": "y", "c": None}


def test_a_type_that_was_never_altered_has_no_older_values(any_db: Database) -> None:
    with any_db.connect() as c:
        c.execute("CREATE PUBLICATION cdc FOR ALL TABLES")
        c.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
        with c.transaction():
            c.execute("CREATE TYPE pair AS (a text, b text)")
            c.execute("CREATE TABLE t (p pair)")
            c.execute("INSERT INTO t VALUES ('(x,y)')")
        c.execute("ALTER TYPE pair RENAME TO couple")
        c.execute("INSERT INTO t VALUES ('(x,y)')")
    batch = peek(any_db.dsn, slot="cdc", publication="cdc").of("public.t")[0]

    assert batch.data["p"].to_pylist() == [{"a": "x", "b": "y"}] * 2


def test_vectors_of_pgvector(db: Database) -> None:
    batch = streamed(
        db,
        "CREATE EXTENSION vector; CREATE TABLE t (v vector(3), w vector, h halfvec(3), s sparsevec(5), vs vector[])",
        "'[1,2.5,-3]', '[0.1]', '[1,0.1,65504]', '{1:1.5,3:-2}/5', ARRAY['[1,2]'::vector, NULL]",
        "'[0,1e-45,3.4028235e38]', '[1,2]', '[0,-0.5,6e-8]', '{}/5', '{}'",
    )
    found = {c.name: batch.data[c.name] for c in batch.schema.columns}

    assert [a.type for a in found.values()] == [
        pa.list_(pa.float32(), 3),
        pa.list_(pa.float32()),
        pa.list_(pa.float32(), 3),
        pa.struct({"indices": pa.list_(pa.int32()), "values": pa.list_(pa.float32()), "dim": pa.int32()}),
        pa.list_(pa.list_(pa.float32())),
    ]
    tiny, tenth, half = pa.array([1e-45, 0.1, 3.4028235e38], pa.float32()).to_pylist()
    assert found["v"].to_pylist() == [[1, 2.5, -3], [0, tiny, half], None]
    assert found["w"].to_pylist() == [[tenth], [1, 2], None]
    assert [pa.array(v, pa.float32()).cast(pa.float16()).to_pylist() for v in found["h"].to_pylist()[:2]] == [
        pa.array(v, pa.float16()).to_pylist() for v in ([1, 0.1, 65504], [0, -0.5, 6e-8])
    ]
    # The text counts from 1; indices count from 0, as pgvector does in binary and SciPy everywhere.
    assert found["s"].to_pylist() == [
        {"indices": [0, 2], "values": [1.5, -2], "dim": 5},
        {"indices": [], "values": [], "dim": 5},
        None,
    ]
    assert found["vs"].to_pylist() == [[[1, 2], None], [], None]
    with db.connect() as c:
        (distance,) = c.execute("SELECT v <-> '[1,2,2]' FROM t LIMIT 1").fetchone() or (None,)
    (nearest,) = duckdb.execute("SELECT array_distance(v, [1, 2, 2]::FLOAT[3]) FROM batch LIMIT 1").fetchall()[0]
    assert nearest == pytest.approx(distance)
    assert batch.data["_raw"].null_count == 3
    in_binary = peek(db.dsn, slot="cdc", publication="cdc", binary="on").of("public.t")[0]
    assert in_binary.data.equals(batch.data)


@pytest.mark.parametrize(
    "text",
    ["{1:1}", "{1:1}/0", "{0:1}/5", "{6:1}/5", "{2:1,1:1}/5", "{1:1,1:2}/5", "{1}/5", "{1:1:1}/5", "{1:x}/5",
     "{1:1,}/5", "1:1/5", "{1:1}/05", "{ 1:1}/5", "", "{}/-1"],
)  # fmt: skip
def test_what_is_no_sparsevec_is_refused(text: str) -> None:
    row = EXTENSIONS["vector", "sparsevec"](1, "sparsevec")
    for column in ([text], ["{1:1.5,3:2}/5", text], [text, "{}/5"]):
        with pytest.raises(ValueError):  # noqa: PT011
            row.decode(pa.array([t.encode() for t in column], pa.binary()), row.arrow(-1))


@pytest.mark.parametrize(
    "sent",
    ["", "00000005", "00000005 00000001 00000000 00000000", "00000005 ffffffff 00000000",
     "00000005 00000001 00000001 00000000 3f800000", "00000005 00000001 00000000 00000005 3f800000",
     "00000005 00000001 00000000 7fffffff 3f800000", "00000005 00000001 00000000 ffffffff 3f800000",
     "00000000 00000000 00000000", "80000000 00000000 00000000"],
)  # fmt: skip
def test_what_is_no_sparsevec_in_binary_is_refused(sent: str) -> None:
    row = EXTENSIONS["vector", "sparsevec"](1, "sparsevec")
    assert row.binary is not None
    good = bytes.fromhex("00000005 00000001 00000000 00000004 3fc00000")
    assert row.binary.decode(Sent.of([good]), row.arrow(-1)).to_pylist() == [
        {"indices": [4], "values": [1.5], "dim": 5}
    ]
    assert row.binary.text(good) == b"{5:1.5}/5"
    with pytest.raises(ValueError):  # noqa: PT011
        row.binary.decode(Sent.of([good, bytes.fromhex(sent)]), row.arrow(-1))


@pytest.fixture
def own_types() -> Iterator[None]:
    own, extensions = dict(DEFINED), dict(EXTENSIONS)
    yield
    DEFINED.clear()
    DEFINED.update(own)
    EXTENSIONS.clear()
    EXTENSIONS.update(extensions)


def test_a_type_of_ones_own_is_one_entry(any_db: Database, own_types: None) -> None:
    @dense
    def parts(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        return pc.split_pattern(values.cast(pa.utf8()), " .. ").cast(kind)

    EXTENSIONS["seg", "seg"] = lambda oid, name: PgType(oid, name, always(pa.list_(pa.float32())), parts)
    DEFINED["public.celsius"] = lambda oid, name: PgType(oid, name, always(pa.float64()), TYPES[701].decode)
    DEFINED['shop."Flag"'] = lambda oid, name: PgType(oid, name, always(pa.bool_()), is_on)

    @dense
    def is_on(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        texts = values.cast(pa.utf8())
        if not pc.all(pc.is_in(texts, pa.array(["on", "off"]))).as_py():
            raise ValueError
        return pc.equal(texts, "on")

    batch = streamed(
        any_db,
        """CREATE EXTENSION seg; CREATE SCHEMA shop
        ;CREATE DOMAIN celsius AS numeric(5,2); CREATE TYPE shop."Flag" AS ENUM ('on', 'off', 'maybe')
        ;CREATE TYPE reading AS (at seg, temperature celsius)
        ;CREATE TABLE t (s seg, c celsius, f shop."Flag", fs shop."Flag"[], r reading)""",
        "'1 .. 2', 36.6, 'on', '{on,NULL,off}', ROW('3 .. 4', 20)",
        "'5', 'NaN', 'maybe', '{maybe}', NULL",
    )
    rows = batch.data.select(["s", "c", "f", "fs", "r"]).to_pylist()

    assert rows[0] == {
        "s": [1, 2],
        "c": 36.6,
        "f": True,
        "fs": [True, None, False],
        "r": {"at": [3, 4], "temperature": 20.0},
    }
    assert str(rows[1]) == "{'s': [5.0], 'c': nan, 'f': None, 'fs': None, 'r': None}"
    # What a decoder refuses is kept, as every misfit is: the database may have changed its type meanwhile.
    assert batch.data["_raw"].to_pylist() == [None, [("f", "maybe"), ("fs", "{maybe}")], None]


# Of PostGIS's manual: ST_AsEWKB, ST_AsHEXEWKB, ST_GeomFromEWKB and ST_GeomFromText. No server here has PostGIS.
EWKB = {
    "0103000020E610000001000000050000000000000000000000000000000000000000000000000000000000"
    "00000000F03F000000000000F03F000000000000F03F000000000000F03F0000000000000000000000000000"
    "00000000000000000000": "POLYGON ((0 0, 0 1, 1 1, 1 0, 0 0))",
    "0102000020AD1000000300000003210FD14FC851C0F5B0BFB17F2D4540D3F85DF349C851C0F7D7F99B822D4540"
    "6E7DA2F24CC851C0EFE5F7927F2D4540": None,
    "0101000000000000000000F03F0000000000000040": "POINT (1 2)",
    "01010000A0E6100000000000000000F03F00000000000000400000000000000840": "POINT Z (1 2 3)",
    "0101000000000000000000F87F000000000000F87F": "POINT EMPTY",
    "010700000000000000": "GEOMETRYCOLLECTION EMPTY",
}
GEOMETRY = """CREATE TYPE {0};
CREATE FUNCTION {0}_in(cstring) RETURNS {0} LANGUAGE internal IMMUTABLE STRICT AS 'textin';
CREATE FUNCTION {0}_out({0}) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'textout';
CREATE TYPE {0} (INPUT = {0}_in, OUTPUT = {0}_out, LIKE = text);"""


def test_geometries_are_exact_bytes_that_duckdb_and_geoarrow_know_as_geometries(db: Database, own_types: None) -> None:
    """On a type that stands in for PostGIS's and writes what PostGIS would."""
    for name in ("geometry", "geography"):
        DEFINED[f"public.{name}"] = EXTENSIONS["postgis", name]
    setup = "".join(map(GEOMETRY.format, ("geometry", "geography")))
    batch = streamed(db, f"{setup} CREATE TABLE t (g geometry, e geography)", *(f"'{h}', '{h}'" for h in EWKB))

    for name in ("g", "e"):
        assert batch.data[name].to_pylist() == [*map(bytes.fromhex, EWKB), None]
    assert batch.data.schema.field("g").type == pa.binary()
    assert batch.data.schema.field("g").metadata[b"ARROW:extension:name"] == b"geoarrow.wkb"
    assert b"ARROW:extension:name" not in batch.data.schema.field("e").metadata
    rows = duckdb.execute("SELECT typeof(g), g::varchar, typeof(e) FROM batch").fetchall()
    assert {(g, e) for g, _, e in rows} == {("GEOMETRY", "BLOB")}
    for (_, text, _), expected in zip(rows, [*EWKB.values(), None], strict=True):
        assert expected is None or text == expected
    assert rows[1][1].startswith("LINESTRING (-71.1298")
    frame: Any = pl.from_arrow(batch.data)
    assert frame["g"].ext.storage().to_list() == batch.data["g"].to_pylist()


def test_a_geometry_that_declares_its_srid_says_so() -> None:
    row = EXTENSIONS["postgis", "geometry"](1, "geometry")
    assert row.metadata is not None
    # geometry(Point, 4326), geometry(Point), geometry
    assert [row.metadata(typmod)["ARROW:extension:metadata"] for typmod in (1107460, 4, -1)] == [
        '{"crs":"4326","crs_type":"srid"}',
        "{}",
        "{}",
    ]
