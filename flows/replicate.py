"""Every table of a publication in another store, as it is now or with its history.

    PGOUTPUT_TO=postgresql://localhost/reporting PGOUTPUT_MODE=mirror python -m bytewax.run flows.replicate -r recovery

`PGOUTPUT_DSN`, `PGOUTPUT_SLOT` and `PGOUTPUT_PUBLICATION` name the source, and `PGOUTPUT_CONFIG` a TOML file with more.
With a recovery folder it begins with a copy of the rows that are there already.
"""

import bytewax.operators as op
from bytewax.dataflow import Dataflow

import pgoutput_source.operators as cdc
from pgoutput_source import PgOutputSource
from pgoutput_source.dataflow.run import recovery_folder

flow = Dataflow("replicate")
snapshot = "never" if recovery_folder() is None else "initial"
changes = op.input("postgres", flow, PgOutputSource.from_env(defaults={"snapshot": snapshot}))
cdc.replicate("replica", changes)
