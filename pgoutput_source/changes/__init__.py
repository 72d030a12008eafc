"""The nouns: tables and their versions, batches and sets of changes, events and values."""

from __future__ import annotations

from pgoutput_source.changes.batches import ChangeBatch, ChangeSet, Message, Truncate
from pgoutput_source.changes.schema import (
    METADATA_COLUMNS,
    OP_CODE,
    OPS,
    Column,
    Position,
    TableSchema,
    metadata_fields,
)

__all__ = [
    "METADATA_COLUMNS",
    "OPS",
    "OP_CODE",
    "ChangeBatch",
    "ChangeSet",
    "Column",
    "Message",
    "Position",
    "TableSchema",
    "Truncate",
    "metadata_fields",
]
