"""What a user gets wrong ends in one clear error: what, where, what to do; nothing is acknowledged or half-written."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.database import Database
from harness.flow import Flow, confirmed, failure, following, publish, wait_for
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgoutput_source import PgOutputReader, cli, peek
from pgoutput_source.embedded import Server
from pgoutput_source.errors import PgOutputError

Spoil = Callable[[Database, Flow], None]


def no_server(db: Database, flow: Flow) -> None:
    flow.environ["PGOUTPUT_DSN"] = "host=127.0.0.1 port=1 dbname=shop user=cdc password=secret"


def wrong_password(db: Database, flow: Flow) -> None:
    flow.environ["PGOUTPUT_DSN"] = make_conninfo(db.dsn, password="secret")


def no_database(db: Database, flow: Flow) -> None:
    flow.environ["PGOUTPUT_DSN"] = make_conninfo(db.dsn, dbname="nowhere")


def no_slot(db: Database, flow: Flow) -> None:
    flow.environ["PGOUTPUT_SLOT"] = "nowhere"


def no_publication(db: Database, flow: Flow) -> None:
    flow.environ["PGOUTPUT_PUBLICATION"] = "nowhere"


def slot_of_another_plugin(db: Database, flow: Flow) -> None:
    with db.connect() as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('decoding', 'test_decoding')")
    flow.environ["PGOUTPUT_SLOT"] = "decoding"


def slot_of_another_database(db: Database, flow: Flow) -> None:
    flow.environ["PGOUTPUT_DSN"] = make_conninfo(db.dsn, dbname="postgres")


def role_that_may_not_replicate(db: Database, flow: Flow) -> None:
    with db.connect() as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'secret'").format(sql.Identifier(db.name)))
    flow.environ["PGOUTPUT_DSN"] = make_conninfo(db.dsn, user=db.name, password="secret")


def misspelled_variable(db: Database, flow: Flow) -> None:
    flow.environ["PGOUTPUT_PUBLICATOIN"] = "cdc"


def unreadable_dsn(db: Database, flow: Flow) -> None:
    flow.environ["PGOUTPUT_DSN"] = "host=localhost pasword=secret"


def folder_that_is_a_file(db: Database, flow: Flow) -> None:
    flow.out.write_text("not a folder")


def folder_of_foreign_files(db: Database, flow: Flow) -> None:
    flow.out.mkdir()
    (flow.out / "foreign.parquet").write_bytes(b"PAR1")


CASES: list[tuple[Spoil, str, str]] = [
    (no_server, "ConnectionFailed", "is the server running"),
    (wrong_password, "ConnectionFailed", "check user name and password"),
    (no_database, "ConnectionFailed", "dbname="),
    (no_slot, "SlotNotFound", "pg_create_logical_replication_slot('nowhere', 'pgoutput')"),
    (no_publication, "PublicationError", "CREATE PUBLICATION"),
    (slot_of_another_plugin, "SlotMismatch", "another slot"),
    (slot_of_another_database, "SlotMismatch", "dbname="),
    (role_that_may_not_replicate, "NotConfigured", "REPLICATION"),
    (misspelled_variable, "ConfigurationError", "PGOUTPUT_PUBLICATION"),
    (unreadable_dsn, "ConfigurationError", "password"),
    (folder_that_is_a_file, "SinkError", "folder"),
    (folder_of_foreign_files, "SinkError", "folder"),
]


@pytest.mark.parametrize(("spoil", "error", "remedy"), CASES, ids=[spoil.__name__ for spoil, *_ in CASES])
def test_one_clear_error(db: Database, tmp_path: Path, spoil: Spoil, error: str, remedy: str) -> None:
    publish(db)
    with db.connect() as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
        connection.execute("INSERT INTO t SELECT generate_series(1, 10)")
    flow = Flow(db, tmp_path)
    before = confirmed(db)
    spoil(db, flow)

    said, code = failure(flow)

    assert code == 1
    assert error in said
    assert "hint: " in said
    assert remedy in said
    assert "secret" not in said
    assert "Traceback" not in said
    assert confirmed(db) == before
    assert not [file for file in tmp_path.glob("out/*.parquet") if file.name != "foreign.parquet"]


SERVER = """
SELECT slot_name::text, confirmed_flush_lsn::text, restart_lsn::text FROM pg_replication_slots
 WHERE slot_name = ANY (%(slots)s)
UNION ALL SELECT pubname::text, puballtables::text, pubowner::text FROM pg_publication ORDER BY 1
"""


def test_nothing_is_created_dropped_or_moved_unasked(
    db: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is there or not, for all that reads, checks or looks."""
    slots = [f"{db.name}_there", f"{db.name}_nowhere"]
    with db.connect() as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
        connection.execute("CREATE PUBLICATION there FOR TABLE t")
        connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", slots[:1])
        connection.execute("INSERT INTO t VALUES (1)")
        before = connection.execute(SERVER, {"slots": slots}).fetchall()
        for slot, publication in itertools.product(slots, ("there", "nowhere")):
            named = ["--dsn", db.dsn, "--slot", slot, "--publication", publication]
            with contextlib.suppress(PgOutputError):
                peek(db.dsn, slot=slot, publication=publication)
            reader = PgOutputReader(db.dsn, slot=slot, publication=publication, until="current")
            with contextlib.suppress(PgOutputError), reader:
                list(reader.sets())
            assert cli.main(["check", *named]) == (slot not in slots[:1] or publication != "there")
            cli.main(["resync", *named, "--recovery", str(tmp_path)])
            assert connection.execute(SERVER, {"slots": slots}).fetchall() == before

    assert len(before) == 2
    assert "hint" in capsys.readouterr().err


def test_a_slot_in_use(db: Database, tmp_path: Path) -> None:
    publish(db)
    first = Flow(db, tmp_path / "first").start("-s", "1")
    with following(first) as lines:
        wait_for(lines, "streaming from", first)

        said, code = failure(Flow(db, tmp_path / "second"))

        assert code == 1
        assert "SlotInUse" in said
        assert "Traceback" not in said
        assert first.poll() is None


def test_wal_level_replica(tmp_path: Path) -> None:
    with Server(settings={"wal_level": "replica"}) as server:
        db = Database(server)
        with db.connect() as connection:
            connection.execute("CREATE PUBLICATION cdc FOR ALL TABLES")

        said, code = failure(Flow(db, tmp_path))
        db.drop()

    assert code == 1
    assert "wal_level" in said
    assert "ALTER SYSTEM SET wal_level" in said
    assert "Traceback" not in said


def test_a_recovery_folder_that_is_corrupt(db: Database, tmp_path: Path) -> None:
    publish(db)
    flow = Flow(db, tmp_path)
    arguments = flow.recovery()
    for file in (tmp_path / "recovery").glob("*.sqlite3"):
        file.write_bytes(b"this is no database" * 100)
    before = confirmed(db)

    said, code = failure(flow, *arguments)

    assert code != 0
    assert "database" in said
    assert confirmed(db) == before


def test_a_slot_that_somebody_else_moved(db: Database, tmp_path: Path) -> None:
    publish(db)
    flow = Flow(db, tmp_path)
    arguments = flow.recovery()
    flow.run("-s", "0", *arguments, PGOUTPUT_UNTIL="current")
    with db.connect() as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
        connection.execute("INSERT INTO t SELECT generate_series(1, 10)")
        connection.execute("SELECT pg_replication_slot_advance('cdc', pg_current_wal_lsn())")

    said, code = failure(flow, *arguments)

    assert code == 1
    assert "SlotAhead" in said
    assert "somebody else consumed" in said


def test_a_slot_that_was_dropped_is_not_made_again_behind_a_state(db: Database, tmp_path: Path) -> None:
    publish(db)
    flow = Flow(db, tmp_path, PGOUTPUT_CREATE="true")
    arguments = flow.recovery()
    flow.run("-s", "0", *arguments, PGOUTPUT_UNTIL="current")
    with db.connect() as connection:
        connection.execute("SELECT pg_drop_replication_slot('cdc')")

    said, code = failure(flow, *arguments)

    assert code == 1
    assert "SlotNotFound" in said
    with db.connect() as connection:
        assert connection.execute("SELECT FROM pg_replication_slots WHERE slot_name = 'cdc'").fetchone() is None


def test_create_makes_publication_and_slot(db: Database, tmp_path: Path) -> None:
    with db.connect() as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
    flow = Flow(db, tmp_path, PGOUTPUT_CREATE="true")
    flow.run("-s", "0", PGOUTPUT_UNTIL="current")
    with db.connect() as connection:
        connection.execute("INSERT INTO t SELECT generate_series(1, 10)")
    flow.run("-s", "0", PGOUTPUT_UNTIL="current")

    assert list(flow.out.glob("*.parquet"))
