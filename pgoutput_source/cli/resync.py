"""`python -m pgoutput_source resync`: what a flow missed when its slot was lost, and how it resumes after the gap.

A slot that was dropped, invalidated, recreated or moved by another client leaves a gap: the changes between the flow's
state and the slot's position are gone from the slot, and no restart brings them back. The flow refuses to resume. This
command describes the gap. Only with ``--yes`` does it change anything: it recreates the slot if necessary, and moves
the flow's state in the recovery folder to the slot's position. Files, windows and aggregates stay as they are, and the
flow resumes from there. The command is safe to repeat. After an interruption it does the remaining steps.

To repair the gap, add ``--copy``: the flow then copies every published table again. Or compare the tables with what the
flow wrote.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pgoutput_source.copy.requests import published_names, request
from pgoutput_source.dataflow.recovery import TABLES, Tables, part_file, parts, progress, resume_epoch
from pgoutput_source.embedded import connection_string
from pgoutput_source.errors import SlotInUse, SlotLost, StateError
from pgoutput_source.postgres import checks
from pgoutput_source.postgres.connection import Connection, connect
from pgoutput_source.postgres.publications import published_tables
from pgoutput_source.postgres.refusals import explained
from pgoutput_source.postgres.slots import create_slot, slot_state
from pgoutput_source.postgres.system import System, current_lsn, identify, setting
from pgoutput_source.protocol.wire import PG_EPOCH_US, Lsn, pg_datetime
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream import start
from pgoutput_source.stream.start import State


@dataclass(frozen=True, slots=True)
class Gap:
    """What a flow has missed, or will have missed once its slot is recreated.

    Attributes:
        reason: Why there is a gap.
        recreate: Whether the slot must be recreated.
        start: The last position that the flow, or the slot, is known to have reached; None if unknown.
        end: The slot holds everything from here on.
        last_commit: When the last change that the flow saw was committed.
        saved: When the flow's state was last written.
        commit_times: Whether the server records when each row was last written (track_commit_timestamp).
        tables: The tables of the publications now.
    """

    reason: str
    recreate: bool
    start: Lsn | None
    end: Lsn
    last_commit: datetime | None
    saved: datetime | None
    commit_times: bool
    tables: tuple[str, ...]


def run(settings: SourceSettings, folders: Sequence[Path], *, yes: bool, copy: bool = False) -> int:
    """Print what is missing and, with `yes`, make the flow resume after the gap.

    Args:
        settings: Which slot, and where.
        folders: The flow's recovery folder; several if each process of a cluster has its own.
        yes: Whether to change anything.
        copy: Whether the flow is then to copy every published table again, which repairs what the gap left out.

    Returns:
        The exit status: 0 if nothing is missing, or the flow can resume now; 1 if there is a gap and nothing was
        changed.

    Raises:
        StateError: The recovery folder can't be used, or the server never had what the flow has seen.
        PublicationError: A publication is missing: it must be older than the slot.
        SlotMismatch, SlotInUse: The slot can't be used, or a flow reads from it.
    """
    store = RecoveryFolder(folders, settings.slot) if folders else None
    dsn = connection_string(settings.dsn)
    with connect(dsn) as conn:
        gap = find(conn, dsn, settings, store)
        if gap is None:
            print(f"slot {settings.slot}: nothing is missing")
            if store is None:
                print("with --recovery … it is also compared with the flow's state")
            return 0
        print("\n".join(described(settings, gap)))
        if not yes:
            print(f"\nNothing was changed. With --yes {' and '.join(_steps(settings, gap, store, copy=copy))}")
            return 1
        end = reanchor(conn, settings, gap, store)
        tables = published_names(conn, settings.publication) if copy else []
        if tables:
            request(conn, settings, tables)
    print(f"\nslot {settings.slot}: the flow resumes from {end}, where the gap ends")
    if tables:
        print(f"it copies again: {', '.join(map(str, tables))}")
    return 0


def find(conn: Connection, dsn: str, settings: SourceSettings, store: RecoveryFolder | None) -> Gap | None:
    """The gap between state and slot; None if there is none. Changes nothing.

    Raises:
        StateError, PublicationError, SlotMismatch, SlotInUse: See `run`.
    """
    checks.check_server(conn)
    checks.check_publications(conn, settings)
    system = identify(conn)
    seen = None if store is None else _seen(dsn, store.state, system)
    slot = slot_state(conn, settings.slot)
    if slot is None:
        reason, known, end = "does not exist", None, None
    else:
        if slot.active:
            raise SlotInUse(
                f"slot {slot.name!r} is in use by process {slot.active_pid}", hint="end the flow that reads from it"
            )
        known, end = slot.confirmed_flush_lsn, slot.confirmed_flush_lsn
        try:
            checks.check_slot(conn, slot)
            reason = "was moved past the flow's state, or recreated"
            if seen is None or known is None or known <= seen:
                return None
        except SlotLost:
            reason, end = f"was invalidated by the server ({slot.invalidation})", None
    state = {} if store is None else store.state
    return Gap(
        reason=reason,
        recreate=end is None,
        start=known if seen is None else seen,
        end=current_lsn(conn) if end is None else end,
        last_commit=pg_datetime(state["commit_ts"] - PG_EPOCH_US) if state.get("commit_ts") is not None else None,
        saved=None if store is None else store.saved,
        commit_times=setting(conn, "track_commit_timestamp") == "on",
        tables=published_tables(conn, settings.publication),
    )


def _seen(dsn: str, state: State, system: System) -> Lsn:
    """The position up to which the flow has seen everything, on this server's timeline."""
    position, lsn = start.positions(state, system)
    lsn = start.on_timeline(dsn, state["timeline"], system.timeline, position, lsn)
    if lsn > system.lsn:
        raise StateError(
            f"the recovery folder ends at {lsn}, but the server's WAL at {system.lsn}: it lost some, or was restored "
            "from a backup",
            hint=start.START_AFRESH,
        )
    return lsn


def described(settings: SourceSettings, gap: Gap) -> Iterator[str]:
    """The gap in words, line by line."""
    start = "an unknown position" if gap.start is None else str(gap.start)
    size = "" if gap.start is None else f": {max(0, gap.end - gap.start):,d} bytes of WAL"
    yield f"slot {settings.slot} on {settings.server} {gap.reason}"
    growing = ", and growing" if gap.recreate else ""
    yield f"  missing      what was committed from {start} to {gap.end}{growing}{size}"
    if gap.last_commit is not None:
        yield f"  since        {gap.last_commit:%Y-%m-%d %H:%M:%S.%f} UTC, the commit of the last change that it saw"
    if gap.saved is not None:
        yield f"  flow ran     until {gap.saved:%Y-%m-%d %H:%M:%S} UTC, when its state was last written"
    yield f"  tables       {', '.join(gap.tables) or 'none'}, of publication {', '.join(settings.publication)}"
    yield "  to repair    add --copy: the flow then sends a T for each table, and all of its rows again. Or read each"
    yield "               table and compare it with what the flow wrote, as returned by pgoutput_source.current(): rows"
    yield "               that differ, or are only in the table, changed in the gap; rows that are only in the files"
    yield "               were deleted"
    if gap.last_commit is not None and gap.commit_times:
        yield f"               inserted or updated since: pg_xact_commit_timestamp(xmin) > '{gap.last_commit}'"


def _steps(settings: SourceSettings, gap: Gap, store: RecoveryFolder | None, *, copy: bool) -> Iterator[str]:
    if gap.recreate:
        yield f"slot {settings.slot} is recreated"
    if store is not None:
        yield "the flow's state is moved to the slot's position; files, windows and aggregates are kept"
    else:
        yield "a flow without recovery resumes from there. For a flow with recovery, name its folder: --recovery …"
    if copy:
        yield "the flow is asked to copy every published table again"


def reanchor(conn: Connection, settings: SourceSettings, gap: Gap, store: RecoveryFolder | None) -> Lsn:
    """Recreate the slot if necessary, move the flow's state to its position, and return that position.

    Raises:
        SlotInUse, NotConfigured: The slot can't be dropped or created.
        StateError: The recovery folder is in use, or can't be written.
    """
    if gap.recreate:
        old = slot_state(conn, settings.slot)
        if old is not None:
            with explained(settings.slot):
                conn.execute("SELECT pg_drop_replication_slot(%s)", [settings.slot])
        create_slot(conn, settings.slot, failover=bool(old and old.failover))
    slot = slot_state(conn, settings.slot)
    if slot is None or slot.confirmed_flush_lsn is None:
        raise SlotLost(f"slot {settings.slot!r} is gone again", hint="another client dropped it: run resync again")
    if store is not None:
        timeline = identify(conn).timeline
        store.write(
            store.state | {"timeline": timeline, "lsn": int(slot.confirmed_flush_lsn), "commit_lsn": None, "seq": None}
        )
    return slot.confirmed_flush_lsn


class RecoveryFolder:
    """The state of a slot's source in the recovery store of a flow that is not running.

    Bytewax has one SQLite file per recovery partition, with the snapshots of some keys by epoch. The source's key is
    its slot's name. Only builtins are unpickled.

    Args:
        folders: Where the files are.
        slot: The slot's name.

    Attributes:
        state: The state from which the next run would resume.
        saved: When it was written.

    Raises:
        StateError: There is no such state, or the store can't be read.
    """

    def __init__(self, folders: Sequence[Path], slot: str) -> None:
        self.slot = slot
        self.files = [file for folder in folders for file in parts(folder)]
        if not self.files:
            raise StateError(
                f"there is no recovery store in {', '.join(map(str, folders))}",
                hint="name the folder that the flow gets with -r",
            )
        rows: list[tuple[str, int, str, State]] = []
        tables: Tables = {table: [] for table in TABLES}
        for file in self.files:
            # Without immutable=1 SQLite would leave files beside the store, even if it only reads.
            log = file.with_name(f"{file.name}-wal")
            quiet = not log.exists() or not log.stat().st_size
            with part_file(file, "ro&immutable=1" if quiet else "ro") as part:
                for table, found in progress([part]).items():
                    tables[table] += found
                for step, epoch, created, data in part.execute(
                    "SELECT step_id, snap_epoch, created_at, ser_change FROM snaps"
                    " WHERE state_key = ? AND ser_change IS NOT NULL",
                    [slot],
                ):
                    state = _unpickled(file, data)
                    if isinstance(state, dict) and state.get("slot") == slot and "lsn" in state:
                        rows.append((step, epoch, created, state))
        bound = resume_epoch(tables)
        loaded = [row for row in rows if row[1] < bound]
        if not loaded:
            raise StateError(
                f"there is no state of slot {slot!r} in {', '.join(map(str, folders))}",
                hint="check the slot's name and the folder; in a cluster name the folder of each process. A flow that "
                "never ran with this folder needs no resync",
            )
        self.steps = {row[0] for row in rows}
        _, _, created, self.state = max(loaded, key=lambda row: row[1])
        self.saved = datetime.fromisoformat(created).replace(tzinfo=UTC)

    def write(self, state: State) -> None:
        """Make the next run resume from `state`.

        Raises:
            StateError: The store is in use, or can't be written.
        """
        data = pickle.dumps(state, protocol=4)
        for file in self.files:
            with part_file(file, "rw") as part, part:
                for step in sorted(self.steps):
                    part.execute(
                        "UPDATE snaps SET ser_change = ?"
                        " WHERE step_id = ? AND state_key = ? AND ser_change IS NOT NULL",
                        [data, step, self.slot],
                    )


class _Builtins(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is not a builtin value")


def _unpickled(file: Path, data: bytes) -> object:
    try:
        return _Builtins(io.BytesIO(data)).load()
    except Exception as e:  # invalid pickles raise errors of any kind
        raise StateError(f"{file} holds a state that can't be read: {e}", hint="is it the flow's folder?") from e
