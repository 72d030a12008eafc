"""The shop that takes orders: the same seed is the same history, and it ends with whoever opened it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from harness.database import Database

from pgoutput_source.embedded import Server, shop
from pgoutput_source.errors import ServerError


class AfterTransactions:
    """A stop that counts: deterministic, where a clock is not."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self, seconds: float) -> bool:
        self.left -= 1
        return self.left <= 0


def decoded(database: Database, slot: str) -> list[str]:
    """What test_decoding says of each change, without xids and times."""
    rows = (
        database.connect()
        .execute(
            "SELECT regexp_replace(data, '(BEGIN|COMMIT) .*|_at\\[[^]]*\\]:(null|''[^'']*'')', '\\1', 'g')"
            " FROM pg_logical_slot_get_changes(%s, NULL, NULL)",
            [slot],
        )
        .fetchall()
    )
    return [row[0] for row in rows]


def history(database: Database, seed: int) -> tuple[shop.Totals, list[str]]:
    slot = f"s_{database.name}_{seed}"
    connection = database.connect()
    connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public; DROP PUBLICATION IF EXISTS shop")
    shop.create(database.dsn)
    connection.execute("SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", [slot])
    totals = shop.Workload(database.dsn, seed=seed).run(AfterTransactions(300))
    changes = decoded(database, slot)
    connection.execute("SELECT pg_drop_replication_slot(%s)", [slot])
    return totals, changes


def test_an_equal_seed_is_an_equal_history_and_the_totals_are_what_was_committed(db: Database) -> None:
    totals, first = history(db, 1)
    counted = {word: sum(f": {word}: " in change for change in first) for word in ("INSERT", "UPDATE", "DELETE")}
    assert counted == {"INSERT": totals.inserted, "UPDATE": totals.updated, "DELETE": totals.deleted}
    assert first.count("BEGIN") == totals.transactions > 200
    assert min(counted.values()) > 10
    assert history(db, 1) == (totals, first)
    assert history(db, 2)[1] != first


def test_the_shop_is_created_once_however_often_it_is_asked_for(db: Database) -> None:
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(shop.create, [db.dsn] * 3))
    tables = "SELECT array_agg(tablename::text ORDER BY tablename::text) FROM pg_publication_tables WHERE pubname = %s"
    assert db.connect().execute(tables, [shop.PUBLICATION]).fetchone() == (sorted(shop.TABLES),)
    assert db.connect().execute("SELECT count(*) FROM customers").fetchone() == (shop.CUSTOMERS,)


def test_the_workload_goes_on_where_another_stopped_and_keeps_to_its_rate(db: Database) -> None:
    shop.create(db.dsn)
    for _ in range(2):
        shop.Workload(db.dsn, seed=3).run(AfterTransactions(20))
    waits: list[float] = []

    def stop(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) == 3

    totals = shop.Workload(db.dsn, seed=4, rate=0.5).run(stop)
    assert waits[-1] == pytest.approx(totals.changes / 0.5, rel=0.2)


def worker() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pgoutput_source.embedded.shop", "--rate", "200"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )


def test_the_process_ends_with_its_standard_input_and_tells_what_it_did(db: Database) -> None:
    shop.create(db.dsn)
    process = worker()
    assert process.stdin is not None
    process.stdin.write(db.dsn + "\n")
    process.stdin.flush()
    connection = db.connect()
    done = threading.Event()
    timer = threading.Timer(30, done.set)
    timer.start()
    while connection.execute("SELECT count(*) FROM orders").fetchone() == (0,) and not done.is_set():
        assert process.poll() is None
    timer.cancel()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out.splitlines()[-1])["inserted"] > 0


def test_no_shop_and_no_server_are_errors_that_say_so(db: Database, pg: Server) -> None:
    with pytest.raises(ServerError, match=r"shop.*orders"):
        shop.Workload(db.dsn).run(AfterTransactions(1))
    nowhere = pg.dsn(host="/nonexistent")
    with pytest.raises(ServerError, match="could not be created") as caught:
        shop.create(nowhere)
    assert isinstance(caught.value.__cause__, psycopg.OperationalError)
    process = worker()
    _, err = process.communicate(nowhere + "\n", timeout=30)
    assert process.returncode == 1
    assert "workload ended" in err
    assert pg.password not in err + str(caught.value)
