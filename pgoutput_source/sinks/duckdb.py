"""`DuckDBSink`: the tables of a publication in a DuckDB file."""

from __future__ import annotations

import pgoutput_source.dataflow.needs_bytewax  # noqa: F401

# isort: split
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

from pgoutput_source.destinations.base import Mode
from pgoutput_source.destinations.delivery import OnTableError
from pgoutput_source.destinations.duckdb import DuckDBDestination
from pgoutput_source.destinations.targets import Targets
from pgoutput_source.sinks.tables import Keys, TableSink


class DuckDBSink(TableSink):
    """All tables of a stream in a DuckDB file, exactly once with recovery (``-r``).

    All tables of an epoch appear in one transaction. Every PostgreSQL type has a DuckDB type that holds what its Arrow
    type holds. The exact text of every other value, such as an infinite date, is in `_raw`. Tables follow ALTER TABLE:
    a column that is dropped stays and gets no more values, a renamed one keeps its values, and what can't be known of
    older rows is named in `_unchanged`.

    - mode "mirror": a table holds what the source's table holds after each transaction. `_commit_lsn` is where each row
      changed last. It needs a key: the replica identity's, or one that `key` names.
    - mode "history": every change is a row, with the metadata columns; `_before` is a map of texts by column.

    The sink opens the file for each transaction and closes it after that, so other processes may read it in between. A
    reader holds the sink up, and the reverse. With `publish_copy` readers have a file of their own instead: it is
    replaced after each transaction, and who has it open keeps the previous one.

    Args:
        path: The DuckDB file, which is created if it is not there.
        mode: "mirror" or "history".
        into: Where a table goes: schema and name, with ``{schema}`` and ``{table}`` in them.
        tables: Patterns of the tables to take, all by default.
        exclude: Patterns of the tables to leave out.
        key: In mode "mirror", by table, the columns that identify a row.
        spool: A folder for what waits, beside the recovery folder.
        max_age: How long a committed epoch may wait for others to be applied with it.
        publish_copy: A path for a copy that readers may open at any time.
        patience: How long the sink waits for others to close the file.
        on_table_error: What happens when the file can't take a table. "stop" stops the flow. "park" keeps what comes of
            the table in the spool, in order, goes on with the others, and tries the table again at each start.

    Raises:
        ConfigurationError: DuckDB is not installed, or an option has no meaning.

    Example:
        >>> DuckDBSink("shop.duckdb", mode="mirror", spool="recovery/spool")
        DuckDBSink('shop.duckdb', mode='mirror')
    """

    def __init__(
        self,
        path: str | Path,
        *,
        mode: Mode,
        spool: str | Path,
        into: str = "{schema}.{table}",
        tables: str | Iterable[str] = ("*",),
        exclude: str | Iterable[str] = (),
        key: Keys | None = None,
        max_age: timedelta = timedelta(0),
        publish_copy: str | Path | None = None,
        patience: timedelta = timedelta(seconds=30),
        on_table_error: OnTableError = "stop",
    ) -> None:
        super().__init__(
            DuckDBDestination(path, mode=mode, publish_copy=publish_copy, patience=patience),
            Targets(into, tables=tables, exclude=exclude, folded=True),
            spool=spool,
            max_age=max_age,
            key=key,
            on_table_error=on_table_error,
        )
        self.path = str(path)

    def __repr__(self) -> str:
        return f"DuckDBSink({self.path!r}, mode={self.destination.mode!r})"
