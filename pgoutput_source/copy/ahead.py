"""Reads the next chunk of a table on a thread, while the last one is decoded and the stream goes on.

The rows that were read ahead count as unread until they are delivered. So the judge drops every change of theirs that
comes meanwhile. That is right if the chunk's snapshot shows all of these changes. Otherwise the chunk is read again.
"""

from __future__ import annotations

import threading
from typing import Final

import numpy as np

from pgoutput_source.changes.schema import TableSchema
from pgoutput_source.copy.chunks import Busy, ChunkReader, Fetched
from pgoutput_source.copy.keys import Key, Keys
from pgoutput_source.copy.ledger import TableCopy
from pgoutput_source.copy.meanwhile import Meanwhile
from pgoutput_source.copy.tables import Published, SourceTable

_ALONE: Final = 16  # chunks that are not read ahead after one was read in vain


class ReadAhead:
    """At most one chunk that is read ahead. While it is being read, nothing else may use the reader: `wait` before."""

    def __init__(self, reader: ChunkReader) -> None:
        self._reader = reader
        self._alone = 0
        self.reading: _Reading | None = None

    def begin(self, copy: TableCopy, wanted: Published, table: SourceTable, rows: int) -> None:
        """Begin to read the table's next chunk, of this many rows."""
        self.drop()
        self._alone = max(0, self._alone - 1)
        if copy.next_key is not None and not self._alone:
            self.reading = _Reading(self._reader, copy, wanted, table, copy.next_key, rows)

    def of(self, copy: TableCopy) -> SourceTable | None:
        """The version of the table, if it is a chunk of this copy."""
        return self.reading.table if self.reading is not None and self.reading.copy is copy else None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is being read, at most `timeout` seconds. Whether nothing is."""
        return self.reading is None or self.reading.ended(timeout)

    def streamed(self, copy: TableCopy, schema: TableSchema) -> None:
        """Changes of this version of the table come: no row of an older version may come after them."""
        table = self.of(copy)
        if table is not None and schema.fingerprint != table.schema.fingerprint:
            copy.meanwhile = None

    def drop(self) -> None:
        """Read what is being read to its end, and forget it."""
        self.wait()
        if self.reading is not None:
            self.reading.copy.meanwhile = None
            self.reading = None

    def close(self) -> None:
        """Stop at once. The connection is lost if a chunk is being read."""
        if not self.wait(0):
            self._reader.interrupt()
        self.drop()

    def take(self, keys: Keys, published: Published | None) -> Fetched | None:
        """The chunk, if it can be delivered.

        Args:
            keys: Compares the table's keys.
            published: What is published of the table now.

        Raises:
            TooLarge: Read a smaller one.
            NotConfigured, ServerError: As when it is read in its turn.
        """
        reading, self.reading = self.reading, None
        assert reading is not None
        copy = reading.copy
        meanwhile, copy.meanwhile = copy.meanwhile, None
        fetched = reading.result()
        if fetched is None or meanwhile is not reading.meanwhile or published != reading.wanted:
            return None
        snapshot = fetched.chunk.snapshot
        if not meanwhile.shown(snapshot, fetched.upper, keys):
            self._alone = _ALONE
            return None
        if copy.unproven:
            xids = np.array(sorted(copy.unproven), np.uint32)
            copy.unproven = set(xids[~snapshot.shows(xids)].tolist())
        return fetched


class _Reading:
    """One chunk, and the thread that reads it."""

    def __init__(
        self, reader: ChunkReader, copy: TableCopy, wanted: Published, table: SourceTable, lower: Key, rows: int
    ) -> None:
        self.copy, self.wanted, self.table = copy, wanted, table
        self.meanwhile = copy.meanwhile = Meanwhile(copy.unproven)
        self._reader, self._lower, self._rows = reader, lower, rows
        self._fetched: Fetched | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="pgoutput-copy", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._fetched = self._read()
        except BaseException as e:
            self._error = e

    def _read(self) -> Fetched | None:
        """The chunk; None if the copy must deal with something in its turn: no connection, a lock, another version."""
        if not self._reader.connected:
            return None
        try:
            chunk = self._reader.open(self.wanted)
        except Busy:
            return None
        try:
            if chunk.table is self.table:
                return self._reader.fetch(chunk, self.table, self._lower, self._rows)
        except BaseException:
            self._reader.abandon()
            raise
        self._reader.abandon()
        return None

    def ended(self, timeout: float | None) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def result(self) -> Fetched | None:
        self.ended(None)
        if self._error is not None:
            raise self._error
        return self._fetched
