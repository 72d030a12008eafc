"""`snapshot` asks the flow of one slot to copy tables again; what can't be copied is an error or a warning."""

from __future__ import annotations

import io
import logging
from contextlib import redirect_stderr, redirect_stdout

import pytest
from harness.database import Database
from psycopg.conninfo import make_conninfo

from pgoutput_source import cli
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream.session import SlotSession


def run(db: Database, *arguments: str, slot: str = "s") -> tuple[int, str]:
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = cli.main(["snapshot", f"--dsn={db.dsn}", f"--slot={slot}", "--publication=p", *arguments])
    return code, said.getvalue()


def delivered(session: SlotSession, db: Database) -> list[tuple[str, str]]:
    """Table and operation of what comes until all that is written now was delivered."""
    with db.connect() as c:
        c.execute("CREATE TABLE IF NOT EXISTS other (x int)")
        row = c.execute("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn").fetchone()
    assert row is not None
    found: list[tuple[str, str]] = []
    while session.safe_lsn < row[0] or session.copying or session.in_transaction:
        for batch in session.next(0.1):
            found += [(batch.table, op) for op in batch.data.column("_op").to_pylist()]
    return found


def test_the_flow_of_the_slot_copies_again_and_no_other(db: Database, caplog: pytest.LogCaptureFixture) -> None:
    settings = {slot: SourceSettings.of(dsn=db.dsn, slot=slot, publication="p") for slot in ("s", "other")}
    with db.connect() as c:
        for name in ("a", '"b.c"', "d"):
            c.execute(f"CREATE TABLE {name} (id int PRIMARY KEY)".encode())
        c.execute('INSERT INTO a VALUES (1), (2); INSERT INTO "b.c" VALUES (1)')
        c.execute('CREATE PUBLICATION p FOR TABLE a, "b.c"')
        for slot in settings:
            c.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])

        code, said = run(db, "--table", "public.a", "--table", 'public."b.c"')
        assert code == 0
        assert said.startswith('public.a: asked for\npublic."b.c": asked for\nnote: nobody reads slot s')

        session = SlotSession(db.dsn, settings["s"])
        assert sorted(delivered(session, db)) == [
            *[('public."b.c"', "R"), ('public."b.c"', "T")],
            *[("public.a", "R"), ("public.a", "R"), ("public.a", "T")],
        ]
        session.close()
        session = SlotSession(db.dsn, settings["other"])
        assert delivered(session, db) == []
        session.close()

        code, said = run(db, "--table", "public.a", "--table", "public.d")
        assert code == 1
        assert "PublicationError: publication p does not have public.d" in said
        assert "it has public.a" in said
        assert run(db, "--table", "public.a", slot="nowhere")[0] == 1

        c.execute("CREATE ROLE copier LOGIN REPLICATION PASSWORD 'p'")
        try:
            assert run(db, "--table", "public.a")[0] == 0
            session = SlotSession(make_conninfo(db.dsn, user="copier", password="p"), settings["s"])
            with caplog.at_level(logging.WARNING):
                assert delivered(session, db) == []
            session.close()
        finally:
            c.execute("DROP ROLE copier")
    assert 'GRANT SELECT ON public.a TO "copier"' in caplog.text
