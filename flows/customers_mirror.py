"""The current customers, without their e-mail addresses: the last row of each, as Parquet.

    python -m bytewax.run flows.customers_mirror

The newest row of each `id` is the customer; `D` means that the customer was deleted. Files appear in `out/customers`,
or under the folder that `PGOUTPUT_OUT` names.
"""

import os
from pathlib import Path

import bytewax.operators as op
from bytewax.dataflow import Dataflow

import pgoutput_source.operators as cdc
from pgoutput_source import ParquetSink, PgOutputSource

OUT = Path(os.environ.get("PGOUTPUT_OUT", "out"))

flow = Dataflow("customers_mirror")
changes = op.input("postgres", flow, PgOutputSource.from_env())
customers = cdc.table("customers", changes, "public.customers")
public = cdc.mask("without_email", customers, "email")
cdc.output("mirror", cdc.latest("latest", public), ParquetSink(OUT / "customers"))
