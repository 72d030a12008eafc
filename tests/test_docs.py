"""README and docs are true: their blocks run, their tables are generated, their commands and links exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from harness.database import Database

from pgoutput_source import operators, run, types
from pgoutput_source.changes.schema import METADATA_COLUMNS
from pgoutput_source.embedded import Server, shop

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {str(path.relative_to(ROOT)): path.read_text() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]}
DSN = "postgresql://localhost/shop"
TABLE = re.compile(r"^\|(---\|)+$", re.MULTILINE)
SECTIONS = [
    "Limits",
    "A dataflow",
    "All tables, without code",
    "Your own database in five steps",
    "In a notebook",
    "Without a dataflow",
    "Guarantees",
    "Read on",
]
PLACES = {
    "docs/changes.md": METADATA_COLUMNS,
    "docs/guarantees.md": (),
    "docs/types.md": (),
    "docs/destinations.md": (),
    "docs/operators.md": operators.__all__,
}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language, without the indentation that a list gives them."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, code in found]


def sections(text: str) -> dict[str, str]:
    return dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))


PYTHON = {name: blocks(part, "python") for name, part in sections(README).items()}


def test_every_section_is_there_with_its_table_or_its_code() -> None:
    parts = sections(README)

    assert list(parts) == SECTIONS
    assert len(README.splitlines()) < 150
    for name in ("A dataflow", "Your own database in five steps", "In a notebook", "Without a dataflow"):
        assert len(PYTHON[name]) == 1
    assert re.findall(r"^(\d)\. ", parts["Your own database in five steps"], re.MULTILINE) == list("12345")
    assert TABLE.search(parts["Guarantees"])
    for name, words in PLACES.items():
        assert TABLE.search(DOCS[name]), name
        assert all(f"`{word}`" in DOCS[name] for word in words)


@pytest.fixture
def orders(db: Database) -> Database:
    """A shop with a few orders after a slot, named as in the README."""
    shop.create(db.dsn)
    with db.connect() as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('orders', 'pgoutput')")
    sell(db)
    return db


def sell(db: Database) -> None:
    steps = iter(range(50))
    shop.Workload(db.dsn, seed=1).run(lambda seconds: next(steps, None) is None)


def test_the_flow_runs_and_is_the_one_in_flows(
    orders: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"DSN": orders.dsn, "SLOT": "orders", "PUBLICATION": "shop", "UNTIL": "current"}.items():
        monkeypatch.setenv(f"PGOUTPUT_{name}", value)
    monkeypatch.chdir(tmp_path)
    (code,) = PYTHON["A dataflow"]
    space: dict[str, Any] = {}
    exec(code, space)
    run(space["flow"], epoch=timedelta(0))

    written = [line for line in code.splitlines() if re.match(r"\w+ = cdc|cdc\.|changes = ", line)]
    kept = (ROOT / "flows" / "orders_cdc.py").read_text().replace('OUT / "orders"', '"out/orders"')
    kept = kept.replace('OUT / "revenue"', '"out/revenue"')

    assert list((tmp_path / "out/orders").glob("*.parquet"))
    assert list((tmp_path / "out/revenue").glob("*.parquet"))
    assert all(re.sub(r"\s+#.*", "", line) in kept for line in written)

    for code in blocks(DOCS["docs/changes.md"], "python"):  # it reads what the flow has written
        capsys.readouterr()
        exec(code, {})
        assert "shipped" in capsys.readouterr().out


@pytest.mark.slow
def test_the_five_steps_lead_from_a_new_database_to_a_query(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    part = sections(README)["Your own database in five steps"]
    shop.create(db.dsn)
    with db.connect() as connection:
        connection.execute("DROP PUBLICATION shop")
        configure, create = (block.split(";") for block in blocks(part, "sql"))
        try:
            for statement in filter(str.strip, configure):
                connection.execute(statement.encode())
        finally:
            connection.execute("ALTER SYSTEM RESET wal_level")  # the server has the value and is shared
        for statement in filter(str.strip, create):
            connection.execute(statement.encode())
    sell(db)
    (tmp_path / "orders_cdc.py").write_text(PYTHON["A dataflow"][0])
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "BYTEWAX"))}
    environ |= {
        "PATH": f"{Path(sys.executable).parent}:{environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PGOUTPUT_UNTIL": "current",
    }
    script = "\n".join(blocks(part, "sh"))
    assert DSN in script
    script = script.replace(DSN, f"'{db.dsn}'")
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=environ, check=True, timeout=120)

    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    exec(PYTHON["Your own database in five steps"][0], {})
    shown = capfd.readouterr().out
    with psycopg.connect(db.dsn) as connection:
        expected = connection.execute("SELECT status, count(*)::text FROM orders GROUP BY status").fetchall()
    assert expected
    assert all(re.search(rf"│ {status} +│ +{count} │", shown) for status, count in expected), shown


def test_the_other_blocks_run(orders: Database, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("In a notebook", "Without a dataflow"):
        (code,) = PYTHON[name]
        assert DSN in code
        exec(code.replace(DSN, orders.dsn), {})
        assert len(capsys.readouterr().out) > 100
    for code in blocks(DOCS["docs/python.md"], "python"):
        exec(code, {})


@pytest.fixture
def target(pg: Server) -> Iterator[Database]:
    database = Database(pg)
    yield database
    database.drop()


def test_a_replication_as_the_documents_show_it(db: Database, target: Database, tmp_path: Path) -> None:
    (command,) = blocks(sections(README)["All tables, without code"], "sh")
    assert command in DOCS["docs/destinations.md"]
    (file,) = blocks(DOCS["docs/destinations.md"], "toml")
    with db.connect() as c:
        c.execute("CREATE TABLE customers (id int PRIMARY KEY, email text); INSERT INTO customers VALUES (1, 'a@b')")
        c.execute("CREATE TABLE orders (id int PRIMARY KEY, notes text); INSERT INTO orders VALUES (7, 'ring twice')")
        c.execute("CREATE TABLE visits (day date, customer_id int); ALTER TABLE visits REPLICA IDENTITY FULL")
        c.execute("INSERT INTO visits VALUES ('2026-01-01', 1); CREATE TABLE log_days (day date)")
    (tmp_path / "replicate.toml").write_text(
        file.replace(DSN, db.dsn).replace("postgresql://localhost/reporting", target.dsn)
    )
    words = (
        command.replace(DSN, f"'{db.dsn}'").replace(" --to postgresql://localhost/reporting", "").split(maxsplit=1)[1]
    )
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "BYTEWAX"))} | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        f"{sys.executable} -m pgoutput_source {words.strip()} --config replicate.toml --until current",
        shell=True,
        cwd=tmp_path,
        env=environ,
        check=True,
        timeout=60,
    )
    with target.connect() as c:
        found = [c.execute(f"SELECT * FROM shop.public_{name}".encode()).fetchall() for name in TABLES]
        schemas = c.execute("SELECT to_regclass('replication.published') IS NOT NULL").fetchall()
    assert [[row[:-2] for row in rows] for rows in found] == [[(1, None)], [(7,)], [(date(2026, 1, 1), 1)]]
    assert schemas == [(True,)]


TABLES = ("customers", "orders", "visits")


def test_the_type_table_is_the_one_in_the_code() -> None:
    begin, end = "<!-- types: begin -->\n", "<!-- types: end -->"
    text = DOCS["docs/types.md"]
    shown = text[text.index(begin) + len(begin) : text.index(end)]

    assert shown == types.markdown_table() + "\n"


@pytest.mark.parametrize("name", DOCS)
def test_links_point_to_files_and_headings(name: str) -> None:
    for target, _, heading in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]+))?\)", DOCS[name]):
        path = ((ROOT / name).parent / target).resolve() if target else ROOT / name
        assert path.exists(), target
        if heading:
            there = {
                re.sub(r"[^\w -]", "", h).lower().replace(" ", "-")
                for h in re.findall(r"^#+ (.*)", path.read_text(), re.M)
            }
            assert heading in there, f"{target}#{heading}"


def test_every_page_is_linked_from_the_readme() -> None:
    assert {name for name in DOCS if name != "README.md" and f"({name})" not in README} == set()


def test_commands_exist() -> None:
    every = "\n".join(DOCS.values())
    made = set(re.findall(r"(?:^|`)make (\w+)", every, re.MULTILINE))
    rules = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert made <= rules
    lines = re.findall(r"python -m (pgoutput_source \w+)", every)
    lines += [f"pgoutput_source {name}" for name in re.findall(r"pgoutput-source (\w+)", every)]
    for line in set(lines):
        subprocess.run([sys.executable, "-m", *line.split(), "--help"], check=True, capture_output=True, cwd=ROOT)
