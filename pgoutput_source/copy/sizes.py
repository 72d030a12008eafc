"""How many rows a chunk has: few enough for memory, and for the stream, which stands still while it is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.copy.tables import SourceTable

_BYTES: Final = 32 << 20
_SECONDS: Final = 0.4
_FIRST_ROWS: Final = 10_000  # of a table of unknown size


class ChunkSizes:
    """Learns from each chunk of a table how many rows the next one may have.

    Args:
        most: The most rows of any chunk.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._rows: dict[int, int] = {}

    def rows(self, table: SourceTable) -> int:
        """How many rows the table's next chunk may have."""
        relation = table.schema.relation_id
        if relation not in self._rows:
            guess = _BYTES // table.row_bytes if table.row_bytes else _FIRST_ROWS
            self._rows[relation] = max(1, min(self._most, guess))
        return self._rows[relation]

    def learn(self, table: SourceTable, batches: Sequence[ChangeBatch], seconds: float) -> None:
        """A chunk was read: its rows, and the time that it took."""
        size, count = sum(batch.nbytes for batch in batches), sum(map(len, batches))
        if not count:
            return
        by_size, by_time = _BYTES * count // max(1, size), int(count * _SECONDS / max(seconds, 0.001))
        self._rows[table.schema.relation_id] = max(1, min(self._most, self.rows(table) * 4, by_size, by_time))

    def shrink(self, table: SourceTable) -> None:
        """A chunk was too large, or took too long."""
        self._rows[table.schema.relation_id] = max(1, self.rows(table) // 8)

    def forget(self, relation_id: int) -> None:
        """The table is copied, or gone."""
        self._rows.pop(relation_id, None)
