"""A small shop that takes orders: four tables, a publication, and a workload that never stops changing them.

The demo, the notebooks and the benchmarks capture its changes. `create()` creates the tables `customers`,
`products`, `orders` and `order_items` and the publication `shop`; `Workload` is the traffic. In its own process

    python -m pgoutput_source.embedded.shop

reads a connection string from the first line of its standard input (arguments would show the password to everybody),
works until that input ends, and prints what it did as a line of JSON, each second and at the end. It therefore ends
with the process that started it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import psycopg

from pgoutput_source.errors import ServerError

PUBLICATION = "shop"
TABLES = ("customers", "products", "orders", "order_items")

CUSTOMERS = 500
PRODUCTS = 200
STATUSES = ("new", "paid", "packed", "shipped", "returned")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS customers (
    id bigint PRIMARY KEY,
    name text NOT NULL,
    email text,
    city text,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS products (
    id bigint PRIMARY KEY,
    name text NOT NULL,
    price numeric(12,2) NOT NULL,
    attributes jsonb NOT NULL DEFAULT '{}',
    active boolean NOT NULL DEFAULT true
);
CREATE TABLE IF NOT EXISTS orders (
    id bigint PRIMARY KEY,
    customer_id bigint NOT NULL REFERENCES customers,
    status text NOT NULL,
    amount numeric(12,2) NOT NULL,
    note text,
    placed_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz
);
CREATE TABLE IF NOT EXISTS order_items (
    order_id bigint REFERENCES orders ON DELETE CASCADE,
    line integer,
    product_id bigint NOT NULL REFERENCES products,
    quantity integer NOT NULL,
    price numeric(12,2) NOT NULL,
    PRIMARY KEY (order_id, line)
);
"""

_FILL = f"""
INSERT INTO customers (id, name, email, city)
SELECT i, 'Customer ' || i, 'customer' || i || '@example.org', (ARRAY['Berlin', 'Lima', 'Ōsaka', 'Zürich'])[1 + i % 4]
FROM generate_series(1, {CUSTOMERS}) i ON CONFLICT DO NOTHING;
INSERT INTO products (id, name, price, attributes)
SELECT i, 'Product ' || i, (i * 37 % 5000 + 99) / 100.0, jsonb_build_object('weight', i % 90, 'fragile', i % 7 = 0)
FROM generate_series(1, {PRODUCTS}) i ON CONFLICT DO NOTHING;
"""

# Two processes that create the shop at once wait for each other.
_LOCK = "SELECT pg_advisory_xact_lock(hashtext('pgoutput_source.embedded.shop'))"


def create(dsn: str) -> None:
    """Create the shop's tables, customers, products and publication in the database of `dsn`, unless they exist.

    Args:
        dsn: libpq connection string or URL of a role that may create tables and publications.

    Raises:
        ServerError: PostgreSQL refused.
    """
    try:
        with psycopg.connect(dsn) as connection:
            connection.execute(_LOCK)
            connection.execute(_SCHEMA)
            connection.execute(_FILL)
            if not connection.execute("SELECT FROM pg_publication WHERE pubname = %s", [PUBLICATION]).rowcount:
                connection.execute(f"CREATE PUBLICATION {PUBLICATION} FOR TABLE {', '.join(TABLES)}")
    except psycopg.Error as error:
        raise ServerError(f"the shop could not be created: {error}") from error


def open_shop(dsn: str, *, rate: float = 500) -> None:
    """Create the shop, and let it take orders in a process that ends with this one. A second call does nothing.

    Args:
        dsn: libpq connection string or URL of a role that may create tables and publications.
        rate: Changed rows per second.

    Raises:
        ServerError: PostgreSQL refused.
    """
    if _open:
        return
    create(dsn)
    command = [sys.executable, "-m", __name__, "--rate", str(rate)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stdin is not None
    process.stdin.write(dsn + "\n")  # not an argument: it holds the password
    process.stdin.flush()
    _open.append(process)  # its standard input stays open, and closes when this process is gone


_open: list[subprocess.Popen[str]] = []


@dataclasses.dataclass(slots=True)
class Totals:
    """What a workload has committed: transactions, and rows inserted, updated and deleted in all tables."""

    transactions: int = 0
    inserted: int = 0
    updated: int = 0
    deleted: int = 0

    @property
    def changes(self) -> int:
        """Rows inserted, updated and deleted."""
        return self.inserted + self.updated + self.deleted


class Workload:
    """The shop's traffic: orders are placed, progress, are cancelled; prices change; whole order books are imported.

    Most transactions change a few rows, one in a hundred changes several thousand, and some are rolled back. With the
    same `seed` and the same tables, the same changes come in the same transactions. Only the server's timestamps
    differ.

    Args:
        dsn: libpq connection string or URL of the database that `create()` prepared.
        seed: Seed of everything random.
        rate: Target of changed rows per second; None for as many as possible.
    """

    def __init__(self, dsn: str, *, seed: int = 0, rate: float | None = None) -> None:
        self.totals = Totals()
        self._dsn = dsn
        self._rate = rate
        self._random = random.Random(seed)
        self._live: list[int] = []
        self._ids = itertools.count(1)

    def run(self, stop: Callable[[float], object]) -> Totals:
        """Work until `stop` returns something true, and finish the current transaction.

        Args:
            stop: Called after each transaction with the seconds until the next. It waits that long, or returns
                something true at once to end the work, like `threading.Event.wait`.

        Returns:
            What was committed.

        Raises:
            ServerError: PostgreSQL refused, or went away.
        """
        weights = [weight for weight, _ in _TRAFFIC]
        works = [work for _, work in _TRAFFIC]
        began = time.monotonic()
        try:
            with psycopg.connect(self._dsn, autocommit=True) as connection:
                self._live = [row[0] for row in connection.execute("SELECT id FROM orders ORDER BY id")]
                self._ids = itertools.count(max(self._live, default=0) + 1)
                while True:
                    self._transaction(connection, self._random.choices(works, weights)[0])
                    due = 0.0 if self._rate is None else began + self.totals.changes / self._rate - time.monotonic()
                    if stop(max(due, 0.0)):
                        return self.totals
        except psycopg.Error as error:
            raise ServerError(f"the shop's workload ended: {error}", hint="did shop.create() run there?") from error

    def _transaction(self, connection: psycopg.Connection[Any], work: Work) -> None:
        before = dataclasses.replace(self.totals)
        abandoned = self._random.random() < 0.03
        live = list(self._live) if abandoned else self._live
        with connection.transaction(force_rollback=abandoned):
            work(self, connection)
        if abandoned:
            self.totals, self._live = before, live
        elif self.totals != before:  # work may find nothing to do
            self.totals.transactions += 1

    def _place(self, connection: psycopg.Connection[Any], count: int, most_items: int) -> None:
        pick = self._random
        ids = list(itertools.islice(self._ids, count))
        orders: list[tuple[object, ...]] = []
        items: list[tuple[object, ...]] = []
        for order in ids:
            amount = Decimal(0)
            for line in range(1, pick.randint(1, most_items) + 1):
                quantity, price = pick.randint(1, 5), Decimal(pick.randint(99, 9999)) / 100
                amount += quantity * price
                items.append((order, line, pick.randint(1, PRODUCTS), quantity, price))
            # A large note is stored out of line, and not sent again when another column is updated.
            note = pick.choice((None, "ring twice", "")) if pick.random() < 0.99 else pick.randbytes(4000).hex()
            orders.append((order, pick.randint(1, CUSTOMERS), "new", amount, note))
        _insert(
            connection, "orders", "id, customer_id, status, amount, note", "bigint bigint text numeric text", orders
        )
        _insert(
            connection,
            "order_items",
            "order_id, line, product_id, quantity, price",
            "bigint integer bigint integer numeric",
            items,
        )
        self._live.extend(ids)
        self.totals.inserted += len(orders) + len(items)

    def _one_order(self, connection: psycopg.Connection[Any]) -> None:
        self._place(connection, 1, 4)

    def _some_orders(self, connection: psycopg.Connection[Any]) -> None:
        self._place(connection, self._random.randint(2, 60), 4)

    def _order_book(self, connection: psycopg.Connection[Any]) -> None:
        self._place(connection, self._random.randint(500, 2500), 1)

    def _progress(self, connection: psycopg.Connection[Any]) -> None:
        if self._live:
            ids = self._random.choices(self._live, k=self._random.choice((1, 1, 1, 2, 5, 20, 200)))
            query = "UPDATE orders SET status = %s, updated_at = now() WHERE id = ANY(%s)"
            self.totals.updated += connection.execute(query, [self._random.choice(STATUSES), ids]).rowcount

    def _cancel(self, connection: psycopg.Connection[Any]) -> None:
        ids = []
        for _ in range(min(len(self._live), self._random.choice((1, 1, 2, 10)))):
            at = self._random.randrange(len(self._live))
            ids.append(self._live[at])
            self._live[at] = self._live[-1]
            self._live.pop()
        items = connection.execute("DELETE FROM order_items WHERE order_id = ANY(%s)", [ids]).rowcount
        self.totals.deleted += items + connection.execute("DELETE FROM orders WHERE id = ANY(%s)", [ids]).rowcount

    def _reprice(self, connection: psycopg.Connection[Any]) -> None:
        first = self._random.randint(1, PRODUCTS)
        query = "UPDATE products SET price = round(price * %s, 2) + 0.01 WHERE id BETWEEN %s AND %s"
        factor = Decimal(self._random.randint(90, 110)) / 100
        self.totals.updated += connection.execute(query, [factor, first, first + self._random.randint(0, 40)]).rowcount

    def _move(self, connection: psycopg.Connection[Any]) -> None:
        customer = self._random.randint(1, CUSTOMERS)
        query = "UPDATE customers SET city = %s, email = NULLIF(email, %s) WHERE id = %s"
        values = [self._random.choice(("Berlin", "Lima", "Ōsaka", None)), f"customer{customer}@example.org", customer]
        self.totals.updated += connection.execute(query, values).rowcount


Work = Callable[[Workload, psycopg.Connection[Any]], None]

_TRAFFIC: tuple[tuple[int, Work], ...] = (
    (50, Workload._one_order),
    (30, Workload._progress),
    (8, Workload._some_orders),
    (6, Workload._cancel),
    (3, Workload._reprice),
    (2, Workload._move),
    (1, Workload._order_book),
)


def _insert(
    connection: psycopg.Connection[Any], table: str, columns: str, types: str, rows: list[tuple[object, ...]]
) -> None:
    arrays = ", ".join(f"%s::{name}[]" for name in types.split())
    query = f"INSERT INTO {table} ({columns}) SELECT * FROM unnest({arrays})"
    connection.execute(query.encode(), [list(column) for column in zip(*rows, strict=True)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the workload in its own process until standard input ends. Prints `Totals` as lines of JSON."""
    parser = argparse.ArgumentParser(prog="python -m pgoutput_source.embedded.shop", description="The shop's workload.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=None, help="changed rows per second (default: no limit)")
    arguments = parser.parse_args(argv)
    # Ctrl-C in a terminal reaches every process. The one that holds our standard input decides when the shop closes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Unbuffered: select() can't see what Python has already read.
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as head:
        dsn = head.readline().decode().strip()

    workload = Workload(dsn, seed=arguments.seed, rate=arguments.rate)
    told = time.monotonic()

    def tell() -> None:
        print(json.dumps(dataclasses.asdict(workload.totals)), flush=True)

    def ended(seconds: float) -> bool:
        nonlocal told
        if time.monotonic() - told >= 1:
            told = time.monotonic()
            tell()
        return bool(select.select([sys.stdin.fileno()], [], [], seconds)[0])

    try:
        workload.run(ended)
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    tell()
    return 0


if __name__ == "__main__":
    sys.exit(main())
