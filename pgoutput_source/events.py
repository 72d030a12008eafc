"""Changes as events, one by one: the public names of `pgoutput_source.changes.events`, and `events_of`."""

from __future__ import annotations

from pgoutput_source.changes.batches import events_of
from pgoutput_source.changes.events import (
    ChangeEvent,
    ColumnDefinition,
    EventTable,
    Facts,
    Row,
    TableFacts,
    Transaction,
    declared_type,
    row_model,
)

__all__ = [
    "ChangeEvent",
    "ColumnDefinition",
    "EventTable",
    "Facts",
    "Row",
    "TableFacts",
    "Transaction",
    "declared_type",
    "events_of",
    "row_model",
]
