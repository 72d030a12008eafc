"""Dataflow operators over whole batches: ``import pgoutput_source.operators as cdc``.

Each works on `ChangeBatch`es, thousands of rows at a time. They compose with Bytewax's own operators, because a stream
of batches is an ordinary Bytewax stream. Only `window`, `aggregate`, `latest`, `entered` and `left` keep state. The
others only cost what Arrow needs to copy the remaining rows, and are deterministic.
"""

import pgoutput_source.dataflow.needs_bytewax  # noqa: F401

# isort: split
from pgoutput_source.operators.aggregates import aggregate
from pgoutput_source.operators.filters import deletes, filter, inserts, updates
from pgoutput_source.operators.latest import latest
from pgoutput_source.operators.outputs import output
from pgoutput_source.operators.projections import mask, rename, select
from pgoutput_source.operators.replicate import replicate
from pgoutput_source.operators.rows import events, key_by, map_batches
from pgoutput_source.operators.selection import messages, table, tables
from pgoutput_source.operators.transitions import entered, left
from pgoutput_source.operators.windows import CommitClock, WindowStream, window

__all__ = [
    "CommitClock",
    "WindowStream",
    "aggregate",
    "deletes",
    "entered",
    "events",
    "filter",
    "inserts",
    "key_by",
    "latest",
    "left",
    "map_batches",
    "mask",
    "messages",
    "output",
    "rename",
    "replicate",
    "select",
    "table",
    "tables",
    "updates",
    "window",
]
