"""Changes as events, one by one: the public name of `pgoutput_source.changes.events`."""

from __future__ import annotations

from pgoutput_source.changes.events import (
    ChangeEvent,
    ColumnDefinition,
    EventTable,
    Facts,
    Row,
    TableFacts,
    Transaction,
    declared_type,
    events_of,
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
