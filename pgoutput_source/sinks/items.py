"""What sinks of Arrow batches accept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import pyarrow as pa

from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.errors import SinkError

Item: TypeAlias = ChangeBatch | pa.RecordBatch | pa.Table


def record_batches(item: Any, sink: object) -> Iterator[pa.RecordBatch]:
    """The record batches in an item.

    Raises:
        SinkError: `sink` got something else.
    """
    match item:
        case ChangeBatch():
            yield item.data
        case pa.RecordBatch():
            yield item
        case pa.Table():
            yield from item.to_batches()
        case _:
            raise SinkError(
                f"{sink} takes ChangeBatch, pyarrow.RecordBatch or pyarrow.Table, not {type(item).__name__}",
                hint="take a table's batches with cdc.table(…), make batches of rows with "
                "pa.RecordBatch.from_pylist, or write rows as lines with JsonLinesSink",
            )
