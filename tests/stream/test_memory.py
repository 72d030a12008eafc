"""A very large value: it comes as it is, and the memory that it took is given back once it is acknowledged."""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from harness.database import Database

from pgoutput_source import PgOutputReader
from pgoutput_source.stream import large_messages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")

MEGABYTES = 60


def resident() -> float:
    """Megabytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


class Large:
    """A reader at a table of one text column, and what is done to it."""

    def __init__(self, db: Database, **options: Any) -> None:
        self.connection = db.connect()
        self.connection.execute("CREATE TABLE t (id serial PRIMARY KEY, v text)")
        self.connection.execute("ALTER TABLE t ALTER v SET STORAGE EXTERNAL")
        self.connection.execute("CREATE PUBLICATION p FOR TABLE t")
        self.connection.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        self.reader = PgOutputReader(db.dsn, slot="s", publication="p", **options)
        self.sets = self.reader.sets()

    def insert(self, value: str) -> list[int]:
        """Insert a row and read it back; the lengths of the values that came."""
        self.connection.execute(f"INSERT INTO t (v) VALUES ({value})".encode())
        changes = next(self.sets)
        self.reader.ack(changes)
        return [len(v) for v in changes.table("public.t")["v"].to_pylist()]

    def used(self) -> float:
        """Megabytes that stay behind a very large value, while small ones go on coming."""
        assert self.insert("'a'") == [1]
        pa.default_memory_pool().release_unused()
        before = resident()
        assert self.insert(f"repeat('x', {MEGABYTES}000000)") == [MEGABYTES * 1_000_000]
        for _ in range(12):
            time.sleep(0.1)
            assert self.insert("'a'") == [1]
        return resident() - before


@pytest.mark.parametrize("streaming", ["off", "on"])
def test_the_memory_of_a_very_large_value_is_given_back(
    db: Database, monkeypatch: pytest.MonkeyPatch, streaming: str
) -> None:
    monkeypatch.setattr(large_messages, "_QUIET", 0.3)
    large = Large(db, streaming=streaming)
    with large.reader:
        assert large.used() < MEGABYTES / 3
        assert large.reader._session is not None
        assert large.reader._session.frames.generation == 1


def test_without_a_new_connection_it_would_stay(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_messages.LargeMessages, "over", lambda *_: False)
    large = Large(db)
    with large.reader:
        assert large.used() > MEGABYTES * 2 / 3


def test_what_is_not_acknowledged_keeps_the_connection(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new one would bring the value again, and again."""
    monkeypatch.setattr(large_messages, "_QUIET", 0.0)
    large = Large(db)
    with large.reader as reader:
        large.insert("'a'")
        monkeypatch.setattr(reader, "ack", lambda _: None)
        large.insert(f"repeat('x', {MEGABYTES}000000)")
        for _ in range(5):
            time.sleep(0.1)
            large.insert("'a'")
        assert reader._session is not None
        assert reader._session.frames.generation == 0
