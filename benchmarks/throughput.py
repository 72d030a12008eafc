"""From a slot to Parquet files, as a ratio to `pg_recvlogical` on a copy of the same slot in the same run.

    python benchmarks/throughput.py [--rows 1000000] [--runs 3] [--table readings] [--binary]

Three streams of 7-column inserts: one big transaction, transactions of 100 rows, and single-row transactions. For each,
`pg_recvlogical` writes the raw stream to a file; then a Bytewax dataflow writes a copy of the same slot to Parquet. For
both, the time is from the start of streaming until everything is on disk. The dataflow's includes its last snapshot,
publication and acknowledgement. CPU and peak RSS are the dataflow's process, without the server.

With --binary the dataflow runs with values as text and then in binary, instead of beside `pg_recvlogical`. The CPU time
of the walsender is reported too. Ratios are medians over the pairs of runs.
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
from pgoutput_source.stream.replication import ReplicationStream

TABLES = {
    "orders": (
        """id bigint PRIMARY KEY, customer_id integer, status text, amount numeric(12,2),
           created_at timestamptz, updated_at timestamptz, note text""",
        """n, n % 1000, (ARRAY['new','paid','shipped'])[1 + n % 3], (n % 100000) / 100.0,
           now() - n * interval '1 second', now(), 'order number ' || n""",
    ),
    "readings": (
        """id bigint PRIMARY KEY, device uuid, at timestamptz, temperature double precision, humidity double precision,
           pressure double precision, battery real""",
        """n, md5((n % 1000)::text)::uuid, now() - n * interval '1 second', 20 + 5 * random(), 100 * random(),
           1000 + 20 * random(), random()""",
    ),
}
"""By name: columns, and what fills them."""

DEFINITION = """
CREATE TABLE orders ({columns});
CREATE PUBLICATION bench FOR TABLE orders;
CREATE PROCEDURE place(first bigint, rows bigint, size bigint) LANGUAGE plpgsql AS $$
DECLARE i bigint := first;
BEGIN
    WHILE i < first + rows LOOP
        INSERT INTO orders SELECT {values} FROM generate_series(i, i + size - 1) n;
        COMMIT;
        i := i + size;
    END LOOP;
END $$;
"""
TABLE = DEFINITION.format(columns=TABLES["orders"][0], values=TABLES["orders"][1])


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="*", default=[0, 100, 1], help="rows a transaction; 0: all in one")
    parser.add_argument("--table", choices=TABLES, default="orders")
    parser.add_argument("--binary", action="store_true", help="compare values as text and in binary")
    parser.add_argument("--drain", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drain:
        drain(*arguments.drain)
        return
    if arguments.binary:
        print(f"{'rows a transaction':>18} {'values':>8} {'s/M':>7} {'CPU s/M':>8} {'walsender CPU s/M':>18}")
    else:
        print(
            f"{'rows a transaction':>18} {'pg_recvlogical':>15} {'to Parquet':>12} "
            f"{'ratio':>6} {'CPU s/M':>8} {'RSS MB':>7}"
        )
    # Over TCP, as in production; a unix socket's small buffer makes both wait for each other.
    with Server(tcp=True, settings={"max_wal_size": "8GB", "checkpoint_timeout": "1h"}) as server:
        for size in arguments.sizes:
            one = compare if arguments.binary else measure
            with filled(server, arguments.table, arguments.rows, size or arguments.rows) as c:
                one(server, c, arguments.rows, size or arguments.rows, arguments.runs)


@contextmanager
def filled(server: Server, table: str, rows: int, size: int) -> Iterator[psycopg.Connection[Any]]:
    """A connection to a database with a slot that holds so many rows, in transactions of this size."""
    name = f"bench_{size}"
    columns, values = TABLES[table]
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    with psycopg.connect(server.dsn(name), autocommit=True) as c:
        c.execute(DEFINITION.format(columns=columns, values=values).encode())
        c.execute("SELECT pg_create_logical_replication_slot('source', 'pgoutput')")
        c.execute("CALL place(1, %s, %s)", [rows, size])
        yield c
        c.execute("SELECT pg_drop_replication_slot('source')")


def compare(server: Server, c: psycopg.Connection[Any], rows: int, size: int, runs: int) -> None:
    """Two lines of the table and their ratios: medians over the runs."""
    reports: dict[str, list[dict[str, float]]] = {"off": [], "on": []}
    for _ in range(runs):
        for binary, found in reports.items():
            with copy_of_slot(c) as slot, tempfile.TemporaryDirectory(dir=".") as folder:
                found.append(child(server.dsn(c.info.dbname), slot, folder, binary))
                assert found[-1]["rows"] == rows, found[-1]
    measured = ("seconds", "cpu", "walsender")
    for name, found in zip(("text", "binary"), reports.values(), strict=True):
        each = [statistics.median(report[key] for report in found) / rows * 1e6 for key in measured]
        print(f"{size:>18,d} {name:>8} {each[0]:>7.2f} {each[1]:>8.2f} {each[2]:>18.2f}")
    pairs = list(zip(reports["off"], reports["on"], strict=True))
    ratios = [statistics.median(b[key] / a[key] for a, b in pairs) for key in measured]
    print(f"{size:>18,d} {'ratio':>8} {ratios[0]:>7.2f} {ratios[1]:>8.2f} {ratios[2]:>18.2f}", flush=True)


def measure(server: Server, c: psycopg.Connection[Any], rows: int, size: int, runs: int) -> None:
    """One line of the table: medians over the runs."""
    raw, ours, reports = [], [], []
    for _ in range(runs):
        with copy_of_slot(c) as slot:
            raw.append(rows / pg_recvlogical(server, c, c.info.dbname, slot))
        with copy_of_slot(c) as slot, tempfile.TemporaryDirectory(dir=".") as folder:
            report = child(server.dsn(c.info.dbname), slot, folder)
            assert report["rows"] == rows, report
            ours.append(rows / report["seconds"])
            reports.append(report)
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


def child(dsn: str, slot: str, folder: str, binary: str = "off") -> dict[str, float]:
    """The dataflow in a process of its own, for its CPU time and memory."""
    command = [sys.executable, __file__, "--drain", dsn, slot, folder, binary]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def drain(dsn: str, slot: str, folder: str, binary: str) -> None:
    """Run the dataflow until the slot is drained and print what it took."""
    from datetime import timedelta

    import bytewax.operators as op
    from bytewax.dataflow import Dataflow
    from bytewax.testing import run_main

    import pgoutput_source.operators as cdc
    from pgoutput_source import ParquetSink, PgOutputSource
    from pgoutput_source.parquet.read import read

    flow = Dataflow("throughput")
    source = PgOutputSource(dsn, slot=slot, publication="bench", until="current", binary=binary)
    cdc.output("out", cdc.table("orders", op.input("in", flow, source), "public.orders"), ParquetSink(folder))
    walsender = _cpu_of_walsender(ReplicationStream)
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    run_main(flow, epoch_interval=timedelta(seconds=1))  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rows = read(folder).count_rows()
    report = {"rows": rows, "seconds": seconds, "cpu": cpu, "rss": after.ru_maxrss * 1024, "walsender": walsender[0]}
    print(json.dumps(report))


def _cpu_of_walsender(stream: type[ReplicationStream]) -> list[float]:
    """The seconds that the server's process has run, found when the stream closes."""
    found = [0.0]
    close = stream.close

    def closing(self: ReplicationStream, **options: Any) -> None:
        if self.backend is not None and not found[0]:
            # Behind the name, which is in brackets: state, and twelve fields on the ticks in user and system mode.
            fields = Path(f"/proc/{self.backend.pid}/stat").read_text().rpartition(")")[2].split()
            found[0] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        close(self, **options)

    stream.close = closing  # type: ignore[method-assign]
    return found


if __name__ == "__main__":
    main()
