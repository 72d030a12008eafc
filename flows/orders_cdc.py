"""Every change of an order, and the revenue per customer and minute, as Parquet.

    python -m bytewax.run flows.orders_cdc

`PGOUTPUT_DSN`, `PGOUTPUT_SLOT` and `PGOUTPUT_PUBLICATION` name the source; without them it runs on an embedded server.
Files appear in `out/orders` and `out/revenue`, or under the folder that `PGOUTPUT_OUT` names.
"""

import os
from datetime import timedelta
from pathlib import Path

import bytewax.operators as op
import pyarrow.compute as pc
from bytewax.dataflow import Dataflow

import pgoutput_source.operators as cdc
from pgoutput_source import ParquetSink, PgOutputSource

OUT = Path(os.environ.get("PGOUTPUT_OUT", "out"))

flow = Dataflow("orders_cdc")
changes = op.input("postgres", flow, PgOutputSource.from_env())
orders = cdc.table("orders", changes, "public.orders")
cdc.output("history", orders, ParquetSink(OUT / "orders"))

paid = cdc.entered("paid", orders, pc.field("status") == "paid")
revenue = cdc.window("revenue", paid, every=timedelta(minutes=1), by="customer_id", sum="amount")
cdc.output("revenue_out", revenue, ParquetSink(OUT / "revenue"))
