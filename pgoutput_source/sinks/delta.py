"""`DeltaSink`: the tables of a publication in Delta Lake."""

from __future__ import annotations

import pgoutput_source.dataflow.needs_bytewax  # noqa: F401

# isort: split
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path

from pgoutput_source.destinations.base import Mode
from pgoutput_source.destinations.delivery import OnTableError
from pgoutput_source.destinations.delta import DeltaDestination, DeltaTargets
from pgoutput_source.sinks.tables import Keys, TableSink


class DeltaSink(TableSink):
    """All tables of a stream in Delta Lake, exactly once with recovery (``-r``): one Delta table each.

    A table's rows and how far it is are in the same commit, and on a local file system the commit is synced before the
    spool forgets it. Tables are committed one after the other. Values keep their types, but for those that Delta Lake
    does not have: `oid` and `xid` become long, `xid8` and `pg_lsn` decimal(20,0), times text. A value that the type
    can't hold, such as a date after 9999, is null and has its exact text in `_raw`.

    - mode "mirror": a table holds what the source's table holds after each transaction, merged into it. `_commit_lsn`
      is where each row changed last; a column whose value is unknown is named in `_unchanged`. It needs a key: the
      replica identity's, or one that `key` names. After ALTER TABLE the files are rewritten: columns that stay keep
      their values, also when they are renamed or can be cast, and dropped ones stay without new values.
    - mode "history": every change is a row, with the metadata columns. It is only appended to. A column that gets
      another type, or another name, is another column from then on; smallint and integer are long from the start.

    Needs the package `deltalake`: ``pip install pgoutput-source[delta]``.

    Args:
        place: Where a table goes: a folder, or a URL such as ``s3://lake/{schema}/{table}``, with ``{schema}`` and
            ``{table}`` in it. What can't be in a folder's name everywhere is written as a tilde and two digits.
        mode: "mirror" or "history".
        tables: Patterns of the tables to take, all by default.
        exclude: Patterns of the tables to leave out.
        key: In mode "mirror", by table, the columns that identify a row.
        spool: A folder for what waits, beside the recovery folder.
        max_age: How long a committed epoch may wait for others to be applied with it. A merge costs by the size of
            its table, hardly by the number of changes.
        storage_options: For object stores, what deltalake takes; by default it reads the environment (``AWS_…``).
        optimize: Whether to compact small files, and to delete files that were replaced `keep` ago.
        keep: How long older versions of a table can be read.
        on_table_error: What happens when a table can't be taken. "stop" stops the flow. "park" keeps what comes of the
            table in the spool, in order, goes on with the others, and tries the table again at each start.

    Raises:
        ConfigurationError: An option has no meaning, or deltalake is not installed.

    Example:
        >>> DeltaSink("lake/{schema}/{table}", mode="mirror", spool="recovery/spool")
        DeltaSink('lake/{schema}/{table}', mode='mirror')
    """

    def __init__(
        self,
        place: str | Path,
        *,
        mode: Mode,
        spool: str | Path,
        tables: Iterable[str] = ("*",),
        exclude: Iterable[str] = (),
        key: Keys | None = None,
        max_age: timedelta = timedelta(minutes=1),
        storage_options: Mapping[str, str] | None = None,
        optimize: bool = True,
        keep: timedelta = timedelta(days=7),
        on_table_error: OnTableError = "stop",
    ) -> None:
        self.place = str(place)
        super().__init__(
            DeltaDestination(mode=mode, storage_options=storage_options, optimize=optimize, keep=keep),
            DeltaTargets(self.place, tables=tables, exclude=exclude),
            spool=spool,
            max_age=max_age,
            key=key,
            on_table_error=on_table_error,
        )

    def __repr__(self) -> str:
        return f"DeltaSink({self.place!r}, mode={self.destination.mode!r})"
