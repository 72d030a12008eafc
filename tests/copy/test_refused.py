"""What the copy can't read is one clear error, with its remedy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness.database import Database
from psycopg.conninfo import make_conninfo

from pgoutput_source.changes.batches import ChangeBatch, UndecodedBatch
from pgoutput_source.copy import initial
from pgoutput_source.copy.initial import InitialCopy
from pgoutput_source.embedded import Server
from pgoutput_source.errors import DecodeError, NotConfigured
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream.session import SlotSession


@pytest.fixture
def copier(db: Database) -> Iterator[str]:
    """The DSN of a role that may replicate and nothing else; tables `a` and `b`, and a publication of them."""
    with db.connect() as c:
        c.execute("CREATE ROLE copier LOGIN REPLICATION PASSWORD 'p'")
        for name in ("a", "b"):
            c.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, n numeric(30, 2))".encode())
            c.execute(f"INSERT INTO {name} SELECT n, n FROM generate_series(1, 40) AS n".encode())
        c.execute("ALTER TABLE b ENABLE ROW LEVEL SECURITY")
        c.execute("CREATE PUBLICATION p FOR TABLE a, b")
        yield make_conninfo(db.dsn, user="copier", password="p")
        c.execute("DROP OWNED BY copier; DROP ROLE copier")


def session(dsn: str, **options: str) -> SlotSession:
    return SlotSession(dsn, SourceSettings.of(dsn=dsn, slot="s", publication="p", snapshot="only", **options))


def drained(one: SlotSession) -> int:
    try:
        rows = 0
        while not one.ended:
            rows += len(one.next(0.05))
        return rows
    finally:
        one.close()


def test_what_the_role_may_not_read(db: Database, copier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with db.connect() as c:
        c.execute("GRANT SELECT ON b TO copier")
        with pytest.raises(NotConfigured, match=r"can't read all rows of public\.a, public\.b") as caught:
            session(copier)
        assert caught.value.hint is not None
        for statement in caught.value.hint.partition(": ")[2].split("; "):
            c.execute(statement.encode())
        assert drained(session(copier)) == 80

        monkeypatch.setattr(initial, "CHUNK_ROWS", 5)
        one = session(copier)
        while not len(one.next(0.05)):
            pass
        c.execute("REVOKE SELECT ON a FROM copier")
        with pytest.raises(NotConfigured, match="no SELECT") as caught:
            drained(one)
        assert "GRANT SELECT ON" in str(caught.value.hint)
        assert "public.a" in str(caught.value)


def test_a_value_that_can_not_be_decoded_concerns_its_table_alone(db: Database, copier: str) -> None:
    with db.connect() as c:
        c.execute("INSERT INTO a VALUES (41, 'NaN')")
    assert drained(session(db.dsn)) == 81

    one = session(db.dsn, on_misfit="error")
    found: list[ChangeBatch] = []
    while not one.ended:
        found += one.next(0.05)
    one.close()
    assert {batch.table: (type(batch), len(batch)) for batch in found} == {
        "public.a": (UndecodedBatch, 41),
        "public.b": (ChangeBatch, 40),
    }
    with pytest.raises(DecodeError, match=r"public\.a") as caught:
        _ = next(batch for batch in found if batch.table == "public.a").data
    assert "n" in caught.value.message


def test_a_standby_is_no_place_to_copy_from() -> None:
    with Server() as primary, primary.standby() as standby:
        settings = SourceSettings.of(dsn=standby.dsn(), slot="s", publication="p", snapshot="initial")
        with pytest.raises(NotConfigured, match="standby") as caught:
            InitialCopy(standby.dsn(), settings, everything=True)
    assert "primary" in str(caught.value.hint)
