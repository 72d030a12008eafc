"""One very large value, to Parquet and to a reader: memory before it, at its peak, and once it is acknowledged.

    python benchmarks/large_values.py [--megabytes 300] [--type bytea text] [--option binary=on …]

The reading process stays connected. It reads some small rows, then a row with one large value, then small rows again.
It prints its resident memory after each, and the peak. A bytea value travels as hexadecimal text, which doubles its
size, unless binary=on; PostgreSQL sends at most 1 GiB in one message. At the peak there are up to four copies of a
message: libpq's, the frame's, the poll's and the column's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg

from pgoutput_source.embedded import Server

MADE = {"bytea": "convert_to(repeat('x', {bytes}), 'UTF8')", "text": "repeat('x', {bytes})"}
PATIENCE = 300


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--type", nargs="*", default=["bytea"], choices=sorted(MADE))
    parser.add_argument("--path", nargs="*", default=["parquet", "reader"], choices=["parquet", "reader"])
    parser.add_argument("--option", nargs="*", default=[], metavar="NAME=VALUE", help="of SourceSettings")
    parser.add_argument("--consume", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = dict(option.split("=", 1) for option in arguments.option)
    if arguments.consume:
        path, dsn, folder = arguments.consume
        (to_parquet if path == "parquet" else to_reader)(dsn, Path(folder), options)
        return
    print(f"{'type':>6} {'path':>8} {'value MB':>9} {'before MB':>10} {'peak MB':>8} {'after MB':>9} {'seconds':>8}")
    with Server(settings={"max_wal_size": "8GB"}) as server:
        for kind in arguments.type:
            for path in arguments.path:
                figures = measure(server.dsn(), kind, path, arguments.megabytes, arguments.option)
                size, before, peak, after, seconds = figures
                print(f"{kind:>6} {path:>8} {size:>9} {before:>10} {peak:>8} {after:>9} {seconds:>8.1f}")


def measure(dsn: str, kind: str, path: str, megabytes: int, options: list[str]) -> tuple[int, int, int, int, float]:
    """Megabytes of the value, of memory before, at the peak and after, and the seconds that the large value took."""
    with psycopg.connect(dsn, autocommit=True) as c, tempfile.TemporaryDirectory() as folder:
        c.execute(f"CREATE TABLE large (id serial PRIMARY KEY, v {kind})".encode())
        c.execute("ALTER TABLE large ALTER v SET STORAGE EXTERNAL")
        c.execute("CREATE PUBLICATION large FOR TABLE large")
        c.execute("SELECT pg_create_logical_replication_slot('large', 'pgoutput')")
        command = [sys.executable, __file__, "--consume", path, dsn, folder, "--option", *options]
        process = subprocess.Popen(command, stdin=subprocess.PIPE)
        try:
            small(c, process)
            small(c, process)
            before = resident(process.pid)
            begun = time.monotonic()
            c.execute(f"INSERT INTO large (v) VALUES ({MADE[kind].format(bytes=megabytes * 1_000_000)})".encode())
            peak = acknowledged(c, process)
            seconds = time.monotonic() - begun
            for _ in range(10):
                time.sleep(0.5)
                small(c, process)
            after = resident(process.pid)
        finally:
            process.kill()
            process.wait()
        slots = "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots WHERE active"
        c.execute(slots)
        c.execute("SELECT pg_drop_replication_slot('large')")
        c.execute("DROP PUBLICATION large; DROP TABLE large")
    return megabytes, before, peak, after, seconds


def small(connection: psycopg.Connection[Any], process: subprocess.Popen[bytes]) -> None:
    """Some rows as they mostly are."""
    connection.execute("INSERT INTO large (v) SELECT 'small' FROM generate_series(1, 10000)")
    acknowledged(connection, process)


def acknowledged(connection: psycopg.Connection[Any], process: subprocess.Popen[bytes]) -> int:
    """Wait until everything is acknowledged; the most memory that the process had meanwhile."""
    row = connection.execute("SELECT pg_current_wal_lsn()").fetchone()
    deadline, peak = time.monotonic() + PATIENCE, 0
    while True:
        assert process.poll() is None, "the process that reads has ended"
        assert time.monotonic() < deadline, "nothing was acknowledged"
        peak = max(peak, resident(process.pid))
        done = connection.execute("SELECT confirmed_flush_lsn >= %s FROM pg_replication_slots", row).fetchone()
        if done == (True,):
            return peak
        time.sleep(0.02)


def resident(pid: int) -> int:
    """The resident memory of a process in MB."""
    kilobytes = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], check=True, stdout=subprocess.PIPE).stdout
    return int(kilobytes) // 1024


def to_parquet(dsn: str, folder: Path, options: dict[str, Any]) -> None:
    """A flow that writes the table to Parquet, for ever."""
    from datetime import timedelta

    from bytewax import operators as op
    from bytewax.dataflow import Dataflow
    from bytewax.testing import run_main

    import pgoutput_source.operators as cdc
    from pgoutput_source import ParquetSink, PgOutputSource

    flow = Dataflow("large")
    source = PgOutputSource(dsn, slot="large", publication="large", **options)
    rows = cdc.table("rows", op.input("postgres", flow, source), "public.large")
    cdc.output("files", rows, ParquetSink(folder / "out", max_age=timedelta(0)))
    run_main(flow, epoch_interval=timedelta(seconds=0.2))  # type: ignore[no-untyped-call]


def to_reader(dsn: str, folder: Path, options: dict[str, Any]) -> None:
    """A reader that acknowledges each set, for ever."""
    from pgoutput_source import PgOutputReader

    with PgOutputReader(dsn, slot="large", publication="large", **options) as reader:
        for changes in reader.sets():
            reader.ack(changes)


if __name__ == "__main__":
    main()
