"""From a slot to Parquet files, as a ratio to `pg_recvlogical` on a copy of the same slot in the same run.

    python benchmarks/throughput.py [--rows 1000000] [--runs 3]

Three streams of 7-column inserts: one big transaction, transactions of 100 rows, and single-row transactions. For each,
`pg_recvlogical` writes the raw stream to a file and, in turn, a Bytewax dataflow writes the same slot to Parquet. The
time of both runs from the moment the program starts to stream until all is on disk; the dataflow's includes its last
snapshot, publication and acknowledgement. CPU and peak RSS are the dataflow's process, without the server.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from pgoutput_source.embedded import Server

TABLE = """
CREATE TABLE orders (
    id bigint PRIMARY KEY, customer_id integer, status text, amount numeric(12,2),
    created_at timestamptz, updated_at timestamptz, note text);
CREATE PUBLICATION bench FOR TABLE orders;
CREATE PROCEDURE place(first bigint, rows bigint, size bigint) LANGUAGE plpgsql AS $$
DECLARE i bigint := first;
BEGIN
    WHILE i < first + rows LOOP
        INSERT INTO orders SELECT n, n % 1000, (ARRAY['new','paid','shipped'])[1 + n % 3], (n % 100000) / 100.0,
            now() - n * interval '1 second', now(), 'order number ' || n FROM generate_series(i, i + size - 1) n;
        COMMIT;
        i := i + size;
    END LOOP;
END $$;
"""


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="*", default=[0, 100, 1], help="rows a transaction; 0: all in one")
    parser.add_argument("--drain", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drain:
        drain(*arguments.drain)
        return
    print(
        f"{'rows a transaction':>18} {'pg_recvlogical':>15} {'to Parquet':>12} "
        f"{'ratio':>6} {'CPU s/M':>8} {'RSS MB':>7}"
    )
    # Over TCP, as in production; a unix socket's small buffer makes both wait for each other.
    with Server(tcp=True, settings={"max_wal_size": "8GB", "checkpoint_timeout": "1h"}) as server:
        for size in arguments.sizes:
            measure(server, arguments.rows, size or arguments.rows, arguments.runs)


def measure(server: Server, rows: int, size: int, runs: int) -> None:
    """One line of the table: medians over the runs."""
    name = f"bench_{size}"
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    dsn = server.dsn(name)
    with psycopg.connect(dsn, autocommit=True) as c:
        c.execute(TABLE)
        c.execute("SELECT pg_create_logical_replication_slot('source', 'pgoutput')")
        c.execute("CALL place(1, %s, %s)", [rows, size])
        raw, ours, reports = [], [], []
        for _ in range(runs):
            with copy_of_slot(c) as slot:
                raw.append(rows / pg_recvlogical(server, c, name, slot))
            with copy_of_slot(c) as slot, tempfile.TemporaryDirectory(dir=".") as folder:
                report = child(dsn, slot, folder)
                assert report["rows"] == rows, report
                ours.append(rows / report["seconds"])
                reports.append(report)
        c.execute("SELECT pg_drop_replication_slot('source')")
    a, b = statistics.median(raw), statistics.median(ours)
    ratio = statistics.median(y / x for x, y in zip(raw, ours, strict=True))
    cpu = statistics.median(r["cpu"] for r in reports) / rows * 1e6
    rss = max(r["rss"] for r in reports) / 1e6
    print(f"{size:>18,d} {a:>13,.0f}/s {b:>10,.0f}/s {ratio:>6.2f} {cpu:>8.2f} {rss:>7.0f}", flush=True)


@contextmanager
def copy_of_slot(c: psycopg.Connection[Any]) -> Iterator[str]:
    """A slot at the same position, so that every run reads the same."""
    c.execute("SELECT pg_copy_logical_replication_slot('source', 'copy')")
    yield "copy"
    c.execute("SELECT pg_drop_replication_slot('copy')")


def pg_recvlogical(server: Server, c: psycopg.Connection[Any], database: str, slot: str) -> float:
    """Seconds until PostgreSQL's own client has written all frames to a file."""
    end = c.execute("SELECT pg_current_wal_flush_lsn()").fetchone()
    assert end is not None
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o777)  # the program runs as the server's account
    try:
        began = time.perf_counter()
        server.run(
            "pg_recvlogical", "--start", "--slot", slot, "--dbname", database, "--file", str(folder / "raw"),
            "--endpos", end[0], "--no-loop", "-o", "proto_version=1", "-o", "publication_names=bench",
        )  # fmt: skip
        return time.perf_counter() - began
    finally:
        shutil.rmtree(folder)


def child(dsn: str, slot: str, folder: str) -> dict[str, float]:
    """The dataflow in a process of its own, for its CPU time and memory."""
    command = [sys.executable, __file__, "--drain", dsn, slot, folder]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def drain(dsn: str, slot: str, folder: str) -> None:
    """Run the dataflow until the slot is drained and print what it took."""
    from datetime import timedelta

    import bytewax.operators as op
    from bytewax.dataflow import Dataflow
    from bytewax.testing import run_main

    import pgoutput_source.operators as cdc
    from pgoutput_source import ParquetSink, PgOutputSource
    from pgoutput_source.sinks.parquet import read

    flow = Dataflow("throughput")
    source = PgOutputSource(dsn, slot=slot, publication="bench", until="current")
    cdc.output("out", cdc.table("orders", op.input("in", flow, source), "public.orders"), ParquetSink(folder))
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    run_main(flow, epoch_interval=timedelta(seconds=1))  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rows = read(folder).count_rows()
    print(json.dumps({"rows": rows, "seconds": seconds, "cpu": cpu, "rss": after.ru_maxrss * 1024, "pid": os.getpid()}))


if __name__ == "__main__":
    main()
