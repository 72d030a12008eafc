"""What to do next, as SQL or as a command: the hints that several errors share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

ONE_PROCESS: Final = "only one process can stream from a slot: stop the other one, or use a slot each"
"""The remedy for a slot in use."""

NO_POOLER: Final = (
    "a connection pooler such as PgBouncer, or a load balancer, seems to stand in between. Replication needs the "
    "server itself: connect to PostgreSQL's own host and port"
)
"""The remedy where what answers does not behave like one PostgreSQL server."""


def quote_name(name: str) -> str:
    """A name as PostgreSQL's SQL and its list of publications want it."""
    return '"' + name.replace('"', '""') + '"'


def resync_hint(slot: str) -> str:
    """How to go on after a gap, the same words wherever there is one."""
    return (
        f"python -m pgoutput_source resync --slot {slot} --recovery … says what is missing and how to repair it, and "
        "with --yes has the flow go on after the gap"
    )


def missing_slot_hint(slot: str, publications: Iterable[str]) -> str:
    """The SQL to run, in the order that matters: the stream fails if the slot is older than the publication."""
    make = [f"CREATE PUBLICATION {quote_name(name)} FOR ALL TABLES;  -- or FOR TABLE …" for name in publications]
    make.append(f"SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput');")
    return "the publication first, then the slot, or use create=True:\n  " + "\n  ".join(make)


def missing_publication_hint(slot: str | None, publications: Iterable[str]) -> str:
    """A publication must have existed at the slot's position: creating it now does not help an older slot."""
    return (
        "a publication must be older than the slot. Create it, then recreate the slot (what it holds is lost):\n  "
        + "\n  ".join(
            [
                *(f"CREATE PUBLICATION {quote_name(name)} FOR ALL TABLES;  -- or FOR TABLE …" for name in publications),
                f"SELECT pg_drop_replication_slot('{slot or '…'}');",
                f"SELECT pg_create_logical_replication_slot('{slot or '…'}', 'pgoutput');",
            ]
        )
    )
