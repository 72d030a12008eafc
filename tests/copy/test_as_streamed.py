"""A row that was copied is the row that the stream would have brought: every kind of table, on every major."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from harness.database import Database

from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.copy import initial
from pgoutput_source.copy.keys import CollatedColumn
from pgoutput_source.copy.ledger import MOST_UNSETTLED, Ledger
from pgoutput_source.copy.visibility import Snapshot
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream.session import SlotSession

# DDL, rows, and how the table is named in its publication, by the first major that can do it.
SHAPES: dict[str, tuple[str, str, dict[int, str]]] = {
    "empty": ("empty (id int PRIMARY KEY)", "SELECT 1 WHERE false", {14: "empty"}),
    "one": ("one (id int PRIMARY KEY)", "VALUES (1)", {14: "one"}),
    "wide": (
        f"wide (id int PRIMARY KEY, {', '.join(f'c{i} text' for i in range(300))})",
        f"SELECT n, {', '.join(f'n || chr({65 + i % 26})' for i in range(300))} FROM generate_series(1, 40) n",
        {14: "wide"},
    ),
    "toast": (
        "toast (id int PRIMARY KEY, v text, b bytea)",
        "SELECT n, string_agg(md5(n || '.' || i), ''), decode(string_agg(md5(i::text), ''), 'hex')"
        "  FROM generate_series(1, 30) n, generate_series(1, 2000) i GROUP BY n",
        {14: "toast"},
    ),
    "keyless": ("keyless (v int, w text)", "SELECT n % 3, NULL FROM generate_series(1, 50) n", {14: "keyless"}),
    "filtered": (
        "filtered (id int PRIMARY KEY, v int, w text)",
        "SELECT n, nullif(n % 5, 0), 'x' FROM generate_series(1, 60) n",
        {14: "filtered", 15: "filtered (id, v) WHERE (id % 2 = 0 AND v > 1)"},
    ),
    "generated": (
        "generated (id int PRIMARY KEY, v int, g int GENERATED ALWAYS AS (v * 2) STORED)",
        "SELECT n, n FROM generate_series(1, 30) n",
        {14: "generated"},
    ),
    "root": (
        "root (id int, region int, v text, PRIMARY KEY (region, id)) PARTITION BY LIST (region)",
        "SELECT n, n % 3, 'v' || n FROM generate_series(1, 60) n",
        {14: "root"},
    ),
    "indexed": (
        "indexed (a uuid NOT NULL, b text COLLATE c NOT NULL, v int)",
        "SELECT md5(n::text)::uuid, (ARRAY['ä','Z','a','Ö','-'])[n % 5 + 1] || n, n FROM generate_series(1, 60) n",
        {14: "indexed"},
    ),
    "pairs": (
        "pairs (p pair PRIMARY KEY, v int)",
        "SELECT (n % 7, 'x' || n)::pair, n FROM generate_series(1, 60) n",
        {14: "pairs"},
    ),
    "odd": (
        "odd (id numeric PRIMARY KEY, gone int, at timestamptz, d date, n numeric(30, 2), m mood, l int[], j jsonb,"
        ' "Ärger "" ." int, r int4range)',
        """
        SELECT CASE n WHEN 1 THEN 'NaN' ELSE n / 3.0 END,
               (ARRAY['infinity', '-infinity', '0044-03-15 BC', '2026-01-01 00:00:00.000001Z', NULL])[n % 5 + 1]
               ::timestamptz,
               (ARRAY['infinity', '4714-11-24 BC', '2026-02-28', NULL])[n % 4 + 1]::date,
               CASE n WHEN 2 THEN 'NaN' ELSE n::numeric END, (ARRAY['sad', 'ok', NULL])[n % 3 + 1]::mood,
               ARRAY[n, NULL], jsonb_build_object('k', n), n, int4range(n, 99)
          FROM generate_series(1, 40) n
        """,
        {14: "odd"},
    ),
}


def make(db: Database, *, root: bool) -> None:
    """All tables and their publication; as `root` says, partitions come as such or as their root."""
    major = db.server.major
    named = [names[max(since for since in names if since <= major)] for _, _, names in SHAPES.values()]
    options = ["publish_via_partition_root"] if root else []
    options += ["publish_generated_columns = stored"] if root and major >= 18 else []
    with db.connect() as c:
        c.execute("CREATE TYPE mood AS ENUM ('happy', 'ok', 'sad'); CREATE TYPE pair AS (a int, b text)")
        c.execute('CREATE COLLATION c FROM "C"')
        for ddl, _, _ in SHAPES.values():
            c.execute(f"CREATE TABLE {ddl}".encode())
        for region in range(3):
            c.execute(f"CREATE TABLE leaf{region} PARTITION OF root FOR VALUES IN ({region})".encode())
        c.execute("CREATE UNIQUE INDEX by_text ON indexed (b, a); ALTER TABLE odd DROP gone")
        c.execute("ALTER TABLE indexed REPLICA IDENTITY USING INDEX by_text")
        c.execute("ALTER TABLE keyless REPLICA IDENTITY FULL; ALTER TABLE toast ALTER v SET STORAGE EXTERNAL")
        clause = f" WITH ({', '.join(options)})" if options else ""
        c.execute(f"CREATE PUBLICATION p FOR TABLE {', '.join(named)}{clause}".encode())
        c.execute("SELECT pg_create_logical_replication_slot('streamed', 'pgoutput')")
        for name, (_, rows, _) in SHAPES.items():
            columns = "(id, v)" if name == "generated" else ""
            c.execute(f"INSERT INTO {name} {columns} {rows}".encode())
        # The stream has it as it was, the copy as it is.
        c.execute("CREATE TABLE IF NOT EXISTS other (x int)")


def rows_of(db: Database, **options: Any) -> dict[str, tuple[pa.Schema, list[str]]]:
    """What a session delivers: of each table its schema, and its rows as text, sorted, without where and when."""
    settings = SourceSettings.of(dsn=db.dsn, publication="p", until="current", **options)
    found: dict[str, list[ChangeBatch]] = defaultdict(list)
    session = SlotSession(db.dsn, settings)
    while not session.ended:
        for batch in session.next(0.05):
            found[batch.table].append(batch)
    session.close()
    return {name: _described(batches) for name, batches in found.items()}


def _columns(batch: ChangeBatch) -> Iterator[list[Any]]:
    for field, array in zip(batch.data.schema, batch.data.columns, strict=True):
        if field.name not in ("_op", "_commit_lsn", "_seq", "_lsn", "_xid", "_commit_ts"):
            # Python's dates end where PostgreSQL's go on.
            number = {"date32[day]": pa.int32(), "timestamp[us, tz=UTC]": pa.int64()}.get(str(field.type))
            yield (array if number is None else array.view(number)).to_pylist()


def _described(batches: list[ChangeBatch]) -> tuple[pa.Schema, list[str]]:
    assert len({batch.schema.arrow for batch in batches}) == 1
    rows = [json.dumps(row, default=repr) for batch in batches for row in zip(*_columns(batch), strict=True)]
    metadata = {k: v for k, v in (batches[0].schema.arrow.metadata or {}).items() if k != b"pg.slot"}
    return batches[0].schema.arrow.with_metadata(metadata), sorted(rows)


@pytest.mark.parametrize("root", [False, True])
def test_what_is_copied_is_what_is_streamed(any_db: Database, root: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "CHUNK_ROWS", 11)
    make(any_db, root=root)

    streamed = rows_of(any_db, slot="streamed")
    copied = rows_of(any_db, slot="copied", snapshot="only")

    assert copied.keys() == streamed.keys()
    assert ("public.root" in copied) is root
    for name, (schema, rows) in streamed.items():
        assert copied[name][1] == rows, name
        assert copied[name][0].equals(schema, check_metadata=True), name


def test_a_ledger_of_ten_thousand_chunks_is_small_at_every_moment() -> None:
    ledger = Ledger()
    copy = ledger.register(1, "public.t", 0)
    copy.key = (CollatedColumn("id", "bigint"),)
    largest = 0
    for n in range(10_000):
        copy.add((str(n * 100_000),), Snapshot(n, n + 2, tuple(range(n, n + 2)), 8 * n))
        largest = max(largest, len(json.dumps(ledger.state())))
        # The stream is up to as many chunks behind as may wait for it.
        ledger.settle(8 * (n - MOST_UNSETTLED + 1))
        assert copy.unsettled <= MOST_UNSETTLED
    copy.add(None, Snapshot(10_000, 10_000, (), 80_000))
    ledger.settle(80_000)

    assert largest < 10_000
    assert ledger.state()["tables"] == {"1": "done"}
