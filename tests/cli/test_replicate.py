"""`pgoutput-source replicate` and `flows/replicate.py`: a publication in another database, without code."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest
from harness.database import Database
from harness.flow import ROOT, Flow, following, wait_for
from harness.mirrors import differ
from harness.public_tables import COMPOSITE, change, create

from pgoutput_source.cli import main
from pgoutput_source.embedded import Server


@pytest.fixture
def target(pg: Server) -> Any:
    made = Database(pg)
    yield made
    made.drop()


@pytest.fixture
def shop(db: Database) -> Database:
    with db.connect() as c:
        c.execute("CREATE TYPE mood AS ENUM ('glad', 'sad'); CREATE TABLE orders (id int PRIMARY KEY, note text)")
        c.execute('CREATE TABLE "Odd ""names"".x" (a int, "B c" mood[], PRIMARY KEY (a, "B c"))')
        c.execute("CREATE TABLE log_days (day date, email text)")
        c.execute("INSERT INTO orders VALUES (1, 'one'), (2, NULL); INSERT INTO log_days VALUES ('2026-01-01', 'a@b')")
        c.execute("""INSERT INTO "Odd ""names"".x" VALUES (1, '{glad,NULL}')""")
    return db


def command(*arguments: str, **environ: str) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "BYTEWAX"))}
    return subprocess.Popen(
        [sys.executable, "-m", "pgoutput_source", "replicate", *arguments],
        cwd=ROOT,
        env=clean | environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def rows(db: Database, query: str) -> list[tuple[Any, ...]]:
    with db.connect() as c:
        return c.execute(query.encode()).fetchall()


def slots(db: Database) -> list[tuple[Any, ...]]:
    return rows(db, "SELECT slot_name FROM pg_replication_slots WHERE database = current_database()")


ORDERS = "SELECT * FROM orders ORDER BY 1"
ODD = 'SELECT a, "B c"::text FROM "Odd ""names"".x" ORDER BY 1'


def test_all_tables_by_one_command(
    shop: Database,
    target: Database,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    recovery = tmp_path / "recovery"
    to = ("--dsn", shop.dsn, "--to", target.dsn, "--recovery", str(recovery))

    assert main(["replicate", *to]) == 1
    said = capsys.readouterr().err
    assert "there is no replication slot 'replicate'" in said
    assert "--create" in said
    with caplog.at_level(logging.INFO):
        assert main(["replicate", *to, "--create", "--exclude", "*.log_*", "--dry-run"]) == 0
    assert "to be created for 2 tables" in caplog.text
    assert "public.orders → public.orders" in caplog.text
    assert main(["replicate", *to, "--create"]) == 1
    said = capsys.readouterr().err
    assert "a mirror needs a key, and PostgreSQL sends none for public.log_days" in said
    assert "--exclude 'public.log_days'" in said
    assert main(["replicate", *to, "--create", "--key", "public.log_days=day"]) == 1
    assert "would make every UPDATE and DELETE there fail" in capsys.readouterr().err
    assert (
        main(
            [
                "replicate",
                "--dsn",
                shop.dsn,
                "--to",
                f"{target.dsn} dbname=nowhere",
                "--create",
                *to[4:],
                "--exclude",
                "*.log_*",
            ]
        )
        == 1
    )
    assert 'database "nowhere" does not exist' in capsys.readouterr().err
    assert slots(shop) == rows(shop, "SELECT pubname FROM pg_publication") == []
    process = command(*to, "--create", "--exclude", "*.log_*")
    with following(process) as lines:
        wait_for(lines, "streaming from", process)
        assert "mirror of 2 tables" in "".join(lines)
        assert "public.orders → public.orders" in "".join(lines)
        with shop.connect() as c:
            c.execute("UPDATE orders SET note = 'two' WHERE id = 2; INSERT INTO orders VALUES (3, 'three')")
        deadline = time.monotonic() + 20
        with target.connect() as c:
            while c.execute("SELECT to_regclass('orders')").fetchone() == (None,):
                assert time.monotonic() < deadline, lines
                time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, lines
    with shop.connect() as c:
        c.execute("DELETE FROM orders WHERE id = 1")
    code, said = ended(command(*to, "--exclude", "*.log_*", "--until", "current"))
    assert code == 0, said
    assert [row[:2] for row in rows(target, ORDERS)] == rows(shop, ORDERS) == [(2, "two"), (3, "three")]
    assert rows(target, ODD) == rows(shop, ODD) == [(1, "{glad,NULL}")]
    assert (tmp_path / "recovery-spool").is_dir()


def test_a_table_that_sends_whole_rows_is_told_by_its_primary_key(
    shop: Database, target: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with shop.connect() as c:
        c.execute("ALTER TABLE orders REPLICA IDENTITY FULL; DROP TABLE log_days")
        c.execute("CREATE TEMP TABLE kept (x int)")
    to = ("--dsn", shop.dsn, "--to", target.dsn, "--recovery", str(tmp_path / "recovery"), "--until", "current")
    with caplog.at_level(logging.INFO):
        assert main(["replicate", *to, "--create"]) == 0
    assert "for all tables" in caplog.text
    assert "public.orders: its rows are told by its primary key (id)" in caplog.text
    with shop.connect() as c:
        c.execute("UPDATE orders SET id = id + 10; UPDATE orders SET note = 'three' WHERE id = 12")
    assert main(["replicate", *to]) == 0
    assert [row[:2] for row in rows(target, ORDERS)] == rows(shop, ORDERS) == [(11, "one"), (12, "three")]


def test_the_flow_does_the_same(shop: Database, target: Database, tmp_path: Path) -> None:
    with shop.connect() as c:
        c.execute("CREATE PUBLICATION cdc FOR TABLE orders, log_days")
        c.execute("SELECT pg_create_logical_replication_slot('cdc', 'pgoutput')")
    file = tmp_path / "replicate.toml"
    file.write_text("""
        to = "nowhere:"  # the environment wins
        exclude = ["public.x"]
        [key]
        "public.log_days" = ["day"]
        [leave_out]
        "public.log_days" = "email"
        [mask]
        "public.orders" = ["note"]
    """)
    names = {"PGOUTPUT_TO": target.dsn, "PGOUTPUT_CONFIG": str(file), "PGOUTPUT_UNTIL": "current"}
    flow = Flow(shop, tmp_path, module="flows.replicate", **names)
    flow.run("-s", "0", *flow.recovery())
    assert [row[:2] for row in rows(target, ORDERS)] == [(1, None), (2, None)]
    assert [row[0].isoformat() for row in rows(target, "SELECT * FROM log_days")] == ["2026-01-01"]
    with target.connect() as c, pytest.raises(psycopg.errors.UndefinedColumn):
        c.execute("SELECT email FROM log_days")


def test_a_misspelled_table_never_shows_its_secrets(
    shop: Database, target: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "replicate.toml"
    file.write_text('[mask]\n"public.order" = ["note"]\n')
    arguments = ["--dsn", shop.dsn, "--to", target.dsn, "--config", str(file), "--create", "--exclude", "*.log_*"]
    assert main(["replicate", *arguments]) == 1
    assert "mask: public.order is not published" in capsys.readouterr().err

    with shop.connect() as c:
        c.execute("CREATE PUBLICATION orders FOR TABLE orders")
        c.execute("SELECT pg_create_logical_replication_slot('orders', 'pgoutput')")
    names = {"PGOUTPUT_TO": target.dsn, "PGOUTPUT_CONFIG": str(file), "PGOUTPUT_UNTIL": "current"}
    flow = Flow(shop, tmp_path, module="flows.replicate", **names)
    process = flow.start("-s", "0", *flow.recovery(), PGOUTPUT_SLOT="orders", PGOUTPUT_PUBLICATION="orders")
    code, said = ended(process)
    assert code != 0
    assert "table public.order" in said
    assert rows(target, "SELECT to_regclass('orders')") == [(None,)]


WRONG = {
    'modes = "mirror"': "modes: there is no such option",
    'mode = "copy"': "mode: input should be 'history' or 'mirror'",
    'max_age = "soon"': "max_age: input should be a valid number",
    '[mask]\norders = ["note"]': "mask: table 'orders' has no schema",
    '[key]\n"public.orders" = []': "key: 'public.orders' has no column",
    '[schema_policy]\non_drop = "forget"': "schema_policy: on_drop: 'forget' is no policy",
    '[schema_policy]\non_move = "fail"': "schema_policy: there is no policy 'on_move'",
    '[options]\nschemas = "x"': "schemas: PostgresSink has no such option",
    '[source]\nslots = "x"': "[source] slots: there is no such option",
    "to: x": "is no TOML",
    "source = 1": "source: input should be a valid dictionary",
    'to = "parquet:out"': "'parquet:out' puts all tables into one place",
    'to = "parquet:{table}"\nmode = "mirror"': "ParquetSink has no mode 'mirror'",
    'to = "parquet:{table}"\ninto = "x"': "into: ParquetSink has no such option",
    'to = "excel:shop.xlsx"': "there is no destination 'excel'",
    'to = "shop.duckdb"': "no kind of destination is named",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_key_is_one_error(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "replicate.toml"
    file.write_text(text if text.startswith("to = ") else f'to = "postgresql://localhost/x"\n{text}')
    dsn = () if text.startswith("[source]") else ("--dsn", "postgresql://nowhere.invalid/x")
    assert main(["replicate", "--config", str(file), *dsn]) == 1
    said = capsys.readouterr().err
    assert WRONG[text] in said
    assert said.count("\n") <= 2
    assert "hint: " in said or "input should be" in said


@pytest.mark.slow
def test_tables_as_projects_have_them_equal_their_source(db: Database, target: Database, tmp_path: Path) -> None:
    with db.connect() as source, target.connect() as there:
        there.execute(COMPOSITE)
        tables = create(source, 12, rows=20, seed=2)
        to = ("--dsn", db.dsn, "--to", target.dsn, "--recovery", str(tmp_path / "recovery"), "--until", "current")
        code, said = ended(command(*to, "--create"))
        assert code == 0, said
        assert differ(db, target, tables) == []
        change(source, tables)
        code, said = ended(command(*to))
        assert code == 0, said
        assert differ(db, target, tables) == []
