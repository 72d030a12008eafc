"""The demo: a PostgreSQL, a shop that takes orders, a dataflow that captures them, and a check of its files.

Everything is real and runs in its own process: an embedded server that is deleted at the end, the shop's workload, and
`demo_flow` under ``python -m bytewax.run``, the usual way to start a dataflow. The shop has orders before the flow
starts, which the initial copy brings. After some seconds the shop closes. Once the flow has acknowledged the last
change, it is asked to stop, and SQL on both sides compares the Parquet files with the tables.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from pgoutput_source.embedded import Server, shop
from pgoutput_source.errors import ConfigurationError, PgOutputError

SLOT = "demo"

FLOW = "pgoutput_source.cli.demo_flow"
"""The dataflow that ``python -m bytewax.run`` runs."""

COPIED = "the initial copy is complete"
"""What the flow's log says then."""

RATE = 4000
"""Changed rows per second that the shop aims at."""

OPENING = 300
"""Transactions of the shop before the flow starts."""

PATIENCE = 40.0
"""How many seconds the flow may take to catch up, and again to stop."""


def run(seconds: float, folder: Path) -> int:
    """Run the demo and print what happens.

    Args:
        seconds: How long the shop takes orders.
        folder: Where to create a folder for the files of this run.

    Returns:
        0 when files and tables agree, 1 when they don't.

    Raises:
        ConfigurationError: DuckDB or Bytewax is missing.
        EmbeddedError: No PostgreSQL can be found or downloaded.
        PgOutputError: The flow or the shop ended early, or the flow did not catch up.
    """
    import pgoutput_source.dataflow.needs_bytewax  # noqa: F401  (before a server is started)

    duck = _duckdb()
    out = _fresh(folder)
    began = time.monotonic()
    with Server() as server:
        dsn = server.dsn()
        shop.create(dsn)
        steps = iter(range(OPENING))
        shop.Workload(dsn, seed=time.time_ns()).run(lambda _: next(steps, None) is None)
        with psycopg.connect(dsn, autocommit=True) as connection:
            orders = _one(connection, "SELECT count(*) FROM orders")
            connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [SLOT])
            print(f"PostgreSQL {server.version} is up, with {orders} orders. A shop takes more for {seconds:g} s")
            print(f"The flow copies those that are there, and follows the changes. Its files go to {out}")
            with _flow(dsn, out) as flow:
                with _shop(dsn, out) as workload:
                    _watch(connection, flow, workload, out, seconds)
                _catch_up(connection, flow, out)
                _stop(flow, out)
            verdict = verify(connection, duck, out / "orders")
    _report(verdict, duck, out, time.monotonic() - began)
    return 1 if verdict.differences else 0


# -- the comparison ---------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """The orders according to the tables and according to the Parquet files.

    `tables` and `files` are rows of status, number of orders and sum of their amounts. `changes` is the number of rows
    in the files. `differences` says what differs, and is empty if everything agrees.
    """

    tables: list[tuple[Any, ...]]
    files: list[tuple[Any, ...]]
    changes: int
    differences: list[str]


# The current table: the last change of each key, without deletes. PostgreSQL does not send a large note that did not
# change, so the note comes from the last change that has it.
_ORDERS_NOW = """
CREATE OR REPLACE TEMP VIEW orders_now AS
WITH ordered AS (SELECT *, row_number() OVER (PARTITION BY id ORDER BY _commit_lsn, _seq) AS n FROM changes),
     notes AS (SELECT id, arg_max_null(note, n) AS note FROM ordered
               WHERE NOT list_contains(coalesce(_unchanged, []), 'note') GROUP BY id)
SELECT o.* REPLACE (notes.note AS note) FROM ordered o LEFT JOIN notes USING (id)
QUALIFY n = max(n) OVER (PARTITION BY o.id) AND _op <> 'D'
"""

_BY_STATUS = "SELECT status, count(*), sum(amount) FROM {table} GROUP BY status ORDER BY status"
_ROWS = "SELECT id, customer_id, status, amount, md5(note), {placed_at}, {updated_at} FROM {table} ORDER BY id"
_TIMES = ("placed_at", "updated_at")


def verify(connection: psycopg.Connection[Any], duck: Any, orders: Path) -> Verdict:
    """Compare the table `orders` with the Parquet files of its changes: counts and sums, then row by row.

    Args:
        connection: A connection to the shop's database.
        duck: A DuckDB connection. Afterwards it has the views `changes` and `orders_now`.
        orders: The folder of the Parquet files.
    """
    if not any(orders.glob("*.parquet")):
        return Verdict([], [], 0, [f"there is no Parquet file in {orders}"])
    pattern = str(orders / "*.parquet").replace("'", "''")
    duck.execute(f"CREATE OR REPLACE TEMP VIEW changes AS FROM read_parquet('{pattern}', union_by_name = true)")
    duck.execute(_ORDERS_NOW)
    changes, different = duck.execute("SELECT count(*), count(DISTINCT (_commit_lsn, _seq)) FROM changes").fetchone()
    differences = []
    if changes != different:
        differences.append(f"{changes - different} changes are in the files more than once")

    # Both sides store timestamps in microseconds.
    here = {name: f"(extract(epoch FROM {name}) * 1000000)::bigint" for name in _TIMES}
    there = {name: f"epoch_us({name})" for name in _TIMES}
    tables = connection.execute(_BY_STATUS.format(table="orders").encode()).fetchall()
    files = duck.execute(_BY_STATUS.format(table="orders_now")).fetchall()
    if tables != files:
        differences.append("counts or sums differ")
    differences += _differing(
        connection.execute(_ROWS.format(table="orders", **here).encode()).fetchall(),
        duck.execute(_ROWS.format(table="orders_now", **there)).fetchall(),
    )
    return Verdict(tables, files, changes, differences)


def _differing(tables: list[tuple[Any, ...]], files: list[tuple[Any, ...]]) -> list[str]:
    if tables == files:
        return []
    table, file = {row[0]: row for row in tables}, {row[0]: row for row in files}
    found = (
        (table.keys() - file.keys(), "are missing in the files"),
        (file.keys() - table.keys(), "are in the files but not in the table"),
        ({key for key in table.keys() & file.keys() if table[key] != file[key]}, "have other values in the files"),
    )
    return [f"{len(keys)} orders {what}, such as id {min(keys)}" for keys, what in found if keys]


# -- the processes ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _flow(dsn: str, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    # No outside configuration may redirect the flow.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "BYTEWAX_"))}
    env |= {
        "PGOUTPUT_DSN": dsn,
        "PGOUTPUT_SLOT": SLOT,
        "PGOUTPUT_PUBLICATION": shop.PUBLICATION,
        "PGOUTPUT_SNAPSHOT": "initial",
        "PGOUTPUT_OUT": str(out.absolute()),
    }
    command = [sys.executable, "-m", "bytewax.run", FLOW, "-s", "2"]
    with (out / "flow.log").open("wb") as log:
        # Its own session: Ctrl-C ends the demo, which then ends the flow.
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _shop(dsn: str, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [
        sys.executable,
        "-m",
        "pgoutput_source.embedded.shop",
        "--rate",
        str(RATE),
        "--seed",
        str(time.time_ns()),
    ]
    with (out / "shop.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
    assert process.stdin is not None
    try:
        process.stdin.write(dsn.encode() + b"\n")
        process.stdin.flush()
        yield process
        process.stdin.close()  # tells the shop to close
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


def _watch(
    connection: psycopg.Connection[Any],
    flow: subprocess.Popen[bytes],
    workload: subprocess.Popen[bytes],
    out: Path,
    seconds: float,
) -> None:
    began = time.monotonic()
    with _Line() as line:
        while (passed := time.monotonic() - began) < seconds:
            _alive(workload, "the shop", out / "shop.log")
            _alive(flow, "the flow", out / "flow.log")
            line.show(f"{passed:4.0f} s  {_progress(connection, out, passed)}")
            time.sleep(min(0.5, max(0.0, began + seconds - time.monotonic())))


def _catch_up(connection: psycopg.Connection[Any], flow: subprocess.Popen[bytes], out: Path) -> None:
    """Wait until the flow has copied all tables and acknowledged the last change, so its epoch is durable."""
    began = time.monotonic()
    while COPIED not in (out / "flow.log").read_text(errors="replace") and time.monotonic() < began + PATIENCE:
        _alive(flow, "the flow", out / "flow.log")
        time.sleep(0.2)
    target = _one(connection, "SELECT pg_current_wal_flush_lsn()")
    reached = f"SELECT confirmed_flush_lsn >= '{target}' FROM pg_replication_slots WHERE slot_name = '{SLOT}'"
    with _Line() as line:
        while not _one(connection, reached):
            passed = time.monotonic() - began
            _alive(flow, "the flow", out / "flow.log")
            if passed > PATIENCE:
                raise PgOutputError(
                    f"the flow has not acknowledged {target} within {PATIENCE:.0f} s",
                    hint=f"its log is {out / 'flow.log'}",
                )
            line.show(f"{passed:4.0f} s  the shop is closed · {_progress(connection, out, 0)}")
            time.sleep(0.2)


def _stop(flow: subprocess.Popen[bytes], out: Path) -> None:
    """Ask the flow to stop: it publishes what it holds, acknowledges and ends with code 0."""
    log = out / "flow.log"
    flow.send_signal(signal.SIGTERM)
    try:
        flow.wait(PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise PgOutputError(f"the flow did not stop within {PATIENCE:.0f} s", hint=f"its log is {log}") from error
    if flow.returncode:
        _alive(flow, "the flow", log)


def _alive(process: subprocess.Popen[bytes], what: str, log: Path) -> None:
    if process.poll() is not None:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise PgOutputError(f"{what} ended with code {process.returncode}:\n{tail}", hint=f"its whole log is {log}")


# -- what a person sees -----------------------------------------------------------------------------------------


class _Line:
    """One line of progress: overwritten on a terminal, printed every few seconds elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._next = 0.0

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            print()

    def show(self, text: str) -> None:
        if self._terminal:
            print(f"\r{text}\x1b[K", end="", flush=True)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + 3
            print(text, flush=True)


_LAG = f"""
SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), coalesce(r.sent_lsn, s.confirmed_flush_lsn))::bigint,
       pg_wal_lsn_diff(pg_current_wal_lsn(), s.confirmed_flush_lsn)::bigint
FROM pg_replication_slots s LEFT JOIN pg_stat_replication r ON r.pid = s.active_pid WHERE s.slot_name = '{SLOT}'
"""


def _progress(connection: psycopg.Connection[Any], out: Path, seconds: float) -> str:
    unsent, unacknowledged = connection.execute(_LAG).fetchone() or (0, 0)
    told = _lines(out / "shop.log")
    changes = sum(told[-1][kind] for kind in ("inserted", "updated", "deleted")) if told else 0
    # The shop prints a line each second, so there are as many lines as seconds.
    rate = f" ({changes / len(told):,.0f}/s)" if told and seconds else ""
    published = _lines(out / "orders" / "_index.jsonl")
    staged = sum(1 for part in out.glob("orders/_staging/*") if part.suffix in (".staged", ".committed", ".unproven"))
    return (
        f"{changes:,} changes{rate} · lag {unsent / 1e6:.1f} MB, {unacknowledged / 1e6:.1f} MB unacknowledged · "
        f"{len(published)} files published, {staged} parts staged"
    )


def _report(verdict: Verdict, duck: Any, out: Path, seconds: float) -> None:
    orders = out / "orders"
    if verdict.differences:
        print("The Parquet files and the tables DIFFER:")
        for difference in verdict.differences:
            print(f"  {difference}")
        print(f"  tables: {_summed(verdict.tables)}\n  files:  {_summed(verdict.files)}\n  log:    {out / 'flow.log'}")
        return
    print(f"The Parquet files agree with the tables, in every row of {sum(n for _, n, _ in verdict.tables):,} orders:")
    print(f"  {'status':<10}{'orders':>10}{'amount':>18}")
    for status, count, amount in verdict.tables:
        print(f"  {status:<10}{count:>10,}{amount:>18,}")
    files = sorted(orders.glob("*.parquet"))
    size = sum(file.stat().st_size for file in files)
    print(f"They hold {verdict.changes:,} changes in {len(files)} files, {size / 1e6:.1f} MB. The last of them:")
    columns = ("_op", "_commit_ts", "id", "customer_id", "status", "amount")
    # As text, so that no time zone library is needed. A delete has only the key.
    texts = ", ".join(f"coalesce({name}::varchar, '')" for name in columns)
    last = duck.execute(f"SELECT {texts} FROM changes ORDER BY _commit_lsn DESC, _seq DESC LIMIT 5").fetchall()
    for row in (columns, *last):
        print("  {:<5}{:<31}{:<9}{:<13}{:<10}{:>10}".format(*row))
    print(f"Look at them:  duckdb.sql(\"FROM '{orders}/*.parquet'\")  or  polars.read_parquet('{orders}/*.parquet')")
    print(f"It took {seconds:.0f} s. The log of the flow is {out / 'flow.log'}")


def _summed(rows: list[tuple[Any, ...]]) -> str:
    return ", ".join(f"{count} {status} of {amount}" for status, count, amount in rows) or "nothing"


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file of JSON lines that may still be written."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.startswith("{") and line.endswith("\n")]


def _one(connection: psycopg.Connection[Any], query: str) -> Any:
    row = connection.execute(query.encode()).fetchone()
    return row[0] if row else None


def _fresh(folder: Path) -> Path:
    """A new folder for this run: changes of different database systems must not be mixed."""
    name = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{n}" for n in range(2, 100))):
        out = folder / f"{name}{suffix}"
        try:
            out.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigurationError(f"{out} can't be created: {error}", hint="name another with --folder") from error
        return out
    raise ConfigurationError(f"{folder} has no room for another run", hint="name another with --folder")


def _duckdb() -> Any:
    try:
        import duckdb
    except ImportError as error:
        raise ConfigurationError(
            "the demo checks the files with DuckDB, which is not installed",
            hint="pip install 'pgoutput-source[demo]'",
        ) from error
    return duckdb.connect()
