"""Secrets stay secret, names are quoted, files are private where asked for, and TLS does what libpq promises."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import psycopg
import pyarrow.parquet as pq
import pytest
from harness.database import Database
from harness.flow import ROOT, Flow, failure, publish
from harness.tls import certificate
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgoutput_source import PgOutputReader, cli, peek
from pgoutput_source.embedded import Server
from pgoutput_source.postgres.remedies import quote_name

VALUE = "a-value-of-a-row"
ODD = '"; drop --"'


@pytest.mark.parametrize("environ", [{}, {"BREAK": "raise"}], ids=["success", "failure"])
def test_passwords_and_row_values_are_nowhere_but_in_the_files(
    db: Database, tmp_path: Path, environ: dict[str, str]
) -> None:
    publish(db)
    with db.connect() as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        for start in range(0, 5_000, 1_000):
            connection.execute(
                "INSERT INTO t SELECT i, %s FROM generate_series(%s::int, %s) i", [VALUE, start, start + 999]
            )
        connection.execute("UPDATE t SET v = v || 'x' WHERE id < 10")
    flow = Flow(db, tmp_path, TELL_ALL="1", PGOUTPUT_UNTIL="current", PGOUTPUT_MAX_FRAMES="500", **environ)

    process = flow.start("-s", "0", *flow.recovery())
    _, said = process.communicate(timeout=120)

    stored = b"".join(file.read_bytes() for file in (tmp_path / "recovery").iterdir())
    assert process.returncode == bool(environ)
    assert "streaming from" in said
    assert "pgoutput_changes_total" in said
    assert VALUE not in said
    assert db.server.password not in said
    assert b"commit_lsn" in stored
    assert VALUE.encode() not in stored
    assert db.server.password.encode() not in stored


def test_names_that_look_like_sql_are_names(db: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with db.connect() as connection:
        odd = sql.Identifier(ODD)
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(odd))
        connection.execute(sql.SQL("CREATE TABLE {}.{} ({} int PRIMARY KEY)").format(odd, odd, odd))
        connection.execute(sql.SQL("CREATE PUBLICATION {} FOR ALL TABLES").format(odd))
        connection.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
        connection.execute(sql.SQL("INSERT INTO {}.{} SELECT generate_series(1, 10)").format(odd, odd))
    flow = Flow(db, tmp_path, PGOUTPUT_PUBLICATION=quote_name(ODD), PGOUTPUT_UNTIL="current")
    flow.run("-s", "0")

    rows = [row for file in flow.out.glob("*.parquet") for row in pq.read_table(file)[ODD].to_pylist()]

    assert sorted(rows) == list(range(1, 11))

    named = ["--dsn", db.dsn, "--slot", "cdc", "--publication", quote_name(ODD)]
    reader = PgOutputReader(db.dsn, slot="cdc", publication=ODD, until="current")
    assert reader.settings.publication == (ODD,)
    assert cli.main(["check", *named]) == 0
    with db.connect() as connection:
        connection.execute("SELECT pg_drop_replication_slot('cdc')")
    assert cli.main(["resync", *named]) == 1
    assert quote_name(ODD) + "." + quote_name(ODD) in capsys.readouterr().out
    assert cli.main(["resync", *named, "--yes"]) == 0
    with db.connect() as connection:
        connection.execute(sql.SQL("INSERT INTO {}.{} SELECT generate_series(11, 20)").format(odd, odd))
    with reader:
        assert [change.after for change in reader] == [{ODD: number} for number in range(11, 21)]
    assert peek(db.dsn, slot="cdc", publication=ODD).tables == (f"{quote_name(ODD)}.{quote_name(ODD)}",)


def test_the_readmes_role_can_do_all_of_it_and_nothing_else(any_db: Database, tmp_path: Path) -> None:
    """Where nothing is granted to everybody."""
    db, role = any_db, f"{any_db.name}_role"
    (block,) = re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "operation.md").read_text(), re.DOTALL)
    with db.connect() as connection:
        connection.execute(f"REVOKE ALL ON DATABASE {db.name} FROM PUBLIC".encode())
        connection.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
        connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
        connection.execute("CREATE PUBLICATION cdc FOR TABLE t")
        connection.execute(re.sub(r"\bcdc\b", role, re.sub(r"\bshop\b", db.name, block)).encode())
        try:
            dsn = make_conninfo(db.dsn, user=role, password="a long one")
            with psycopg.connect(dsn, autocommit=True) as weak:
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    weak.execute("SELECT FROM public.t")
                weak.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
            flow = Flow(db, tmp_path, PGOUTPUT_DSN=dsn)
            named = ["--dsn", dsn, "--slot", "cdc", "--publication", "cdc"]
            assert cli.main(["check", *named]) == 0
            connection.execute("INSERT INTO t SELECT generate_series(1, 100)")
            flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current", PGOUTPUT_BINARY="auto")
            connection.execute("INSERT INTO t SELECT generate_series(101, 200)")
            assert len(peek(dsn, slot="cdc", publication="cdc").table("public.t")) == 100
            with PgOutputReader(
                dsn, slot="cdc", publication="cdc", until="current", heartbeat_seconds=0.01, streaming="on"
            ) as reader:
                assert [change.after for change in reader] == [{"id": number} for number in range(101, 201)]
            connection.execute("SELECT pg_drop_replication_slot('cdc')")
            assert cli.main(["resync", *named, "--recovery", str(tmp_path / "recovery"), "--yes"]) == 0
            flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current", PGOUTPUT_HEARTBEAT_SECONDS="0.01")
        finally:
            connection.execute(f"REVOKE ALL ON DATABASE {db.name} FROM {role}".encode())
            connection.execute(f"DROP ROLE {role}".encode())


def test_files_are_as_private_as_the_umask_says(db: Database, tmp_path: Path) -> None:
    publish(db)
    with db.connect() as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
        connection.execute("INSERT INTO t SELECT generate_series(1, 10)")
    Flow(db, tmp_path, PGOUTPUT_UNTIL="current", UMASK="077").run("-s", "0")
    made = list((tmp_path / "out").rglob("*"))

    assert any(path.suffix == ".parquet" for path in made)
    assert [path for path in made if stat.S_IMODE(path.stat().st_mode) & 0o077] == []

    Flow(db, tmp_path / "usual", PGOUTPUT_UNTIL="current", UMASK="022").run("-s", "0")
    assert [path for path in (tmp_path / "usual").rglob("*") if stat.S_IMODE(path.stat().st_mode) & 0o022] == []


def test_tls_modes(tls: Server, tmp_path: Path) -> None:
    db = Database(tls)
    publish(db)
    with db.connect() as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
    right = tmp_path / "right.crt"
    right.write_bytes((tls.data / "server.crt").read_bytes())
    wrong = certificate(tmp_path, "wrong")
    named = {"host": "localhost", "hostaddr": "127.0.0.1"}

    for options in ({"sslmode": "require"}, {"sslmode": "verify-full", "sslrootcert": str(right)} | named):
        flow = Flow(db, tmp_path, PGOUTPUT_DSN=make_conninfo(db.dsn, **options), PGOUTPUT_UNTIL="current")
        flow.run("-s", "0")
    for options in (
        {"sslmode": "verify-full", "sslrootcert": str(wrong)} | named,
        {"sslmode": "verify-full", "sslrootcert": str(right)},  # the certificate names localhost, not 127.0.0.1
    ):
        said, code = failure(Flow(db, tmp_path, PGOUTPUT_DSN=make_conninfo(db.dsn, **options)))
        assert code == 1
        assert "ConnectionFailed" in said
        assert "certificate" in said
        assert "hint: " in said
        assert "Traceback" not in said
        assert tls.password not in said
    db.drop()


def test_tls_that_the_server_does_not_have(db: Database, tmp_path: Path) -> None:
    publish(db)
    dsn = make_conninfo(db.dsn, sslmode="require")
    with Server(tcp=True) as server:
        dsn = make_conninfo(server.dsn(), sslmode="require")
        said, code = failure(Flow(db, tmp_path, PGOUTPUT_DSN=dsn))

    assert code == 1
    assert "ConnectionFailed" in said
    assert "hint: " in said
    assert "Traceback" not in said
