"""Customers who place several orders within a minute, as lines of JSON: row by row, with Bytewax's own windows.

    python -m bytewax.run flows.order_alerts

Lines go to standard output, each at least once.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

import bytewax.operators as op
import bytewax.operators.windowing as win
from bytewax.dataflow import Dataflow

import pgoutput_source.operators as cdc
from pgoutput_source import JsonLinesSink, PgOutputSource
from pgoutput_source.events import ChangeEvent

MINUTE = timedelta(minutes=1)
EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
MANY = 3


def customer(event: ChangeEvent) -> str:
    """The customer who placed the order."""
    return str(event.row["customer_id"])


def alert(counted: tuple[str, tuple[int, int]]) -> tuple[str, dict[str, Any]] | None:
    """A customer with many orders, and the line that says so."""
    who, (window, orders) = counted
    if orders < MANY:
        return None
    return who, {"customer_id": int(who), "minute": EPOCH + window * MINUTE, "orders": orders}


flow = Dataflow("order_alerts")
changes = op.input("postgres", flow, PgOutputSource.from_env())
placed = cdc.inserts("placed", cdc.table("orders", changes, "public.orders"))
minutes = win.TumblingWindower(length=MINUTE, align_to=EPOCH)
counts = win.count_window("counts", cdc.events("events", placed), cdc.CommitClock(), minutes, customer)
op.output("alerts", op.filter_map("many", counts.down, alert), JsonLinesSink())
