"""Compares mirrors in other stores with their source: the source's server reads the texts of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from psycopg import sql

from harness.database import Database
from harness.mirrors import rows, unlike
from pgoutput_source.types.written import copy_text, written

ReadTable: TypeAlias = Callable[[str, str], pa.Table | None]
"""Reads a table of a store by the source's schema and name; None if it is not there."""

_PINNED = "SET TimeZone TO 'UTC'; SET DateStyle TO 'ISO'; SET extra_float_digits TO 1"
_COLUMNS = (
    "SELECT attname, format_type(atttypid, NULL) FROM pg_attribute"
    " WHERE attrelid = format('%%I.%%I', %s::text, %s::text)::regclass"
    " AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum"
)


def differ_in_store(db: Database, read: ReadTable, tables: list[tuple[str, str]]) -> list[str]:
    """What the mirrors in a store have that their sources have not, and the reverse."""
    wrong = []
    with db.connect() as source:
        source.execute(_PINNED)
        for schema, name in tables:
            kinds = dict(source.execute(_COLUMNS, (schema, name)).fetchall())
            expected = rows(source, schema, name, list(kinds))
            table = read(schema, name)
            if table is not None:
                _load(source, table, schema, name, kinds)
                wrong += unlike(source, "pg_temp", "mirror", list(kinds), expected)
            elif expected:
                wrong.append(f"{schema}.{name} is not there")
    return wrong


def _load(source: psycopg.Connection[Any], table: pa.Table, schema: str, name: str, kinds: dict[str, str]) -> None:
    listed = sql.SQL(", ").join(map(sql.Identifier, kinds))
    source.execute("DROP TABLE IF EXISTS pg_temp.mirror")
    source.execute(
        sql.SQL("CREATE TEMP TABLE mirror AS SELECT {}, NULL::text[] AS _unchanged FROM {} LIMIT 0").format(
            listed, sql.Identifier(schema, name)
        )
    )
    texts = [text_of(table, column, kind) for column, kind in kinds.items()]
    texts.append(written(_one(table, "_unchanged"), "text[]"))
    with source.cursor().copy("COPY pg_temp.mirror FROM STDIN") as copy:
        copy.write(copy_text(texts))


def text_of(table: pa.Table, name: str, kind: str) -> pa.Array:
    """A store's column as PostgreSQL's text, from `_raw` where the cell can't hold the value."""
    column = _one(table, name)
    text = written(column.cast(pa.uint64()) if kind == "pg_lsn" else column, kind)
    raw = _one(table, "_raw")
    if raw.null_count < len(raw) and text.null_count:
        text = pc.coalesce(text, pc.map_lookup(raw, pa.scalar(name), "first").cast(text.type))
    return text


def _one(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name).combine_chunks()
    return column if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks)
