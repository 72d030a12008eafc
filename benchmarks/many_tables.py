"""A thousand tables in one flow: one sink for all of them, beside a sink for each.

    python -m benchmarks.many_tables [tables] [epochs] [rows per table and epoch]

Each transaction inserts rows into every table, and each epoch takes one transaction. Every way runs in a process of its
own, on a slot of its own, with recovery. What is measured: how long it took from the first changes to the stop, and CPU
time per table and epoch; how long the flow then took to publish what was left; descriptors at most; memory at most.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import bytewax.operators as op
import psycopg
from bytewax.dataflow import Dataflow

import pgoutput_source.operators as cdc
from pgoutput_source import ParquetSink, PgOutputSource, run
from pgoutput_source.dataflow.run import gate
from pgoutput_source.dataflow.source import _SlotPartition
from pgoutput_source.embedded import Server
from pgoutput_source.sinks.base import _TwoPhasePartition
from pgoutput_source.sinks.parquet import _ParquetPartition


def measured(way: str, dsn: str, folder: Path, tables: int, epochs: int, rows: int) -> dict[str, float]:
    """One run, in this process."""
    begun: list[tuple[float, float]] = []
    stopped: list[tuple[float, float]] = []
    most_files = 0

    def noted(owner: Any, name: str, notes: list[tuple[float, float]]) -> None:
        original = getattr(owner, name)

        def noting(*arguments: Any) -> Any:
            nonlocal most_files
            most_files = max(most_files, len(os.listdir("/proc/self/fd")))
            notes.append((time.perf_counter(), time.process_time()))
            return original(*arguments)

        setattr(owner, name, noting)

    noted(_SlotPartition, "next_batch", begun)
    noted(gate, "opened", [])
    for partition in (_ParquetPartition, _TwoPhasePartition):
        noted(partition, "drain", stopped)
    flow = Dataflow("many_tables")
    # A poll takes a transaction: its rows, and at first its relations.
    source = PgOutputSource(dsn, slot=way, publication="bench", until="current", max_frames=tables * rows)
    changes = op.input("in", flow, source)
    if way == "one":
        cdc.output("out", changes, ParquetSink(folder / "{schema}/{table}"))
    else:
        for number in range(tables):
            orders = cdc.table(f"table {number}", changes, f"public.t{number}")
            cdc.output(f"out {number}", orders, ParquetSink(folder / f"public/t{number}"))
    run(flow, recovery=folder / "recovery", epoch=timedelta(0))
    end = (time.perf_counter(), time.process_time())
    first, last = begun[0], stopped[0]
    return {
        "seconds": last[0] - first[0],
        "ms CPU per table and epoch": 1e3 * (last[1] - first[1]) / tables / epochs,
        "seconds to drain": end[0] - last[0],
        "ms CPU per table to drain": 1e3 * (end[1] - last[1]) / tables,
        "descriptors": most_files,
        "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Measure both ways."""
    if sys.argv[1:2] == ["--way"]:
        way, dsn, place, *numbers = sys.argv[2:]
        print(json.dumps(measured(way, dsn, Path(place), *map(int, numbers))))
        return
    tables, epochs, rows = (int(n) for n in (*sys.argv[1:], *["1000", "10", "10"][len(sys.argv) - 1 :]))
    with Server() as server, tempfile.TemporaryDirectory() as scratch:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            for number in range(tables):
                columns = "id bigserial PRIMARY KEY, status text, amount numeric(12, 2)"
                connection.execute(f"CREATE TABLE t{number} ({columns})")
            connection.execute("CREATE PUBLICATION bench FOR ALL TABLES")
            for way in ("one", "each"):
                connection.execute(f"SELECT pg_create_logical_replication_slot('{way}', 'pgoutput')")
            for _ in range(epochs):
                with connection.transaction():
                    for number in range(tables):
                        made = f"SELECT 'paid', i FROM generate_series(1, {rows}) AS i"
                        connection.execute(f"INSERT INTO t{number} (status, amount) {made}")
        for way in ("each", "one"):
            folder = Path(scratch, way)
            folder.mkdir()
            command = [sys.executable, "-m", "benchmarks.many_tables", "--way", way, server.dsn(), str(folder)]
            done = subprocess.run([*command, str(tables), str(epochs), str(rows)], stdout=subprocess.PIPE, check=True)
            print(f"{'one sink for all' if way == 'one' else 'a sink for each'}, {tables} tables, {epochs} epochs:")
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                print(f"  {name:28} {value:10.2f}")


if __name__ == "__main__":
    main()
