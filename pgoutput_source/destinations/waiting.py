"""How far a destination is as a whole, and `wait_for`, which waits until it is far enough.

    spool/complete.json    by slot, the position before which everything is at the destination

A destination that many can read keeps the same in a place of its own: PostgreSQL in `pgoutput.complete`.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pgoutput_source.destinations.postgres import PostgresDestination
from pgoutput_source.errors import ConfigurationError, NotReached
from pgoutput_source.files import explained, local_path
from pgoutput_source.protocol.wire import Lsn

_FILE: Final = "complete.json"
_PAUSE: Final = 0.05  # seconds between two looks


def note(folder: Path, origin: tuple[str, ...], lsn: int) -> None:
    """Note in a spool that everything before `lsn` is at the destination.

    It is not synced: after a crash an older position is there, which is true as well.
    """
    with explained("can't write to", folder):
        known = dict(noted(folder))
        known[json.dumps(origin)] = lsn
        path = folder / f"{_FILE}.writing-{os.getpid()}"
        path.write_text(json.dumps(known))
        path.replace(folder / _FILE)


def noted(folder: Path) -> Mapping[str, int]:
    """What a spool says, by origin: system, database and slot as JSON."""
    with explained("can't read", folder):
        try:
            text = (folder / _FILE).read_text()
        except FileNotFoundError:
            return {}
    try:
        return {str(origin): int(lsn) for origin, lsn in json.loads(text).items()}
    except (ValueError, AttributeError):
        return {}  # cut off by a crash of the machine; the next position comes


def wait_for(
    place: str | Path, lsn: Lsn | str, *, timeout: float = 30.0, slot: str | None = None, **options: Any
) -> Lsn:
    """Wait until everything that committed before `lsn` can be read at a destination; gives how far it is.

    Take `lsn` from the source after the commit, with ``SELECT pg_current_wal_lsn()``. It is reached whether or not the
    transaction changed a published table, and also if nothing is written afterwards. What may be missing are tables
    that are parked. While an initial copy runs nothing is reached, because not all rows are there. In a cluster of
    several processes it works if the sink is in the process of the source.

    Args:
        place: The spool of a running replication, on the same machine; or, for one into PostgreSQL, the connection
            string of that database.
        lsn: The position.
        timeout: Seconds to wait.
        slot: Which one, if several replications write to the same database.
        options: Arguments of `PostgresDestination`, such as `schema`.

    Raises:
        NotReached: It was not reached in time.
        ConfigurationError: Several replications write there, and no slot is named.
        ServerError, SinkError: The place can't be read.

    Example:
        >>> wait_for("/no/such/spool", "0/16B3748", timeout=0)
        Traceback (most recent call last):
        pgoutput_source.errors.NotReached: /no/such/spool: 0/16B3748 is not reached, nothing is known of it yet
        hint: ...
    """
    wanted, deadline = Lsn(lsn), time.monotonic() + timeout
    server = isinstance(place, str) and re.match(r"postgres(ql)?://|\s*[a-z_]+\s*=", place) is not None
    destination = PostgresDestination(str(place), mode="mirror", **options) if server else None
    folder = local_path("." if server else place)
    shown = repr(destination) if destination is not None else str(place)
    try:
        while True:
            known = noted(folder) if destination is None else destination.completed()
            found = {origin: at for origin, at in known.items() if slot in (None, json.loads(origin)[-1])}
            if len(found) > 1:
                slots = sorted(json.loads(origin)[-1] for origin in found)
                raise ConfigurationError(
                    f"{shown} has changes of several slots", hint=f"slot= one of {', '.join(slots)}"
                )
            at = Lsn(max(found.values(), default=0))
            if at >= wanted:
                return at
            if time.monotonic() >= deadline:
                far = f"it is at {at}" if found else "nothing is known of it yet"
                raise NotReached(
                    f"{shown}: {wanted} is not reached, {far}",
                    hint="look whether the replication runs, or copies tables; a longer epoch or max_age takes longer",
                )
            time.sleep(min(_PAUSE, max(0.0, deadline - time.monotonic())))
    finally:
        if destination is not None:
            destination.close()
