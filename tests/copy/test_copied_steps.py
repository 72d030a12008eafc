"""Aggregates, windows and the last row of each key over a copy and the stream around it: what SQL says of the table."""

from __future__ import annotations

import random
import threading
from collections import Counter
from datetime import timedelta
from typing import Any

import bytewax.operators as op
import psycopg
import pyarrow as pa
import pytest
from bytewax.dataflow import Dataflow
from bytewax.testing import TestingSink, TestingSource
from harness.database import Database
from harness.mirror import catch_up
from harness.one_table import run_flow
from harness.waiting import until

import pgoutput_source.operators as cdc
from pgoutput_source.changes import ChangeBatch
from pgoutput_source.copy import initial
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream.session import SlotSession

CHANGES = [
    "UPDATE t SET n = n + %(n)s WHERE id %% 97 = %(n)s %% 97",
    "UPDATE t SET g = %(n)s %% 7 WHERE id = %(n)s",
    "UPDATE t SET id = id + 5000 WHERE id = %(n)s",
    "DELETE FROM t WHERE id = %(n)s",
    "INSERT INTO t SELECT %(n)s + 10000, %(n)s %% 7, %(n)s, repeat(md5('x'), 100) ON CONFLICT DO NOTHING",
    "INSERT INTO log (g, n) SELECT %(n)s %% 7, %(n)s",
]


@pytest.fixture
def delivered(db: Database, monkeypatch: pytest.MonkeyPatch) -> list[ChangeBatch]:
    """What a session delivers of two tables that are written to while they are copied, up to their last change."""
    monkeypatch.setattr(initial, "CHUNK_ROWS", 50)
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, g int, n bigint, big text)")
        c.execute("ALTER TABLE t ALTER big SET STORAGE EXTERNAL")
        c.execute("CREATE TABLE log (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, g int, n bigint)")
        c.execute("INSERT INTO t SELECT n, n % 7, n, repeat(md5(n::text), 100) FROM generate_series(1, 2000) n")
        c.execute("INSERT INTO log (g, n) SELECT n % 7, n FROM generate_series(1, 2000) n")
        c.execute("CREATE PUBLICATION p FOR TABLE t, log")
        c.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    stopped, commits = threading.Event(), list[int]()
    writers = [threading.Thread(target=write, args=(db.dsn, seed, stopped, commits)) for seed in range(2)]
    for writer in writers:
        writer.start()
    session = SlotSession(db.dsn, SourceSettings.of(dsn=db.dsn, slot="s", publication="p", snapshot="initial"))
    found: list[ChangeBatch] = []
    while session.copying:
        before = len(commits)
        found += session.next(0.01)
        until(lambda before=before: len(commits) > before, "nobody writes")  # type: ignore[misc]
    stopped.set()
    for writer in writers:
        writer.join()
    catch_up(session, db, found.extend)
    session.close()
    ops = Counter(o for batch in found for o in batch.data.column("_op").to_pylist())
    assert ops["R"] > 3000
    assert min(ops["I"], ops["U"], ops["D"]) > 5
    return found


def write(dsn: str, seed: int, stopped: threading.Event, commits: list[int]) -> None:
    rng = random.Random(seed)
    with psycopg.connect(dsn, options="-c deadlock_timeout=20ms") as c:
        while not stopped.wait(0.002):
            try:
                for _ in range(rng.randint(1, 5)):
                    c.execute(rng.choice(CHANGES).encode(), {"n": rng.randint(1, 2000)})
                c.commit()
                commits.append(seed)
            except (psycopg.errors.DeadlockDetected, psycopg.errors.UniqueViolation):
                c.rollback()


def of(batches: list[ChangeBatch], table: str, step: Any) -> list[Any]:
    """What a step makes of the batches of a table."""
    out: list[Any] = []
    flow = Dataflow("test")
    mine = [batch for batch in batches if batch.table == table]
    op.output("out", step(op.input("in", flow, TestingSource(mine))), TestingSink(out))
    run_flow(flow)
    return out


def test_steps_over_a_copy_and_its_stream_equal_sql(db: Database, delivered: list[ChangeBatch]) -> None:
    sums = of(delivered, "public.t", lambda up: cdc.aggregate("sum", up, by="g", count=True, sum="n", max="id"))
    groups: dict[Any, Any] = {}
    for row in pa.Table.from_batches(sums).to_pylist():
        groups[row["g"]] = (row["count"], row["n_sum"], row["id_max"]) if row["_op"] != "D" else None
    rows: dict[int, Any] = {}
    for batch in of(delivered, "public.t", lambda up: cdc.latest("latest", up)):
        for row in batch.data.to_pylist():
            rows[row["id"]] = None if row["_op"] == "D" else (row["g"], row["n"], row["big"])
    counted = of(
        delivered,
        "public.log",
        lambda up: cdc.window("minutes", up, every=timedelta(minutes=1), by="g", count=True, sum="n", ops=("R", "I")),
    )
    totals = pa.Table.from_batches(counted).group_by("g").aggregate([("count", "sum"), ("n_sum", "sum")]).to_pylist()

    with db.connect() as c:
        expected = c.execute("SELECT g, count(*), sum(n)::bigint, max(id) FROM t GROUP BY g").fetchall()
        assert {g: v for g, v in groups.items() if v is not None} == {g: tuple(rest) for g, *rest in expected}
        expected = c.execute("SELECT id, g, n, big FROM t").fetchall()
        assert {key: v for key, v in rows.items() if v is not None} == {key: tuple(rest) for key, *rest in expected}
        expected = c.execute("SELECT g, count(*), sum(n)::bigint FROM log GROUP BY g").fetchall()
        assert sorted((row["g"], row["count_sum"], row["n_sum_sum"]) for row in totals) == sorted(map(tuple, expected))
