"""From a slot to `ChangeEvent`s, as a ratio to `pg_recvlogical` on a copy of the same slot in the same run.

    python benchmarks/events.py [--rows 200000] [--runs 3]

The streams of 7-column inserts are those of `throughput.py`. Each way to read runs in its own process: the reader's
sets, its events one by one, and the events as JSON. The time is from the connection to the last change. CPU is the
reader's, without the server.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import psycopg
from throughput import TABLE, copy_of_slot, pg_recvlogical

from pgoutput_source import PgOutputReader
from pgoutput_source.embedded import Server

WAYS: dict[str, Callable[[PgOutputReader], int]] = {
    "sets": lambda reader: sum(map(len, reader.sets())),
    "events": lambda reader: sum(1 for _ in reader),
    "JSON": lambda reader: sum(1 for event in reader if event.model_dump_json()),
}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="*", default=[0, 100, 1], help="rows a transaction; 0: all in one")
    parser.add_argument("--read", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        read(*arguments.read)
        return
    print(
        f"{'rows a transaction':>18} {'pg_recvlogical':>15}", *(f"{way:>12} {'ratio':>5} {'µs CPU':>6}" for way in WAYS)
    )
    with Server(tcp=True, settings={"max_wal_size": "8GB", "checkpoint_timeout": "1h"}) as server:
        for size in arguments.sizes:
            measure(server, arguments.rows, size or arguments.rows, arguments.runs)


def measure(server: Server, rows: int, size: int, runs: int) -> None:
    """One line of the table: medians over the runs."""
    name = f"bench_{size}"
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    dsn = server.dsn(name)
    raw: list[float] = []
    reports: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with psycopg.connect(dsn, autocommit=True) as c:
        c.execute(TABLE)
        c.execute("SELECT pg_create_logical_replication_slot('source', 'pgoutput')")
        c.execute("CALL place(1, %s, %s)", [rows, size])
        for _ in range(runs):
            with copy_of_slot(c) as slot:
                raw.append(rows / pg_recvlogical(server, c, name, slot))
            for way in WAYS:
                with copy_of_slot(c) as slot:
                    command = [sys.executable, __file__, "--read", way, dsn, slot]
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    reports[way].append(json.loads(done.stdout))
                assert reports[way][-1]["rows"] == rows, reports[way]
        c.execute("SELECT pg_drop_replication_slot('source')")
    line = f"{size:>18,d} {statistics.median(raw):>13,.0f}/s"
    for found in reports.values():
        speed = [rows / report["seconds"] for report in found]
        ratio = statistics.median(s / r for s, r in zip(speed, raw, strict=True))
        cpu = statistics.median(report["cpu"] for report in found) / rows * 1e6
        line += f" {statistics.median(speed):>10,.0f}/s {ratio:>5.2f} {cpu:>6.1f}"
    print(line, flush=True)


def read(way: str, dsn: str, slot: str) -> None:
    """Drain the slot in one of the ways and print what it took."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    with PgOutputReader(dsn, slot=slot, publication="bench", until="current") as reader:
        rows = WAYS[way](reader)
        seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"rows": rows, "seconds": seconds, "cpu": cpu}))


if __name__ == "__main__":
    main()
