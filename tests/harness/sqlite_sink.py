"""A sink with two phases, over SQLite."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from pgoutput_source import ChangeBatch
from pgoutput_source.sinks import TwoPhaseSink


class SqliteSink(TwoPhaseSink[ChangeBatch]):
    def __init__(self, file: Path) -> None:
        self.file = file
        with self.database() as db:
            db.execute("CREATE TABLE IF NOT EXISTS staging (token, id)")
            db.execute("CREATE TABLE IF NOT EXISTS orders (id)")
            db.execute("CREATE TABLE IF NOT EXISTS published (token PRIMARY KEY)")

    @contextlib.contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self.file)) as db, db:
            yield db

    def stage(self, token: str, items: list[ChangeBatch]) -> None:
        ids = (id for item in items for id in item.data["id"].to_pylist())
        with self.database() as db:
            db.executemany("INSERT INTO staging VALUES (?, ?)", ((token, id) for id in ids))

    def publish(self, token: str) -> None:
        with self.database() as db:
            db.execute("INSERT INTO orders SELECT id FROM staging WHERE token = ?", [token])
            db.execute("DELETE FROM staging WHERE token = ?", [token])
            db.execute("INSERT OR IGNORE INTO published VALUES (?)", [token])

    def published(self, token: str) -> bool:
        with self.database() as db:
            return bool(db.execute("SELECT 1 FROM published WHERE token = ?", [token]).fetchall())

    def discard(self, token: str) -> None:
        with self.database() as db:
            db.execute("DELETE FROM staging WHERE token = ?", [token])

    def staged(self) -> list[str]:
        with self.database() as db:
            return [token for (token,) in db.execute("SELECT DISTINCT token FROM staging")]


def orders(sink: SqliteSink) -> list[int]:
    with sink.database() as db:
        return sorted(id for (id,) in db.execute("SELECT id FROM orders WHERE id IS NOT NULL"))
