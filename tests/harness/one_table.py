"""Random DML on a real table, and what PostgreSQL streams of it: frames, and the batches of any cut of them."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pytest
from bytewax.dataflow import Dataflow
from bytewax.errors import BytewaxRuntimeError
from bytewax.recovery import RecoveryConfig, init_db_dir
from bytewax.testing import cluster_main, run_main

from pgoutput_source.changes import ChangeSet
from pgoutput_source.changes.schema import Position
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.errors import PgOutputError

TABLE = """
CREATE TABLE t (
    id int, part int, status text, region int, amount numeric(12,2), free numeric, score float8, big bigint,
    day date, note text, PRIMARY KEY (id, part)
);
ALTER TABLE t ALTER note SET STORAGE EXTERNAL;
CREATE PUBLICATION p FOR TABLE t;
"""

Row = tuple[Any, ...]
STATUSES = ("open", "paid", "sent", "zürich", "", None)


class Workload:
    """Transactions on table `t` and its slot; `identity` is DEFAULT or FULL."""

    def __init__(self, connection: psycopg.Connection[Any], slot: str, seed: int, identity: str = "DEFAULT") -> None:
        self.connection, self.slot = connection, slot
        self.random = random.Random(seed)
        self.next_id = 0
        for statement in TABLE.split(";"):
            if statement.strip():
                connection.execute(statement)
        connection.execute(f"ALTER TABLE t REPLICA IDENTITY {identity}")
        connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])

    def row(self) -> dict[str, Any]:
        r = self.random
        return {
            "status": r.choice(STATUSES),
            "region": r.choice([1, 2, 3, None]),
            "amount": r.choice([None, r.randrange(-(10**6), 10**6) / 100, r.randrange(1000)]),
            "free": r.choice([None, f"{r.randrange(10**6)}.{r.randrange(1000)}", "1.0", "1.00"]),
            "score": r.choice([None, "NaN", "Infinity", "-0", "0", "1e300", "-1e300", r.random(), r.random()]),
            "big": r.choice([None, r.randrange(-(2**40), 2**40)]),
            "day": r.choice([None, f"2024-01-{r.randrange(1, 29):02}"]),
            "note": r.choice([None, "short", r.choice("abc") * 5000]),
        }

    def statement(self) -> None:
        """One random statement."""
        r, c = self.random, self.connection
        kind = r.choices(["insert", "update", "note", "key", "delete", "many", "truncate"], [30, 25, 8, 8, 12, 5, 1])[0]
        some = "(SELECT id FROM t ORDER BY (id * %s) %% 101, id LIMIT 1)"
        if kind == "insert":
            row = self.row()
            self.next_id += 1
            names = ", ".join(row)
            marks = ", ".join(["%s"] * len(row))
            c.execute(
                f"INSERT INTO t (id, part, {names}) VALUES (%s, 0, {marks})",
                [self.next_id, *row.values()],
            )
        elif kind == "update":
            row = self.row()
            for name in r.sample(sorted(row), r.randrange(1, 4)):
                if name != "note":
                    c.execute(f"UPDATE t SET {name} = %s WHERE id = {some}", [row[name], r.randrange(1, 100)])
        elif kind == "note":
            c.execute(f"UPDATE t SET note = %s WHERE id = {some}", [self.row()["note"], r.randrange(1, 100)])
        elif kind == "key":
            # A key that moves on, that comes back later, or another row's old one.
            c.execute(f"UPDATE t SET part = part + 1 - 2 * (part %% 2) WHERE id = {some}", [r.randrange(1, 100)])
        elif kind == "delete":
            c.execute(f"DELETE FROM t WHERE id = {some}", [r.randrange(1, 100)])
        elif kind == "many":
            c.execute(
                "UPDATE t SET region = coalesce(region, 0) %% 4 + 1, amount = amount + 1 WHERE id %% 3 = %s",
                [r.randrange(3)],
            )
        else:
            c.execute("TRUNCATE t")

    def transaction(self, statements: int) -> None:
        """A transaction of random statements, some of them rolled back."""
        with self.connection.transaction():
            for _ in range(statements):
                if self.random.random() < 0.1:
                    with self.connection.transaction(force_rollback=True):
                        self.statement()
                self.statement()

    def frames(self) -> list[bytes]:
        """What the slot holds: XLogData frames. They are consumed."""
        return consumed(self.connection, self.slot)

    def feed(self, assembler: Assembler, frames: Sequence[bytes]) -> Iterator[ChangeSet]:
        """Change sets of the frames, cut at random."""
        at = 0
        while at < len(frames):
            size = self.random.choice([1, 2, 7, 50, 200])
            changes = assembler.feed(frames[at : at + size])
            at += size
            if len(changes):
                yield changes


def consumed(connection: psycopg.Connection[Any], slot: str) -> list[bytes]:
    """What a slot holds, for publication `p`, as XLogData frames; the slot forgets it."""
    query = """
        SELECT lsn - '0/0'::pg_lsn, data
        FROM pg_logical_slot_get_binary_changes(%s, NULL, NULL, 'proto_version', '1', 'publication_names', 'p')
    """
    rows = connection.execute(query, [slot], binary=True).fetchall()
    return [b"w" + struct.pack(">QQq", int(lsn), int(lsn), 0) + data for lsn, data in rows]


def plain(value: Any) -> Any:
    """A value as it compares with PostgreSQL's: numbers by value, floats to 12 digits, NaN equal to itself."""
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else float(f"{value:.12g}") + 0.0
    return value.normalize() + 0 if isinstance(value, Decimal) else value


class Checkpoints:
    """Change sets of a workload, and what the queries gave after some of them."""

    def __init__(
        self, connection: psycopg.Connection[Any], identity: str, seed: int, queries: Sequence[str], rounds: int = 40
    ) -> None:
        workload = Workload(connection, f"agg{seed}", seed, identity)
        connection.execute("SET extra_float_digits = 3")
        assembler = Assembler()
        self.sets: list[ChangeSet] = []
        self.known: list[tuple[Position, list[list[Row]]]] = []
        for _ in range(rounds):
            for _ in range(workload.random.randrange(1, 4)):
                workload.transaction(workload.random.choice([1, 1, 3, 10]))
            frames = workload.frames()
            self.sets += workload.feed(assembler, frames)
            if self.sets and assembler.position is not None:
                self.known.append((assembler.position, [connection.execute(q).fetchall() for q in queries]))


def ordered(rows: Iterable[Row]) -> list[Row]:
    """Rows as they compare with PostgreSQL's, in any one order."""
    return sorted((tuple(plain(v) for v in row) for row in rows), key=repr)


def refused(kind: type[PgOutputError], run: Callable[[], object]) -> None:
    """Assert that a flow ends with this error."""
    with pytest.raises(BytewaxRuntimeError) as raised:
        run()
    error: BaseException | None = raised.value
    while error is not None and not isinstance(error, kind):
        error = error.__cause__
    assert error is not None, f"no {kind.__name__}"


def run_flow(
    flow: Dataflow, *, recovery: Path | None = None, epochs: timedelta | None = None, workers: int = 0
) -> None:
    """Run a flow to its end, or to TestingSource's ABORT, with a recovery store that is made if it is missing."""
    config = None
    if recovery is not None:
        if not recovery.exists():
            recovery.mkdir()
            init_db_dir(recovery, 1)  # type: ignore[no-untyped-call]
        config = RecoveryConfig(recovery, timedelta(0))  # type: ignore[no-untyped-call]
    if epochs is None:
        epochs = timedelta(seconds=10) if recovery is None else timedelta(0)
    options = {"epoch_interval": epochs, "recovery_config": config}
    if workers:
        cluster_main(flow, [], 0, worker_count_per_proc=workers, **options)  # type: ignore[no-untyped-call]
    else:
        run_main(flow, **options)  # type: ignore[no-untyped-call]


def at(position: Position, results: Sequence[pa.RecordBatch], by: Sequence[str]) -> list[Row]:
    """The groups as of a position: what a reader of the results makes of them."""
    groups: dict[Row, Row] = {}
    for rows in results:
        for row in rows.to_pylist():
            if (row["_commit_lsn"], row["_seq"]) > position:
                return ordered(groups.values())
            key = tuple(str(plain(row[name])) for name in by)
            assert (key in groups) == (row["_op"] != "I")
            if row["_op"] == "D":
                assert row.get("count", 0) == 0
                del groups[key]
            else:
                groups[key] = tuple(plain(v) for n, v in row.items() if n[:1] != "_")
    return ordered(groups.values())


LOG = """
CREATE TABLE log AS SELECT 'I' AS op, pg_current_xact_id() AS xid, t.* FROM t WITH NO DATA;
CREATE FUNCTION log() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO log SELECT left(TG_OP, 1), pg_current_xact_id(), NEW.*; RETURN NULL;
END $$;
CREATE TRIGGER log AFTER INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION log();
"""
