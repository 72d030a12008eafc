"""The README is true: its blocks run, its tables are generated, its commands and links exist."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from harness.database import Database

from pgoutput_source import run, types
from pgoutput_source.changes.schema import METADATA_COLUMNS
from pgoutput_source.embedded import shop

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
DSN = "postgresql://localhost/shop"


SECTIONS = [
    "A dataflow",
    "In a notebook",
    "Without a dataflow",
    "Options",
    "What a batch holds",
    "Guarantees",
    "Types",
    "What it is not",
]


def test_every_section_is_there_with_its_table_or_its_code() -> None:
    parts = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL))

    assert list(parts) == SECTIONS
    assert len(PYTHON) == 3
    for name in SECTIONS[:3]:
        assert "```python" in parts[name]
    for name in ("A dataflow", "What a batch holds", "Guarantees", "Types"):
        assert re.search(r"^\|(---\|)+$", parts[name], re.MULTILINE)
    for name in METADATA_COLUMNS:
        assert f"`{name}`" in parts["What a batch holds"]


@pytest.fixture
def orders(db: Database) -> Database:
    """A shop with a few orders behind a slot, named as in the README."""
    shop.create(db.dsn)
    with db.connect() as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('orders', 'pgoutput')")
    workload = shop.Workload(db.dsn, seed=1)
    steps = iter(range(50))
    workload.run(lambda seconds: next(steps, None) is None)
    return db


def test_the_flow_runs_and_is_the_one_in_flows(
    orders: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"DSN": orders.dsn, "SLOT": "orders", "PUBLICATION": "shop", "UNTIL": "current"}.items():
        monkeypatch.setenv(f"PGOUTPUT_{name}", value)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(PYTHON[0], space)
    run(space["flow"], epoch=timedelta(0))

    written = [line for line in PYTHON[0].splitlines() if re.match(r"\w+ = cdc|cdc\.|changes = ", line)]
    kept = (ROOT / "flows" / "orders_cdc.py").read_text().replace('OUT / "orders"', '"out/orders"')
    kept = kept.replace('OUT / "revenue"', '"out/revenue"')

    assert list((tmp_path / "out/orders").glob("*.parquet"))
    assert list((tmp_path / "out/revenue").glob("*.parquet"))
    assert all(re.sub(r"\s+#.*", "", line) in kept for line in written)


def test_the_other_blocks_run(orders: Database, capsys: pytest.CaptureFixture[str]) -> None:
    for code in PYTHON[1:]:
        assert DSN in code
        exec(code.replace(DSN, orders.dsn), {})
        assert len(capsys.readouterr().out) > 100


def test_the_type_table_is_the_one_in_the_code() -> None:
    begin, end = "<!-- types: begin -->\n", "<!-- types: end -->"
    shown = README[README.index(begin) + len(begin) : README.index(end)]

    assert shown == types.markdown_table() + "\n"


def test_links_point_to_files() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_commands_exist() -> None:
    made = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    rules = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert made <= rules
    for line in re.findall(r"python -m (pgoutput_source \w+)", README):
        subprocess.run([sys.executable, "-m", *line.split(), "--help"], check=True, capture_output=True, cwd=ROOT)
