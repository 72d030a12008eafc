"""`PostgresSink`: the tables of a publication in another PostgreSQL database."""

from __future__ import annotations

import pgoutput_source.dataflow.needs_bytewax  # noqa: F401

# isort: split
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path

from pgoutput_source.destinations.base import Mode
from pgoutput_source.destinations.delivery import OnTableError
from pgoutput_source.destinations.policies import SchemaPolicy
from pgoutput_source.destinations.postgres import PostgresDestination
from pgoutput_source.destinations.targets import Targets
from pgoutput_source.sinks.tables import Keys, TableSink


class PostgresSink(TableSink):
    """All tables of a stream in another PostgreSQL database, exactly once with recovery (``-r``).

    All tables of an epoch appear in one transaction. Every value arrives: as text, which the server's own input
    functions read. Tables are created with the types of the source; a type that the destination lacks becomes its base
    type or text. They follow ALTER TABLE: a column that is dropped stays and gets no more values, a renamed one keeps
    its values, and what can't be known of older rows is named in `_unchanged`.

    - mode "mirror": a table holds what the source's table holds after each transaction. `_commit_lsn` is where each row
      changed last. It needs a key: the replica identity's, or one that `key` names.
    - mode "history": every change is a row, with the metadata columns; `_before` and `_raw` are jsonb.

    Args:
        dsn: The database, as libpq reads it. Its role may create schemas and tables.
        mode: "mirror" or "history".
        into: Where a table goes: schema and name, with ``{schema}`` and ``{table}`` in them.
        tables: Patterns of the tables to take, all by default.
        exclude: Patterns of the tables to leave out.
        key: In mode "mirror", by table, the columns that identify a row.
        spool: A folder for what waits, beside the recovery folder.
        max_age: How long a committed epoch may wait for others to be applied with it.
        schema: Where the sink keeps its own tables, `published` and `complete`.
        schema_policy: What follows from ALTER TABLE at the source: a `SchemaPolicy`, or its names and values.
        on_table_error: What happens when the database refuses a table. "stop" stops the flow. "park" keeps what comes
            of the table in the spool, in order, goes on with the others, and tries the table again at each start.

    Raises:
        ConfigurationError: An option has no meaning.

    Example:
        >>> PostgresSink("postgresql://localhost/reporting", mode="mirror", spool="recovery/spool")
        PostgresSink('{schema}.{table}', mode='mirror')
    """

    def __init__(
        self,
        dsn: str,
        *,
        mode: Mode,
        spool: str | Path,
        into: str = "{schema}.{table}",
        tables: Iterable[str] = ("*",),
        exclude: Iterable[str] = (),
        key: Keys | None = None,
        max_age: timedelta = timedelta(0),
        schema: str = "pgoutput",
        schema_policy: SchemaPolicy | Mapping[str, str] | None = None,
        on_table_error: OnTableError = "stop",
    ) -> None:
        super().__init__(
            PostgresDestination(dsn, mode=mode, schema=schema, policy=SchemaPolicy.of(schema_policy)),
            Targets(into, tables=tables, exclude=exclude),
            spool=spool,
            max_age=max_age,
            key=key,
            on_table_error=on_table_error,
        )

    def __repr__(self) -> str:
        return f"PostgresSink({self.targets.template!r}, mode={self.destination.mode!r})"
