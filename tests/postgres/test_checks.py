"""The catalogue on real servers: what is found, what is refused and with which remedy, and what is created."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from harness.database import Database

from pgoutput_source.embedded import Server
from pgoutput_source.errors import (
    ConfigurationError,
    ConnectionFailed,
    NotConfigured,
    PgOutputError,
    PublicationError,
    SlotLost,
    SlotMismatch,
    SlotNotFound,
)
from pgoutput_source.postgres import checks, slots
from pgoutput_source.postgres.connection import PINNED, connect
from pgoutput_source.postgres.creation import create, create_publication_and_slot
from pgoutput_source.postgres.system import current_lsn, identify
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.settings import SourceSettings


def settings(db: Database, **options: Any) -> SourceSettings:
    return SourceSettings.of(**{"dsn": db.dsn, "slot": slot_of(db), "publication": "p"} | options)


def slot_of(db: Database) -> str:
    return f"{db.name}_slot"


@pytest.fixture
def conn(db: Database) -> Iterator[psycopg.Connection[Any]]:
    with connect(db.dsn) as connection:
        yield connection


def test_what_is_created_passes_the_check(any_db: Database, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with connect(any_db.dsn) as conn:
        conn.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
        before = current_lsn(conn)
        create(conn, settings(any_db, publication=("p", 'We,"Ird')))
        slot = checks.check(conn, settings(any_db, publication=("p", 'We,"Ird')))
        created = caplog.text
        caplog.clear()
        create(conn, settings(any_db, publication=("p", 'We,"Ird')))

    assert (slot.name, slot.slot_type, slot.plugin) == (slot_of(any_db), "logical", "pgoutput")
    assert (slot.database, slot.active, slot.temporary, slot.two_phase) == (any_db.name, False, False, False)
    assert slot.invalidation is None
    assert slot.confirmed_flush_lsn is not None
    assert slot.restart_lsn is not None
    assert before <= slot.confirmed_flush_lsn
    assert re.findall(r"created (publication|replication slot)", created) == ["publication"] * 2 + ["replication slot"]
    assert caplog.text == ""


def test_the_server_is_identified_as_a_walsender_does(any_db: Database) -> None:
    with connect(any_db.dsn) as conn, connect(any_db.dsn, replication=True) as walsender:
        system = identify(conn)
        row = walsender.execute("IDENTIFY_SYSTEM").fetchone()

    assert row is not None
    assert (system.system_id, system.timeline, system.database) == (row[0], row[1], row[3])
    assert system.lsn <= Lsn(row[2])
    assert system.server_version // 10000 == any_db.server.major


def test_settings_of_role_and_database_do_not_shape_values(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    with db.connect() as conn:
        for name, value in (
            ("DateStyle", "German"),
            ("TimeZone", "Asia/Tokyo"),
            ("IntervalStyle", "sql_standard"),
            ("extra_float_digits", "-5"),
            ("bytea_output", "escape"),
            ("search_path", "hostile"),
            ("statement_timeout", "200ms"),
        ):
            conn.execute(f"ALTER DATABASE {db.name} SET {name} = '{value}'".encode())
    monkeypatch.setenv("PGOPTIONS", "-c work_mem=7MB -c DateStyle=SQL")
    mine = psycopg.conninfo.make_conninfo(db.dsn, options="-c work_mem=9MB -c TimeZone=Asia/Tokyo")

    for replication in (False, True):
        with connect(db.dsn, replication=replication) as conn:
            row = conn.execute(
                "SELECT '2024-03-04 05:06:07+00'::timestamptz::text, 0.1::float8::text, '\\x00'::bytea::text,"
                " '-1 day 2 hours'::interval::text, current_setting('work_mem'), pg_sleep(0.3)::text"
            ).fetchone()
            shown = dict(conn.execute("SELECT name, setting FROM pg_settings").fetchall())
        with connect(mine, replication=replication) as conn:
            both = conn.execute("SELECT current_setting('work_mem'), current_setting('TimeZone')").fetchone()

        assert row == ("2024-03-04 05:06:07+00", "0.1", "\\x00", "-1 days +02:00:00", "7MB", "")
        assert both == ("9MB", "UTC")
        assert {name: shown[name].replace(" ", "") for name in PINNED} == PINNED
        assert shown["transaction_timeout"] == "0"


# -- what is refused ------------------------------------------------------------------------------------------------


def _no_slot(conn: psycopg.Connection[Any], db: Database) -> None:
    conn.execute("CREATE PUBLICATION p FOR ALL TABLES")


def _nothing(conn: psycopg.Connection[Any], db: Database) -> None:
    pass


def _no_publication(conn: psycopg.Connection[Any], db: Database) -> None:
    conn.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot_of(db)])


def _physical(conn: psycopg.Connection[Any], db: Database) -> None:
    conn.execute("SELECT pg_create_physical_replication_slot(%s)", [slot_of(db)])


def _two_phase(conn: psycopg.Connection[Any], db: Database) -> None:
    conn.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput', false, true)", [slot_of(db)])


def _other_database(conn: psycopg.Connection[Any], db: Database) -> None:
    with connect(db.server.dsn()) as other:
        other.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot_of(db)])


@pytest.mark.parametrize(
    ("prepare", "kind", "hint"),
    [
        (_nothing, SlotNotFound, r'CREATE PUBLICATION "p" .*\n.*pg_create_logical_replication_slot\(\'{slot}\''),
        (_no_slot, SlotNotFound, r"^[^P]*pg_create_logical_replication_slot\('{slot}', 'pgoutput'\)"),
        (_no_publication, PublicationError, r'CREATE PUBLICATION "p" .*\n.*drop.*{slot}.*\n.*create.*{slot}'),
        (_physical, SlotMismatch, "another slot"),
        (_two_phase, SlotMismatch, "slot without"),
        (_other_database, SlotMismatch, "dbname=postgres"),
    ],
)
def test_a_slot_that_can_not_be_used_is_refused_with_its_remedy(
    any_db: Database,
    prepare: Callable[[psycopg.Connection[Any], Database], None],
    kind: type[PgOutputError],
    hint: str,
) -> None:
    with connect(any_db.dsn) as conn:
        prepare(conn, any_db)
        try:
            with pytest.raises(kind) as caught:
                checks.check(conn, settings(any_db))
        finally:
            conn.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s",
                [slot_of(any_db)],
            )

    assert re.search(hint.replace("{slot}", slot_of(any_db)), caught.value.hint or "")
    assert any_db.server.password not in str(caught.value)


def test_the_remedy_for_a_missing_slot_is_sql_that_works(db: Database, conn: psycopg.Connection[Any]) -> None:
    conn.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
    with pytest.raises(SlotNotFound) as caught:
        checks.check(conn, settings(db))
    assert caught.value.hint is not None
    for line in caught.value.hint.splitlines()[1:]:
        conn.execute(line.encode())

    assert checks.check(conn, settings(db)).name == slot_of(db)


def test_create_leaves_a_slot_alone_that_is_older_than_its_publication(
    db: Database, conn: psycopg.Connection[Any]
) -> None:
    _no_publication(conn, db)
    create(conn, settings(db))

    with pytest.raises(PublicationError):
        checks.check(conn, settings(db))


def test_a_publication_without_tables_is_a_warning(
    db: Database, conn: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    conn.execute("CREATE PUBLICATION p")
    create(conn, settings(db))
    checks.check(conn, settings(db))

    assert "publication 'p' has no table yet" in caplog.text


def test_a_publication_of_some_tables(db: Database, conn: psycopg.Connection[Any]) -> None:
    conn.execute('CREATE TABLE public.a (id int PRIMARY KEY); CREATE TABLE public."B c" (id int, d int)')
    create_publication_and_slot(
        conn, slot=slot_of(db), publications=["p"], tables=["public.a", 'public."B c" (id) WHERE (id > 3)']
    )
    rows = conn.execute("SELECT tablename::text, rowfilter IS NULL FROM pg_publication_tables ORDER BY 1").fetchall()

    assert rows == [("B c", False), ("a", True)]


def test_a_role_without_rights_is_told_what_it_lacks(db: Database, conn: psycopg.Connection[Any]) -> None:
    role = f"{db.name}_role"
    conn.execute("CREATE PUBLICATION p")
    conn.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'".encode())
    theirs = psycopg.conninfo.make_conninfo(db.dsn, user=role, password="x")
    try:
        with connect(theirs) as weak:
            with pytest.raises(NotConfigured, match=f'ALTER ROLE "{role}" REPLICATION'):
                checks.check(weak, settings(db))
            with pytest.raises(NotConfigured, match="may not replicate"):
                create(weak, settings(db))
            conn.execute(f"ALTER ROLE {role} REPLICATION".encode())
            with pytest.raises(NotConfigured, match="FOR ALL TABLES needs a superuser"):
                create(weak, settings(db, publication="q"))
            assert identify(weak).database == db.name
            create(weak, settings(db))
            assert checks.check(weak, settings(db)).name == slot_of(db)
    finally:
        conn.execute(f"DROP ROLE {role}".encode())


def test_the_creation_of_a_slot_says_what_it_waits_for(
    db: Database,
    conn: psycopg.Connection[Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slots, "_LOG_EVERY", 0.1)
    caplog.set_level(logging.INFO)
    conn.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
    writer = db.connect(autocommit=False)
    writer.execute("INSERT INTO public.t VALUES (1)")
    release = threading.Timer(0.6, writer.commit)
    release.start()
    create(conn, settings(db))
    release.join()

    assert caplog.text.count("waits for the transactions") >= 2
    assert checks.check(conn, settings(db)).name == slot_of(db)


# -- positions ------------------------------------------------------------------------------------------------------


def test_the_current_position_covers_what_was_committed_and_is_flushed(
    db: Database, conn: psycopg.Connection[Any]
) -> None:
    conn.execute("CREATE TABLE public.t (v text)")
    conn.execute("SET synchronous_commit = off")
    for length in range(0, 400, 7):
        row = conn.execute(
            "INSERT INTO public.t VALUES (repeat('x', %s)) RETURNING pg_current_wal_insert_lsn()::text", [length]
        ).fetchone()
        position = current_lsn(conn)
        flushed = conn.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
        assert row is not None
        assert flushed is not None
        assert Lsn(row[0]) < position <= Lsn(flushed[0])


def test_the_current_position_does_not_wait_for_an_open_transaction(
    db: Database, conn: psycopg.Connection[Any]
) -> None:
    conn.execute("CREATE TABLE public.t (v text)")
    writer = db.connect(autocommit=False)
    writer.execute("INSERT INTO public.t VALUES ('x')")
    begun = time.monotonic()
    current_lsn(conn)

    assert time.monotonic() - begun < 5


# -- servers that refuse --------------------------------------------------------------------------------------------


def test_a_server_that_does_not_decode_is_refused() -> None:
    with Server(settings={"wal_level": "replica"}) as server, connect(server.dsn()) as conn:
        wanted = SourceSettings.of(dsn=server.dsn(), slot="s", publication="p", create=True)
        for action in (checks.check, create):
            with pytest.raises(NotConfigured, match="wal_level is 'replica'") as caught:
                action(conn, wanted)
            assert "ALTER SYSTEM SET wal_level = 'logical'" in (caught.value.hint or "")


def test_a_slot_whose_wal_is_gone_is_lost() -> None:
    options = {"max_slot_wal_keep_size": "1MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}
    with Server(settings=options) as server, connect(server.dsn()) as conn:
        wanted = SourceSettings.of(dsn=server.dsn(), slot="s", publication="p", create=True)
        create(conn, wanted)
        for _ in range(4):
            conn.execute("SELECT pg_logical_emit_message(false, 'x', 'x'), pg_switch_wal()")
            conn.execute("CHECKPOINT")
        with pytest.raises(SlotLost, match="wal_removed") as caught:
            checks.check(conn, wanted)

    assert "resync --slot s" in (caught.value.hint or "")
    assert "max_slot_wal_keep_size" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"password": "wrong"}, ConnectionFailed, "check user name and password"),
        ({"user": "nobody_here"}, ConnectionFailed, "check user name and password"),
        ({"dbname": "nowhere"}, ConnectionFailed, "name an existing database"),
        ({"port": "1"}, ConnectionFailed, "socket"),
        ({"host": "127.0.0.1", "port": "1"}, ConnectionFailed, "is the server running"),
        ({"host": "no-such-host.invalid"}, ConnectionFailed, "check the host's name"),
        ({"host": "127.0.0.1", "sslmode": "require", "sslrootcert": "/nowhere"}, ConnectionFailed, ""),
    ],
)
def test_a_connection_that_fails_says_why_and_keeps_the_password(
    db: Database, change: dict[str, str], kind: type[PgOutputError], says: str
) -> None:
    secret = change.get("password", db.server.password)
    with pytest.raises(kind) as caught:
        connect(psycopg.conninfo.make_conninfo(db.dsn, **change))

    assert says in (caught.value.hint or "")
    assert caught.value.hint
    assert secret not in str(caught.value).replace("wrong password", "")


def test_a_dsn_that_can_not_be_read_is_no_place_for_its_text() -> None:
    with pytest.raises((ConfigurationError, ConnectionFailed)) as caught:
        connect("host=x password=hunter2 hunter2")

    assert "hunter2" not in str(caught.value)
