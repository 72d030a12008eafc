"""One large transaction to Parquet: rows per second and peak memory, with streaming off and on.

    python benchmarks/big_transaction.py [--rows 10000000] [--streaming off on parallel]

The transaction is written once, to a table of three columns. For each way to stream, a dataflow in its own process then
writes a copy of the slot to Parquet. It prints the seconds from the process's start to its end, and its peak RSS, which
must not grow with the number of rows.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg

from pgoutput_source.embedded import Server

TABLE = """
CREATE TABLE events (id bigint PRIMARY KEY, at timestamptz, note text);
CREATE PUBLICATION bench FOR TABLE events;
"""


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--streaming", nargs="*", default=["off", "on"], choices=["off", "on", "parallel"])
    parser.add_argument("--drain", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drain:
        drain(*arguments.drain)
        return
    print(f"{'streaming':>10} {'rows':>10} {'seconds':>8} {'rows/s':>9} {'peak RSS MB':>12}")
    settings = {"max_wal_size": "16GB", "checkpoint_timeout": "1h"}
    with Server(settings=settings) as server, psycopg.connect(server.dsn(), autocommit=True) as c:
        c.execute(TABLE)
        c.execute("SELECT pg_create_logical_replication_slot('source', 'pgoutput')")
        c.execute(
            "INSERT INTO events SELECT i, now() + i * interval '1 s', 'event number ' || i"
            f" FROM generate_series(1, {arguments.rows}) i"
        )
        for streaming in arguments.streaming:
            c.execute("SELECT pg_copy_logical_replication_slot('source', %s)", [f"with_{streaming}"])
            measure(server.dsn(), streaming, arguments.rows)
            c.execute("SELECT pg_drop_replication_slot(%s)", [f"with_{streaming}"])


def measure(dsn: str, streaming: str, rows: int) -> None:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        command = [sys.executable, __file__, "--drain", dsn, f"with_{streaming}", streaming, folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
        seconds = time.monotonic() - started
        found, rss = map(int, done.stdout.split())
    assert found == rows, f"{found} rows of {rows}"
    print(f"{streaming:>10} {rows:>10} {seconds:>8.1f} {rows / seconds:>9.0f} {rss:>12}")


def drain(dsn: str, slot: str, streaming: str, folder: str) -> None:
    """Write the slot to Parquet; print the number of rows and the peak RSS in MB."""
    import pyarrow.parquet as pq
    from bytewax import operators as op
    from bytewax.dataflow import Dataflow
    from bytewax.testing import run_main

    import pgoutput_source.operators as cdc
    from pgoutput_source import ParquetSink, PgOutputSource

    flow = Dataflow("big")
    source = PgOutputSource(dsn, slot=slot, publication="bench", until="current", streaming=streaming)
    events = cdc.table("events", op.input("postgres", flow, source), "public.events")
    cdc.output("files", events, ParquetSink(Path(folder) / "events"))
    run_main(flow)  # type: ignore[no-untyped-call]
    # Linux says kilobytes, macOS bytes.
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "linux" else 1 << 20)
    rows = sum(pq.read_metadata(file).num_rows for file in (Path(folder) / "events").glob("*.parquet"))
    print(rows, rss)


if __name__ == "__main__":
    main()
