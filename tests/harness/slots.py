"""What happens to slots while nobody looks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psycopg
import pyarrow.parquet as pq

from harness.database import Database
from harness.flow import Flow


def absent(db: Database, flow: Flow) -> None:
    with db.connect() as connection:
        connection.execute("SELECT pg_drop_replication_slot('cdc')")


def ahead(db: Database, flow: Flow) -> None:
    with db.connect() as connection:
        connection.execute("INSERT INTO t SELECT generate_series(101, 200)")
        connection.execute("SELECT pg_replication_slot_advance('cdc', pg_current_wal_lsn())")


def recreated(db: Database, flow: Flow) -> None:
    absent(db, flow)
    with db.connect() as connection:
        connection.execute("INSERT INTO t SELECT generate_series(101, 200)")
        connection.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")


def lost(db: Database, flow: Flow) -> None:
    def write(connection: psycopg.Connection[Any]) -> None:
        connection.execute("INSERT INTO t SELECT max(id) + 1 FROM t")
        connection.execute("SELECT pg_switch_wal()")

    invalidate(db, "max_slot_wal_keep_size = '1MB'", write)


def invalidate(db: Database, setting: str, wait: Callable[[psycopg.Connection[Any]], object]) -> None:
    """Have the server give the slot up, which it does at a checkpoint."""
    with db.connect() as connection:
        connection.execute(f"ALTER SYSTEM SET {setting}".encode())
        connection.execute("SELECT pg_reload_conf()")
        try:
            deadline = time.monotonic() + 30
            while connection.execute("SELECT wal_status FROM pg_replication_slots").fetchall() != [("lost",)]:
                wait(connection)
                connection.execute("CHECKPOINT")
                assert time.monotonic() < deadline
        finally:
            connection.execute(f"ALTER SYSTEM RESET {setting.split()[0]}".encode())
            connection.execute("SELECT pg_reload_conf()")


def of_another_plugin(db: Database, flow: Flow) -> None:
    absent(db, flow)
    with db.connect() as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('cdc', 'test_decoding')")


def ids(flow: Flow) -> list[int]:
    """The column `id` of everything published."""
    return sorted(row for file in flow.out.glob("*.parquet") for row in pq.read_table(file)["id"].to_pylist())


def insert(db: Database, first: int, last: int) -> None:
    """Rows of table `t`, in one transaction."""
    with db.connect() as connection:
        connection.execute("INSERT INTO t SELECT generate_series(%s::int, %s)", [first, last])
