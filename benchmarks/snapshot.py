"""The initial copy: rows a second to Arrow, to Parquet and through a dataflow, and what the live stream feels of it.

    python benchmarks/snapshot.py [--rows 5000000] [--runs 3] [--adbc /path/to/python]

Each way reads the same table of 7 columns in a process of its own, in turn with the others. With --adbc, an interpreter
that has `adbc-driver-postgresql` and `pyarrow`, the same table is read by ADBC in the same run, in one query: rates are
then also ratios to it. CPU and peak RSS are of the reading process, without the server. At last a table of which a row
is written every 20 ms streams while the large one is copied: how long after its commit each row was delivered.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
from throughput import TABLES

from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.copy.initial import InitialCopy
from pgoutput_source.embedded import Server
from pgoutput_source.postgres.definitions import Definitions
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream.session import SlotSession

FLOW = """
import sys
from datetime import timedelta
import bytewax.operators as op
from bytewax.dataflow import Dataflow
import pgoutput_source.operators as cdc
from pgoutput_source import ParquetSink, PgOutputSource, run

flow = Dataflow("copy")
source = PgOutputSource(sys.argv[1], slot="bench", publication="bench", snapshot="only")
orders = cdc.table("orders", op.input("in", flow, source), "public.orders")
cdc.output("out", orders, ParquetSink(sys.argv[2]))
run(flow, epoch=timedelta(seconds=1))
"""

ADBC = """
import json, resource, sys, time
import adbc_driver_postgresql.dbapi as adbc
import pyarrow.parquet as pq

with adbc.connect(sys.argv[1]) as c, c.cursor() as cursor:
    begun, before, rows, writer = time.perf_counter(), time.process_time(), 0, None
    cursor.execute("SELECT * FROM public.orders")
    for batch in cursor.fetch_record_batch():
        rows += len(batch)
        if sys.argv[2]:
            writer = writer or pq.ParquetWriter(sys.argv[2], batch.schema, compression="zstd")
            writer.write_batch(batch)
    if writer:
        writer.close()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - before
rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"rows": rows, "seconds": seconds, "cpu": cpu, "rss": rss}))
"""

WAYS = {"to Arrow": "arrow", "to Parquet": "parquet", "dataflow to Parquet": "flow"}
ADBC_WAYS = {"ADBC to Arrow": "", "ADBC to Parquet": "adbc.parquet"}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--adbc", metavar="PYTHON", help="an interpreter that has ADBC")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    settings: dict[str, str | bool] = {"max_wal_size": "8GB", "checkpoint_timeout": "1h"}
    with Server(settings=settings) as server, tempfile.TemporaryDirectory(dir=".") as folder:
        dsn = server.dsn()
        fill(dsn, arguments.rows)
        found: dict[str, list[dict[str, float]]] = {}
        for turn in range(arguments.runs):
            for name, report in measured(dsn, Path(folder) / str(turn), arguments.adbc):
                assert report["rows"] == arguments.rows, (name, report)
                found.setdefault(name, []).append(report)
        show(found, arguments.rows)
        latencies(dsn)


def fill(dsn: str, rows: int) -> None:
    """The table, and nothing left to do for the server."""
    columns, values = TABLES["orders"]
    with psycopg.connect(dsn, autocommit=True) as c:
        # It is copied first, so that its changes are delivered while the other is copied.
        c.execute("CREATE TABLE live (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, at double precision)")
        c.execute(f"CREATE TABLE orders ({columns})".encode())
        c.execute(f"INSERT INTO orders SELECT {values} FROM generate_series(1, {rows}) n".encode())
        c.execute("CREATE PUBLICATION bench FOR TABLE orders, live")
        c.execute("VACUUM (ANALYZE, FREEZE) orders")
        c.execute("CHECKPOINT")


def measured(dsn: str, folder: Path, adbc: str | None) -> Iterator[tuple[str, dict[str, float]]]:
    """Each way once."""
    folder.mkdir()
    commands = {name: [sys.executable, __file__, "--child", way, dsn, str(folder / way)] for name, way in WAYS.items()}
    if adbc:
        for name, file in ADBC_WAYS.items():
            commands[name] = [adbc, "-c", ADBC, _uri(dsn), str(folder / file) if file else ""]
    for name, command in commands.items():
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        yield name, json.loads(said.splitlines()[-1])


def _uri(dsn: str) -> str:
    parts = psycopg.conninfo.conninfo_to_dict(dsn)
    return (
        f"postgresql://{parts['user']}:{parts['password']}@/{parts['dbname']}?host={parts['host']}&port={parts['port']}"
    )


def child(way: str, dsn: str, folder: str) -> None:
    """One way, in this process."""
    begun, before = time.perf_counter(), time.process_time()
    rows = 0
    if way == "flow":
        sys.argv = ["flow", dsn, folder]
        exec(compile(FLOW, "flow", "exec"), {"__name__": "flow"})
        rows = sum(pq.read_metadata(file).num_rows for file in Path(folder).glob("*.parquet"))
    else:
        writer: pq.ParquetWriter | None = None
        for batch in copied(dsn):
            rows += len(batch)
            if way == "parquet":
                own = batch.data.select([column.name for column in batch.schema.columns])
                writer = writer or pq.ParquetWriter(folder, own.schema, compression="zstd")
                writer.write_batch(own)
        if writer is not None:
            writer.close()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - before
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rows": rows, "seconds": seconds, "cpu": cpu, "rss": rss}))


def copied(dsn: str) -> Iterator[ChangeBatch]:
    """The rows of all tables, by the chunks of the initial copy, without a stream."""
    settings = SourceSettings.of(dsn=dsn, slot="bench", publication="bench", snapshot="initial")
    copy = InitialCopy(dsn, settings, look_up=Definitions(dsn), everything=True)
    far = 1 << 50
    while copy.pending:
        yield from copy.step(far).batches
        copy.passed(far)
    copy.close()


def show(found: dict[str, list[dict[str, float]]], rows: int) -> None:
    """Medians of the runs."""
    millions = rows / 1_000_000
    print(f"{rows:,} rows, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"{'':20} {'M rows/s':>9} {'CPU s/M':>8} {'RSS MB':>7} {'to ADBC':>8}")
    for name, reports in found.items():
        seconds, cpu, rss = (
            statistics.median(report[what] for report in reports) for what in ("seconds", "cpu", "rss")
        )
        other = found.get("ADBC to Arrow" if "Arrow" in name else "ADBC to Parquet")
        ratio = ""
        if other and "ADBC" not in name:
            pairs = zip(other, reports, strict=True)
            ratio = f"{statistics.median(theirs['seconds'] / ours['seconds'] for theirs, ours in pairs):8.2f}"
        print(f"{name:20} {millions / seconds:9.2f} {cpu / millions:8.2f} {rss:7.0f} {ratio}")


def latencies(dsn: str) -> None:
    """Rows that stream while a table is copied."""
    stopped = threading.Event()

    def write() -> None:
        with psycopg.connect(dsn, autocommit=True) as c:
            while not stopped.wait(0.02):
                c.execute("INSERT INTO live (at) VALUES (%s)", [time.time()])

    with psycopg.connect(dsn, autocommit=True) as c:
        c.execute("SELECT pg_create_logical_replication_slot('bench', 'pgoutput')")
    writer = threading.Thread(target=write)
    session = SlotSession(dsn, SourceSettings.of(dsn=dsn, slot="bench", publication="bench", snapshot="initial"))
    writer.start()
    found: list[float] = []
    rows, begun, acknowledged = 0, time.monotonic(), time.monotonic()
    while session.copying:
        changes = session.next(0.05)
        now = time.time()
        for batch in changes:
            if batch.table == "public.live":
                inserted = batch.data.filter(pa.array([op == "I" for op in batch.data.column("_op").to_pylist()]))
                found += [now - at for at in inserted.column("at").to_pylist()]
            else:
                rows += len(batch)
        if time.monotonic() - acknowledged > 1:
            session.acknowledge(session.safe_lsn)
            acknowledged = time.monotonic()
    seconds = time.monotonic() - begun
    stopped.set()
    writer.join()
    session.close()
    found.sort()
    print(
        f"the live stream while {rows:,} rows were copied in {seconds:.1f} s: {len(found)} rows, delivered after "
        f"{1000 * statistics.median(found):.0f} ms (median), {1000 * found[len(found) * 99 // 100]:.0f} ms (99 %), "
        f"{1000 * found[-1]:.0f} ms (at most)"
    )


if __name__ == "__main__":
    main()
