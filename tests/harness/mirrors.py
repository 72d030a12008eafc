"""Tables of a PostgreSQL database and their mirror in another, as the servers write their values."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from psycopg import sql

from harness.database import Database
from harness.workload import Workload
from pgoutput_source.types.written import copy_text, written


def rows(
    connection: psycopg.Connection[Any], schema: str, name: str, columns: list[str], as_text: list[str] | None = None
) -> list[tuple[Any, ...]]:
    """A table's rows as the server writes them."""
    kinds = [sql.SQL("::text" if as_text is None or c in as_text else "") for c in columns]
    texts = sql.SQL(", ").join(
        sql.SQL("{}{}").format(sql.Identifier(c), k) for c, k in zip(columns, kinds, strict=True)
    )
    query = sql.SQL("SELECT {} FROM {}").format(texts, sql.Identifier(schema, name))
    return connection.execute(query).fetchall()


def unlike(
    mirror: psycopg.Connection[Any], schema: str, name: str, columns: list[str], expected: list[tuple[Any, ...]]
) -> list[str]:
    """What differs, but for cells that the mirror says that it does not know: volatile defaults, for example."""
    left = Counter(expected)
    more = []
    for *row, unknown in rows(mirror, schema, name, [*columns, "_unchanged"], as_text=columns):
        hidden = [column in (unknown or ()) for column in columns]
        there = tuple(row)
        if left[there] <= 0 and any(hidden):
            known = [None if h else cell for h, cell in zip(hidden, there, strict=True)]
            there = next(
                (
                    r
                    for r, n in left.items()
                    if n > 0 and known == [None if h else c for h, c in zip(hidden, r, strict=True)]
                ),
                there,
            )
        if left[there] > 0:
            left[there] -= 1
        else:
            more.append(there)
    return [
        f"{schema}.{name}: {kind} {some[:2]}"
        for kind, some in (("only in the mirror", more), ("only in the source", list(left.elements())))
        if some
    ]


def columns_of(connection: psycopg.Connection[Any], schema: str, name: str) -> list[str]:
    query = (
        "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(format('%%I.%%I', %s::text, %s::text))"
        " AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum"
    )
    return [column for (column,) in connection.execute(query, (schema, name)).fetchall()]


def differ(db: Database, target: Database, tables: list[tuple[str, str]]) -> list[str]:
    """What a mirror has that its source has not, and the reverse."""
    wrong = []
    with db.connect() as source, target.connect() as mirror:
        for connection in (source, mirror):
            connection.execute("SET TimeZone TO 'UTC'; SET DateStyle TO 'ISO'; SET extra_float_digits TO 1")
        for schema, name in tables:
            columns, there = columns_of(source, schema, name), columns_of(mirror, schema, name)
            expected = rows(source, schema, name, columns)
            if not there:
                wrong += [f"{schema}.{name} is not there"] if expected else []
                continue
            # Nothing tells of a column that was added before the next change is sent. All of it is NULL.
            unsent = [i for i, column in enumerate(columns) if column not in there]
            wrong += [
                f"{schema}.{name}: no {columns[i]}" for i in unsent if any(row[i] is not None for row in expected)
            ]
            kept = [i for i in range(len(columns)) if i not in unsent]
            sent = [tuple(row[i] for i in kept) for row in expected]
            wrong += unlike(mirror, schema, name, [columns[i] for i in kept], sent)
    return wrong


def unkeyed(workload: Workload) -> str:
    return ",".join(str(t.name) for t in workload.tables if not t.keyed)


def keyed(workload: Workload) -> list[tuple[str, str]]:
    return [(t.name.namespace, t.name.name) for t in workload.tables if t.keyed]


def of_keys(workload: Workload) -> dict[str, str]:
    """What a mirror with deferrable keys, too, must be told."""
    return {
        "EXCLUDE": ",".join(str(t.name) for t in workload.tables if not (t.keyed or t.deferrable)),
        "KEY": json.dumps({str(t.name): "id" for t in workload.tables if t.deferrable}),
    }


def with_keys(workload: Workload) -> list[tuple[str, str]]:
    """Tables with a key, deferrable or not."""
    return [(t.name.namespace, t.name.name) for t in workload.tables if t.keyed or t.deferrable]


def unlike_source(
    db: Database,
    scratch: Database,
    tables: list[tuple[str, str]],
    read: Callable[[str, str], pa.Table | None],
) -> list[str]:
    """What mirrors in another store have that their sources have not, and the reverse.

    What `read` gives of each is loaded into the database `scratch`, so that a server writes its values.
    """
    with db.connect() as source, scratch.connect() as c:
        c.execute("SET TimeZone TO 'UTC'; SET IntervalStyle TO 'postgres'")
        for schema, name in tables:
            c.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(schema)))
            c.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(schema, name)))
            query = (
                "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute WHERE attnum > 0"
                " AND NOT attisdropped AND attrelid = format('%%I.%%I', %s::text, %s::text)::regclass ORDER BY attnum"
            )
            columns = source.execute(query, (schema, name)).fetchall()
            if (found := read(schema, name)) is not None:
                _load(c, found, (schema, name), columns)
    return differ(db, scratch, tables)


def _load(
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
        values = rows.column(column).combine_chunks()
        text = written(values.cast(pa.uint64()) if kind == "pg_lsn" else values, kind)
        if text.null_count:
            text = pc.coalesce(text, pc.map_lookup(raw, pa.scalar(column), "first").cast(text.type))
        texts.append(text)
    with connection.cursor().copy(sql.SQL("COPY {} FROM STDIN").format(table)) as copy:
        copy.write(copy_text(texts))
