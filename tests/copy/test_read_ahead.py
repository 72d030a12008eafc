"""The chunk that is read ahead while the stream goes on: it is delivered only if it shows all that was dropped."""

from __future__ import annotations

import threading
import time

import pytest
from harness.database import Database
from harness.mirror import Mirror, finish

from pgoutput_source.copy import initial
from pgoutput_source.copy.ahead import ReadAhead
from pgoutput_source.copy.chunks import ChunkReader, Fetched
from pgoutput_source.copy.initial import InitialCopy
from pgoutput_source.copy.keys import Keys
from pgoutput_source.copy.meanwhile import Meanwhile
from pgoutput_source.copy.tables import Published
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream.session import SlotSession

# Of the even numbers up to 200, 2 to 20 were read, and 22 to 40 are being read ahead.
UPDATE = "UPDATE t SET v = 'new' WHERE id = 30"
IN_VAIN = [
    UPDATE,
    "DELETE FROM t WHERE id = 30",
    "INSERT INTO t VALUES (31, 'new')",
    "UPDATE t SET id = 7 WHERE id = 30",
    "UPDATE t SET id = 31 WHERE id = 6",
    "TRUNCATE t; INSERT INTO t VALUES (30, 'new')",
    "ALTER TABLE t ADD w int; UPDATE t SET w = 1 WHERE id = 6",
    "ALTER TABLE t ALTER id TYPE bigint; UPDATE t SET v = 'new' WHERE id = 6",
    "ALTER TABLE t RENAME TO u; UPDATE u SET v = 'new' WHERE id = 6",
]
USED = [
    "UPDATE t SET v = 'new' WHERE id = 6",
    "UPDATE t SET v = 'new' WHERE id = 110",
    "UPDATE t SET id = 111 WHERE id = 6",
    "UPDATE t SET id = 7 WHERE id = 110",
    "INSERT INTO t VALUES (111, 'new')",
    "ALTER TABLE t ADD w int",
    "SELECT",
]


@pytest.fixture
def used(db: Database, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """`t`, copied in chunks of 10 rows, and which of those that were read ahead were delivered."""
    found: list[object] = []
    original = ReadAhead.take

    def noted(self: ReadAhead, keys: Keys, published: Published | None) -> Fetched | None:
        reading, fetched = self.reading, original(self, keys, published)
        if fetched is not None:
            found.append(reading)
        return fetched

    monkeypatch.setattr(initial, "CHUNK_ROWS", 10)
    monkeypatch.setattr(ReadAhead, "take", noted)
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        c.execute("INSERT INTO t SELECT 2 * n, 'old' FROM generate_series(1, 100) n")
        c.execute("CREATE PUBLICATION p FOR ALL TABLES")
        c.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    return found


def meanwhile(db: Database, statement: str) -> tuple[Mirror, object]:
    """What is delivered if this is streamed while the second chunk is read ahead, and that chunk."""
    mirror = Mirror(("id",))
    session = SlotSession(
        db.dsn, SourceSettings.of(dsn=db.dsn, slot="s", publication="p", snapshot="initial", binary="off")
    )
    while not mirror.read:
        mirror.take(session.next(0.01))
    assert session._copy is not None
    assert session._copy._ahead.wait()
    ahead = session._copy._ahead.reading
    assert ahead is not None
    with db.connect() as c:
        c.execute(statement.encode())
        row = c.execute("SELECT pg_current_wal_flush_lsn() - '0/0'::pg_lsn").fetchone()
    assert row is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InitialCopy, "due", False)
        while session.safe_lsn < row[0]:
            mirror.take(session.next(0.05))
    finish(session, db, mirror)
    session.close()
    return mirror, ahead


def rows(db: Database, name: str) -> set[tuple[object, ...]]:
    with db.connect() as c:
        return set(c.execute(f"SELECT id, v FROM {name}".encode()).fetchall())


@pytest.mark.parametrize("statement", [*IN_VAIN, *USED])
def test_a_chunk_that_was_read_ahead_is_delivered_if_it_shows_what_was_dropped(
    db: Database, used: list[object], statement: str
) -> None:
    table = "u" if "RENAME" in statement else "t"

    found, ahead = meanwhile(db, statement)

    assert {(row["id"], row["v"]) for row in found.of(f"public.{table}").values()} == rows(db, table)
    assert any(one is ahead for one in used) == (statement in USED)
    if statement == "SELECT":
        assert len(used) == 9


def test_without_a_look_at_what_was_dropped_it_would_be_lost(
    db: Database, used: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Meanwhile, "shown", lambda *_: True)

    found, _ = meanwhile(db, UPDATE)

    assert found.rows[30,]["v"] == "old"
    assert used


def test_the_stream_goes_on_while_a_chunk_is_read_ahead_and_the_end_does_not_wait_for_it(
    db: Database, used: list[object]
) -> None:
    with db.connect() as c:
        # About 0.3 s a row of the second chunk.
        c.execute("ALTER PUBLICATION p RENAME TO q")
        c.execute("CREATE PUBLICATION p FOR TABLE t WHERE (id < 22 OR md5(repeat(v, 50000000)) > '')")
        session = SlotSession(db.dsn, SourceSettings.of(dsn=db.dsn, slot="s", publication="p", snapshot="initial"))
        ops: list[str] = []
        while "R" not in ops:
            ops += [op for batch in session.next(0.01) for op in batch.data.column("_op").to_pylist()]
        c.execute("INSERT INTO t VALUES (1, 'new')")
        while "I" not in ops:
            ops += [op for batch in session.next(0.01) for op in batch.data.column("_op").to_pylist()]
        assert session._copy is not None
        assert not session._copy._ahead.wait(0)

        begun = time.monotonic()
        session.close()
        assert time.monotonic() - begun < 1
        assert not [thread for thread in threading.enumerate() if thread.name == "pgoutput-copy"]
        assert ops == ["R"] * 10 + ["I"]
        assert not used


@pytest.mark.parametrize("moment", ["open", "upper_bound", "read", "commit"])
def test_the_connection_is_lost_while_a_chunk_is_read_ahead(
    db: Database, used: list[object], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminate = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name LIKE '%copy s'"
    original, calls = getattr(ChunkReader, moment), 0

    def fails_once(self: ChunkReader, *arguments: object) -> object:
        nonlocal calls
        if threading.current_thread().name == "pgoutput-copy":
            calls += 1
            if calls == 3:
                with db.connect() as c:
                    c.execute(terminate)
        return original(self, *arguments)

    monkeypatch.setattr(ChunkReader, moment, fails_once)
    mirror = Mirror(("id",))
    session = SlotSession(
        db.dsn, SourceSettings.of(dsn=db.dsn, slot="s", publication="p", snapshot="initial", binary="off")
    )
    finish(session, db, mirror)
    session.close()
    assert {(row["id"], row["v"]) for row in mirror.rows.values()} == rows(db, "t")
    assert used
    assert calls > 3
