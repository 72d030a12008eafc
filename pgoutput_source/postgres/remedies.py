"""Hints that several errors share: what to do next, as SQL or as a command."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Final

ONE_PROCESS: Final = "only one process can stream from a slot: stop the other one, or use a slot each"
"""The remedy for a slot in use."""

NO_POOLER: Final = (
    "there seems to be a connection pooler such as PgBouncer, or a load balancer, in between. Replication needs a "
    "direct connection: use PostgreSQL's own host and port"
)
"""The remedy when the peer does not behave like a single PostgreSQL server."""


def quote_name(name: str) -> str:
    """A quoted name, for SQL and for the option publication_names."""
    return '"' + name.replace('"', '""') + '"'


def resync_hint(slot: str) -> str:
    """How to resume after a gap, in the same words everywhere."""
    return (
        f"python -m pgoutput_source resync --slot {slot} --recovery … shows what is missing and how to repair it; "
        "with --yes it makes the flow resume after the gap"
    )


def missing_slot_hint(slot: str, missing: Iterable[str], existing: Sequence[str] = ()) -> str:
    """The SQL to run, in this order: the stream fails if the slot is older than the publication.

    Args:
        slot: The missing slot.
        missing: The publications that are missing too.
        existing: The publications that exist in the database.
    """
    missing = list(missing)
    make = [f"CREATE PUBLICATION {quote_name(name)} FOR ALL TABLES;  -- or FOR TABLE …" for name in missing]
    make.append(f"SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput');")
    rather = f"{_rather(missing, existing)}; otherwise " if missing and existing else ""
    return f"{rather}create the publication first, then the slot, or use create=True:\n  " + "\n  ".join(make)


def missing_publication_hint(slot: str, missing: Sequence[str], existing: Sequence[str] = ()) -> str:
    """A publication must have existed at the slot's position: creating it now does not help an older slot.

    If the database has publications, the name may be a typo. Then the hint does not propose to drop the slot.

    Args:
        slot: The existing slot.
        missing: The missing publications.
        existing: The publications that exist in the database.
    """
    make = [f"CREATE PUBLICATION {quote_name(name)} FOR ALL TABLES;  -- or FOR TABLE …" for name in missing]
    if existing:
        return (
            f"{_rather(missing, existing)}. A publication must be older than the slot; a new one needs a new slot:"
            "\n  " + "\n  ".join([*make, "SELECT pg_create_logical_replication_slot('…', 'pgoutput');"])
        )
    make.append(f"SELECT pg_drop_replication_slot('{slot}');")
    make.append(f"SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput');")
    return (
        "a publication must be older than the slot. Create it, then recreate the slot (what it holds is lost):\n  "
        + "\n  ".join(make)
    )


def newer_publication_hint(slot: str | None) -> str:
    """The publication exists, or did when the stream began, but it is younger than the slot's position."""
    slot = slot or "…"
    return (
        "a publication must be older than the slot, and this one was created, or dropped and recreated, after the "
        "changes that the slot holds. Read these changes with the earlier publication, or give them up: "
        f"SELECT pg_replication_slot_advance('{slot}', pg_current_wal_lsn()). {resync_hint(slot)}"
    )


def skip_hint(slot: str | None) -> str:
    """How to get past a transaction that the server fails to decode."""
    return (
        "it will fail every time. If the cause can't be repaired, skip the transaction and lose its changes: "
        f"SELECT pg_replication_slot_advance('{slot or '…'}', …) to a position after its commit, which pg_walinspect "
        "shows; pg_current_wal_lsn() is after everything committed so far"
    )


def _rather(missing: Sequence[str], existing: Sequence[str]) -> str:
    near = [match[0] for name in missing if (match := difflib.get_close_matches(name, existing, 1))]
    shown = ", ".join(map(repr, existing[:_SHOWN])) + (f" and {len(existing) - _SHOWN} more" * (len(existing) > _SHOWN))
    meant = f"did you mean {' and '.join(map(repr, near))}? " if near else ""
    return f"{meant}the publications of this database are {shown}"


_SHOWN: Final = 20  # names in one text
