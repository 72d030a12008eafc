"""What a start makes of a resume state and a slot: the positions to go on from, or one clear error.

    no state                 the slot is the only memory
    state = slot             go on
    state ahead of slot      go on; what comes again is dropped
    state behind the slot    `SlotAhead`: the slot was moved, or made anew, and changes are missing
    slot absent, lost        `SlotNotFound`, `SlotLost`: the same, and `resync` says how much
    another history          `StateError`: the server never had what was given out

Nothing here creates, drops or moves anything.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final

from pgoutput_source.changes.schema import Position
from pgoutput_source.errors import ConnectionFailed, SlotAhead, SlotLost, SlotNotFound, StateError
from pgoutput_source.postgres import checks
from pgoutput_source.postgres import connection as postgres
from pgoutput_source.postgres.connection import Connection, resync_hint
from pgoutput_source.postgres.slots import SlotState
from pgoutput_source.postgres.system import System, current_lsn, identify
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream.walsender import Walsender, timeline_end

logger = logging.getLogger(__name__)

State = dict[str, Any]
"""A resume state: builtins only, with the version of its shape under "v"."""

STATE_VERSION: Final = 1

START_AFRESH: Final = (
    "what was written downstream has changes that this server does not have: start afresh, with a new recovery folder "
    "and new folders for the output"
)
"""The remedy where the server's history is another one."""

_STARTING: Final = 60.0  # seconds


def connect(dsn: str, settings: SourceSettings) -> Connection:
    """A connection; a server that is just starting up, as after a crash, is waited for.

    Raises:
        ConnectionFailed: It can't be had.
    """
    deadline = time.monotonic() + min(_STARTING, settings.reconnect_seconds)
    while True:
        try:
            return postgres.connect(dsn)
        except ConnectionFailed as e:
            if e.sqlstate != "57P03" or time.monotonic() > deadline:
                raise
            logger.info("%s; waiting", e.message)
            time.sleep(0.5)


def check(conn: Connection, dsn: str, settings: SourceSettings, state: State | None) -> SlotState:
    """`checks.check`; for a flow that has a state the absence of its slot means more than for a new one.

    Raises:
        SlotNotFound, SlotLost: With what is lost.
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
            "to this flow"
        )
        hint = f"it was dropped. {resync_hint(settings.slot)}" if isinstance(e, SlotNotFound) else e.hint
        if state.get("system") == system.system_id and state.get("timeline", 0) < system.timeline:
            end = timeline_end(dsn, state["timeline"], system.timeline)
            if end is not None:
                message += f". The server is on timeline {system.timeline}, which left timeline {state['timeline']} "
                message += f"at {end}"
                hint = (
                    "this server is a promoted standby, and slots follow only from PostgreSQL 17 on, if they were "
                    f"made with failover. {resync_hint(settings.slot)}"
                )
        error = type(e)(message, hint=hint)
        error.sqlstate = e.sqlstate
        raise error from e


def reconcile(
    state: State | None, settings: SourceSettings, slot: SlotState, system: System
) -> tuple[Position | None, Lsn]:
    """The position to go on behind, and the position that is acknowledged already.

    Raises:
        StateError: The state is of another shape, slot or database system.
        SlotAhead: The slot was moved past the state, so changes in between are lost to this flow.
    """
    confirmed = slot.confirmed_flush_lsn or Lsn(0)
    if state is None:
        return None, confirmed
    position, lsn = positions(state, system)
    if confirmed > lsn:
        raise SlotAhead(
            f"slot {settings.slot!r} was moved to {confirmed}, past {lsn}, the last position in the recovery folder",
            hint="somebody else consumed from the slot or made it anew, or an old recovery folder was restored: the "
            f"changes between are gone from the slot. {resync_hint(settings.slot)}",
        )
    return position, lsn


def stop_at(conn: Connection, settings: SourceSettings) -> Lsn | None:
    """Where a bounded run ends, as `settings.until` says it; None if it has no end."""
    if settings.until is None:
        return None
    return current_lsn(conn) if settings.until == "current" else Lsn(settings.until)


def positions(state: State, system: System) -> tuple[Position | None, Lsn]:
    """The last change that a state has seen, and up to where all was.

    Raises:
        StateError: The state is of another shape or database system.
    """
    if not isinstance(state, dict) or state.get("v") != STATE_VERSION:
        raise StateError(
            "the resume state is of another version",
            hint="run the version that wrote it, or start afresh with a new recovery folder",
        )
    if state["system"] != system.system_id:
        raise StateError(
            f"the resume state belongs to database system {state['system']}, this server is {system.system_id}",
            hint="check the connection; for another database use another recovery folder",
        )
    position = None
    if state["commit_lsn"] is not None:
        position = Position(Lsn(state["commit_lsn"]), state["seq"])
    return position, Lsn(state["lsn"])


def on_timeline(dsn: str, was: int, now: int, position: Position | None, durable: Lsn) -> Lsn:
    """The same position on timeline `now` as `durable` on timeline `was`, which the server, or another, was on before.

    Raises:
        StateError: What was given out did not all happen on this server's timeline.
    """
    if was == now:
        return durable
    end = timeline_end(dsn, was, now) if was < now else None
    if end is None:
        raise StateError(
            f"the resume state is of timeline {was}, and the server's timeline {now} does not descend from it",
            hint="this is not the server that took over from the former one: check where host and port lead to",
        )
    if position is not None and position.commit_lsn >= end:
        raise StateError(
            f"changes up to {position} were given out on timeline {was}, and the server's timeline {now} left it at "
            f"{end}: the promoted server never had all of them",
            hint="what was written downstream has changes that do not exist: start afresh. From PostgreSQL 17 on "
            "synchronized_standby_slots keeps changes back until the standby has them",
        )
    logger.warning("the server is on timeline %d now, which left timeline %d at %s", now, was, end)
    # Only WAL that was looked through, and had nothing for us, may have been beyond the end.
    return min(durable, end)


def admit(walsender: Walsender, system_id: str, seen: Lsn) -> None:
    """Whether a connection leads to a server that can go on.

    Args:
        walsender: The connection, which does not stream yet.
        system_id: Of the database system that it must be; empty for any.
        seen: Up to here everything is done with; 0 if nothing is known.

    Raises:
        StateError: It is another database system, or has lost WAL.
        SlotAhead: The slot was moved, or made anew, meanwhile.
        ConnectionFailed: It is a standby that has not yet replayed what it had; it passes.
    """
    slot, end = walsender.slot, walsender.wal_end
    if system_id and walsender.system_id != system_id:
        raise StateError(
            f"slot {slot!r}: after the connection was lost another database system answered "
            f"({walsender.system_id}, before {system_id})",
            hint="check where host and port lead to; start afresh on the other system with a new resume state",
        )
    if seen > end and walsender.standby:
        late = ConnectionFailed(f"slot {slot!r}: the standby has replayed up to {end}, and {seen} was seen already")
        late.sqlstate, late.transient = "57P03", True
        raise late
    if seen > end:
        raise StateError(
            f"slot {slot!r}: changes up to {seen} were seen, and the server's WAL ends at {end}: it lost some, or was "
            "restored from a backup",
            hint=START_AFRESH,
        )
    if seen and walsender.confirmed is not None and walsender.confirmed > seen:
        raise SlotAhead(
            f"slot {slot!r} was moved to {walsender.confirmed}, past {seen}, the last position that was acknowledged",
            hint="somebody else consumed from the slot or made it anew meanwhile: the changes between are gone from "
            f"it. {resync_hint(slot)}",
        )
