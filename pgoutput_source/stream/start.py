"""Compares a resume state with a slot at the start: the result is the positions to resume from, or one clear error.

    no state                 resume from the slot's position
    state = slot             resume
    state ahead of slot      resume, and skip what the server sends again
    slot ahead of state      `SlotAhead`: the slot was moved or recreated, and changes are missing
    slot absent or lost      `SlotNotFound`, `SlotLost`: the same; `resync` shows how much is missing
    another history          `StateError`: the server never had what was delivered

`begin` does all of it for a session. Nothing here drops or moves anything, and only `create=True` creates something.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from pgoutput_source.changes.schema import Position
from pgoutput_source.copy.ledger import reach
from pgoutput_source.errors import (
    ConfigurationError,
    ConnectionFailed,
    SlotAhead,
    SlotLost,
    SlotNotFound,
    StateError,
    check_version,
)
from pgoutput_source.postgres import checks, connection, creation
from pgoutput_source.postgres.connection import Connection
from pgoutput_source.postgres.publications import create_publications
from pgoutput_source.postgres.published import check_tables
from pgoutput_source.postgres.remedies import resync_hint
from pgoutput_source.postgres.slots import SlotState, slot_state
from pgoutput_source.postgres.system import System, current_lsn, identify
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream.walsender import Walsender, timeline_end

logger = logging.getLogger(__name__)

State = dict[str, Any]
"""A resume state: builtins only, with the version of its shape under "v"."""

STATE_VERSION: Final = 1

START_AFRESH: Final = (
    "the output has changes that this server does not have: start afresh, with a new recovery folder and new output "
    "folders"
)
"""The remedy when the server has another history."""

_STARTING: Final = 60.0  # seconds


@dataclass(frozen=True, slots=True)
class Start:
    """Where a session starts.

    Attributes:
        system: The database system.
        position: The last change that an earlier session delivered; None if unknown.
        acknowledged: Everything before it was delivered and is durable.
        until: Where a bounded run ends; None if it has no end.
    """

    system: System
    position: Position | None
    acknowledged: Lsn
    until: Lsn | None


def begin(
    dsn: str,
    settings: SourceSettings,
    state: State | None = None,
    tables: Iterable[tuple[str, str]] = (),
    patterns: Iterable[str] = (),
) -> Start:
    """Connect, create what is missing if asked to, check everything a stream needs, and resume from `state`.

    Args:
        dsn: A libpq connection string or URL.
        settings: Which slot and which publications.
        state: The resume state; None for none.
        tables: Tables that must be published, as schema and name.
        patterns: Patterns that should match some published table.

    Raises:
        ServerError: The server, the slot or a publication can't be used, see `checks.check` and `check_tables`.
        SlotAhead: The slot was moved past the state.
        StateError: The state can't be used, or belongs to another server or history.
    """
    only = settings.snapshot == "only"
    if state is not None and bool(state.get("only")) != only:
        raise ConfigurationError(
            f"snapshot={settings.snapshot!r}: an earlier run with this recovery folder "
            + ("followed a slot" if only else "had snapshot='only', and followed none"),
            hint="use another recovery folder, and other folders for the output",
        )
    if only:
        return _begin_only(dsn, settings, state, tables, patterns)
    with connect_when_started(dsn, settings) as conn:
        if settings.create and state is None:
            creation.create(conn, settings)
        slot = check_with_state(conn, dsn, settings, state)
        once = [(schema, name) for schema, name in (state or {}).get("taken", ())]
        check_tables(conn, settings, tables, once=once, patterns=patterns)
        system = identify(conn)
        until = stop_at(conn, settings)
    position, acknowledged = reconcile(state, settings, slot, system)
    if state is not None:
        delivered = last_delivered(position, reach(state.get("copy")))
        acknowledged = on_timeline(dsn, state["timeline"], system.timeline, delivered, acknowledged)
    return Start(system, position, acknowledged, until)


def _begin_only(
    dsn: str, settings: SourceSettings, state: State | None, tables: Iterable[tuple[str, str]], patterns: Iterable[str]
) -> Start:
    """The start of a session whose slot is made by its own connection: nothing is resumed but the ledger."""
    with connect_when_started(dsn, settings) as conn:
        if settings.create and state is None:
            create_publications(conn, settings.publication, None)
        checks.check_server(conn)
        checks.check_options(conn, settings)
        checks.check_publications(conn, settings)
        slot = slot_state(conn, settings.slot)
        if slot is not None and not slot.temporary:
            raise ConfigurationError(
                f"snapshot='only' creates a temporary slot {settings.slot!r}, but there is a slot of this name",
                hint="name a slot that does not exist",
            )
        check_tables(conn, settings, tables, patterns=patterns)
        system = identify(conn)
    if state is not None:
        positions(state, system)
    return Start(system, None, system.lsn, None)


def connect_when_started(dsn: str, settings: SourceSettings) -> Connection:
    """Connect, and wait for a server that is starting up, for example after a crash.

    Raises:
        ConnectionFailed: The connection failed.
    """
    deadline = time.monotonic() + min(_STARTING, settings.reconnect_seconds)
    while True:
        try:
            return connection.connect(dsn)
        except ConnectionFailed as e:
            if e.sqlstate != "57P03" or time.monotonic() > deadline:
                raise
            logger.info("%s; waiting", e.message)
            time.sleep(0.5)


def check_with_state(conn: Connection, dsn: str, settings: SourceSettings, state: State | None) -> SlotState:
    """`checks.check` for a flow. If the flow has a state, an absent slot means lost changes, and the error says so.

    Raises:
        SlotNotFound, SlotLost: The error says what is lost.
        ServerError: Whatever else `checks.check` finds.
    """
    try:
        return checks.check(conn, settings)
    except (SlotNotFound, SlotLost) as e:
        if not isinstance(state, dict) or "lsn" not in state:
            raise
        system = identify(conn)
        message = (
            f"{e.message}, and the recovery folder ends at {Lsn(state['lsn'])}: what was committed after that is lost "
            "for this flow"
        )
        hint = f"it was dropped. {resync_hint(settings.slot)}" if isinstance(e, SlotNotFound) else e.hint
        if state.get("system") == system.system_id and state.get("timeline", 0) < system.timeline:
            end = timeline_end(dsn, state["timeline"], system.timeline)
            if end is not None:
                message += f". The server is on timeline {system.timeline}, which left timeline {state['timeline']} "
                message += f"at {end}"
                hint = (
                    "this server is a promoted standby. A standby has the primary's slots only from PostgreSQL 17 on, "
                    f"and only those created with failover. {resync_hint(settings.slot)}"
                )
        error = type(e)(message, hint=hint)
        error.sqlstate = e.sqlstate
        raise error from e


def reconcile(
    state: State | None, settings: SourceSettings, slot: SlotState, system: System
) -> tuple[Position | None, Lsn]:
    """The last delivered change, and the position that is acknowledged already.

    Raises:
        StateError: The state is of another version, or belongs to another slot or database system.
        SlotAhead: The slot was moved past the state, so this flow lost the changes in between.
    """
    confirmed = slot.confirmed_flush_lsn or Lsn(0)
    if state is None:
        return None, confirmed
    position, lsn = positions(state, system)
    if confirmed > lsn:
        raise SlotAhead(
            f"slot {settings.slot!r} was moved to {confirmed}, past {lsn}, the last position in the recovery folder",
            hint="somebody else consumed from the slot or recreated it, or an old recovery folder was restored: the "
            f"changes in between are gone from the slot. {resync_hint(settings.slot)}",
        )
    return position, lsn


def stop_at(conn: Connection, settings: SourceSettings) -> Lsn | None:
    """Where a bounded run ends, from `settings.until`; None if it has no end."""
    if settings.until is None:
        return None
    return current_lsn(conn) if settings.until == "current" else Lsn(settings.until)


def positions(state: State, system: System) -> tuple[Position | None, Lsn]:
    """The last change that a state covers, and the position before which it covers everything.

    Raises:
        StateError: The state is of another version, or belongs to another database system.
    """
    check_version(state, STATE_VERSION, "the source")
    if state["system"] != system.system_id:
        raise StateError(
            f"the resume state belongs to database system {state['system']}, but this server is {system.system_id}",
            hint="check the connection; for another database use another recovery folder",
        )
    position = None
    if state["commit_lsn"] is not None:
        position = Position(Lsn(state["commit_lsn"]), state["seq"])
    return position, Lsn(state["lsn"])


def last_delivered(position: Position | None, copied: int) -> Position | None:
    """The last delivered position: of the stream, or of copied rows, which show the server up to `copied`."""
    if not copied:
        return position
    return max(position or Position(Lsn(0), 0), Position(Lsn(copied), 0))


def on_timeline(dsn: str, was: int, now: int, position: Position | None, durable: Lsn, *, patience: float = 0.0) -> Lsn:
    """The position on timeline `now` that corresponds to `durable` on `was`, the timeline before a failover.

    While the server is away it retries for `patience` seconds.

    Raises:
        StateError: Some delivered changes are not on this server's timeline.
    """
    if was == now:
        return durable
    end = timeline_end(dsn, was, now, patience=patience) if was < now else None
    if end is None:
        raise StateError(
            f"the resume state is of timeline {was}, but the server's timeline {now} does not descend from it",
            hint="this is not the server that took over from the former one: check where host and port lead",
        )
    if position is not None and position.commit_lsn >= end:
        raise StateError(
            f"changes up to {position} were delivered on timeline {was}, but the server's timeline {now} left it at "
            f"{end}: the promoted server never had all of them",
            hint="the output has changes that do not exist on the server: start afresh. From PostgreSQL 17 on "
            "synchronized_standby_slots holds changes back until the standby has them",
        )
    logger.warning("the server is on timeline %d now, which left timeline %d at %s", now, was, end)
    # Beyond the end there can only be WAL that was read but held nothing for us.
    return min(durable, end)


def admit(walsender: Walsender, system_id: str, seen: Lsn) -> None:
    """Check that a connection leads to a server from which the stream can resume.

    Args:
        walsender: The connection, which does not stream yet.
        system_id: The database system that it must be; empty for any.
        seen: Everything before it was processed; 0 if nothing is known.

    Raises:
        StateError: It is another database system, or has lost WAL.
        SlotAhead: The slot was moved or recreated meanwhile.
        ConnectionFailed: It is a standby that has not yet replayed that far; a retry helps.
    """
    slot, end = walsender.slot, walsender.wal_end
    if system_id and walsender.system_id != system_id:
        raise StateError(
            f"slot {slot!r}: after the connection was lost, another database system answered "
            f"({walsender.system_id}, before {system_id})",
            hint="check where host and port lead; to use the other system, start afresh without the resume state",
        )
    if seen > end and walsender.standby:
        late = ConnectionFailed(f"slot {slot!r}: the standby has replayed only up to {end}, but {seen} was seen before")
        late.sqlstate, late.transient = "57P03", True
        raise late
    if seen > end:
        raise StateError(
            f"slot {slot!r}: changes up to {seen} were seen, but the server's WAL ends at {end}: it lost some, or was "
            "restored from a backup",
            hint=START_AFRESH,
        )
    if seen and walsender.confirmed is not None and walsender.confirmed > seen:
        raise SlotAhead(
            f"slot {slot!r} was moved to {walsender.confirmed}, past {seen}, the last acknowledged position",
            hint="somebody else consumed from the slot or recreated it meanwhile: the changes in between are gone "
            f"from it. {resync_hint(slot)}",
        )
