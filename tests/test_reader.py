"""The plain reader and peek, on real servers: what is delivered, what comes again, what is never lost."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from harness.database import Database
from harness.waiting import until

from pgoutput_source.changes import ChangeSet, Position
from pgoutput_source.errors import (
    ConfigurationError,
    ConnectionFailed,
    DecodeError,
    PublicationError,
    SlotInUse,
    SlotNotFound,
)
from pgoutput_source.events import ChangeEvent
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.pypgoutput import LogicalReplicationReader
from pgoutput_source.reader import PgOutputReader, peek

ROOT = Path(__file__).parents[1]


@pytest.fixture
def shop(db: Database) -> Database:
    """A database with one table, a publication and a slot."""
    make(db)
    return db


def make(db: Database) -> None:
    connection = db.connect()
    connection.execute("CREATE TABLE orders (id int PRIMARY KEY, status text)")
    connection.execute("CREATE TABLE elsewhere (id int)")
    connection.execute("CREATE PUBLICATION p FOR TABLE orders")
    connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot(db)])


def slot(db: Database) -> str:
    return f"s_{db.name}"


def insert(db: Database, first: int, count: int, *, per_transaction: int = 1) -> None:
    with psycopg.connect(db.dsn) as connection:
        for low in range(first, first + count, per_transaction):
            connection.execute(
                "INSERT INTO orders SELECT i, 'new' FROM generate_series(%s::int, %s::int) i",
                [low, min(low + per_transaction, first + count) - 1],
            )
            connection.commit()


def reader(db: Database, until: str | None = "current", **options: Any) -> PgOutputReader:
    return PgOutputReader(db.dsn, slot=slot(db), publication="p", until=until, **options)


def ids(events: Iterator[ChangeEvent] | PgOutputReader | list[ChangeEvent]) -> list[int]:
    return [event.row["id"] for event in events]


def left(db: Database) -> list[int]:
    """The changes that a new reader would get."""
    return ids(peek(db.dsn, slot=slot(db), publication="p").events())


def confirmed(db: Database) -> Lsn:
    rows = db.connect().execute(
        "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s", [slot(db)]
    )
    return Lsn(rows.fetchall()[0][0])


def is_active(db: Database) -> bool:
    rows = db.connect().execute("SELECT active FROM pg_replication_slots WHERE slot_name = %s", [slot(db)])
    return bool(rows.fetchall()[0][0])


def test_the_readers_on_every_major_give_the_same_changes(any_db: Database) -> None:
    make(any_db)
    insert(any_db, 0, 30, per_transaction=7)
    any_db.connect().execute("UPDATE orders SET status = 'paid' WHERE id % 2 = 0")
    any_db.connect().execute("TRUNCATE orders")
    peeked = peek(any_db.dsn, slot=slot(any_db), publication="p")
    assert peeked.tables == ("public.orders",)
    assert peeked.table("public.orders")["_op"].to_pylist() == ["I"] * 30 + ["U"] * 15 + ["T"]
    with reader(any_db) as by_set:
        sets = list(by_set.sets())
    with reader(any_db) as by_event:
        events = list(by_event)
    assert [e.message_id for s in sets for e in s.events()] == [e.message_id for e in events]
    assert [e.message_id for e in peeked.events()] == [e.message_id for e in events]

    async def main() -> list[ChangeEvent]:
        with reader(any_db) as asynchronous:
            return [event async for event in asynchronous]

    assert asyncio.run(main()) == events


@pytest.mark.parametrize("seed", range(4))
def test_nothing_acknowledged_is_repeated_and_nothing_else_is_lost(shop: Database, seed: int) -> None:
    """Readers that stop anywhere and acknowledge anything, one after another, until all is acknowledged."""
    rng = random.Random(seed)
    insert(shop, 0, 60)
    insert(shop, 60, 40, per_transaction=10)
    insert(shop, 100, 20)
    seen: list[int] = []
    expected = 0  # what the next reader begins with
    while expected < 120:
        with reader(shop, max_frames=rng.choice([1, 3, 16, 1000])) as r:
            given: list[ChangeEvent] = list(itertools.islice(r, rng.randint(1, 60)))
            assert ids(given) == list(range(expected, expected + len(given)))
            seen += ids(given)
            acknowledged = given[rng.randint(-1, len(given) - 1)] if rng.random() < 0.8 else None
            if acknowledged is not None and acknowledged is not given[-1]:
                r.ack(acknowledged)
            elif acknowledged is not None:
                for event in given:
                    r.ack(event)
            if acknowledged is not None:
                end = acknowledged.row["id"] + 1
                # Within the transactions of ten, what counts is the begin of the one that is not yet through.
                expected = end if end <= 60 or end > 100 else max(60, end // 10 * 10)
        assert left(shop) == list(range(expected, 120))
    assert sorted(set(seen)) == list(range(120))


def test_a_killed_reader_loses_nothing_and_repeats_only_what_was_not_acknowledged(shop: Database) -> None:
    program = """
import sys
from pgoutput_source.reader import PgOutputReader
with PgOutputReader(sys.argv[1], slot=sys.argv[2], publication="p", status_interval=0.2) as reader:
    for event in reader:
        print(event.row["id"], flush=True)
        reader.ack(event)
"""
    seen: list[int] = []
    for round_ in range(3):
        insert(shop, round_ * 1000, 1000, per_transaction=1 + round_)
        process = subprocess.Popen(
            [sys.executable, "-c", program, shop.dsn, slot(shop)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert process.stdout is not None
        with process:
            lines = []
            for line in process.stdout:
                lines.append(int(line))
                if len(lines) == 600 or lines[-1] % 1000 == 999:
                    process.send_signal(signal.SIGKILL)
        # Contiguous, and a repetition of the last one's end at most.
        assert lines == list(range(lines[0], lines[-1] + 1))
        assert not seen or lines[0] <= max(seen) + 1
        seen += lines
    until(lambda: not is_active(shop))
    with reader(shop) as r:
        rest = []
        for event in r:
            rest.append(event.row["id"])
            r.ack(event)
    assert sorted(set(seen + rest)) == list(range(3000))
    assert left(shop) == []


def test_a_set_is_acknowledged_as_a_whole(shop: Database) -> None:
    insert(shop, 0, 50)
    with reader(shop, max_frames=40) as r:
        for changes in r.sets():
            r.ack(changes)
            break
        done = len(changes)
    assert 0 < done < 50
    assert left(shop) == list(range(done, 50))
    with reader(shop, max_frames=7) as r:
        for changes in r.sets():
            r.ack(changes)
    assert left(shop) == []


def test_logical_messages_come_with_the_sets_and_hold_the_slot_until_they_are_acknowledged(shop: Database) -> None:
    emit = "SELECT pg_logical_emit_message(%s, 'prefix', 'content')"
    shop.connect().execute(emit, [True])
    with reader(shop) as r:
        assert [m.content for s in r.sets() for m in s.messages] == [b"content"]
    before = confirmed(shop)
    with reader(shop) as r:
        for changes in r.sets():
            r.ack(changes)
    assert confirmed(shop) > before
    with reader(shop) as r:
        assert list(r.sets()) == []


def test_a_quiet_publication_lets_go_of_the_busy_databases_wal(shop: Database) -> None:
    insert(shop, 0, 3)
    with reader(shop, until=None, status_interval=0.2) as r:
        for event in r:
            r.ack(event)
            if event.row["id"] == 2:
                break
        connection = shop.connect()
        connection.execute("INSERT INTO elsewhere SELECT generate_series(1, 10000)")
        now = Lsn(connection.execute("SELECT pg_current_wal_lsn()::text").fetchall()[0][0])
        thread = threading.Thread(target=lambda: next(r, None))
        thread.start()
        until(lambda: confirmed(shop) >= now)
        r.stop()
        thread.join()


def test_what_is_outstanding_keeps_the_slot_where_it_is(shop: Database) -> None:
    insert(shop, 0, 3)
    with reader(shop, until=None, status_interval=0.1) as r:
        first = next(r)
        r.ack(first)
        thread = threading.Thread(target=lambda: list(r))  # takes the others and acknowledges none
        thread.start()
        shop.connect().execute("INSERT INTO elsewhere SELECT generate_series(1, 10000)")
        time.sleep(1)
        assert confirmed(shop) <= first.position.commit_lsn + 1
        r.stop()
        thread.join()
    assert left(shop) == [1, 2]


def test_a_slow_loop_body_does_not_lose_the_connection(shop: Database) -> None:
    insert(shop, 0, 3)
    shop.connect().execute(f"ALTER DATABASE {shop.name} SET wal_sender_timeout = '1s'")
    with reader(shop, max_frames=1) as r:
        got = []
        for event in r:
            got.append(event.row["id"])
            if len(got) == 1:
                time.sleep(3)
        assert r._session is not None
        assert r._session.frames.generation == 0
    assert got == [0, 1, 2]


def test_a_lost_connection_is_made_again_and_nothing_comes_twice(shop: Database) -> None:
    insert(shop, 0, 100, per_transaction=50)
    terminate = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s"
    got = []
    with reader(shop, max_frames=11) as r:
        for event in r:
            got.append(event.row["id"])
            if len(got) in (5, 30, 70):
                shop.connect().execute(terminate, [slot(shop)])
                time.sleep(0.3)
            if len(got) % 20 == 0:
                r.ack(event)
        assert r._session is not None
        assert r._session.frames.generation > 0
    assert got == list(range(100))
    assert left(shop) == []


@pytest.mark.parametrize("how", ["thread", "signal"])
def test_stop_ends_the_loop_and_frees_the_slot(shop: Database, how: str) -> None:
    insert(shop, 0, 3)
    got = []
    with reader(shop, until=None) as r:
        signal.signal(signal.SIGALRM, lambda *_: r.close())
        for event in r:
            got.append(event.row["id"])
            if len(got) == 3:  # soon, it waits for the next
                if how == "thread":
                    threading.Timer(0.3, r.stop).start()
                else:
                    signal.setitimer(signal.ITIMER_REAL, 0.3)
        assert list(r) == []
    assert got == [0, 1, 2]
    assert not is_active(shop)


def test_a_loop_that_was_left_goes_on_where_it_was(shop: Database) -> None:
    insert(shop, 0, 10)
    with reader(shop) as r:
        assert ids(list(itertools.islice(r, 4))) == [0, 1, 2, 3]
        assert next(r).row["id"] == 4
        assert ids(r) == [5, 6, 7, 8, 9]
        with pytest.raises(ConfigurationError, match="events and sets"):
            next(r.sets())


def test_a_cancelled_task_loses_nothing(shop: Database) -> None:
    async def main() -> list[int]:
        got = []
        with reader(shop, until=None) as r:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(r), 0.5)
            insert(shop, 0, 3)
            async for event in r:
                got.append(event.row["id"])
                if len(got) == 3:
                    break
        return got

    assert asyncio.run(main()) == [0, 1, 2]


def test_a_task_that_begins_while_a_cancelled_one_still_waits_gets_everything(shop: Database) -> None:
    async def main() -> list[int]:
        got = []
        with reader(shop, until=None) as r:
            for first in range(0, 15, 3):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(r), 0.01)
                task = asyncio.ensure_future(anext(r))
                await asyncio.sleep(0.05)  # now two threads wait
                await asyncio.to_thread(insert, shop, first, 3)
                got.append((await asyncio.wait_for(task, 20)).row["id"])
                for _ in range(2):
                    got.append((await asyncio.wait_for(anext(r), 20)).row["id"])
        return got

    assert asyncio.run(main()) == list(range(15))


def test_what_goes_wrong_behind_a_cancelled_task_is_not_passed_over(shop: Database) -> None:
    async def main() -> None:
        with reader(shop, until=None, on_misfit="error") as r:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(r), 0.5)
            shop.connect().execute("INSERT INTO amounts VALUES ('NaN')")
            time.sleep(1)  # the thread that the task has left behind gets it
            insert(shop, 0, 3)
            with pytest.raises(DecodeError):
                await anext(r)

    shop.connect().execute("CREATE TABLE amounts (amount numeric(8, 2)); ALTER PUBLICATION p ADD TABLE amounts")
    asyncio.run(main())


def test_until_an_lsn_ends_there(shop: Database) -> None:
    insert(shop, 0, 3)
    here = Lsn(shop.connect().execute("SELECT pg_current_wal_lsn()::text").fetchall()[0][0])
    insert(shop, 3, 3)
    with reader(shop, until=str(here), max_frames=1) as r:
        assert ids(r)[:3] == [0, 1, 2]
    with reader(shop, until="current") as r:
        assert ids(r) == [0, 1, 2, 3, 4, 5]


def test_only_what_was_given_out_can_be_acknowledged(shop: Database) -> None:
    insert(shop, 0, 3)
    with reader(shop) as r:
        with pytest.raises(ConfigurationError, match="not delivered"):
            r.ack(Position(Lsn("FF/0"), 0))
        first = next(r)
        with pytest.raises(ConfigurationError, match="not delivered"):
            r.ack(peek_all(shop)[-1])
        r.ack(first)
    assert left(shop) == [1, 2, 1000]


def peek_all(db: Database) -> list[ChangeEvent]:
    with psycopg.connect(db.dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('other_' || current_database(), 'pgoutput')")
    insert(db, 1000, 1)
    return list(peek(db.dsn, slot=f"other_{db.name}", publication="p").events())


def test_an_error_is_raised_and_raised_again(shop: Database) -> None:
    insert(shop, 0, 3)
    with reader(shop, until=None, reconnect_seconds=0) as r:
        assert next(r).row["id"] == 0
        list(itertools.islice(r, 2))
        shop.server.halt("immediate")
        try:
            with pytest.raises(ConnectionFailed):
                next(r)
            with pytest.raises(ConnectionFailed):
                next(r)
        finally:
            shop.server.start()


def test_errors_say_what_to_do(shop: Database) -> None:
    for make_it in (
        lambda: next(iter(PgOutputReader(shop.dsn, slot="missing", publication="p"))),
        lambda: peek(shop.dsn, slot="missing", publication="p"),
    ):
        with pytest.raises(SlotNotFound, match="pg_create_logical_replication_slot"):
            make_it()
    with pytest.raises(PublicationError, match="CREATE PUBLICATION"):
        peek(shop.dsn, slot=slot(shop), publication="missing")
    with pytest.raises(ConfigurationError, match="publicaton"):
        PgOutputReader(shop.dsn, slot="s", publication="p", publicaton="p")
    insert(shop, 0, 1)
    with reader(shop, until=None) as r:
        next(r)
        with pytest.raises(SlotInUse):
            peek(shop.dsn, slot=slot(shop), publication="p")
        with pytest.raises(SlotInUse):
            next(reader(shop, slot_wait_seconds=0))
    with pytest.raises(ConfigurationError, match="tables with changes: public"):
        peek(shop.dsn, slot=slot(shop), publication="p").table("orders")


def test_create_makes_publication_and_slot(db: Database) -> None:
    db.connect().execute("CREATE TABLE t (id int PRIMARY KEY)")
    with PgOutputReader(db.dsn, slot=slot(db), publication="new", create=True) as r:
        db.connect().execute("INSERT INTO t VALUES (1)")
        assert next(r).after == {"id": 1}


def test_peek_consumes_nothing_and_shows_whole_transactions(shop: Database) -> None:
    insert(shop, 0, 100, per_transaction=10)
    before = confirmed(shop)
    all_of_it = peek(shop.dsn, slot=slot(shop), publication="p")
    assert isinstance(all_of_it, ChangeSet)
    assert ids(all_of_it.events()) == list(range(100))
    few = peek(shop.dsn, slot=slot(shop), publication="p", limit=25)
    assert 20 <= len(few) <= 30
    assert len(few) % 10 == 0
    assert (confirmed(shop), is_active(shop)) == (before, False)
    assert all_of_it.table("public.orders").equals(
        peek(shop.dsn, slot=slot(shop), publication="p").table("public.orders")
    )


def test_a_table_whose_columns_came_and_went_is_one_arrow_table(shop: Database) -> None:
    insert(shop, 0, 2)
    shop.connect().execute("ALTER TABLE orders ADD COLUMN amount numeric(8,2), ALTER COLUMN id TYPE bigint")
    shop.connect().execute("INSERT INTO orders VALUES (2, 'paid', 9.5)")
    table = peek(shop.dsn, slot=slot(shop), publication="p").table("public.orders")
    assert table["id"].to_pylist() == [0, 1, 2]
    assert list(map(str, table["amount"].to_pylist())) == ["None", "None", "9.50"]
    shop.connect().execute("ALTER TABLE orders ALTER COLUMN amount TYPE text")
    shop.connect().execute("INSERT INTO orders VALUES (3, 'paid', 'much')")
    with pytest.raises(ConfigurationError, match="changed their types"):
        peek(shop.dsn, slot=slot(shop), publication="p").table("public.orders")


def test_the_readers_events_know_the_catalogue(shop: Database) -> None:
    connection = shop.connect()
    connection.execute("ALTER TABLE orders REPLICA IDENTITY FULL, ALTER status SET NOT NULL, ADD note text")
    insert(shop, 0, 1)
    with reader(shop) as r:
        (event,) = r
    assert [(c.name, c.part_of_pkey, c.optional) for c in event.table_schema.column_definitions] == [
        ("id", True, False),
        ("status", False, False),
        ("note", False, True),
    ]


def test_the_readers_row_model_holds_the_tables_rows(shop: Database) -> None:
    insert(shop, 0, 2)
    with reader(shop) as r:
        model = r.model("public.orders")
        rows = [model.model_validate(event.after) for event in r]
        with pytest.raises(ConfigurationError, match="no table"):
            r.model("public.missing")
    assert [json.loads(row.model_dump_json()) for row in rows] == [{"id": i, "status": "new"} for i in (0, 1)]


def test_a_reader_that_was_not_entered_models_rows(shop: Database) -> None:
    assert set(reader(shop).model("public.orders").model_fields) == {"id", "status"}


def test_the_compatible_reader_is_a_reader(shop: Database) -> None:
    insert(shop, 0, 2)
    old = LogicalReplicationReader("p", slot(shop), dsn=shop.dsn)
    assert [next(old).row["id"], next(old).row["id"]] == [0, 1]
    old.stop()
    assert left(shop) == [1]  # the last one was never asked past
