"""Parked tables: their changes are kept as PostgreSQL sent them, until they are replayed.

With on_table_error="park" a table whose changes can't be decoded is *parked*. These changes and all later ones of the
table go to files, as raw changes (`decode.raw`), and the other tables go on. A *replay* delivers them in their order,
and the table is parked no more. So nothing of a table overtakes what is parked of it.

A file has the raw changes of one version of a table, in one epoch (`parked_files`). The resume state says which tables
are parked, the number of the next file, and how far a replay is; it is durable with its epoch, like all that the epoch
delivered:

    `state()`                      syncs the files of the epoch, and gives them their names
    this state is durable          they count
    a crash before it was          their changes come again: at the next start these files are void, and deleted
    a replay delivers              nothing is deleted; the state says up to which change
    the state of it is durable     `durable()` deletes the files of what was replayed, and the request
    a crash before that            the next start deletes them

Without a resume state the files themselves say what is parked. Then a change may be parked twice, and is replayed once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pgoutput_source import metrics
from pgoutput_source.changes.batches import ChangeSet, ParkedBatch, Truncate, UndecodedBatch
from pgoutput_source.changes.schema import Position, TableSchema
from pgoutput_source.decode.raw import decode_raw, truncates_of
from pgoutput_source.decode.relations import Relations
from pgoutput_source.errors import StateError
from pgoutput_source.files import explained
from pgoutput_source.stream.parked_files import Pair, ParkedFile, ParkedFolder, parked_files, positions, unreplayed
from pgoutput_source.stream.replay_request import ReplayRequest

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class ParkedTable:
    """A table whose changes are parked, under all names and relations that it has had since.

    Attributes:
        id: What its files call it.
        names: As `TableSchema.table` writes them; the first is the one that it was parked under.
        relations: Numbers of its relations.
        since: The first change that was parked.
        reason: Why that could not be decoded.
        changes: How many are parked; None if only the files could tell.
        replayed: The last change that a replay has delivered.
    """

    id: str
    names: list[str]
    relations: list[int]
    since: Pair
    reason: str
    changes: int | None = 0
    replayed: Pair | None = None

    def state(self) -> dict[str, Any]:
        """What a resume state keeps of it."""
        return {
            "names": list(self.names),
            "relations": list(self.relations),
            "since": list(self.since),
            "reason": self.reason,
            "changes": self.changes,
            "replayed": None if self.replayed is None else list(self.replayed),
        }

    @classmethod
    def of(cls, id: str, state: Mapping[str, Any]) -> ParkedTable:
        """The table that `state` was kept of."""
        since, replayed = state["since"], state["replayed"]
        return cls(
            id,
            list(state["names"]),
            list(state["relations"]),
            (since[0], since[1]),
            state["reason"],
            state["changes"],
            None if replayed is None else (replayed[0], replayed[1]),
        )


@dataclass(slots=True)
class _Replay:
    """A replay that was asked for, and its tables."""

    token: str
    tables: list[ParkedTable]


class Parking:
    """The parked tables of one slot. Make it when the slot is held: it deletes files that are void.

    Args:
        folder: Where they are kept: a folder for each slot is in it.
        slot: The slot's name.
        system: The database system that the changes are of.
        relations: Takes note of the messages of a replay.
        on_misfit: As in `SourceSettings`.
        state: What `state` of an earlier run returned; None if there was none.
        resumed: The last change that the earlier run delivered.

    Raises:
        StateError: What the folder holds does not fit the state, or is of another slot.
        StateError: The folder can't be used.
    """

    def __init__(
        self,
        folder: Path,
        *,
        slot: str,
        system: str,
        relations: Relations,
        on_misfit: str,
        state: Mapping[str, Any] | None,
        resumed: Position | None,
    ) -> None:
        self._folder = ParkedFolder(folder / slot)
        self.folder = self._folder.path
        self._slot, self._relations, self._on_misfit = slot, relations, on_misfit
        self._done: list[Path] = []  # replayed, and needed until the state that says so is durable
        self._staged: list[Path] = []  # … which the last state does
        self._last_token: str | None = None if state is None else state["replay"]
        self._staged_token: str | None = None
        files = parked_files(self.folder)
        for file in files:
            if file.origin != (system, slot):
                raise StateError(
                    f"{file.path} holds changes of slot {file.origin[1]!r} of database system {file.origin[0]}",
                    hint="use another park_folder",
                )
        if state is None:
            self._folder.next = max((file.number for file in files), default=-1) + 1
            self._tables = _tables_of(files)
        else:
            self._folder.next = state["next"]
            self._tables = {id: ParkedTable.of(id, kept) for id, kept in state["tables"].items()}
            files = self._restored(files, resumed)
            for table in self._tables.values():
                there = sum(file.changes for file in files if file.table == table.id)
                if there < (table.changes or 0):
                    raise _missing((table.changes or 0) - there, table, self.folder)
        self._replay = self._requested()
        self._pieces: Iterator[ChangeSet] = iter(())
        if self._replay is not None:
            self._pieces = self._replayed(files, self._replay)
        for table in self._tables.values():
            metrics.PARKED.labels(slot, table.names[0]).set(sum(f.changes for f in files if f.table == table.id))
            logger.warning(
                "slot %s: table %s is parked, its changes go to %s: %s",
                slot,
                table.names[0],
                self.folder,
                table.reason,
            )

    def _restored(self, files: list[ParkedFile], resumed: Position | None) -> list[ParkedFile]:
        """The files that the state counts on; the others are deleted."""
        kept = []
        for file in files:
            if file.number < self._folder.next and file.table in self._tables:
                kept.append(file)
                continue
            if file.number >= self._folder.next and resumed is not None and file.first <= resumed:
                raise StateError(
                    f"{file.path} is ahead of the recovery folder, and its changes will not come again",
                    hint="an old recovery folder was restored, or two flows use this park_folder",
                )
            with explained("can't delete", file.path, StateError):
                file.path.unlink()
        return kept

    def _requested(self) -> _Replay | None:
        request = ReplayRequest.read(self.folder)
        if request is None:
            return None
        if request.token == self._last_token:  # a crash came before it was deleted
            ReplayRequest.delete(self.folder, request.token)
            return None
        names = request.tables
        tables = [t for t in self._tables.values() if names is None or set(names).intersection(t.names)]
        return _Replay(request.token, tables)

    # -- parking ----------------------------------------------------------------------------------------------------

    def __contains__(self, schema: TableSchema) -> bool:
        """Whether changes of this version of a table have to be parked."""
        return self._find(schema) is not None

    def _find(self, schema: TableSchema) -> ParkedTable | None:
        tables = self._tables.values()
        by_relation = next((table for table in tables if schema.relation_id in table.relations), None)
        return by_relation or next((table for table in tables if schema.table in table.names), None)

    def add(self, batch: UndecodedBatch) -> None:
        """From these changes on the table is parked."""
        table = self._find(batch.schema)
        if table is None:
            id, first = str(self._folder.number()), batch.first
            reason = str(batch.error).replace("\n", "; ")
            table = ParkedTable(id, [], [], (int(first.commit_lsn), first.seq), reason)
            self._tables[id] = table
            logger.warning(
                "slot %s: table %s is parked: its changes go to %s until they are replayed, and the other tables go "
                "on: %s",
                self._slot,
                batch.table,
                self.folder,
                reason,
            )
        if batch.table not in table.names:
            table.names.append(batch.table)
        if batch.schema.relation_id not in table.relations:
            table.relations.append(batch.schema.relation_id)

    def take(self, changes: ChangeSet) -> ChangeSet:
        """Park what has to be parked of these changes; the rest.

        Raises:
            StateError: A file can't be written.
        """
        parked = [batch for batch in changes.batches if isinstance(batch, ParkedBatch)]
        if not parked:
            return changes
        for batch in parked:
            table = self._find(batch.schema)
            assert table is not None, "it was added"
            self._folder.write(table.id, batch.raw, table.reason)
            if table.changes is not None:
                table.changes += len(batch.raw)
            metrics.PARKED.labels(self._slot, table.names[0]).inc(len(batch.raw))
        names = {batch.table for batch in parked}
        truncates = [_without(truncate, names) for truncate in changes.truncates]
        return replace(
            changes,
            batches=tuple(batch for batch in changes.batches if not isinstance(batch, ParkedBatch)),
            truncates=tuple(truncate for truncate in truncates if truncate.tables),
        )

    # -- replaying --------------------------------------------------------------------------------------------------

    @property
    def replaying(self) -> bool:
        """Whether a replay is under way; nothing of the stream may be delivered before it ends."""
        return self._replay is not None

    def replay(self) -> ChangeSet:
        """The next parked changes, in their order; empty at the end.

        Raises:
            StateError: Parked changes are missing.
        """
        found = next(self._pieces, None)
        if found is not None:
            return found
        assert self._replay is not None
        self._last_token, self._replay = self._replay.token, None
        return ChangeSet(())

    def _replayed(self, files: Sequence[ParkedFile], replay: _Replay) -> Iterator[ChangeSet]:
        for table in replay.tables:
            mine = [file for file in files if file.table == table.id]
            count = 0
            for raw in unreplayed(mine, table.replayed):
                batch = decode_raw(raw, self._relations, on_misfit=self._on_misfit)
                if isinstance(batch, UndecodedBatch):
                    table.reason = str(batch.error).replace("\n", "; ")
                    logger.warning(
                        "slot %s: %d changes of %s were replayed; the next can't be decoded, and the table stays "
                        "parked: %s",
                        self._slot,
                        count,
                        table.names[0],
                        table.reason,
                    )
                    break
                table.replayed = positions(raw)[-1]
                table.changes = None if table.changes is None else table.changes - len(raw)
                count += len(raw)
                metrics.PARKED.labels(self._slot, table.names[0]).dec(len(raw))
                yield ChangeSet((batch,), (), tuple(truncates_of(raw)))
            else:
                if table.changes:
                    raise _missing(table.changes, table, self.folder)
                del self._tables[table.id]
                metrics.PARKED.labels(self._slot, table.names[0]).set(0)
                logger.info(
                    "slot %s: %d changes of %s were replayed, and it is parked no more",
                    self._slot,
                    count,
                    table.names[0],
                )
            self._done += [f.path for f in mine if table.replayed is not None and f.last <= table.replayed]

    # -- positions --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a resume state keeps; all that was parked is synced.

        Raises:
            StateError: A file can't be written.
        """
        self._folder.finish()
        self._staged += self._done
        self._done, self._staged_token = [], self._last_token
        return {
            "next": self._folder.next,
            "tables": {id: table.state() for id, table in self._tables.items()},
            "replay": self._last_token,
        }

    def durable(self) -> None:
        """What the last `state` said is durable."""
        with explained("can't clean", self.folder, StateError):
            for path in self._staged:
                path.unlink(missing_ok=True)
            self._staged = []
        if self._staged_token is not None:
            ReplayRequest.delete(self.folder, self._staged_token)
            self._staged_token = None

    def close(self) -> None:
        """Close the files; what was not synced comes again."""
        self._folder.close()


def _missing(count: int, table: ParkedTable, folder: Path) -> StateError:
    return StateError(
        f"{count} parked changes of {table.names[0]} are not in {folder}",
        hint="somebody removed files that were not replayed, or this is another park_folder: restore them",
    )


def _tables_of(files: Sequence[ParkedFile]) -> dict[str, ParkedTable]:
    """The parked tables, as the files alone tell of them."""
    found: dict[str, ParkedTable] = {}
    for file in files:
        table = found.setdefault(file.table, ParkedTable(file.table, [], [], file.first, file.reason, None))
        table.names += [file.name] if file.name not in table.names else []
        table.relations += [file.relation] if file.relation not in table.relations else []
    return found


def _without(truncate: Truncate, names: set[str]) -> Truncate:
    return replace(truncate, tables=tuple(table for table in truncate.tables if table not in names))
