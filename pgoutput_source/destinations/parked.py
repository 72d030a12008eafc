"""Parts that a destination refused: they wait beside the spool, a file for each, until it takes them.

    spool/parked/00000000000000000042-5f1c….committed    part 42 of a table, in the spool's format

A part is moved here before its epoch leaves the spool, so for a moment it may be in both. Its number tells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pyarrow as pa

from pgoutput_source.changes.schema import TableName
from pgoutput_source.destinations.spool import COMMITTED, STAGED, Portion, Spool

FOLDER: Final = "parked"


class ParkedParts:
    """The folder; the process that owns the spool owns it. It is made when the first part comes.

    Raises:
        SinkError: The operating system refuses, or a file is damaged.
    """

    def __init__(self, spool: Spool) -> None:
        self.folder: Path = spool.folder / FOLDER
        self._parts: dict[TableName, dict[int, Portion]] = {}
        self._spool = Spool(self.folder) if self.folder.is_dir() else None
        if self._spool is None:
            return
        for token in self._spool.tokens(STAGED):
            self._spool.drop(token)  # its epoch is still in the spool
        for token in self._spool.tokens(COMMITTED):
            for part in self._spool.parts(token):
                self._parts.setdefault(part.table, {})[part.number] = part

    def close(self) -> None:
        """Leave it to others."""
        if self._spool is not None:
            self._spool.close()

    def tables(self) -> list[TableName]:
        """The tables that have parts here; the one that has waited longest comes first."""
        first = [(parts[min(parts)].first, table) for table, parts in list(self._parts.items()) if parts]
        return [table for _, table in sorted(first)]

    def parts(self, table: TableName) -> list[Portion]:
        """The parts of a table without their rows, in order."""
        return [part for _, part in sorted(self._parts.get(table, {}).items())]

    def rows(self, table: TableName) -> int:
        """How many changes of a table are here."""
        return sum(part.rows for part in self.parts(table))

    def put(self, part: Portion, changes: pa.Table) -> None:
        """Make a part durable here; a second time does nothing."""
        there = self._parts.setdefault(part.table, {})
        if part.number in there:
            return
        if self._spool is None:
            self._spool = Spool(self.folder)
        token = _token(part)
        self._spool.put(token, [(part, changes.to_batches())])
        self._spool.commit(token)
        there[part.number] = part

    def read(self, table: TableName) -> Iterator[tuple[Portion, pa.Table]]:
        """The parts of a table with their rows, in order."""
        assert self._spool is not None
        for part in self.parts(table):
            yield from self._spool.read(_token(part))

    def drop(self, table: TableName) -> None:
        """The destination has all of them."""
        assert self._spool is not None
        for part in self.parts(table):
            self._spool.drop(_token(part))
        del self._parts[table]


def _token(part: Portion) -> str:
    table = hashlib.blake2b(json.dumps(part.table).encode(), digest_size=8).hexdigest()
    return f"{part.number:020d}-{table}"
