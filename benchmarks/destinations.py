"""What each destination costs: rows appended per second, seconds per epoch of a mirror, and memory over many epochs.

    python -m benchmarks.destinations --rows 1000000
    python -m benchmarks.destinations --rows 100000 --epochs 200 duckdb:shop.duckdb delta:lake/{schema}/{table}

An epoch updates keys that are spread over the whole table. Without an address it measures an embedded PostgreSQL, and
beside it what one would write by hand: COPY, and COPY with INSERT … ON CONFLICT.
"""

from __future__ import annotations

import argparse
import io
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.csv

from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.changes.schema import TableName
from pgoutput_source.destinations.base import Destination, Job
from pgoutput_source.destinations.replication import Replication
from pgoutput_source.destinations.spool import Portion
from pgoutput_source.destinations.targets import Target
from pgoutput_source.embedded import Server
from pgoutput_source.sinks.addresses import sink_of
from pgoutput_source.testing import batch

TABLE = TableName("public", "orders")
COLUMNS = ("id", "amount", "note")
_MODEL: ChangeBatch = batch("public.orders", [("I", {"id": 1, "amount": 1.5, "note": "x"})])


def changes(ids: np.ndarray[Any, Any], lsn: int, op: int) -> pa.Table:
    """One transaction of inserts (0) or updates (1)."""
    schema, count = _MODEL.data.schema, len(ids)
    given: dict[str, pa.Array] = {
        "id": pa.array(ids),
        "amount": pa.array(ids * 1.5 + lsn),
        "note": pa.array(np.char.add("note ", ids.astype("U"))),
        "_op": pa.DictionaryArray.from_arrays(np.full(count, op, np.int8), _MODEL.data["_op"].dictionary),
        "_commit_lsn": pa.array(np.full(count, lsn, np.uint64)),
        "_seq": pa.array(np.arange(count)).cast(schema.field("_seq").type),
    }
    arrays = [
        given[field.name].cast(field.type)
        if field.name in given
        else pa.nulls(count, field.type)
        if field.nullable
        else pa.array([_MODEL.data[field.name][0].as_py()] * count, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def job(number: int, ids: np.ndarray[Any, Any], *, op: int, key: tuple[str, ...]) -> Job:
    """The part of one epoch."""
    table = changes(ids, number * 1000, op)
    part = Portion(number, TABLE, "d", key, (number * 1000, 0), (number * 1000, len(ids) - 1), len(ids))
    return Job.of(Target(*TABLE), [(part, table)])


def measure(name: str, destination: Destination, rows: int, epochs: int) -> None:
    """Append all rows, and then update ten thousand keys in each epoch."""
    key = ("id",) if destination.mode == "mirror" else ()
    ids = np.arange(rows)
    begun = time.monotonic()
    destination.apply([job(1, ids, op=0, key=key)])
    print(f"{name}, {destination.mode}: {rows / (time.monotonic() - begun):,.0f} rows/s appended", flush=True)
    rng, took, memory = np.random.default_rng(1), [], []
    for epoch in range(epochs):
        some = np.sort(rng.choice(ids, min(10_000, rows), replace=False))
        made = job(2 + epoch, some, op=1, key=key)
        begun = time.monotonic()
        destination.apply([made])
        took.append(time.monotonic() - begun)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    destination.close()
    if took:
        print(
            f"{name}, {destination.mode}: {np.median(took):.2f} s per epoch of 10,000 keys, the longest of {epochs} "
            f"{max(took):.2f} s; {memory[0]} MB after the first, {memory[-1]} MB after the last",
            flush=True,
        )


def by_hand(dsn: str, rows: int, epochs: int) -> None:
    """COPY into the table, and then COPY and INSERT … ON CONFLICT for each epoch."""
    ids = np.arange(rows)

    def copied(connection: psycopg.Connection[Any], into: str, some: np.ndarray[Any, Any], lsn: int) -> None:
        buffer = io.BytesIO()
        pyarrow.csv.write_csv(
            changes(some, lsn, 0).select(COLUMNS), buffer, pyarrow.csv.WriteOptions(include_header=False)
        )
        with connection.cursor().copy(f"COPY {into} FROM STDIN (FORMAT csv)".encode()) as copy:
            copy.write(buffer.getbuffer())

    with psycopg.connect(dsn) as connection:
        connection.execute("CREATE TABLE by_hand (id bigint PRIMARY KEY, amount float8, note text)")
        begun = time.monotonic()
        copied(connection, "by_hand", ids, 1)
        connection.commit()
        print(f"by hand, COPY: {rows / (time.monotonic() - begun):,.0f} rows/s", flush=True)
        rng, took = np.random.default_rng(1), []
        for epoch in range(epochs):
            some = np.sort(rng.choice(ids, min(10_000, rows), replace=False))
            begun = time.monotonic()
            connection.execute("CREATE TEMP TABLE part (LIKE by_hand) ON COMMIT DROP")
            copied(connection, "part", some, epoch)
            connection.execute(
                "INSERT INTO by_hand SELECT * FROM part"
                " ON CONFLICT (id) DO UPDATE SET (amount, note) = (excluded.amount, excluded.note)"
            )
            connection.commit()
            took.append(time.monotonic() - begun)
    if took:
        print(f"by hand, ON CONFLICT: {np.median(took):.2f} s per epoch of 10,000 keys", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("addresses", nargs="*", metavar="ADDRESS")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for address in options.addresses:
            for mode in Replication(to=address).kind.modes:
                sink = sink_of(Replication(to=address, mode=mode), spool=Path(folder))
                destination = getattr(sink, "destination", None)
                if not isinstance(destination, Destination):
                    raise SystemExit(f"{address}: its sink has no destination of its own to measure")
                measure(address.partition(":")[0], destination, options.rows, options.epochs)
                break  # the other mode needs a place of its own: another address
    if not options.addresses:
        with Server() as server:
            by_hand(server.dsn(), options.rows, options.epochs)
            for mode in ("mirror", "history"):
                with psycopg.connect(server.dsn(), autocommit=True) as connection:
                    connection.execute(f"CREATE DATABASE {mode}".encode())
                sink = sink_of(Replication(to=server.dsn(mode), mode=mode), spool=Path("spool"))
                measure("PostgreSQL", sink.destination, options.rows, options.epochs)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
