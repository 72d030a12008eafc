"""A table with a column of every type: its stream, COPY of the same rows, and files of it must all tell the same.

The stream's columns are the first oracle's matter (`test_types`). Here the ways that lead past the decoders of tuples
are held against them: COPY, which other programs parse, and Parquet files, which other programs read.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from harness.database import Database
from harness.type_cases import CASES, PINNED, drawn, plain

from pgoutput_source import peek
from pgoutput_source.changes import ChangeBatch
from pgoutput_source.copy.initial import InitialCopy
from pgoutput_source.dataflow.run import gate
from pgoutput_source.decode.copied import TEXT_OF, CopiedColumn, Tuples, as_text, decode_copied
from pgoutput_source.decode.relations import Relations
from pgoutput_source.embedded import Server
from pgoutput_source.postgres.definitions import Definitions
from pgoutput_source.postgres.publications import text_columns
from pgoutput_source.settings import SourceSettings
from pgoutput_source.sinks import ParquetSink
from pgoutput_source.sinks import read as read_folder
from pgoutput_source.types.written import copy_text, written

LAST = "294247-01-10 04:00:54.775807"

AS_TEXT = {"cube", "regclass", "tsquery"}

DEFINED = {
    "mood": ("sad", "happy", 'a,b "c"'),
    "price": ("1.50", "NaN", "0"),
    "price[]": ("{1.50,NULL}", "{}", "{NaN}"),
    "pair": ('(1,"x")', "(,)", '(2,"a ""b"" \\\\ (c)")'),
    "pair[]": ('{"(1,x)",NULL}', "{}"),
    "floats": ("[1.5,2)", "empty", "(,)"),
    "hstore": ('"a"=>"1", "b"=>NULL', "", '"q\\"\\\\"=>" =>,"'),
    "citext": ("Ab", ""),
    "ltree": ("Top.Science",),
    "seg": ("1 .. 2",),
    "cube": ("(1, 2),(3, 4)",),
}
DEFINITIONS = """CREATE EXTENSION hstore; CREATE EXTENSION citext; CREATE EXTENSION ltree;
CREATE EXTENSION seg; CREATE EXTENSION cube;
CREATE TYPE mood AS ENUM ('sad', 'happy', 'a,b "c"');
CREATE DOMAIN price AS numeric(10,2);
CREATE TYPE pair AS (a int, b text);
CREATE TYPE floats AS RANGE (subtype = float8)"""


@dataclass(frozen=True)
class Everything:
    """The table `t`: its batch, and what the server calls the type of each column."""

    db: Database
    batch: ChangeBatch
    binary: ChangeBatch  # the columns that can be, sent in binary
    sql: dict[str, str]

    @property
    def names(self) -> list[str]:
        return list(self.sql)

    def relation(self) -> Relations:
        """The types of the batch, as the catalogue tells them."""
        relations = Relations((), Definitions(self.db.dsn))
        relations._learn([column.type_oid for column in self.batch.schema.columns])
        return relations

    def decoded(self, texts: dict[str, pa.BinaryArray]) -> dict[str, pa.Array]:
        """Columns of PostgreSQL's text, decoded by the type table."""
        relations = self.relation()
        return {c.name: relations.type_of(c.type_oid).decode(texts[c.name], c.arrow) for c in self.batch.schema.columns}

    def must_equal(self, texts: dict[str, pa.BinaryArray]) -> None:
        """The same texts give the same columns, and what is null in them is in `_raw` as it stands in `texts`."""
        found = self.decoded(texts)
        raws = [dict(raw or ()) for raw in self.batch.data["_raw"].to_pylist()]
        for name, sql in self.sql.items():
            column = self.batch.data[name]
            assert repr(plain(found[name])) == repr(plain(column)), f"{name}: {sql}"
            for value, text, raw in zip(column.is_null().to_pylist(), texts[name].to_pylist(), raws, strict=True):
                assert raw.get(name) == (text.decode() if value and text is not None else None), f"{name}: {sql}"


def filled(db: Database) -> Everything:
    """A row for each value, with NULLs where a type has fewer, through a real stream."""
    cases = [case for case in CASES if case.since <= db.server.major]
    values = {f"c{i}": drawn(case) for i, case in enumerate(cases)}
    kinds = {name: case.sql for name, case in zip(values, cases, strict=True)}
    values |= {f"d{i}": list(texts) for i, texts in enumerate(DEFINED.values())}
    kinds |= {f"d{i}": kind for i, kind in enumerate(DEFINED)}
    with db.connect(options=PINNED.replace("search_path=", "search_path=public")) as c:
        c.execute(DEFINITIONS)
        c.execute(f"CREATE TABLE t (id int, {', '.join(f'{name} {kind}' for name, kind in kinds.items())})".encode())
        c.execute("CREATE PUBLICATION cdc FOR ALL TABLES")
        c.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
        casts = ", ".join(f"(v->>'{name}')::{kind}" for name, kind in kinds.items())
        rows = [
            {name: texts[i] for name, texts in values.items() if i < len(texts)}
            for i in range(max(map(len, values.values())))
        ]
        c.execute(
            f"INSERT INTO t SELECT n, {casts} FROM json_array_elements(%s) WITH ORDINALITY AS u(v, n)".encode(),
            [json.dumps(rows)],
        )
        in_text = {column.split()[0].split(".")[2] for column in text_columns(c, ["cdc"])}
        columns = ", ".join(name for name in ("id", *kinds) if name not in in_text)
        c.execute(
            f"CREATE TABLE b AS SELECT {columns} FROM t WITH NO DATA; CREATE PUBLICATION bin FOR TABLE b".encode()
        )
        c.execute("SELECT pg_create_logical_replication_slot('bin', 'pgoutput')")
        c.execute(f"INSERT INTO b SELECT {columns} FROM t ORDER BY id".encode())
    batch = peek(db.dsn, slot="cdc", publication="cdc").of("public.t")[0]
    binary = peek(db.dsn, slot="bin", publication="bin", binary="on").of("public.b")[0]
    assert len(batch) == len(binary) == len(rows)
    return Everything(db, batch, binary, {"id": "int"} | kinds)


@pytest.fixture(scope="module")
def every(any_pg: Server) -> Iterator[Everything]:
    db = Database(any_pg)
    yield filled(db)
    db.drop()


def test_copy_decoded_by_the_same_table_equals_the_stream(every: Everything) -> None:
    """In COPY's text format as psycopg parses it, and as CSV as Arrow does."""
    with every.db.connect(options=PINNED) as c:
        with c.cursor().copy("COPY (SELECT * FROM public.t ORDER BY id) TO STDOUT") as copy:
            rows = list(copy.rows())
        texts = {
            name: pa.array([None if v is None else v.encode() for v in column], pa.binary())
            for name, column in zip(every.names, zip(*rows, strict=True), strict=True)
        }
        every.must_equal(texts)

        with c.cursor().copy("COPY (SELECT * FROM public.t ORDER BY id) TO STDOUT (FORMAT csv, FORCE_QUOTE *)") as copy:
            csv = b"".join(copy)
    table = pa_csv.read_csv(
        io.BytesIO(csv),
        read_options=pa_csv.ReadOptions(column_names=every.names),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            column_types=dict.fromkeys(every.names, pa.binary()),
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            null_values=[""],
        ),
    ).combine_chunks()
    every.must_equal({name: pa.concat_arrays(table[name].chunks) for name in every.names})


def test_rows_of_the_initial_copy_equal_the_stream(every: Everything) -> None:
    """In binary and, where a type has no decoder for that, as text; misfits, defined types and NULLs alike."""
    settings = SourceSettings(dsn=every.db.dsn, slot="cdc", publication=("cdc",))
    copy = InitialCopy(every.db.dsn, settings, look_up=Definitions(every.db.dsn), everything=True)
    found = []
    while not all(table.read for table in copy.ledger.copying.values()):
        found += [batch for batch in copy.step(2**40).batches if batch.table == "public.t"]
    copy.close()

    data = pa.Table.from_batches([batch.data for batch in found]).sort_by("id").combine_chunks()
    assert found[0].schema == every.batch.schema
    assert found[0].data.schema.equals(every.batch.data.schema.remove_metadata())
    for name, sql in every.sql.items():
        copied = pa.concat_arrays(data[name].chunks)
        assert repr(plain(copied)) == repr(plain(every.batch.data[name])), f"{name}: {sql}"
    assert data["_raw"].to_pylist() == every.batch.data["_raw"].to_pylist()
    assert set(data["_op"].to_pylist()) == {"R"}


@pytest.mark.parametrize("all_as_text", [False, True])
def test_copy_in_binary_equals_the_stream(every: Everything, all_as_text: bool) -> None:
    """Each column as `as_text` chooses, and all of them as text; decoded in pieces that end anywhere."""
    relations = every.relation()
    columns = [
        CopiedColumn(column, row := relations.type_of(column.type_oid), all_as_text or as_text(row))
        for column in every.batch.schema.columns
    ]
    asked = [TEXT_OF.format(one.column.name) if one.as_text else one.column.name for one in columns]
    query = f"COPY (SELECT {', '.join(asked)} FROM public.t ORDER BY id) TO STDOUT (FORMAT binary)"
    with every.db.connect(options=PINNED) as c, c.cursor().copy(query.encode()) as copy:
        frames = [bytes(frame) for frame in copy]
    assert len(frames) == len(every.batch) + 1
    for cuts in ([0, len(frames)], [0, 1, 5, 6, len(frames) - 1, len(frames)]):
        found = [
            decode_copied(Tuples(part, list(map(len, part)), first=low == 0), columns, "public.t")
            for low, high in itertools.pairwise(cuts)
            for part in [frames[low:high]]
        ]
        for i, (name, sql) in enumerate(every.sql.items()):
            column = pa.concat_arrays([piece.columns[i] for piece in found])
            column.validate(full=True)
            assert column.type == every.batch.data[name].type
            assert repr(plain(column)) == repr(plain(every.batch.data[name])), f"{name}: {sql}"
        raw = pa.concat_arrays([piece.raw for piece in found])
        assert raw.to_pylist() == every.batch.data["_raw"].to_pylist()
        assert raw.null_count < len(raw)


def test_binary_says_what_text_says(every: Everything) -> None:
    names = [column.name for column in every.binary.schema.columns]
    texts = {kind for name, kind in every.sql.items() if name not in names}
    # What the server has send functions for and the type table no decoder for.
    assert texts <= AS_TEXT, texts
    for name in names:
        in_text, in_binary = plain(every.batch.data[name]), plain(every.binary.data[name])
        assert repr(in_binary) == repr(in_text), f"{name}: {every.sql[name]}"
    raws = [[(n, text) for n, text in raw or () if n in names] for raw in every.batch.data["_raw"].to_pylist()]
    assert [raw or [] for raw in every.binary.data["_raw"].to_pylist()] == raws


def test_what_is_text_sorts_groups_and_compares_wherever_it_is_read_back(every: Everything, tmp_path: Path) -> None:
    """As Arrow's extension types for JSON, UUIDs and others would not."""
    names = [
        name for name, kind in every.sql.items() if kind in ("json", "jsonb", "uuid", "inet", "public.mood", "mood")
    ]
    batch = every.batch.data.select(names)
    assert len(names) == 5
    pq.write_table(pa.table(batch), tmp_path / "t.parquet")
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    for table in (
        pa.table(batch),
        pa.table(every.batch).select(names),  # through the C data interface
        pq.read_table(tmp_path / "t.parquet"),
        pa.ipc.open_stream(sink.getvalue()).read_all(),
    ):
        for name in names:
            assert table.schema.field(name).type == pa.utf8()
            first = table[name].drop_null()[0]
            assert (
                pc.sum(pc.equal(table[name], first)).as_py()
                == table.group_by(name)
                .aggregate([([], "count_all")])
                .filter(pc.field(name) == first)["count_all"]
                .to_pylist()[0]
            )
            assert table.sort_by(name)[name][0] == pc.min(table[name])
    frame: Any = pl.read_parquet(tmp_path / "t.parquet")
    assert set(frame.dtypes) == {pl.String}


# How DuckDB's own text of a value is one that PostgreSQL reads.
_DUCKDB_TEXT: dict[object, str] = {
    "pg_lsn": "format('{{:X}}/{{:X}}', {0} >> 32, {0} & 4294967295)",
    pa.binary(): "'\\x' || lower(hex({0}))",
    pa.date32(): "replace({0}::varchar, ' (BC)', ' BC')",
    pa.timestamp("us"): "replace({0}::varchar, ' (BC)', ' BC')",
    pa.timestamp("us", "UTC"): "CASE WHEN isinf({0}) THEN 'infinity' ELSE "
    "replace(timezone('UTC', {0})::varchar, ' (BC)', '') || '+00' || if({0}::varchar LIKE '%BC%', ' BC', '') END",
}


def by_duckdb(query: str) -> pa.Table:
    relation = duckdb.sql(query)
    assert relation is not None
    table = relation.to_arrow_table()
    assert table is not None
    return table


def test_duckdb_and_polars_read_the_same_values_from_parquet_as_the_batch_holds(
    every: Everything, tmp_path: Path
) -> None:
    gate.abandon()
    gate.source_opened("cdc")
    part = ParquetSink(tmp_path).build_part("flow.out", "parquet", None)
    part.write_batch([every.batch])
    part.snapshot()
    gate.opened("cdc")
    gate.drain()
    gate.abandon()
    expected = every.batch.data.select(every.names)
    (file,) = tmp_path.rglob("*.parquet")

    read = {
        "pyarrow": read_folder(tmp_path).to_table(columns=every.names),
        "Polars": pl.read_parquet(file, columns=every.names).to_arrow(),
        "DuckDB": by_duckdb(f"SELECT {', '.join(every.names)} FROM '{file}'"),
    }
    for program, table in read.items():
        for name, sql in every.sql.items():
            column = pa.concat_arrays(table[name].chunks).cast(expected[name].type)
            assert repr(plain(column)) == repr(plain(expected[name])), f"{program}: {name} {sql}"

    # DuckDB writes what it read as text, PostgreSQL reads that: it must be the value that it has.
    scalars = {n: sql for n, sql in every.sql.items() if not pa.types.is_nested(expected[n].type)}
    written = ", ".join(
        (_DUCKDB_TEXT.get(sql) or _DUCKDB_TEXT.get(expected[name].type, "{0}::varchar")).format(name) + f" AS {name}"
        for name, sql in scalars.items()
    )
    back = by_duckdb(f"SELECT {written} FROM '{file}'").to_pylist()
    with every.db.connect(options=PINNED) as c:
        for name, sql in scalars.items():
            typed = sql if sql not in DEFINED else f"public.{sql}"
            rows = [{"id": i, "v": row[name]} for i, row in enumerate(back, 1) if expected[name][i - 1].is_valid]
            differ = c.execute(
                f"SELECT id, {name}::text, v FROM public.t JOIN json_to_recordset(%s) AS r(id int, v text) USING (id)"
                f" WHERE {name}::text IS DISTINCT FROM v::{typed}::text".encode(),
                [json.dumps(rows)],
            ).fetchall()
            # DuckDB takes the last microsecond that 64 bits can count for infinity.
            wrong = [row for row in differ if row[2].split("+")[0] != "infinity" or not row[1].startswith(LAST)]
            assert not wrong, f"{name} {sql}: {wrong[:3]}"


def test_a_server_reads_back_the_values_that_it_sent(every: Everything) -> None:
    """`written` text of every column, and `_raw` where there is no value."""
    data = every.batch.data
    columns = []
    for field in data.schema:
        if field.name in every.names:
            column = written(data[field.name], (field.metadata or {})[b"pg.type"].decode())
            raw = pc.map_lookup(data["_raw"], pa.scalar(field.name), "first").cast(column.type)
            columns.append(pc.coalesce(column, raw))
    with every.db.connect(options=PINNED) as c:
        c.execute("CREATE TABLE public.w (LIKE public.t)")
        with c.cursor().copy("COPY public.w FROM STDIN") as copy:
            copy.write(copy_text(columns))
        for name, kind in every.sql.items():
            sent, read = (TEXT_OF.format(f'{table}."{name}"') for table in "tw")
            query = f"SELECT {sent}, {read} FROM public.t JOIN public.w USING (id) ORDER BY id"
            for before, after in c.execute(query.encode()):
                assert before == after, f"{name}: {kind}"
