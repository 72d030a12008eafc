"""Tables in Delta Lake: the source's tables are the oracle, and DuckDB reads the files that the log lists."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import duckdb
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable
from harness.database import Database
from harness.flow import Busy, Flow, failure, following, publish, wait_for
from harness.mirrors import differ, keyed, unkeyed
from harness.workload import Workload
from psycopg import sql

from pgoutput_source.destinations.base import Job
from pgoutput_source.destinations.delta import DeltaDestination
from pgoutput_source.destinations.targets import Target
from pgoutput_source.embedded import Server
from pgoutput_source.testing import batch
from pgoutput_source.types.written import copy_text, written

Tables = list[tuple[str, str]]


def into(db: Database, folder: Path, **environ: str) -> Flow:
    settings = {"MODE": "mirror", "SPOOL": str(folder / "spool"), "INTO": f"delta:{folder}/lake/{{schema}}/{{table}}"}
    return Flow(db, folder, module="harness.into_tables", **(settings | environ))


def place(folder: Path, schema: str, name: str) -> str:
    template = str(folder / "lake/{schema}/{table}")
    return DeltaDestination(template, mode="mirror").place(Target(schema, name))


def stored(folder: Path, schema: str = "public", name: str = "t") -> pa.Table:
    """A Delta table, read by DuckDB from the files that its log lists."""
    table = DeltaTable(Path(place(folder, schema, name)).as_uri())
    files = [unquote(file) for file in table.file_uris()]
    kinds = pa.schema(table.schema().to_arrow())
    if not files:
        return kinds.empty_table()
    connection = duckdb.connect()
    connection.execute("SET TimeZone TO 'UTC'")
    rows = connection.read_parquet(files, union_by_name=True).to_arrow_table()
    rows = pa.Table.from_arrays([rows.column(f.name).cast(f.type) for f in kinds], schema=kinds.remove_metadata())
    own = pa.table(table.scan()).select(kinds.names).cast(rows.schema)
    assert sorted(map(repr, own.to_pylist())) == sorted(map(repr, rows.to_pylist()))  # NaN is not equal to itself
    return rows


@pytest.fixture
def scratch(pg: Server) -> Iterator[Database]:
    """A database for what was stored, so that a server can write it as text."""
    made = Database(pg)
    yield made
    made.drop()


def wrong(db: Database, folder: Path, scratch: Database, tables: Tables) -> list[str]:
    """What the mirrors have that their sources have not, and the reverse."""
    with db.connect() as source, scratch.connect() as c:
        c.execute("SET TimeZone TO 'UTC'; SET IntervalStyle TO 'postgres'")
        for schema, name in tables:
            c.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(schema)))
            c.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(schema, name)))
            if not Path(place(folder, schema, name)).exists():
                continue
            query = (
                "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute WHERE attnum > 0"
                " AND NOT attisdropped AND attrelid = format('%%I.%%I', %s::text, %s::text)::regclass ORDER BY attnum"
            )
            columns = source.execute(query, (schema, name)).fetchall()
            load(c, stored(folder, schema, name), (schema, name), columns)
    return differ(db, scratch, tables)


def load(
    connection: psycopg.Connection[Any], rows: pa.Table, name: tuple[str, str], columns: list[tuple[str, str]]
) -> None:
    kinds = [*columns, ("_unchanged", "text[]")]
    parts = [sql.SQL("{} {}").format(sql.Identifier(c), sql.SQL(kind)) for c, kind in kinds]
    table = sql.Identifier(*name)
    connection.execute(sql.SQL("CREATE TABLE {} ({})").format(table, sql.SQL(", ").join(parts)))
    if not len(rows):
        return
    raw = rows.column("_raw").combine_chunks()
    texts = []
    for column, kind in kinds:
        text = written(rows.column(column).combine_chunks(), kind)
        if text.null_count:
            text = pc.coalesce(text, pc.map_lookup(raw, pa.scalar(column), "first").cast(text.type))
        texts.append(text)
    with connection.cursor().copy(sql.SQL("COPY {} FROM STDIN").format(table)) as copy:
        copy.write(copy_text(texts))


def test_a_mirror_equals_its_source(db: Database, scratch: Database, tmp_path: Path) -> None:
    with Workload(db.dsn, seed=3, tables=8, largest=300) as workload:
        publish(db)
        flow = into(db, tmp_path, EXCLUDE=unkeyed(workload), PGOUTPUT_UNTIL="current")
        for _ in range(3):
            workload.run(700)
            flow.run("-s", "0", *flow.recovery())
            assert wrong(db, tmp_path, scratch, keyed(workload)) == []
