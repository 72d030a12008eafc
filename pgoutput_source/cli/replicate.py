"""`python -m pgoutput_source replicate`: every table of a publication into another store, without code.

It is the flow in `flows/replicate.py`, with its checks before it starts.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from typing import Final

from pgoutput_source.changes.schema import TableName
from pgoutput_source.copy.requests import published_names
from pgoutput_source.destinations.replication import Replication
from pgoutput_source.embedded import connection_string
from pgoutput_source.errors import ConfigurationError, SlotNotFound
from pgoutput_source.postgres import checks
from pgoutput_source.postgres.connection import Connection, connect
from pgoutput_source.postgres.creation import create
from pgoutput_source.postgres.published import remarks
from pgoutput_source.postgres.slots import slot_state
from pgoutput_source.settings import SourceSettings

logger = logging.getLogger(__name__)

NAME: Final = "replicate"
"""The slot and the publication, where nothing else is said."""

_SHOWN: Final = 20

# The key that the stream sends: of the replica identity's index, or the primary key. A partition counts by itself.
_KEYLESS: Final = """
SELECT n.nspname::text, c.relname::text, c.relreplident::text FROM pg_class AS c
  JOIN pg_namespace AS n ON n.oid = c.relnamespace
 WHERE (n.nspname, c.relname) IN (SELECT * FROM unnest(%s::text[], %s::text[])) AND c.relkind IN ('r', 'p')
   AND (c.relreplident IN ('f', 'n') OR NOT EXISTS (
       SELECT FROM pg_index AS i WHERE i.indrelid = c.oid
          AND CASE c.relreplident WHEN 'i' THEN i.indisreplident ELSE i.indisprimary END))
 ORDER BY 1, 2
"""


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

    replication = replication.model_copy(update={"spool": replication.spool or spool_beside(recovery)})
    sink_of(replication)  # what is wrong with it is said before anything is created
    dsn = connection_string(settings.dsn)
    with connect(dsn) as conn:
        if settings.create and slot_state(conn, settings.slot) is None:
            logger.info("publication %s and slot %s: to be created", ", ".join(settings.publication), settings.slot)
            if dry:
                return 0
            create(conn, settings)
        try:
            checks.check(conn, settings)
        except SlotNotFound as e:
            raise SlotNotFound(e.message, hint=f"--create does this for you: {e.hint}") from None
        tables = published_names(conn, settings.publication)
        for remark in remarks(conn, settings):
            logger.info("note: %s\n  hint: %s", remark.text, remark.hint)
        taken = _targets(tables, replication)
        if replication.mode == "mirror":
            _check_keys(conn, [table for table in taken if str(table) not in replication.key])
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


def _check_keys(conn: Connection, tables: list[TableName]) -> None:
    schemas, names = [t.namespace for t in tables], [t.name for t in tables]
    keyless = [(TableName(s, n), identity) for s, n, identity in conn.execute(_KEYLESS, (schemas, names)).fetchall()]
    if keyless:
        which = ", ".join(str(table) for table, _ in keyless)
        first, identity = keyless[0]
        raise ConfigurationError(
            f"a mirror needs a key, and PostgreSQL sends none for {which}",
            hint=f"ALTER TABLE {first} ADD PRIMARY KEY …, or REPLICA IDENTITY USING INDEX …"
            + (", or REPLICA IDENTITY DEFAULT" if identity != "d" else "")
            + f"; or name the columns that identify a row: --key {first}=id; or leave it out: --exclude '{first}'",
        )
