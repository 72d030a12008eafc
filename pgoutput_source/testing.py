"""Makes batches of changes by hand, for tests of flows and for the examples in this package.

flow = Dataflow("test")
orders = op.input("orders", flow, TestingSource([batch("public.orders", [("I", {"id": 1, "amount": 5})])]))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.changes.schema import OPS, Column, TableName, TableSchema

Row = Mapping[str, Any]
START = datetime(2024, 1, 1, 12, 0, tzinfo=UTC)
"""The commit time of the first change in a `batch`."""


def batch(
    table: str,
    changes: Sequence[tuple[str, Row | None] | tuple[str, Row | None, Row | None]],
    *,
    key: str | Sequence[str] = "id",
    types: Mapping[str, pa.DataType] | None = None,
    identity: str = "d",
    unchanged: Mapping[int, Sequence[str]] | None = None,
    lsn: int = 1000,
    at: datetime | Sequence[datetime] = START,
    every: timedelta = timedelta(seconds=30),
    metadata_prefix: str = "_",
) -> ChangeBatch:
    """The `ChangeBatch` that these changes would give in PostgreSQL, with one transaction per change.

    Args:
        table: Schema and table.
        changes: (`_op`, row) or (`_op`, row, `_before`). A column that a row lacks is NULL. A truncate's row is None.
        key: The columns of the replica identity. With identity "f" these are all columns.
        types: Arrow types of the columns, in order. By default Arrow infers them from the values.
        identity: The replica identity's letter.
        unchanged: `_unchanged` by index of the change.
        lsn: `_commit_lsn` of the first change; each further change adds 1.
        at: Commit time of the first change, or a list with that of each change.
        every: The time from one commit to the next, if `at` is a single time.
        metadata_prefix: What the names of the metadata columns begin with.

    Example:
        >>> made = batch("public.orders", [("I", {"id": 1}), ("D", {"id": 1}, {"id": 1})])
        >>> made.data.column("_op").to_pylist(), made.schema.key
        (['I', 'D'], ('id',))
    """
    rows = [change[1] or {} for change in changes]
    before = [change[2] if len(change) > 2 else None for change in changes]
    names = list(types) if types else list(dict.fromkeys(n for row in [*rows, *filter(None, before)] for n in row))
    arrow = dict(types) if types else {n: pa.array([row.get(n) for row in rows]).type for n in names}
    keys = (key,) if isinstance(key, str) else tuple(key)
    columns = tuple(Column(n, 0, -1, identity == "f" or n in keys, str(arrow[n]), arrow[n]) for n in names)
    schema = TableSchema(1, *TableName.parse(table), identity, columns, metadata_prefix=metadata_prefix)
    metadata = schema.metadata_names
    times = [at + every * i for i in range(len(rows))] if isinstance(at, datetime) else list(at)
    kinds = {f.name: f.type for f in schema.arrow}

    def column(name: str, values: Iterable[Any]) -> pa.Array:
        return pa.array(list(values), kinds[name])

    ops = pa.DictionaryArray.from_arrays(pa.array([OPS.index(c[0]) for c in changes], pa.int8()), pa.array(OPS))
    numbers = range(lsn, lsn + len(rows))
    arrays = [
        *(column(n, (row.get(n) for row in rows)) for n in names),
        ops,
        column(metadata.commit_lsn, numbers),
        column(metadata.seq, (0 for _ in rows)),
        column(metadata.lsn, numbers),
        column(metadata.xid, (n % 2**32 for n in numbers)),
        column(metadata.commit_ts, times),
        column(metadata.before, before),
        column(metadata.unchanged, ((unchanged or {}).get(i) for i in range(len(rows)))),
        column(metadata.raw, (None for _ in rows)),
    ]
    return ChangeBatch(schema, pa.RecordBatch.from_arrays(arrays, schema=schema.arrow))
