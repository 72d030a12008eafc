"""How many orders each status has, and what they are worth, like PostgreSQL's GROUP BY, as Parquet.

    python -m bytewax.run flows.sales_by_status

The newest row of each `status` equals ``SELECT status, count(*), sum(amount), max(amount) FROM orders GROUP BY status``
at the position in its `_commit_lsn` and `_seq`; `D` means that there are no such orders any more. Files appear in
`out/sales_by_status`, or under the folder that `PGOUTPUT_OUT` names.
"""

import os
from pathlib import Path

import bytewax.operators as op
from bytewax.dataflow import Dataflow

import pgoutput_source.operators as cdc
from pgoutput_source import ParquetSink, PgOutputSource

OUT = Path(os.environ.get("PGOUTPUT_OUT", "out"))

flow = Dataflow("sales_by_status")
changes = op.input("postgres", flow, PgOutputSource.from_env())
orders = cdc.table("orders", changes, "public.orders")
sales = cdc.aggregate("sales", orders, by="status", count=True, sum="amount", max="amount")
cdc.output("sales_out", sales, ParquetSink(OUT / "sales_by_status"))
