"""Replicates many tables of many types into another PostgreSQL by one command, and compares table by table.

    python -m benchmarks.replicate --tables 200
    python -m benchmarks.replicate --tables 1000 --rows 20

Prints how long it took until the first row was there and until all were, what an epoch costs in which every table
changes and one in which one table does, and the most memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from pgoutput_source import wait_for
from pgoutput_source.embedded import Server

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from harness.mirrors import differ  # noqa: E402
from harness.public_tables import COMPOSITE, change, create  # noqa: E402


@dataclass(frozen=True)
class Place:
    """A database."""

    dsn: str

    def connect(self) -> psycopg.Connection[Any]:
        """A new connection in autocommit mode."""
        return psycopg.connect(self.dsn, autocommit=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tables", type=int, default=200)
    parser.add_argument("--rows", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Server() as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute("CREATE DATABASE source")
            connection.execute("CREATE DATABASE target")
        source, target = Place(server.dsn("source")), Place(server.dsn("target"))
        with target.connect() as connection:
            connection.execute(COMPOSITE)
        with source.connect() as connection:
            begun = time.monotonic()
            tables = create(connection, options.tables, rows=options.rows)
            print(f"{len(tables)} tables of {options.rows} rows made in {time.monotonic() - begun:.1f} s")
            run(connection, source, target, tables, Path(folder))


def run(connection: Any, source: Place, target: Place, tables: list[tuple[str, str]], folder: Path) -> None:
    """Replicate, change, compare, and print what it took."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pgoutput_source", "replicate", "--dsn", source.dsn, "--to", target.dsn),
            *("--recovery", str(folder / "recovery"), "--create"),
        ],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith(("PG", "BYTEWAX"))},
        stdout=subprocess.DEVNULL,
        stderr=(folder / "log").open("w"),
    )
    try:
        with target.connect() as there:
            query = "SELECT count(*) FROM pg_class WHERE relkind = 'r' AND oid > 16384 AND relname NOT IN"
            query += " ('published', 'complete')"
            while there.execute(query.encode()).fetchone() == (0,):
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
        print(f"the first table was there after {time.monotonic() - begun:.1f} s")
        reach(connection, target)
        print(f"all tables were there after {time.monotonic() - begun:.1f} s")
        for what, some in (("all tables change", tables), ("one table changes", tables[-1:])):
            for _ in range(2):
                seconds, cpu = time.monotonic(), used(process.pid)
                change(connection, some)
                reach(connection, target)
                print(f"{what}: there after {time.monotonic() - seconds:.1f} s, {used(process.pid) - cpu:.2f} s CPU")
        process.send_signal(signal.SIGTERM)
        seconds = time.monotonic()
        code = process.wait(120)
        print(f"stopped within {time.monotonic() - seconds:.1f} s, exit code {code}")
    finally:
        process.kill()
        process.wait()
    wrong = differ(source, target, tables)  # type: ignore[arg-type]
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    print(f"{len(tables)} tables compared, {len(wrong)} differ; at most {memory} MB of memory")
    print(*wrong[:5], sep="\n")
    if wrong or code:
        print((folder / "log").read_text()[-2000:])
        sys.exit(1)


def reach(connection: Any, target: Place) -> None:
    """Wait until everything up to now is there."""
    wait_for(target.dsn, str(connection.execute("SELECT pg_current_wal_lsn()::text").fetchone()[0]), timeout=600)


def used(pid: int) -> float:
    """The CPU seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
