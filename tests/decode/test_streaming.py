"""Transactions that PostgreSQL streams while they are in progress give the same changes as those that it does not.

The server's frames, streamed and not, come from the same slot: it is peeked with each protocol in turn. The conformance
cases 106 to 116 carry their numbers.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from harness.database import Database
from harness.flow import Flow, publish
from harness.notation import peeked, positions, rendered
from harness.streams import frame, text_tuple
from harness.workload import Workload, differences, replayed, tables
from hypothesis import given, settings
from hypothesis import strategies as st

from pgoutput_source import PgOutputReader, metrics
from pgoutput_source import messages as m
from pgoutput_source.changes import ChangeSet, Message, Truncate
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.decode.in_progress import StreamedTransactions
from pgoutput_source.errors import ConfigurationError, DecodeError, PgOutputError, ProtocolError, SpillError
from pgoutput_source.postgres import checks
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.settings import SourceSettings

PROTOCOL_1: dict[str, str] = {}
ON = {"proto_version": "2", "streaming": "on"}
PARALLEL = {"proto_version": "4", "streaming": "parallel"}


def modes(database: Database) -> list[dict[str, str]]:
    return [ON] if database.server.major < 16 else [ON, PARALLEL]


@dataclass
class Outcome:
    """All that came out: each change with its table and position, in order; messages and truncates."""

    changes: list[tuple[Any, ...]] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    truncates: list[Truncate] = field(default_factory=list)
    end_lsn: int = 0
    cells: dict[tuple[int, int], Any] = field(default_factory=dict, compare=False, repr=False)

    def collect(self, changes: ChangeSet) -> None:
        for batch in changes.batches:
            for row in batch.data.to_pylist():
                at = row["_commit_lsn"], row["_seq"]
                self.changes.append((at, batch.table, repr(row)))
                self.cells[at] = row["_op"], row.get("id"), row.get("v")
        self.messages += changes.messages
        self.truncates += changes.truncates

    def replayed(self, table: str) -> dict[int, str]:
        """What a table of `id` and `v`, whose ids never change, holds behind these changes."""
        values: dict[int, str] = {}
        for op, id_, value in (self.cells[at] for at, name, _ in self.changes if name == table):
            match op:
                case "T":
                    values.clear()
                case "D":
                    del values[id_]
                case _:
                    values[id_] = value
        return values

    def done(self, assembler: Assembler) -> Outcome:
        assert not assembler.in_transaction
        assert not assembler.pending
        self.end_lsn = assembler.end_lsn
        self.changes.sort()
        self.messages.sort(key=lambda message: message.lsn)
        return self


def assembled(
    frames: Sequence[bytes], streamed: StreamedTransactions | None = None, *, seed: int = 0, step: int | None = None
) -> Outcome:
    """What frames say, in feeds that are cut anywhere."""
    rng = random.Random(seed)
    outcome, assembler = Outcome(), Assembler(streamed=streamed)
    at = 0
    while at < len(frames):
        size = step or rng.choice([1, 7, 100, 5000])
        outcome.collect(assembler.feed(frames[at : at + size]))
        while assembler.pending:
            outcome.collect(assembler.feed([]))
        at += size
    return outcome.done(assembler)


def opened(database: Database, *definitions: str) -> psycopg.Connection[Any]:
    """Tables, a publication, and a slot that streams whatever is larger than 64 kB."""
    connection = database.connect()
    for table in definitions or ("t (id int PRIMARY KEY, v text)",):
        connection.execute(f"CREATE TABLE {table}".encode())
    connection.execute("CREATE PUBLICATION p FOR ALL TABLES")
    connection.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    connection.execute("SET logical_decoding_work_mem = '64kB'")
    return connection


def tags(frames: Sequence[bytes]) -> bytes:
    return bytes(f[25] for f in frames)


def rows(first: int, count: int = 1500, table: str = "t") -> str:
    return f"INSERT INTO {table} SELECT i, 'value ' || i FROM generate_series({first}, {first + count - 1}) i"


# ----------------------------------------------------------------------------------------------- what a server sends


class Session:
    """A connection in whose transactions anything may happen, on a table that is its own and one that all share."""

    def __init__(self, database: Database, number: int, rng: random.Random) -> None:
        self.connection = database.connect()
        self.table, self.rng, self.number = f"s{number}", rng, number
        self.next_id = 1
        self.savepoints: list[str] = []
        self.open = False

    def execute(self, statement: str) -> None:
        self.connection.execute(statement.encode())

    def step(self) -> None:
        if not self.open:
            self.execute("BEGIN")
            self.open, self.savepoints = True, []
        dice = self.rng.random()
        if dice < 0.45:
            self.insert()
        elif dice < 0.55:
            self.execute(f"UPDATE {self.table} SET v = v || 'x' WHERE id % 3 = {self.rng.randint(0, 2)}")
        elif dice < 0.60:
            self.execute(f"DELETE FROM {self.table} WHERE id % 5 = 0")
        elif dice < 0.70:
            name = f"p{len(self.savepoints)}"
            self.execute(f"SAVEPOINT {name}")
            self.savepoints.append(name)
        elif dice < 0.80 and self.savepoints:
            at = self.rng.randrange(len(self.savepoints))
            verb = self.rng.choice(["ROLLBACK TO", "RELEASE"])
            self.execute(f"{verb} {self.savepoints[at]}")
            del self.savepoints[at + (verb == "ROLLBACK TO") :]
        elif dice < 0.83:
            self.execute(f"ALTER TABLE {self.table} ADD c{self.next_id} int DEFAULT {self.next_id}")
            self.next_id += 1
        elif dice < 0.85:
            self.execute(f"TRUNCATE {self.table}")
        elif dice < 0.90:
            # Not transactional within a savepoint: see the test of this below.
            flag = "false" if self.savepoints else "true"
            self.execute(f"SELECT pg_logical_emit_message({flag}, 'note', 'from {self.number}')")
        else:
            self.end()

    def insert(self) -> None:
        count = self.rng.choice([1, 10, 400, 1200])
        table = self.rng.choice([self.table, self.table, "shared"])
        first, self.next_id = self.next_id, self.next_id + count
        start = first + self.number * 1_000_000
        self.execute(
            f"INSERT INTO {table} (id, v) SELECT i, repeat(md5(i::text), 2)"
            f" FROM generate_series({start}, {start + count - 1}) i"
        )

    def end(self) -> None:
        if self.open:
            self.execute(self.rng.choice(["COMMIT", "COMMIT", "COMMIT", "ROLLBACK"]))
        self.open = False


@pytest.mark.parametrize("seed", [1, 2])
def test_case_106_109_116_any_workload_gives_the_same_changes_streamed_or_not(any_db: Database, seed: int) -> None:
    rng = random.Random(seed * 100 + any_db.server.major)
    connection = opened(any_db, *(f"{name} (id int PRIMARY KEY, v text)" for name in ("s0", "s1", "s2", "shared")))
    sessions = [Session(any_db, number, rng) for number in range(3)]
    for _ in range(180):
        rng.choice(sessions).step()
        if rng.random() < 0.1:
            connection.execute("INSERT INTO shared SELECT coalesce(min(id), 0) - 1 FROM shared WHERE id < 0")
    for session in sessions:
        session.end()

    plain = assembled(peeked(connection))
    assert len(plain.changes) > 3000
    for options in modes(any_db):
        frames = peeked(connection, **options)
        assert {*b"SEcA"} <= {*tags(frames)}
        for memory in (0, 300_000, 1 << 30):
            streamed = StreamedTransactions(memory=memory, piece=100_000, parallel=options is PARALLEL)
            found = assembled(frames, streamed, seed=seed)
            assert found == plain
            assert streamed.held == 0
            assert bool(streamed.spilled) is (memory < 1 << 30)

    for table in ("s0", "s1", "s2", "shared"):
        rows_now = connection.execute(f"SELECT id, v FROM {table}".encode()).fetchall()
        assert plain.replayed(f"public.{table}") == dict(rows_now)


def each_mode(database: Database, connection: psycopg.Connection[Any]) -> Iterator[tuple[list[bytes], str]]:
    """For each way to stream: the frames, and the changes in notation, in one feed and without any bytes in memory."""
    for options in modes(database):
        frames = peeked(connection, **options)
        with closing(Assembler(streamed=StreamedTransactions(memory=0, parallel=options is PARALLEL))) as assembler:
            sets = [assembler.feed(frames)]
            while assembler.pending:
                sets.append(assembler.feed([]))
        yield frames, rendered(sets)


def test_case_107_a_subtransaction_that_aborts_after_it_was_streamed_is_gone(any_db: Database) -> None:
    c = opened(any_db)
    with c.transaction():
        c.execute(rows(1, 1500))
        with c.transaction() as savepoint:
            c.execute(rows(10_000))
            raise psycopg.Rollback(savepoint)
    expected = assembled(peeked(c))

    assert len(expected.changes) == 1500
    for frames, _ in each_mode(any_db, c):
        parallel = frames[tags(frames).index(b"A")][25:]
        streamed = StreamedTransactions(parallel=len(parallel) > 9)
        assert assembled(frames, streamed) == expected


def test_case_108_a_transaction_that_aborts_after_it_was_streamed_leaves_nothing(any_db: Database) -> None:
    c = opened(any_db)
    with c.transaction() as transaction:
        c.execute(rows(1, 3000))
        raise psycopg.Rollback(transaction)
    c.execute("INSERT INTO t VALUES (1, 'a')")

    for frames, text in each_mode(any_db, c):
        assert text == "+t{1,a}"
        if any_db.server.major < 18:  # which does not stream what it knows to have aborted
            assert {*b"SEA"} <= {*tags(frames)}


def test_case_110_aborts_of_what_was_never_streamed_are_ignored() -> None:
    streamed = StreamedTransactions()
    streamed.add([frame(m.StreamAbort(7, 8)), frame(m.StreamAbort(9, 9))])

    assert not streamed.pending


def test_case_111_a_relation_of_a_chunk_counts_from_the_commit_on(any_db: Database) -> None:
    c = opened(any_db)
    c.execute(rows(1, 3000))
    c.execute("INSERT INTO t VALUES (-1, 'a')")

    for frames, text in each_mode(any_db, c):
        assert tags(frames).count(b"R") == 1
        assert text.endswith(" | +t{-1,a}")


def test_case_111_a_younger_relation_outlives_the_commit_of_an_older_one(any_db: Database) -> None:
    """Another transaction changes what is published of a table while one is streamed: nobody announces that again."""
    if any_db.server.major < 15:
        pytest.skip("column lists come with PostgreSQL 15")
    c = any_db.connect()
    c.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
    c.execute("CREATE PUBLICATION p FOR TABLE t")
    c.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    c.execute("SET logical_decoding_work_mem = '64kB'")
    other = any_db.connect()
    other.execute("BEGIN")
    other.execute(rows(1, 3000))
    c.execute("ALTER PUBLICATION p SET TABLE t (id)")
    c.execute("INSERT INTO t VALUES (-1, 'a')")
    other.execute("COMMIT")
    c.execute("INSERT INTO t VALUES (-2, 'b')")
    expected = assembled(peeked(c))

    for options in modes(any_db):
        frames = peeked(c, **options)
        assert assembled(frames, StreamedTransactions(parallel=options is PARALLEL)).changes[-1] == expected.changes[-1]


def test_case_112_a_relation_of_an_aborted_subtransaction_does_not_count(any_db: Database) -> None:
    c = opened(any_db)
    with c.transaction():
        c.execute(rows(1))
        with c.transaction() as savepoint:
            c.execute("ALTER TABLE t ADD w int DEFAULT 5")
            c.execute(rows(10_000).replace("'value ' || i", "'value ' || i, i"))
            raise psycopg.Rollback(savepoint)
        c.execute(rows(20_000))
    c.execute("INSERT INTO t VALUES (-1, 'a')")
    expected = rendered([Assembler().feed(peeked(c))])

    for _, text in each_mode(any_db, c):
        assert text == expected


def test_case_113_ddl_truncate_and_messages_inside_of_chunks(any_db: Database) -> None:
    c = opened(any_db)
    with c.transaction():
        c.execute(rows(1))
        c.execute("SELECT pg_logical_emit_message(true, 'x', 'hi')")
        c.execute("ALTER TABLE t ADD w int DEFAULT 5")
        c.execute(rows(10_000))
        c.execute("TRUNCATE t RESTART IDENTITY")
        c.execute("CREATE TYPE mood AS ENUM ('sad')")
        c.execute("CREATE TABLE e (m mood)")
        c.execute("INSERT INTO e SELECT 'sad' FROM generate_series(1, 2000)")
    expected = rendered([Assembler().feed(peeked(c))])

    assert "M(x:hi)" in expected
    assert "T(t restart)" in expected
    for _, text in each_mode(any_db, c):
        assert text == expected


def test_case_114_aborts_have_eight_bytes_and_parallel_ones_more(any_db: Database) -> None:
    c = opened(any_db)
    with c.transaction():
        c.execute(rows(1))
        with c.transaction() as savepoint:
            c.execute(rows(10_000))
            raise psycopg.Rollback(savepoint)
    sizes = {
        options["streaming"]: {len(f) - 26 for f in peeked(c, **options) if f[25] == ord("A")}
        for options in modes(any_db)
    }

    assert sizes == ({"on": {8}} if any_db.server.major < 16 else {"on": {8}, "parallel": {24}})


def test_case_115_a_message_that_is_not_transactional_comes_at_once(any_db: Database) -> None:
    c = opened(any_db)
    other = any_db.connect()
    other.execute("BEGIN")
    other.execute(rows(1))
    c.execute("SELECT pg_logical_emit_message(false, 'x', 'hi')")
    c.execute("INSERT INTO t VALUES (-1, 'a')")
    other.execute(rows(10_000))
    before = [text for _, text in each_mode(any_db, c)]
    other.execute("COMMIT")
    after = [text for _, text in each_mode(any_db, c)]

    assert set(before) == {"M!(x:hi) | +t{-1,a}"}
    assert len(set(after)) == 1
    assert after[0].startswith("M!(x:hi) | +t{-1,a} | +t{1,value 1} ")


EVERYTHING = """
CREATE TABLE big (id int PRIMARY KEY, v text, n int)
ALTER TABLE big ALTER v SET STORAGE EXTERNAL
CREATE TABLE log (id serial PRIMARY KEY, v text)
CREATE TABLE child (id int PRIMARY KEY, big int REFERENCES big ON DELETE CASCADE)
CREATE TABLE parts (id int PRIMARY KEY, v text) PARTITION BY RANGE (id)
CREATE TABLE parts1 PARTITION OF parts FOR VALUES FROM (0) TO (1000)
CREATE TABLE parts2 PARTITION OF parts FOR VALUES FROM (1000) TO (9000)
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO log (v) VALUES (NEW.id); RETURN NEW; END'
CREATE TRIGGER before_each BEFORE INSERT OR UPDATE ON big FOR EACH ROW EXECUTE FUNCTION note()
CREATE TRIGGER after_each AFTER INSERT OR UPDATE ON big FOR EACH ROW EXECUTE FUNCTION note()
"""
DO = """
INSERT INTO big SELECT i, repeat(md5(i::text), 100), i FROM generate_series(1, 60) i
INSERT INTO big SELECT i, repeat('x', 5000) FROM generate_series(41, 90) i ON CONFLICT (id) DO UPDATE SET v = excluded.v
INSERT INTO big SELECT i, repeat('y', 5000), i FROM generate_series(81, 99) i ON CONFLICT DO NOTHING
INSERT INTO child SELECT id + 500, id FROM big
UPDATE big SET n = n + 1
WITH gone AS (DELETE FROM big WHERE id < 20 RETURNING id) INSERT INTO parts SELECT id, 'moved' FROM gone
INSERT INTO parts SELECT i, 'p' FROM generate_series(100, 700) i
UPDATE parts SET id = id + 1000
DO $$ BEGIN FOR i IN 1..40 LOOP BEGIN INSERT INTO big VALUES (i, 'z', i); EXCEPTION WHEN unique_violation THEN
  UPDATE big SET v = repeat('w', 4000) WHERE id = i; END; END LOOP; END $$
TRUNCATE child
CREATE TABLE late AS SELECT * FROM big
ALTER TABLE big ALTER n TYPE bigint
UPDATE big SET v = NULL WHERE id % 2 = 0
"""


def test_changes_stand_in_the_order_of_the_wal_whatever_makes_them(any_db: Database) -> None:
    """What is not in this order ends a stream: triggers, conflicts, exceptions, rewrites and cascades are."""
    c = opened(any_db)
    for statement in filter(None, EVERYTHING.splitlines()):
        c.execute(statement.encode())
    with c.transaction():
        for statement in DO.replace("\n  ", " ").strip().splitlines():
            c.execute(statement.encode())
        with c.cursor().copy("COPY late FROM STDIN") as copy:
            for i in range(3000):
                copy.write_row((i, "copied", i))
    expected = assembled(peeked(c))

    assert len(expected.changes) > 5000
    for options in modes(any_db):
        streamed = StreamedTransactions(parallel=options is PARALLEL, memory=0)
        assert assembled(peeked(c, **options), streamed) == expected


def test_a_message_of_a_savepoint_that_was_rolled_back_is_streamed_as_the_transactions_own(any_db: Database) -> None:
    """What can't be held: PostgreSQL says of each change in which subtransaction it was made, but of no message."""
    c = opened(any_db)
    with c.transaction():
        c.execute(rows(1))
        with c.transaction() as savepoint:
            c.execute("SELECT pg_logical_emit_message(true, 'x', 'hi')")
            c.execute(rows(10_000))
            raise psycopg.Rollback(savepoint)

    assert "M(" not in rendered([Assembler().feed(peeked(c))])
    for _, text in each_mode(any_db, c):
        assert text.count("M(x:hi)") == 1


# ---------------------------------------------------------------------------------------------- what a slot forgets


def drained(database: Database, **options: Any) -> list[tuple[int, int]]:
    """The positions of all that a reader gives out, each set acknowledged."""
    sets = []
    with PgOutputReader(database.dsn, slot="s", publication="p", until="current", **options) as reader:
        for changes in reader.sets():
            sets.append(changes)
            reader.ack(changes)
    return positions(sets)


@pytest.mark.parametrize("streaming", ["off", "on", "parallel"])
@pytest.mark.parametrize("released", [True, False], ids=["released", "open"])
def test_a_large_transaction_that_rolls_back_holds_nothing_up(any_db: Database, streaming: str, released: bool) -> None:
    """18 says of it that a stream was aborted, also to readers that asked for no streaming."""
    if streaming == "parallel" and any_db.server.major < 16:
        pytest.skip("streaming = parallel needs PostgreSQL 16")
    c = opened(any_db)
    c.execute(f"ALTER DATABASE {any_db.name} SET logical_decoding_work_mem = '64kB'".encode())
    c.execute("BEGIN")
    c.execute("INSERT INTO t VALUES (1, 'a')")
    c.execute("SAVEPOINT a")
    c.execute(rows(2, 50))
    if released:
        c.execute("RELEASE a")
    c.execute("INSERT INTO t SELECT i, repeat('x', 200) FROM generate_series(100, 3099) i")
    c.execute("ROLLBACK")
    c.execute("INSERT INTO t VALUES (1, 'b')")

    if released and streaming == "off" and any_db.server.major >= 18:
        assert b"A" in tags(peeked(c))
    assert len(drained(any_db, streaming=streaming)) == 1


def test_what_is_acknowledged_while_a_transaction_is_streamed_takes_nothing_of_it(any_db: Database) -> None:
    """Positions behind a chunk may be acknowledged: the server sends each transaction whose commit lies behind them."""
    c = opened(any_db)
    c.execute(f"ALTER DATABASE {any_db.name} SET logical_decoding_work_mem = '64kB'".encode())
    other = any_db.connect()
    other.execute("BEGIN")
    other.execute(rows(1, 3000))
    c.execute("INSERT INTO t VALUES (-1, 'a')")
    before = drained(any_db, streaming="on")
    moved = c.execute(
        "SELECT confirmed_flush_lsn > %s::pg_lsn FROM pg_replication_slots", [str(Lsn(before[0][0]))]
    ).fetchone()
    other.execute(rows(5000, 3000))
    other.execute("COMMIT")
    expected = positions([Assembler().feed(peeked(c))])
    after = drained(any_db, streaming="on", max_bytes=100_000)

    assert moved == (True,)
    assert len(before) == 1
    assert after == expected
    assert len(after) == 6000
    assert drained(any_db, streaming="on") == []


def test_a_reader_resumes_in_the_midst_of_a_streamed_transaction(db: Database) -> None:
    c = opened(db)
    c.execute(f"ALTER DATABASE {db.name} SET logical_decoding_work_mem = '64kB'".encode())
    c.execute("INSERT INTO t VALUES (-1, 'a')")
    c.execute(rows(1, 20_000))
    c.execute("INSERT INTO t VALUES (-2, 'b')")
    expected = positions([Assembler().feed(peeked(c))])
    options: dict[str, Any] = {
        "slot": "s",
        "publication": "p",
        "streaming": "parallel",
        "streaming_memory": 0,
        "max_bytes": 100_000,
    }
    with PgOutputReader(db.dsn, **options) as reader:
        sets = reader.sets()
        for _ in range(4):
            reader.ack(next(sets))  # but only of the first of them is it the whole transaction

    assert positions([next(sets_of(db, options))])[0] == expected[1]
    assert drained(db, **{k: v for k, v in options.items() if k not in ("slot", "publication")}) == expected[1:]


def test_a_lost_connection_in_the_midst_of_chunks_loses_and_repeats_nothing(db: Database) -> None:
    c = opened(db)
    c.execute(f"ALTER DATABASE {db.name} SET logical_decoding_work_mem = '64kB'".encode())
    other = db.connect()
    other.execute("BEGIN")
    other.execute(rows(1, 5000))
    c.execute("INSERT INTO t VALUES (-1, 'a')")
    options: dict[str, Any] = {"slot": "s", "publication": "p", "streaming": "on", "streaming_memory": 0}
    with PgOutputReader(db.dsn, **options, max_bytes=50_000) as reader:
        found = []
        for changes in reader.sets():
            found.append(changes)
            reader.ack(changes)
            if len(found) == 1:  # the small transaction: the chunks of the other one came before it
                c.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots")
                other.execute(rows(6000, 5000))
                other.execute("COMMIT")
            elif len(found) == 3:  # in the midst of what is left
                c.execute("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots")
                c.execute("INSERT INTO t VALUES (-2, 'b')")
            elif positions([changes])[-1][1] == 0:
                break
    ids = [i for s in found for i in s.table("public.t")["id"].to_pylist()]

    assert ids == [-1, *range(1, 5001), *range(6000, 11_000), -2]


def sets_of(database: Database, options: dict[str, Any]) -> Iterator[ChangeSet]:
    with PgOutputReader(database.dsn, **options) as reader:
        yield from reader.sets()


def test_options_that_a_server_is_too_old_for_are_refused(any_db: Database) -> None:
    c = opened(any_db)
    for option in ({"streaming": "parallel"}, {"origin": "none"}):
        settings = SourceSettings.of(dsn=any_db.dsn, slot="s", publication="p", **option)
        if any_db.server.major >= 16:
            checks.check(c, settings)
        else:
            with pytest.raises(ConfigurationError, match=rf"needs PostgreSQL 16, and .* runs {any_db.server.major}"):
                checks.check(c, settings)


def test_a_file_that_can_not_be_written_is_an_error_that_names_the_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    streamed = StreamedTransactions(memory=0)

    with pytest.raises(SpillError, match=r"make room in .*missing"):
        streamed.add([frame(m.StreamStart(7, True)), frame(m.Insert(1, text_tuple("a"), 7))])


def test_nothing_is_left_in_the_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with closing(StreamedTransactions(memory=0)) as streamed:
        streamed.add([frame(m.StreamStart(7, True)), frame(m.Insert(1, text_tuple("a"), 7))])

        assert streamed.spilled
        assert list(tmp_path.iterdir()) == []


READ = """
from pgoutput_source import PgOutputReader
with PgOutputReader({dsn!r}, slot="s", publication="p", streaming="on", streaming_memory=0) as reader:
    for changes in reader.sets():
        reader.ack(changes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="open files are read from /proc")
def test_a_process_that_is_killed_while_it_keeps_a_transaction_leaves_no_file(db: Database, tmp_path: Path) -> None:
    c = opened(db)
    c.execute(f"ALTER DATABASE {db.name} SET logical_decoding_work_mem = '64kB'".encode())
    c.execute("BEGIN")
    c.execute(rows(1, 20_000))
    other = db.connect()
    other.execute("INSERT INTO t VALUES (-1, 'a')")
    environ = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", READ.format(dsn=db.dsn)], env=environ)
    try:
        files: list[str] = []
        deadline = time.monotonic() + 30
        while not any(link.startswith(str(tmp_path)) and link.endswith("(deleted)") for link in files):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
            files = []
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                with suppress(OSError):
                    files.append(os.readlink(descriptor))
        assert list(tmp_path.iterdir()) == []
    finally:
        process.kill()
        process.wait()

    assert list(tmp_path.iterdir()) == []
    # What the first reader acknowledged stands after the rows above, and a server streams nothing from before that.
    c.execute(rows(20_001, 20_000))
    c.execute("COMMIT")
    before = metrics.SPILLED.labels("s")._value.get()
    found = drained(db, streaming="on", streaming_memory=0)
    assert len(found) in (40_000, 40_001)  # the small one may be acknowledged
    assert metrics.SPILLED.labels("s")._value.get() - before > 500_000


@pytest.mark.slow
def test_files_of_a_flow_that_streams_replayed_equal_the_tables(db: Database, tmp_path: Path) -> None:
    with Workload(db.dsn, seed=7, tables=6, largest=4000) as workload:
        publish(db)
        workload.connection.execute(f"ALTER DATABASE {db.name} SET logical_decoding_work_mem = '64kB'".encode())
        workload.run(30_000)
        options = {"PGOUTPUT_STREAMING": "parallel", "PGOUTPUT_STREAMING_MEMORY": "100000"}
        flow = Flow(db, tmp_path, PGOUTPUT_UNTIL="current", **options)
        flow.run("-s", "1", *flow.recovery())

        assert differences(replayed(flow.out)[0], tables(workload)) == []


# ------------------------------------------------------------------------------------------------- bytes are hostile


def is_parallel(seed: int) -> bool:
    """Whether `legal_stream` is one of protocol 4."""
    return seed % 2 == 1


def legal_stream(seed: int) -> list[bytes]:
    """Chunks of several transactions with subtransactions that abort, and small transactions between them."""
    r = random.Random(seed)
    when = (Lsn(1), 0) if is_parallel(seed) else ()
    lsn = 1000
    relation = m.Relation(1, "public", "t", "d", (m.RelationColumn(True, "v", 25, -1),))
    frames: list[bytes] = []
    open_: list[int] = []
    aborted: set[int] = set()
    next_xid = 100

    def small() -> list[m.AnyMessage]:
        commit, end = Lsn(lsn + 5), Lsn(lsn + 8)
        return [m.Begin(commit, 0, 3), relation, m.Insert(1, text_tuple("small")), m.Commit(commit, end, 0)]

    for _ in range(r.randint(1, 25)):
        lsn += 100
        said: list[m.AnyMessage] = []
        dice = r.random()
        if dice < 0.5 or not open_:
            first = not open_ or r.random() < 0.3
            xid = next_xid if first else r.choice(open_)
            if first:
                open_.append(xid)
                next_xid += 100
            said = [m.StreamStart(xid, first)]
            for _ in range(r.randint(0, 4)):
                # Once it has aborted, a subtransaction says nothing more.
                sub = r.choice([n for n in range(xid, xid + 4) if n not in aborted])
                said += [m.Relation(1, "public", "t", "d", relation.columns, sub)] * (r.random() < 0.5)
                row = text_tuple(f"{xid} {sub} {r.randint(0, 9)}")
                # Text in binary is the same bytes; a stream may mix both.
                said.append(m.Insert(1, m.TupleData(r.choice([b"t", b"b"]), row.values), sub))
            said.append(m.StreamStop())
        elif dice < 0.7:
            said = small()
        elif dice < 0.85:
            xid = r.choice(open_)
            sub = xid + r.randint(0, 3)
            aborted.add(sub)
            said = [m.StreamAbort(xid, sub, *when)]
            if sub == xid:
                open_.remove(xid)
        else:
            xid = open_.pop(r.randrange(len(open_)))
            said = [m.StreamCommit(xid, Lsn(lsn + 5), Lsn(lsn + 8), 0)]
        frames += [frame(message, lsn) for message in said]
    return frames


def expected_values(frames: Sequence[bytes], *, parallel: bool) -> list[str]:
    """What such a stream says, one message after the other."""
    kept: dict[int, list[tuple[int, str | None]]] = {}
    aborted: dict[int, set[int]] = {}
    values: list[str] = []
    chunk: int | None = None
    for each in frames:
        try:
            in_stream = chunk is not None and each[25:26] not in b"SEcA"
            message = m.decode(each[25:], in_stream=in_stream, parallel=parallel)
        except ProtocolError:
            if chunk is None:
                raise
            # What is broken matters only if it is committed.
            kept[chunk].append((int.from_bytes(each[26:30], "big"), None))
            continue
        match message:
            case m.StreamStart(xid=xid):
                chunk = xid
                kept.setdefault(xid, [])
                aborted.setdefault(xid, set())
            case m.StreamStop():
                chunk = None
            case m.StreamAbort(xid=xid, subxid=subxid):
                if xid == subxid:
                    kept.pop(xid, None)
                    aborted.pop(xid, None)
                elif xid in kept:
                    aborted[xid].add(subxid)
            case m.StreamCommit(xid=xid):
                gone = aborted.pop(xid, set())
                for sub, value in kept.pop(xid):
                    if sub not in gone:
                        assert value is not None
                        values.append(value)
            case m.Insert(new=row, xid=sub):
                value = (row.values[0] or b"").decode()
                if chunk is None:
                    values.append(value)
                else:
                    kept[chunk].append((sub or 0, value))
    return values


def values_of(sets: Sequence[ChangeSet]) -> list[str]:
    found = [
        ((lsn, seq), value)
        for s in sets
        for b in s.batches
        for lsn, seq, value in zip(*(b.data[n].to_pylist() for n in ("_commit_lsn", "_seq", "v")), strict=True)
    ]
    return [value for _, value in sorted(found)]


def fed(frames: Sequence[bytes], seed: int, *, parallel: bool) -> list[ChangeSet]:
    r = random.Random(seed)
    memory, piece = r.choice([0, 200, 1 << 20]), r.choice([1, 300, 1 << 20])
    streamed = StreamedTransactions(memory=memory, piece=piece, parallel=parallel)
    sets = []
    with closing(Assembler(streamed=streamed)) as assembler:
        at = 0
        while at < len(frames):
            size = r.choice([1, 3, 50])
            sets.append(assembler.feed(frames[at : at + size]))
            while assembler.pending:
                sets.append(assembler.feed([]))
            at += size
    return sets


RELATION = m.Relation(1, "public", "t", "d", (m.RelationColumn(True, "v", 25, -1),))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_chunks_say_what_they_say_one_by_one_however_they_are_cut_and_kept(seed: int, cut: int) -> None:
    head = [frame(x, 10) for x in (m.Begin(Lsn(15), 0, 1), RELATION, m.Commit(Lsn(15), Lsn(18), 0))]
    frames = head + legal_stream(seed)

    parallel = is_parallel(seed)
    assert values_of(fed(frames, cut, parallel=parallel)) == expected_values(frames, parallel=parallel)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_broken_chunks_end_in_an_error_that_names_its_place_or_say_what_they_say(seed: int, mutation: int) -> None:
    """Frames lost, repeated, swapped and cut short; bytes replaced behind the envelope."""
    r = random.Random(mutation)
    frames = legal_stream(seed)
    if not frames:
        return
    kinds = [r.randrange(5) for _ in range(r.randint(1, 3))]
    for kind in kinds:
        i = r.randrange(len(frames))
        match kind:
            case 0 if len(frames) > 1:
                del frames[i]
            case 1:
                frames.insert(r.randrange(len(frames) + 1), frames[i])
            case 2:
                j = r.randrange(len(frames))
                frames[i], frames[j] = frames[j], frames[i]
            case 3:
                frames[i] = frames[i][: r.randint(0, len(frames[i]))]
            case _:
                at = r.randrange(25, max(26, len(frames[i])))
                frames[i] = frames[i][:at] + bytes([r.randrange(256)]) + frames[i][at + 1 :]
    found: list[ChangeSet] = []
    error: PgOutputError | None = None
    try:
        found = fed(frames, mutation, parallel=is_parallel(seed))
        for batch in (batch for changes in found for batch in changes.batches):
            batch.data.validate(full=True)  # what can't be decoded raises here
    except (ProtocolError, DecodeError) as e:
        error = e
    if error is not None:
        assert error.lsn is not None
        return
    if 4 not in kinds:  # another byte in a value is another value
        assert values_of(found) == expected_values(frames, parallel=is_parallel(seed))
