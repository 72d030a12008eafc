"""Tables that a destination refuses: they wait, the others go on, and nothing of them is lost or comes twice."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.database import Database
from harness.flow import Flow, failure, publish
from harness.mirrors import differ
from psycopg.conninfo import make_conninfo

from pgoutput_source.embedded import Server
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.sinks.postgres import PostgresSink

FINE = ["fine", "Fine.too"]
REFUSED = {
    "triggered": "asks for ids below 1000",
    "constrained": "violates check constraint",
    "foreign": "permission denied for table foreign|must be owner",
    "theirs": "is there already, and was not made by this package",
    "keyless": "sends no key, and a mirror needs one",
    "deferred": "violates foreign key constraint",
}
"""Tables, and why they can't be written."""

WORK = """
INSERT INTO {0} SELECT i, repeat(md5(i::text || {1}), 200) FROM generate_series({1} * 1000, {1} * 1000 + 9) AS i;
UPDATE {0} SET id = id + 100 WHERE id % 3 = 0; DELETE FROM {0} WHERE id % 7 = 0;
"""

BROKEN = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
    $$BEGIN RAISE 'no thanks' USING HINT = 'asks for ids below 1000'; END$$;
CREATE TRIGGER refuse BEFORE INSERT ON triggered FOR EACH ROW WHEN (new.id >= 2000) EXECUTE FUNCTION refuse();
ALTER TABLE constrained ADD CONSTRAINT small CHECK (id < 2000);
ALTER TABLE "foreign" OWNER TO CURRENT_USER;
CREATE TABLE known (id int PRIMARY KEY);
ALTER TABLE deferred ADD CONSTRAINT known FOREIGN KEY (id) REFERENCES known DEFERRABLE INITIALLY DEFERRED NOT VALID;
"""
MENDED = """
DROP TRIGGER refuse ON triggered;
ALTER TABLE constrained DROP CONSTRAINT small;
ALTER TABLE "foreign" OWNER TO {role};
DROP TABLE theirs;
ALTER TABLE deferred DROP CONSTRAINT known;
"""


@pytest.fixture
def target(pg: Server) -> Iterator[Database]:
    made = Database(pg)
    yield made
    made.drop()


@pytest.fixture
def role(target: Database) -> Iterator[str]:
    name = f"writer_{target.name}"
    with target.connect() as c:
        c.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'x'; GRANT CREATE ON DATABASE {target.name} TO {name}".encode())
        c.execute(f"GRANT CREATE ON SCHEMA public TO {name}".encode())
    yield name
    with target.connect() as c:
        c.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}".encode())


def into(db: Database, dsn: str, folder: Path, **environ: str) -> Flow:
    settings = {"MODE": "mirror", "SPOOL": str(folder / "spool"), "INTO": dsn, "ON_TABLE_ERROR": "park"} | environ
    return Flow(db, folder, module="harness.into_tables", **settings)


def quoted(name: str) -> str:
    return f'"{name}"'


def work(connection: Any, names: list[str], number: int) -> None:
    for name in names:
        connection.execute(WORK.format(quoted(name), number).encode())


def test_the_others_go_on_and_all_is_right_after_the_mend(
    db: Database, target: Database, role: str, tmp_path: Path
) -> None:
    first = ["triggered", "constrained", "foreign", "deferred", *FINE]
    names = [*first, "theirs", "keyless"]
    tables = [("public", name) for name in names]
    with db.connect() as c, target.connect() as t:
        for name in names:
            c.execute(f'CREATE TABLE "{name}" (id int PRIMARY KEY, note text)'.encode())
        c.execute("ALTER TABLE keyless REPLICA IDENTITY FULL")
        publish(db)
        t.execute("CREATE TABLE theirs (id int)")
        flow = into(
            db, make_conninfo(target.dsn, user=role, password="x"), tmp_path, PGOUTPUT_UNTIL="current", TELL_ALL="1"
        )
        work(c, first, 1)
        flow.run("-s", "0", *flow.recovery())
        assert differ(db, target, [("public", name) for name in first]) == []

        t.execute(BROKEN.encode())
        for number in (2, 3):
            work(c, names, number)
            said = flow.run("-s", "0", *flow.recovery())
            assert differ(db, target, [("public", name) for name in FINE]) == []
            for name, reason in REFUSED.items():
                assert f"table public.{name} is parked" in said
                assert any(each in said for each in reason.split("|")), name
                assert f'pgoutput_destination_parked_changes{{slot="cdc",table="public.{name}"}}' in said
        said, code = failure(flow, *flow.recovery(), ON_TABLE_ERROR="stop")
        assert code != 0

        t.execute(MENDED.format(role=role).encode())
        key = '{"public.keyless": "id"}'
        said = flow.run("-s", "0", *flow.recovery(), KEY=key)  # although nothing new comes
        assert "is parked" not in said
        assert differ(db, target, tables) == []
        work(c, names, 4)
        flow.run("-s", "0", *flow.recovery(), KEY=key, ON_TABLE_ERROR="stop")
        assert differ(db, target, tables) == []
        for name in names:
            query = f'SELECT count(*) FROM "{name}" WHERE _unchanged IS NOT NULL'
            assert t.execute(query.encode()).fetchone() == (0,), name
    assert list((tmp_path / "spool" / "parked").glob("*.committed")) == []


def test_without_it_a_refused_table_stops_the_flow(db: Database, target: Database, tmp_path: Path) -> None:
    with db.connect() as c, target.connect() as t:
        c.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY)")
        publish(db)
        t.execute("CREATE TABLE u (id int)")
        c.execute("INSERT INTO t VALUES (1); INSERT INTO u VALUES (1)")
        said, code = failure(into(db, target.dsn, tmp_path, ON_TABLE_ERROR="stop"))
    assert code != 0
    assert "public.u is there already" in said
    with pytest.raises(ConfigurationError, match="'ignore' has no meaning"):
        PostgresSink("", mode="mirror", spool=tmp_path / "other", on_table_error="ignore")  # type: ignore[arg-type]


def history(target: Database, name: str) -> list[Any]:
    with target.connect() as c:
        return c.execute(f"SELECT _op, id FROM {name} ORDER BY _commit_lsn, _seq".encode()).fetchall()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["before a refused part is parked", "a refused part is parked"])
def test_kill_9_while_parts_are_parked(db: Database, target: Database, tmp_path: Path, place: str) -> None:
    flow, expected = _refused(db, target, tmp_path)
    _killed(flow, f"{place}:4")
    flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
    assert history(target, "t") == expected
    assert history(target, "u") == []
    with target.connect() as c:
        c.execute("ALTER TABLE u DROP CONSTRAINT no")
    flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
    assert history(target, "u") == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "remembers"),
    [("parked parts are applied", True), ("parked parts are applied", False), ("applied parts are deleted", True)],
)
def test_kill_9_while_parked_parts_are_applied(
    db: Database, target: Database, tmp_path: Path, place: str, remembers: bool
) -> None:
    flow, expected = _refused(db, target, tmp_path)
    flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
    with target.connect() as c:
        c.execute("ALTER TABLE u DROP CONSTRAINT no")
        _killed(flow, f"{place}:1")
        if not remembers:  # a control: the number at the destination is what keeps them from coming twice
            c.execute("UPDATE pgoutput.published SET number = 0, commit_lsn = '0/0' WHERE name = 'u'")
    flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
    assert history(target, "t") == expected
    assert (history(target, "u") == expected) is remembers


def _killed(flow: Flow, place: str) -> None:
    process = flow.start("-s", "0", *flow.recovery(), KILL_AT=place)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def _refused(db: Database, target: Database, folder: Path) -> tuple[Flow, list[Any]]:
    """A flow of two tables of which one is refused, and all of the changes that both will have."""
    with db.connect() as c, target.connect() as t:
        c.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY)")
        publish(db)
        flow = into(db, target.dsn, folder, MODE="history", PGOUTPUT_MAX_FRAMES="7")
        c.execute("INSERT INTO t VALUES (0); INSERT INTO u VALUES (0)")
        flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
        t.execute("DELETE FROM t; DELETE FROM u; ALTER TABLE u ADD CONSTRAINT no CHECK (id = 0)")
        expected = []
        for i in range(1, 21):
            for name in "tu":
                c.execute(f"INSERT INTO {name} VALUES ({i}); UPDATE {name} SET id = id + 100 WHERE id = {i}".encode())
            expected += [("I", i), ("U", i + 100)]
    return flow, expected
