"""Every order change, and revenue per customer per minute, as Parquet.

    python -m bytewax.run flows.orders_cdc

`PGOUTPUT_DSN`, `PGOUTPUT_SLOT` and `PGOUTPUT_PUBLICATION` say which database; without them it runs on an embedded one.
Files appear in `out/orders` and `out/revenue`, or under the folder that `PGOUTPUT_OUT` names.
"""

import os
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import bytewax.operators as op
import bytewax.operators.windowing as win
import pyarrow as pa
import pyarrow.compute as pc
from bytewax.dataflow import Dataflow

import pgoutput_source.operators as cdc
from pgoutput_source import ChangeBatch, ParquetSink, PgOutputSource

OUT = Path(os.environ.get("PGOUTPUT_OUT", "out"))
MINUTE = timedelta(minutes=1)
EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
Revenue = tuple[datetime, Decimal]


def revenue_by_customer(batch: ChangeBatch) -> list[tuple[str, Revenue]]:
    """One partial sum per customer and minute for thousands of rows."""
    minute = pc.floor_temporal(batch.data["_commit_ts"], unit="minute")
    rows = pa.table({"customer": batch.data["customer_id"], "minute": minute, "amount": batch.data["amount"]})
    sums = rows.group_by(["customer", "minute"]).aggregate([("amount", "sum")])
    return [(str(r["customer"]), (r["minute"], r["amount_sum"])) for r in sums.to_pylist()]


flow = Dataflow("orders_cdc")
changes = op.input("postgres", flow, PgOutputSource.from_env())
orders = cdc.table("orders", changes, "public.orders")
cdc.output("history", orders, ParquetSink(OUT / "orders"))

paid = cdc.filter("paid", orders, (pc.field("status") == "paid") & (pc.field("_op") != "D"))
partial = op.flat_map("partial", paid, revenue_by_customer)
clock = win.EventClock[Revenue](lambda r: r[0], wait_for_system_duration=MINUTE)
minutes = win.TumblingWindower(length=MINUTE, align_to=EPOCH)
