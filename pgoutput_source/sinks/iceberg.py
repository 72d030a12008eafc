"""`IcebergSink`: the tables of a publication in Apache Iceberg, as history."""

from __future__ import annotations

import pgoutput_source.dataflow.needs_bytewax  # noqa: F401

# isort: split
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path

from pgoutput_source.destinations.base import Mode
from pgoutput_source.destinations.delivery import OnTableError
from pgoutput_source.destinations.iceberg import IcebergDestination
from pgoutput_source.destinations.targets import Targets
from pgoutput_source.sinks.tables import TableSink


class IcebergSink(TableSink):
    """The history of all tables of a stream in Apache Iceberg, exactly once with recovery (``-r``): one table each.

    A table's rows, its shape and how far it is are in the same commit, and on a local file system its files are synced
    before the catalogue names them. Tables are committed one after the other. Values keep their types, but for those
    that Iceberg does not have: `smallint` becomes int, `oid` and `xid` long, `xid8` and `pg_lsn` decimal(20,0), times
    text. So do multiranges and arrays of composites, ranges and points: pyiceberg can't keep a NULL of these. A value
    that the type can't hold, such as a date after 9999, is null and has its exact text in `_raw`.

    Every change is a row, with the metadata columns; `_before` is a map of texts by column. Tables follow ALTER TABLE:
    a column that is dropped stays and gets no more values, a renamed one keeps its values, and one that gets a type
    that Iceberg can't make of the old one is a new column, while the old one stays as ``name__2``.

    Needs the package `pyiceberg`: ``pip install pgoutput-source[iceberg]``.

    Args:
        into: Where a table goes: namespace and name, with ``{schema}`` and ``{table}`` in them.
        catalog: A name in ``.pyiceberg.yaml``, or the properties of a catalogue, which is called "default" unless they
            have a ``name``: a catalogue in SQL finds the tables of its own name only.
            https://py.iceberg.apache.org/configuration/
        mode: "history". A mirror is refused: pyiceberg writes no deletes that are merged on read.
        tables: Patterns of the tables to take, all by default.
        exclude: Patterns of the tables to leave out.
        spool: A folder for what waits, beside the recovery folder.
        max_age: How long a committed epoch may wait for others to be applied with it. Each commit is a data file.
        on_table_error: What happens when a table can't be taken. "stop" stops the flow. "park" keeps what comes of the
            table in the spool, in order, goes on with the others, and tries the table again at each start.

    Raises:
        ConfigurationError: An option has no meaning, or pyiceberg is not installed.

    Example:
        >>> IcebergSink("{schema}.{table}", catalog="prod", mode="history", spool="recovery/spool")
        IcebergSink('{schema}.{table}', mode='history')
    """

    def __init__(
        self,
        into: str = "{schema}.{table}",
        *,
        catalog: str | Mapping[str, str],
        mode: Mode,
        spool: str | Path,
        tables: str | Iterable[str] = ("*",),
        exclude: str | Iterable[str] = (),
        max_age: timedelta = timedelta(minutes=1),
        on_table_error: OnTableError = "stop",
    ) -> None:
        super().__init__(
            IcebergDestination(catalog, mode=mode),
            Targets(into, tables=tables, exclude=exclude),
            spool=spool,
            max_age=max_age,
            on_table_error=on_table_error,
        )

    def __repr__(self) -> str:
        return f"IcebergSink({self.targets.template!r}, mode={self.destination.mode!r})"
