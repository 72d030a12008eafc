"""Tables of a PostgreSQL database and their mirror in another, as the servers write their values."""

from __future__ import annotations

from collections import Counter
from typing import Any

import psycopg
from psycopg import sql

from harness.database import Database
from harness.workload import Workload


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
