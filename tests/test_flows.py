"""The flows in `flows/`: importing one touches nothing, each can be drawn, and says what PostgreSQL says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from harness.database import Database
from harness.one_table import ordered

from pgoutput_source.embedded import shop
from pgoutput_source.parquet.read import read

ROOT = Path(__file__).parents[1]
FLOWS = sorted(path.stem for path in (ROOT / "flows").glob("[!_]*.py"))
CHANGES = 3000

IMPORT = """
import os, sys
import bytewax.connectors.stdio, bytewax.operators.windowing, pgoutput_source.operators, pgoutput_source.dataflow.source
from pgoutput_source import ParquetSink

class Watched(dict):
    asked = set()
    def __getitem__(self, name): self.asked.add(name); return super().__getitem__(name)
    def get(self, name, default=None): self.asked.add(name); return super().get(name, default)

def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event in ("socket.connect", "socket.bind", "os.mkdir", "subprocess.Popen", "os.rename"):
        print(event, arguments); os._exit(1)

os.environ = Watched(os.environ)
sys.dont_write_bytecode = True
sys.addaudithook(watch)
import flows.{name}
print(sorted(n for n in Watched.asked if n.startswith("PG")))
"""


def python(*arguments: str, **environ: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "BYTEWAX"))}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=clean | environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", FLOWS)
def test_importing_a_flow_touches_no_database_and_no_disk(name: str) -> None:
    # The folder to write to is the one thing that the environment says about what a flow looks like.
    assert python("-c", IMPORT.replace("{name}", name)).strip() in ("[]", "['PGOUTPUT_OUT']")


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_is_short_and_can_be_drawn(name: str) -> None:
    assert len((ROOT / "flows" / f"{name}.py").read_text().splitlines()) <= 50
    assert python("-m", "bytewax.visualize", f"flows.{name}:flow", "-o", "mermaid").startswith("flowchart")


PAID = """
CREATE TABLE paid (customer_id bigint, amount numeric);
CREATE FUNCTION paid() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO paid VALUES (NEW.customer_id, NEW.amount); RETURN NULL;
END $$;
CREATE TRIGGER paid_now AFTER INSERT ON orders FOR EACH ROW WHEN (NEW.status = 'paid') EXECUTE FUNCTION paid();
CREATE TRIGGER paid_later AFTER UPDATE ON orders FOR EACH ROW
    WHEN (NEW.status = 'paid' AND OLD.status IS DISTINCT FROM 'paid') EXECUTE FUNCTION paid();
"""


@pytest.fixture(scope="module")
def sold(pg: Any) -> Any:
    """A shop that has sold, and a slot for each flow from before it opened."""
    database = Database(pg)
    shop.create(database.dsn)
    with database.connect() as connection:
        connection.execute(PAID)
        for name in FLOWS:
            connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [name])
    work = shop.Workload(database.dsn, seed=5)
    work.run(lambda _: work.totals.changes > CHANGES)
    yield database
    database.drop()


def run(name: str, sold: Database, out: Path) -> str:
    environ = {"PGOUTPUT_DSN": sold.dsn, "PGOUTPUT_SLOT": name, "PGOUTPUT_PUBLICATION": "shop"}
    return python(
        "-m", "bytewax.run", f"flows.{name}", "-s", "1", PGOUTPUT_UNTIL="current", PGOUTPUT_OUT=str(out), **environ
    )


def newest(folder: Path, key: str) -> list[dict[str, Any]]:
    """The newest row of each key, as a reader of the folder finds it."""
    table = read(folder).to_table().sort_by([("_commit_lsn", "ascending"), ("_seq", "ascending")])
    found = {row[key]: row for row in table.to_pylist()}
    return [row for row in found.values() if row["_op"] != "D"]


def test_sales_by_status_equal_group_by(sold: Database, tmp_path: Path) -> None:
    run("sales_by_status", sold, tmp_path)
    rows = newest(tmp_path / "sales_by_status", "status")
    got = [(r["status"], r["count"], r["amount_sum"], r["amount_max"]) for r in rows]
    query = "SELECT status, count(*), sum(amount), max(amount) FROM orders GROUP BY status"
    with sold.connect() as connection:
        assert ordered(got) == ordered(connection.execute(query).fetchall())


def test_customers_mirror_holds_the_rows_and_no_address(sold: Database, tmp_path: Path) -> None:
    run("customers_mirror", sold, tmp_path)
    rows = newest(tmp_path / "customers", "id")
    assert {row["email"] for row in rows} == {None}
    query = "SELECT id, name, city FROM customers WHERE id = ANY(%s)"
    with sold.connect() as connection:
        expected = connection.execute(query, [[row["id"] for row in rows]]).fetchall()
    assert ordered((row["id"], row["name"], row["city"]) for row in rows) == ordered(expected)
    assert b"@example.org" not in b"".join(file.read_bytes() for file in tmp_path.rglob("*.parquet"))


def test_orders_cdc_writes_each_change_and_the_revenue_of_each_minute(sold: Database, tmp_path: Path) -> None:
    run("orders_cdc", sold, tmp_path)
    history = read(tmp_path / "orders").to_table()
    revenue = read(tmp_path / "revenue").to_table().group_by("customer_id").aggregate([("amount_sum", "sum")])
    got = {row["customer_id"]: row["amount_sum_sum"] for row in revenue.to_pylist()}
    paid = history.filter(pa.compute.field("status") == "paid")
    assert sum(got.values()) < sum(paid["amount"].to_pylist()), "no order was updated while it was paid"
    with sold.connect() as connection:
        assert got == dict(connection.execute("SELECT customer_id, sum(amount) FROM paid GROUP BY 1").fetchall())
    with sold.connect() as connection:
        [(count,)] = connection.execute("SELECT count(*) FROM orders").fetchall()
    ops = history["_op"].to_pylist()
    assert ops.count("I") - ops.count("D") == count


def test_order_alerts_name_customers_with_many_orders(sold: Database, tmp_path: Path) -> None:
    alerts = [json.loads(line) for line in run("order_alerts", sold, tmp_path).splitlines()]
    assert alerts
    assert all(alert["orders"] >= 3 for alert in alerts)
    assert len({(a["customer_id"], a["minute"]) for a in alerts}) == len(alerts)
