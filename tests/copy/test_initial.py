"""The initial copy on real servers: busy tables, crashes of the reader, replayed strictly in the order of arrival."""

from __future__ import annotations

import contextlib
import copy as copying
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import psycopg
import pytest
from harness.database import Database
from harness.mirror import Mirror, catch_up, finish
from prometheus_client import Gauge

from pgoutput_source import metrics
from pgoutput_source.changes.batches import ChangeSet
from pgoutput_source.copy import chunks, copy_out, initial
from pgoutput_source.copy.chunks import ChunkReader
from pgoutput_source.copy.initial import InitialCopy
from pgoutput_source.copy.ledger import TableCopy
from pgoutput_source.errors import ConfigurationError, ConnectionFailed
from pgoutput_source.postgres.definitions import Definitions
from pgoutput_source.reader import PgOutputReader, peek
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream.session import SlotSession

KEYS = 300


@dataclass(frozen=True)
class Kind:
    """A kind of key: its columns, and SQL that makes one of the number `n`."""

    columns: str
    names: str
    key: str
    identity: str = "DEFAULT"


KINDS = {
    "int": Kind("id int", "id", "n"),
    "bigint, full": Kind("id bigint", "id", "(n::bigint - 150) * 9007199254740993", "FULL"),
    "uuid": Kind("id uuid", "id", "md5(n::text)::uuid"),
    "text": Kind(
        "id text COLLATE c", "id", "(ARRAY['ä','Z','a','Ö','b','é','-',' ','_','ß'])[n % 10 + 1] || n % 7 || 'X' || n"
    ),
    "numeric": Kind("id numeric", "id", "CASE n WHEN 0 THEN 'NaN' ELSE round(n / 7.0 - 20, n % 9) + n END"),
    "timestamp": Kind(
        "id timestamptz", "id",
        "CASE n WHEN 0 THEN '-infinity' WHEN 1 THEN 'infinity' WHEN 2 THEN '0044-03-15 BC'"
        " ELSE '2020-01-01Z'::timestamptz + n * interval '1 day 1 s' END",
    ),
    "enum and int": Kind("a mood, id int", "a, id", "(ARRAY['sad','ok','happy'])[n % 3 + 1]::mood, n"),
    "text and numeric": Kind("a text COLLATE c, b numeric", "a, b", "chr(97 + n % 5), n / 3.0"),
}  # fmt: skip

ONE = """
CREATE PROCEDURE one(r float8, n int, m int) LANGUAGE plpgsql AS $$
BEGIN
    IF r < 0.001 THEN
        BEGIN TRUNCATE t; EXCEPTION WHEN OTHERS THEN NULL; END;
    ELSIF r < 0.30 THEN
        INSERT INTO t SELECT {key}, 1, 'i' || n, CASE WHEN n % 2 = 0 THEN big(n + m) END ON CONFLICT DO NOTHING;
    ELSIF r < 0.60 THEN
        UPDATE t SET v = v + 1 WHERE ({names}) = ({key});
    ELSIF r < 0.68 THEN
        UPDATE t SET big = big(m), v = v + 1 WHERE ({names}) = ({key});
    ELSIF r < 0.80 THEN
        DELETE FROM t WHERE ({names}) = ({key});
    ELSE
        BEGIN
            UPDATE t SET ({names}) = ROW({key_m}), v = v + 1 WHERE ({names}) = ({key});
        EXCEPTION WHEN unique_violation THEN NULL;
        END;
    END IF;
END $$
"""


def table(db: Database, kind: Kind) -> None:
    """Table `t`, of two thirds of its keys, and a publication of it."""
    with db.connect() as c:
        c.execute("CREATE TYPE mood AS ENUM ('happy', 'ok', 'sad')")
        try:
            c.execute("CREATE COLLATION c (provider = icu, locale = 'de-u-ks-level2')")
        except psycopg.errors.FeatureNotSupported:
            c.execute('CREATE COLLATION c FROM "C"')
        c.execute("CREATE FUNCTION big(x int) RETURNS text LANGUAGE sql AS $$ SELECT repeat(md5(x::text), 80) $$")
        c.execute(f"CREATE TABLE t ({kind.columns}, v int, s text, big text, PRIMARY KEY ({kind.names}))".encode())
        c.execute("ALTER TABLE t ALTER big SET STORAGE EXTERNAL")
        c.execute(f"ALTER TABLE t REPLICA IDENTITY {kind.identity}".encode())
        fill = {"key": kind.key, "names": kind.names, "key_m": kind.key.replace("n ", "m ").replace("(n:", "(m:")}
        fill["key_m"] = _of(kind.key, "m")
        c.execute(ONE.format(**fill).encode())
        c.execute(
            f"INSERT INTO t SELECT {kind.key}, 0, 'there', CASE WHEN n % 2 = 0 THEN big(n) END"
            f"  FROM generate_series(0, {KEYS}) n WHERE n % 3 <> 0".encode()
        )
        c.execute("CREATE PUBLICATION p FOR TABLE t")


def _of(key: str, name: str) -> str:
    import re

    return re.sub(r"\bn\b", name, key)


class Writers:
    """Four sessions that write to `t` until they are left: subtransactions, roll-backs, prepared transactions."""

    def __init__(self, db: Database, seed: int) -> None:
        self.db, self.seed = db, seed
        self.stopped = threading.Event()
        self.errors: list[BaseException] = []

    def __enter__(self) -> Self:
        self.threads = [threading.Thread(target=self._guarded, args=(i,), daemon=True) for i in range(4)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join()
        assert not self.errors

    def _guarded(self, number: int) -> None:
        try:
            with psycopg.connect(self.db.dsn, autocommit=True) as connection:
                self._write(connection, random.Random(self.seed * 10 + number), number)
        except BaseException as e:
            self.errors.append(e)

    def _write(self, c: psycopg.Connection[Any], rng: random.Random, number: int) -> None:
        c.execute("SET deadlock_timeout = '20ms'")
        c.execute(f"SET synchronous_commit = {'off' if number % 2 else 'on'}".encode())
        serial = 0
        while not self.stopped.is_set():
            serial += 1
            name = f"w{number}_{serial}_{time.time_ns()}"
            try:
                c.execute("BEGIN")
                for _ in range(rng.randint(1, 6)):
                    nested = rng.random()
                    if nested < 0.3:
                        c.execute("SAVEPOINT a")
                    c.execute("CALL one(%s, %s, %s)", [rng.random(), rng.randint(0, KEYS), rng.randint(0, KEYS)])
                    if nested < 0.1:
                        c.execute("ROLLBACK TO a")
                if rng.random() < 0.1:
                    c.execute(f"PREPARE TRANSACTION '{name}'".encode())
                    self.stopped.wait(rng.random() * 0.01)
                    c.execute(f"{'COMMIT' if rng.random() < 0.8 else 'ROLLBACK'} PREPARED '{name}'".encode())
                else:
                    c.execute("COMMIT" if rng.random() < 0.9 else "ROLLBACK")
            except psycopg.errors.DeadlockDetected:
                c.execute("ROLLBACK")
            time.sleep(rng.random() * 0.004)


def table_now(db: Database, key: tuple[str, ...]) -> dict[Any, dict[str, Any]]:
    """The rows of `t`, read at one moment."""
    settings = SourceSettings(dsn=db.dsn, slot="s", publication=("p",))
    reader = InitialCopy(db.dsn, settings, look_up=Definitions(db.dsn), everything=True)
    mirror = Mirror(key)
    while reader.pending:
        mirror.take(reader.step(2**40))
        reader.passed(2**40)
    reader.close()
    return mirror.rows


@contextlib.contextmanager
def _small_chunks(monkeypatch: pytest.MonkeyPatch, rows: int) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setattr(initial, "CHUNK_ROWS", rows)
        yield


def follow(db: Database, kind: Kind, seed: int, **options: Any) -> Mirror:
    """Copy and stream a busy table, with crashes; then let it be quiet, and give what was delivered."""
    rng = random.Random(seed)
    key = tuple(kind.names.split(", "))
    settings = SourceSettings.of(dsn=db.dsn, slot="s", publication="p", snapshot="initial", **options)
    with db.connect() as c:
        c.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    state, mirror = None, Mirror(key)
    durable: Any = (None, copying.deepcopy(mirror))
    crashes = rng.randint(1, 3)
    with Writers(db, seed) as writers:
        session = SlotSession(db.dsn, settings, state)
        deadline = time.monotonic() + 60
        while session.copying:
            assert time.monotonic() < deadline, session.snapshot()
            mirror.take(session.next(0.01))
            time.sleep(rng.random() * 0.01)
            if rng.random() < 0.1:
                state = session.snapshot()
                durable = copying.deepcopy((state, mirror))
                session.acknowledge(state["lsn"])
            if crashes and rng.random() < 0.05:
                crashes -= 1
                session.close()
                state, mirror = copying.deepcopy(durable)
                session = SlotSession(db.dsn, settings, state)
        writers.stopped.set()
    finish(session, db, mirror)
    session.close()
    return mirror


@pytest.mark.parametrize("name", KINDS)
def test_a_busy_table_is_copied_exactly(db: Database, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS[name]
    seed = list(KINDS).index(name)
    table(db, kind)
    with _small_chunks(monkeypatch, 9):
        found = follow(db, kind, seed, streaming="on" if seed % 2 else "off", binary="off")

    assert found.rows == table_now(db, found.key)
    assert found.read


def drained(session: SlotSession, db: Database) -> list[tuple[str, str, int]]:
    """What comes until all that is written now was delivered and no table is being copied: table, op, count."""
    found: list[tuple[str, str, int]] = []

    def take(changes: ChangeSet) -> None:
        for batch in changes:
            ops = batch.data.column("_op").to_pylist()
            found.extend((batch.table, op, ops.count(op)) for op in dict.fromkeys(ops))

    catch_up(session, db, take)
    return found


def test_a_message_asks_for_a_table_again_and_others_are_left_alone(db: Database) -> None:
    with db.connect() as c:
        for name in ("a", "b"):
            c.execute(f"CREATE TABLE {name} (id int PRIMARY KEY)".encode())
            c.execute(f"INSERT INTO {name} SELECT generate_series(1, 10)".encode())
        c.execute("CREATE PUBLICATION p FOR TABLE a, b")
        c.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        session = SlotSession(db.dsn, SourceSettings.of(dsn=db.dsn, slot="s", publication="p"))
        c.execute("INSERT INTO a VALUES (11)")
        assert drained(session, db) == [("public.a", "I", 1)]
        assert "copy" not in session.snapshot()

        c.execute("SELECT pg_logical_emit_message(true, 'pgoutput_source.copy', 'public.a')")
        assert drained(session, db) == [("public.a", "T", 1), ("public.a", "R", 11)]

        c.execute("INSERT INTO a VALUES (12)")
        c.execute("INSERT INTO b VALUES (12)")
        assert drained(session, db) == [("public.a", "I", 1), ("public.b", "I", 1)]
        session.close()


def test_a_table_that_is_published_later_is_copied_and_one_without_a_key_is_emptied_before_it_is_read_again(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_out, "_PIECE", 100)
    monkeypatch.setattr(copy_out, "_BLOCK", 100)
    with db.connect() as c:
        c.execute("CREATE TABLE a (v int)")
        c.execute("INSERT INTO a SELECT generate_series(1, 10000)")
        c.execute("CREATE TABLE b (id int PRIMARY KEY)")
        c.execute("INSERT INTO b SELECT generate_series(1, 10)")
        c.execute("CREATE PUBLICATION p FOR TABLE a")
        c.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        settings = SourceSettings.of(dsn=db.dsn, slot="s", publication="p", snapshot="initial")
        session = SlotSession(db.dsn, settings)
        while not len(session.next(0.1)):
            pass
        state = session.snapshot()
        session.close()

        session = SlotSession(db.dsn, settings, state)
        found = drained(session, db)
        assert found[0] == ("public.a", "T", 1)
        assert sum(count for table, op, count in found if op == "R") == 10_000

        c.execute("ALTER PUBLICATION p ADD TABLE b")
        c.execute("INSERT INTO b VALUES (11)")
        assert drained(session, db) == [("public.b", "R", 11)]
        session.close()
        with pytest.raises(ConfigurationError, match="not complete"):
            SlotSession(db.dsn, SourceSettings.of(dsn=db.dsn, slot="s", publication="p"), state)


def busy_session(db: Database, *statements: str) -> Mirror:
    """A copy of small chunks; each statement runs after some of them. What is delivered until all is."""
    settings = SourceSettings.of(dsn=db.dsn, slot="s", publication="p", snapshot="initial", max_frames=1)
    session, mirror = SlotSession(db.dsn, settings), Mirror(("id",))
    with db.connect() as c:
        for statement in statements:
            for _ in range(24):
                mirror.take(session.next(0.01))
            c.execute(statement.encode())
    state = session.snapshot()
    session.close()
    session = SlotSession(db.dsn, settings, state)
    finish(session, db, mirror)
    session.close()
    return mirror


RECREATE = """
DO $$ BEGIN
    FOR i IN 1..50 LOOP
        UPDATE t SET v = 'last of the old' WHERE id = i;
        COMMIT;
    END LOOP;
    {away};
    CREATE TABLE t (id int PRIMARY KEY, v text, w int);
    {fill}
END $$
"""
FILL = "INSERT INTO t SELECT n, 'new', 1 FROM generate_series(150, 250) AS n;"


@pytest.mark.parametrize("away", ["DROP TABLE t", "ALTER TABLE t RENAME TO old"])
@pytest.mark.parametrize("silent", [False, True])
def test_a_table_that_takes_the_name_of_another_in_the_midst_of_its_copy(
    db: Database, away: str, silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        c.execute("INSERT INTO t SELECT n, 'old' FROM generate_series(1, 400) AS n")
        c.execute("CREATE PUBLICATION p FOR ALL TABLES")
        c.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    statements = [RECREATE.format(away=away, fill=FILL), "UPDATE t SET w = 2 WHERE id < 200"]
    if silent:  # nothing that is streamed tells of the new table
        statements = [RECREATE.format(away=away, fill="")]
        monkeypatch.setattr(initial, "_LIST_EVERY", 0.0)
    with _small_chunks(monkeypatch, 20):
        found = busy_session(db, *statements, "SELECT 1")
    with db.connect() as c:
        expected = c.execute("SELECT id, v, w FROM t").fetchall()

    assert found.truncates == 1
    assert {(row["id"], row["v"], row["w"]) for row in found.of("public.t").values()} == set(expected)
    if "RENAME" in away:
        assert len(found.of("public.old")) == 400


def test_rows_of_the_copy_never_stand_before_what_was_delivered_of_an_unfinished_transaction(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream is cut after a TRUNCATE, and the table is read again before the rest of its transaction comes."""
    settings = SourceSettings.of(dsn=db.dsn, slot="s", publication="p", snapshot="initial", max_frames=1)
    found: list[tuple[int, int, str, int | None]] = []

    def take(changes: ChangeSet) -> str:
        for batch in changes:
            names = ("_commit_lsn", "_seq", "_op", "id")
            found.extend(zip(*(batch.data.column(name).to_pylist() for name in names), strict=True))
        return found[-1][2] if found else ""

    def until(op: str, session: SlotSession) -> None:
        deadline = time.monotonic() + 30
        while take(session.next(0.01)) != op:
            assert time.monotonic() < deadline

    with db.connect() as c:
        c.execute("CREATE TABLE t (id int); ALTER TABLE t REPLICA IDENTITY FULL; INSERT INTO t VALUES (1)")
        c.execute("CREATE PUBLICATION p FOR TABLE t")
        c.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        session = SlotSession(db.dsn, settings)
        until("R", session)
        with monkeypatch.context() as patch:
            patch.setattr(TableCopy, "settle", lambda *_: None)  # before the TRUNCATE is there
            take(session.next(0.01))
            c.execute("BEGIN; TRUNCATE t; INSERT INTO t VALUES (2), (3); COMMIT")
            until("T", session)
        state = session.snapshot()
        session.close()
        session = SlotSession(db.dsn, settings, state)
        with monkeypatch.context() as patch:
            patch.setattr(session.frames, "poll", lambda **_: [])  # the server takes its time
            for _ in range(20):
                take(session.next())
        until("R", session)
        c.execute("UPDATE t SET id = id + 10")
        deadline = time.monotonic() + 30
        while session.copying or found[-1][2:] != ("U", 13):
            assert time.monotonic() < deadline, found
            take(session.next(0.05))
        session.close()

    assert found == sorted(found)
    kept = [row for row in found if row > next(row for row in found if row[2] == "T")]
    assert [(op, number) for _, _, op, number in kept] == [("R", 2), ("R", 3), ("U", 12), ("U", 13)]


def test_a_reader_that_only_copies(db: Database) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY)")
        c.execute("INSERT INTO t SELECT generate_series(1, 10)")
        reader = PgOutputReader(db.dsn, slot="s", publication="p", create=True, snapshot="only")
        with reader:
            ops = [(event.op, event.after["id"]) for event in reader]  # type: ignore[index]
        assert sorted(ops) == [("R", n) for n in range(1, 11)]
        peeked = peek(db.dsn, slot="s", publication="p", snapshot="only")
        assert sorted(peeked.table("public.t").column("id").to_pylist()) == list(range(1, 11))
        assert c.execute("SELECT FROM pg_replication_slots WHERE database = %s", [db.name]).fetchall() == []

        c.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        with pytest.raises(ConfigurationError, match="there is a slot of this name"):
            PgOutputReader(db.dsn, slot="s", publication="p", snapshot="only").open()

        def cut_off() -> None:
            terminate = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = 'other'"
            with PgOutputReader(db.dsn, slot="other", publication="p", snapshot="only") as reader:
                for _ in reader:
                    c.execute(terminate)

        with pytest.raises(ConnectionFailed, match="temporary"):
            cut_off()


def test_tables_that_leave_the_publication_and_come_back(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "CHUNK_ROWS", 10)
    monkeypatch.setattr(initial, "_LIST_EVERY", 0.0)
    with db.connect() as c:
        for name in ("dropped", "t", "whole"):
            c.execute(f"CREATE TABLE {name} (id int PRIMARY KEY)".encode())
            c.execute(f"INSERT INTO {name} SELECT generate_series(1, {20 if name == 'whole' else 200})".encode())
        c.execute("CREATE PUBLICATION p FOR TABLE dropped, t, whole")
        c.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        session = SlotSession(db.dsn, SourceSettings.of(dsn=db.dsn, slot="s", publication="p", snapshot="initial"))
        mirror = Mirror(("id",))
        while not mirror.read:
            mirror.take(session.next(0.01))
        c.execute("DELETE FROM dropped WHERE id <= 20")
        c.execute("DROP TABLE dropped")
        c.execute("ALTER PUBLICATION p DROP TABLE t")
        c.execute("DELETE FROM t WHERE id <= 20")
        for _ in range(20):
            mirror.take(session.next(0.01))
        c.execute("ALTER PUBLICATION p ADD TABLE t")
        for _ in range(20):  # until it is seen to be published
            mirror.take(session.next(0.01))
        finish(session, db, mirror)
        assert len(mirror.rows) == 180

        # Copied completely, and what is deleted now is not streamed.
        c.execute("ALTER PUBLICATION p DROP TABLE whole")
        finish(session, db, mirror)
        for _ in range(20):
            mirror.take(session.next(0.01))
        c.execute("DELETE FROM whole WHERE id <= 5")
        c.execute("ALTER PUBLICATION p ADD TABLE whole")
        for _ in range(20):
            mirror.take(session.next(0.01))
        finish(session, db, mirror)
        assert len(mirror.of("public.whole")) == 15
        session.close()


@pytest.mark.parametrize("moment", ["upper_bound", "read", "commit"])
def test_nothing_is_lost_with_the_connection_of_a_chunk(
    db: Database, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminate = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name LIKE '%copy s'"
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY)")
        c.execute("INSERT INTO t SELECT generate_series(1, 10)")
        c.execute("CREATE PUBLICATION p FOR TABLE t")
        c.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        session = SlotSession(db.dsn, SourceSettings.of(dsn=db.dsn, slot="s", publication="p", snapshot="initial"))
        assert drained(session, db) == [("public.t", "R", 10)]
        c.execute("SELECT pg_logical_emit_message(true, 'pgoutput_source.copy', 'public.t')")
        original, calls = getattr(ChunkReader, moment), 0

        def fails_once(self: ChunkReader, *arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                c.execute(terminate.encode())
            return original(self, *arguments)

        monkeypatch.setattr(ChunkReader, moment, fails_once)
        assert drained(session, db) == [("public.t", "T", 1), ("public.t", "R", 10)]
        assert calls == 2
        session.close()


def test_a_chunk_that_takes_too_long_is_read_in_smaller_ones(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_LONGEST", 0.3)
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        c.execute("INSERT INTO t SELECT n, 'v' || n FROM generate_series(1, 200) AS n")
        # About 5 ms a row.
        c.execute("CREATE PUBLICATION p FOR TABLE t WHERE (md5(repeat(v, 500000)) > '')")
        c.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        session = SlotSession(db.dsn, SourceSettings.of(dsn=db.dsn, slot="s", publication="p", snapshot="initial"))
        found = drained(session, db)
        session.close()

    assert sum(count for _, _, count in found) == 200
    assert len(found) > 1


@pytest.mark.parametrize("key", [" PRIMARY KEY", ""])
def test_a_limit_of_rows_holds_and_the_way_is_seen(db: Database, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_out, "_PIECE", 1000)
    monkeypatch.setattr(copy_out, "_BLOCK", 1000)
    with db.connect() as c:
        c.execute(f"CREATE TABLE t (id int{key})".encode())
        c.execute("INSERT INTO t SELECT generate_series(1, 1000)")
        c.execute("ANALYZE t")
        c.execute("CREATE PUBLICATION p FOR TABLE t")
        settings = SourceSettings.of(
            dsn=db.dsn, slot=f"s{len(key)}", publication="p", snapshot="only", snapshot_rows_per_second=400
        )
        session = SlotSession(db.dsn, settings)
        begun = time.monotonic()
        rows, seen = 0, set()
        while rows < 1000:
            rows += len(session.next(0.1))
            seen.add(gauge(metrics.COPY_EXPECTED, settings.slot))
            assert gauge(metrics.COPY_READ, settings.slot) in (rows, 0)
        assert time.monotonic() - begun > 1.2  # the first rows wait for nothing
        assert 1000 in seen
        row = c.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pgoutput_source copy s%'")
        assert row.fetchall() == [(1,)]
        while session.copying:
            session.next(0.1)
        session.close()
    assert gauge(metrics.COPYING, settings.slot) == 0


def gauge(metric: Gauge, slot: str) -> float:
    return float(metric.labels(slot)._value.get())
