"""Parked tables: their changes are kept as PostgreSQL sent them, until they are replayed.

With on_table_error="park" a table whose changes can't be decoded is *parked*. These changes and all later ones of the
table go to files, as raw changes (`decode.raw`), and the other tables go on. A *replay* delivers them in their order,
and the table is parked no more. So nothing of a table overtakes what is parked of it.

    folder/slot/000000000042.arrows     raw changes of one version of a table, in one epoch: an Arrow IPC stream
    folder/slot/replay.json             asks for a replay, at the next start

Files are numbered in the order in which they were begun. The resume state says which tables are parked, the number of
the next file, and how far a replay is; it is durable with its epoch, like all that the epoch delivered:

    `state()`                      syncs the files of the epoch, and gives them their names
    this state is durable          they count
    a crash before it was          their changes come again: at the next start these files are void, and deleted
    a replay delivers              nothing is deleted; the state says up to which change
    the state of it is durable     `durable()` deletes the files of what was replayed, and the request
    a crash before that            the next start deletes them

Without a resume state the files themselves say what is parked. Then a change may be parked twice, and is replayed once.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import pyarrow as pa

from pgoutput_source import metrics
from pgoutput_source.changes.batches import ChangeSet, ParkedBatch, Truncate, UndecodedBatch
from pgoutput_source.changes.schema import Position, TableSchema
from pgoutput_source.decode.raw import decode_raw, truncates_of
from pgoutput_source.decode.relations import Relations
from pgoutput_source.errors import StateError
from pgoutput_source.files import explained, sync

logger = logging.getLogger(__name__)

SUFFIX: Final = ".arrows"
REQUEST: Final = "replay.json"
_WRITING: Final = ".writing"
_PIECE: Final = 8192  # changes of a replay that are decoded together

Pair = tuple[int, int]
"""A position as a state keeps it."""


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


@dataclass(frozen=True, slots=True)
class ParkedFile:
    """A file of parked changes, and what its own metadata say: `table` is the id of a `ParkedTable`."""

    path: Path
    number: int
    table: str
    name: str
    relation: int
    reason: str
    origin: tuple[str, str]  # the database system and the slot
    changes: int
    first: Pair
    last: Pair

    @classmethod
    def read(cls, path: Path) -> ParkedFile | None:
        """What is in a file; None if there is no change in it.

        Raises:
            StateError: It can't be read.
        """
        count, first, last = 0, (0, 0), (0, 0)
        with explained("can't read", path, StateError), path.open("rb") as file:
            try:
                with pa.ipc.open_stream(file) as stream:
                    said = {key.decode(): value.decode() for key, value in (stream.schema.metadata or {}).items()}
                    for batch in stream:
                        here = _positions(batch)
                        first = here[0] if not count else first
                        count, last = count + len(here), here[-1]
            except pa.ArrowInvalid as e:
                raise StateError(f"{path} is not a file of parked changes: {e}", hint="restore it") from e
        if not count:
            return None
        return cls(
            path,
            int(path.stem),
            said["parked.table"],
            said["pg.table"],
            int(said["pg.relation_id"]),
            said["parked.reason"],
            (said.get("pg.system", ""), said.get("pg.slot", "")),
            count,
            first,
            last,
        )


def parked_files(folder: Path) -> Iterator[Path]:
    """The files of parked changes in the folder of a slot, in the order of their numbers."""
    if folder.is_dir():
        yield from sorted(path for path in folder.glob(f"*{SUFFIX}") if path.stem.isdigit())


@dataclass(slots=True)
class _Open:
    """A file that is being written: the changes of one version of a table in this epoch."""

    path: Path
    file: IO[bytes]
    writer: pa.RecordBatchStreamWriter
    metadata: Mapping[bytes, bytes]


@dataclass(slots=True)
class _Replay:
    """What was asked for, and what is left of it. `names` is None for all tables."""

    token: str
    names: list[str] | None
    left: list[ParkedTable] = field(default_factory=list)


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
        self.folder = folder / slot
        self._slot, self._relations, self._on_misfit = slot, relations, on_misfit
        self._open: dict[str, _Open] = {}
        self._done: list[Path] = []  # replayed, and needed until the state that says so is durable
        self._staged: list[Path] = []  # … which the last state does
        self._last_token: str | None = None if state is None else state["replay"]
        self._staged_token: str | None = None
        with explained("can't use", self.folder, StateError):
            self.folder.mkdir(parents=True, exist_ok=True)
            for above in (folder, folder.absolute().parent):
                sync(above)
            for path in self.folder.glob(f"*{_WRITING}"):
                path.unlink()
        files = [found for path in parked_files(self.folder) if (found := ParkedFile.read(path)) is not None]
        for file in files:
            if file.origin != (system, slot):
                raise StateError(
                    f"{file.path} holds changes of slot {file.origin[1]!r} of database system {file.origin[0]}",
                    hint="use another park_folder",
                )
        if state is None:
            self._next = max((file.number for file in files), default=-1) + 1
            self._tables = _tables_of(files)
        else:
            self._next = state["next"]
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
            if file.number < self._next and file.table in self._tables:
                kept.append(file)
                continue
            if file.number >= self._next and resumed is not None and file.first <= resumed:
                raise StateError(
                    f"{file.path} is ahead of the recovery folder, and its changes will not come again",
                    hint="an old recovery folder was restored, or two flows use this park_folder",
                )
            with explained("can't delete", file.path, StateError):
                file.path.unlink()
        return kept

    def _requested(self) -> _Replay | None:
        path = self.folder / REQUEST
        with explained("can't read", path, StateError):
            if not path.exists():
                return None
            try:
                request = json.loads(path.read_text())
            except ValueError as e:
                raise StateError(f"{path} is not a request: {e}", hint="delete it, and ask for the replay again") from e
            if request["token"] == self._last_token:  # a crash came before it was deleted
                path.unlink()
                return None
        names = request["tables"]
        left = [t for t in self._tables.values() if names is None or set(names).intersection(t.names)]
        return _Replay(request["token"], names, left)

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
            id, first = str(self._next), batch.first
            # The number of the first file is nobody else's: it is taken at once.
            self._next += 1
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
            self._write(table, batch)
        names = {batch.table for batch in parked}
        truncates = [_without(truncate, names) for truncate in changes.truncates]
        return replace(
            changes,
            batches=tuple(batch for batch in changes.batches if not isinstance(batch, ParkedBatch)),
            truncates=tuple(truncate for truncate in truncates if truncate.tables),
        )

    def _write(self, table: ParkedTable, batch: ParkedBatch) -> None:
        raw = batch.raw
        with explained("can't park changes in", self.folder, StateError):
            writing = self._open.get(table.id)
            if writing is not None and writing.metadata != raw.schema.metadata:
                self._close(table.id)
                writing = None
            if writing is None:
                path = self.folder / f"{self._next:012d}{_WRITING}"
                self._next += 1
                said = {**raw.schema.metadata, "parked.table": table.id, "parked.reason": table.reason}
                file = path.open("wb")
                stream = pa.ipc.new_stream(file, raw.schema.with_metadata(said))
                writing = self._open[table.id] = _Open(path, file, stream, raw.schema.metadata)
            writing.writer.write_batch(raw.replace_schema_metadata(None))
        if table.changes is not None:
            table.changes += len(raw)
        metrics.PARKED.labels(self._slot, table.names[0]).inc(len(raw))

    def _close(self, id: str) -> None:
        writing = self._open.pop(id)
        writing.writer.close()
        writing.file.flush()
        os.fsync(writing.file.fileno())
        writing.file.close()
        writing.path.rename(writing.path.with_suffix(SUFFIX))

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
        for table in replay.left:
            # Each file has all changes of the table from its first to its last. Without a resume state they may
            # overlap, and a later file begin before an earlier one: changes that were not acknowledged came again.
            mine = sorted((file for file in files if file.table == table.id), key=lambda file: file.first)
            count = 0
            for raw in _pieces(mine, table):
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
                table.replayed = _positions(raw)[-1]
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
        with explained("can't park changes in", self.folder, StateError):
            if self._open:
                for id in list(self._open):
                    self._close(id)
                sync(self.folder)
        self._staged += self._done
        self._done, self._staged_token = [], self._last_token
        return {
            "next": self._next,
            "tables": {id: table.state() for id, table in self._tables.items()},
            "replay": self._last_token,
        }

    def durable(self) -> None:
        """What the last `state` said is durable."""
        with explained("can't clean", self.folder, StateError):
            for path in self._staged:
                path.unlink(missing_ok=True)
            self._staged = []
            path, token = self.folder / REQUEST, self._staged_token
            if token is not None and path.exists() and json.loads(path.read_text())["token"] == token:
                path.unlink()
            self._staged_token = None

    def close(self) -> None:
        """Close the files; what was not synced comes again."""
        for writing in self._open.values():
            writing.file.close()
        self._open = {}


def request(folder: Path, tables: Sequence[str] | None) -> None:
    """Ask for a replay of the parked changes in the folder of a slot; None stands for all tables.

    Raises:
        StateError: The folder can't be written.
    """
    path = folder / REQUEST
    with explained("can't write", path, StateError):
        writing = path.with_suffix(_WRITING)
        with writing.open("w") as file:
            json.dump({"token": secrets.token_hex(8), "tables": None if tables is None else list(tables)}, file)
            file.flush()
            os.fsync(file.fileno())
        writing.rename(path)
        sync(folder)


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


def _pieces(files: Sequence[ParkedFile], table: ParkedTable) -> Iterator[pa.RecordBatch]:
    """The raw changes of a table that were not replayed, each once."""
    for file in files:
        with (
            explained("can't read", file.path, StateError),
            file.path.open("rb") as opened,
            pa.ipc.open_stream(opened) as stream,
        ):
            for batch in stream:
                for start in range(0, len(batch), _PIECE):
                    raw = batch.slice(start, _PIECE)
                    if table.replayed is not None:
                        fresh = [i for i, position in enumerate(_positions(raw)) if position > table.replayed]
                        raw = raw.take(pa.array(np.array(fresh, np.int64))) if len(fresh) < len(raw) else raw
                    if len(raw):
                        yield raw.replace_schema_metadata(stream.schema.metadata)


def _positions(raw: pa.RecordBatch) -> list[Pair]:
    return list(zip(raw.column("commit_lsn").to_pylist(), raw.column("seq").to_pylist(), strict=True))


def _without(truncate: Truncate, names: set[str]) -> Truncate:
    return replace(truncate, tables=tuple(table for table in truncate.tables if table not in names))
