"""`python -m pgoutput_source replicate`: every table of a publication into another store, without code.

It is the flow in `flows/replicate.py`, with its checks before it starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Final, NamedTuple

from psycopg import sql

from pgoutput_source.changes.schema import TableName
from pgoutput_source.copy.requests import published_names
from pgoutput_source.destinations.replication import Replication
from pgoutput_source.embedded import connection_string
from pgoutput_source.errors import ConfigurationError, SlotNotFound
from pgoutput_source.postgres import checks
from pgoutput_source.postgres.connection import Connection, connect
from pgoutput_source.postgres.creation import create_publication_and_slot
from pgoutput_source.postgres.publications import find_publications
from pgoutput_source.postgres.published import remarks
from pgoutput_source.postgres.slots import slot_state
from pgoutput_source.settings import SourceSettings

logger = logging.getLogger(__name__)

NAME: Final = "replicate"
"""The slot and the publication, where nothing else is said."""

_SHOWN: Final = 20

# Without names: what FOR ALL TABLES publishes. A partition counts by itself.
_TABLES: Final = """
SELECT n.nspname::text, c.relname::text, c.relreplident::text,
       coalesce(bool_or(CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END), false),
       (SELECT array_agg(a.attname::text ORDER BY array_position(p.indkey::int2[], a.attnum))
          FROM pg_index AS p JOIN pg_attribute AS a ON a.attrelid = p.indrelid AND a.attnum = ANY (p.indkey::int2[])
         WHERE p.indrelid = c.oid AND p.indisprimary)
  FROM pg_class AS c
  JOIN pg_namespace AS n ON n.oid = c.relnamespace
  LEFT JOIN pg_index AS i ON i.indrelid = c.oid AND i.indislive
 WHERE CASE WHEN %(schemas)s::text[] IS NULL
       THEN c.relkind = 'r' AND c.relpersistence = 'p' AND c.oid >= 16384 AND n.nspname <> 'information_schema'
       ELSE c.relkind IN ('r', 'p')
            AND (n.nspname, c.relname) IN (SELECT * FROM unnest(%(schemas)s::text[], %(names)s::text[])) END
 GROUP BY n.nspname, c.oid, c.relname, c.relreplident ORDER BY 1, 2
"""


class _Table(NamedTuple):
    """A table that is, or will be, published: `indexed` says whether the key of its replica identity has an index."""

    name: TableName
    identity: str
    indexed: bool
    primary_key: tuple[str, ...]

    @property
    def changeable(self) -> bool:
        """Whether the application may UPDATE and DELETE its rows while it is published."""
        return self.identity == "f" or (self.identity != "n" and self.indexed)

    @property
    def sends_key(self) -> bool:
        """Whether the stream sends a key."""
        return self.identity in "di" and self.indexed


def run(
    settings: SourceSettings,
    replication: Replication,
    *,
    recovery: Path,
    epoch: timedelta = timedelta(seconds=1),
    dry: bool = False,
) -> int:
    """Check, say what will happen, and replicate until a signal comes or `until` is reached; the exit status is 0.

    Args:
        settings: The source.
        replication: What goes where.
        recovery: The recovery folder. It is created if it is missing.
        epoch: How often what was read becomes durable.
        dry: Only check, and say what would happen.

    Raises:
        PgOutputError: Something is missing, or the replication failed.
    """
    import pgoutput_source.dataflow.needs_bytewax  # noqa: F401  (before anything is created)

    # isort: split
    from bytewax import operators as op
    from bytewax.dataflow import Dataflow

    from pgoutput_source import operators as cdc
    from pgoutput_source.dataflow.run import run as run_flow
    from pgoutput_source.dataflow.source import PgOutputSource
    from pgoutput_source.sinks.addresses import sink_of, spool_beside
    from pgoutput_source.sinks.tables import TableSink

    replication = replication.model_copy(update={"spool": replication.spool or spool_beside(recovery)})
    sink = sink_of(replication)  # what is wrong with it is said before anything is created

    def reach(table: TableName) -> None:
        """Whether the destination can be used, and has in this table's place what this command writes."""
        if isinstance(sink, TableSink) and (target := sink.targets.of(table)) is not None:
            sink.destination.reached(target)
            sink.destination.close()

    dsn = connection_string(settings.dsn)
    with connect(dsn) as conn:
        replication, taken = _prepared(conn, settings, replication, reach, dry=dry)
    copied = ", rows that are there first" if settings.snapshot != "never" else ""
    logger.info(
        "%s of %d tables of %s to %s%s", replication.mode, len(taken), settings.server, replication.place, copied
    )
    for table, target in list(taken.items())[:_SHOWN]:
        logger.info("  %s → %s", table, target)
    if len(taken) > _SHOWN:
        logger.info("  and %d more", len(taken) - _SHOWN)
    logger.info("state in %s, what waits in %s", recovery, replication.spool)
    if dry:
        return 0
    flow = Dataflow(NAME)
    source = PgOutputSource(**{**settings.model_dump(), "dsn": dsn, "create": False})
    cdc.replicate("replica", op.input("postgres", flow, source), replication)
    run_flow(flow, recovery=recovery, epoch=epoch)
    return 0


def _prepared(
    conn: Connection,
    settings: SourceSettings,
    replication: Replication,
    reach: Callable[[TableName], object],
    *,
    dry: bool,
) -> tuple[Replication, dict[TableName, str]]:
    """Check everything, and only then create what is missing: the replication with its keys, and where tables go."""
    fresh = settings.create and slot_state(conn, settings.slot) is None
    if not fresh:
        try:
            checks.check(conn, settings)
        except SlotNotFound as e:
            raise SlotNotFound(e.message, hint=f"--create does this for you: {e.hint}") from None
    unpublished = fresh and len(find_publications(conn, settings.publication)) < len(set(settings.publication))
    tables = _tables(conn, None if unpublished else published_names(conn, settings.publication))
    taken = _targets([table.name for table in tables], replication)
    chosen = [table for table in tables if table.name in taken]
    if replication.mode == "mirror":
        replication = replication.model_copy(update={"key": {**_keys(chosen, replication), **replication.key}})
    for table in list(taken)[:1]:
        reach(table)
    if fresh:
        checks.check_server(conn)
        everything = len(chosen) == len(tables)
        if unpublished:
            _check_changeable(chosen)
            which = "all tables" if everything else f"{len(chosen)} tables; those that are created later are left out"
            logger.info("publication %s: to be created for %s", ", ".join(settings.publication), which)
        logger.info("slot %s: to be created", settings.slot)
        if not dry:
            names = None if everything else [sql.Identifier(*table.name).as_string(conn) for table in chosen]
            create_publication_and_slot(conn, slot=settings.slot, publications=settings.publication, tables=names)
            checks.check(conn, settings)
    if not (fresh and dry):
        for remark in remarks(conn, settings):
            logger.info("note: %s\n  hint: %s", remark.text, remark.hint)
    return replication, taken


def _targets(tables: list[TableName], replication: Replication) -> dict[TableName, str]:
    """Where each table goes that is taken."""
    found = {table: target for table in tables if (target := replication.target_of(table)) is not None}
    if tables and not found:
        raise ConfigurationError(
            "tables and exclude leave no table",
            hint=f"published are {', '.join(map(str, tables[:_SHOWN]))}; patterns match schema and name: 'public.*'",
        )
    for what in ("key", "mask", "leave_out"):
        for name in getattr(replication, what):
            if TableName.parse(name) not in tables:
                raise ConfigurationError(
                    f"{what}: {name} is not published", hint=f"published are {', '.join(map(str, tables[:_SHOWN]))}"
                )
    return found


def _tables(conn: Connection, names: list[TableName] | None) -> list[_Table]:
    schemas = None if names is None else [name.namespace for name in names]
    tables = None if names is None else [name.name for name in names]
    rows = conn.execute(_TABLES, {"schemas": schemas, "names": tables}).fetchall()
    return [
        _Table(TableName(schema, name), identity, indexed, tuple(key or ()))
        for schema, name, identity, indexed, key in rows
    ]


def _keys(tables: list[_Table], replication: Replication) -> dict[str, tuple[str, ...]]:
    """The columns that identify a row, of tables whose stream does not say: those of the primary key."""
    silent = [table for table in tables if not table.sends_key and str(table.name) not in replication.key]
    keyless = [table for table in silent if not table.primary_key]
    if keyless:
        first = keyless[0]
        raise ConfigurationError(
            f"a mirror needs a key, and PostgreSQL sends none for {', '.join(str(table.name) for table in keyless)}",
            hint=f"ALTER TABLE {first.name} ADD PRIMARY KEY …, or REPLICA IDENTITY USING INDEX …; or name the columns "
            f"that identify a row: --key {first.name}=id; or leave it out: --exclude '{first.name}'",
        )
    for table in silent:
        logger.info("%s: its rows are told by its primary key (%s)", table.name, ", ".join(table.primary_key))
    return {str(table.name): table.primary_key for table in silent}


def _check_changeable(tables: list[_Table]) -> None:
    """A publication makes UPDATE and DELETE fail on tables without a replica identity: for the application."""
    fixed = [table.name for table in tables if not table.changeable]
    if fixed:
        raise ConfigurationError(
            f"a publication of {', '.join(map(str, fixed[:_SHOWN]))} would make every UPDATE and DELETE there fail: "
            "without a key they have no replica identity",
            hint=f"ALTER TABLE {fixed[0]} ADD PRIMARY KEY …, or REPLICA IDENTITY FULL; or leave it out: "
            f"--exclude '{fixed[0]}'; or, if its rows never change, create the publication yourself",
        )
