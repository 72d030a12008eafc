"""The assembler: it turns frames into `ChangeSet`s.

It takes the frames of one poll, in order, and returns what they say, columnar by table. It checks their order
(`order`), finds their transactions and positions (`transactions`), and decodes the rows of each version of a table
(`columns`), for many frames at once. Only rare messages (Relation, Type, Origin, Truncate, Message) are decoded one by
one.

This is protocol 1, in which PostgreSQL sends a transaction after its commit, contiguously, and Begin has the commit's
LSN. So a transaction may be cut anywhere: what was read of it is final. `in_progress` turns transactions that are
streamed before their commit into protocol 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pgoutput_source.changes.batches import (
    HEARTBEAT,
    ChangeBatch,
    ChangeSet,
    Message,
    ParkedBatch,
    Truncate,
    UndecodedBatch,
)
from pgoutput_source.changes.schema import Position
from pgoutput_source.decode.columns import decode
from pgoutput_source.decode.frames import Bools, Frame, Frames
from pgoutput_source.decode.in_progress import StreamedTransactions
from pgoutput_source.decode.order import UNTRUSTED, check_order
from pgoutput_source.decode.raw import ALREADY, Parked, raw_of
from pgoutput_source.decode.relations import LookUp, Relations, TableVersion, nameless
from pgoutput_source.decode.transactions import Open, Rows, Transactions, after, changes_of, transactions_of
from pgoutput_source.errors import ProtocolError, SchemaChanged
from pgoutput_source.protocol import messages
from pgoutput_source.protocol.wire import Lsn, pg_datetime
from pgoutput_source.types import TYPES, PgType

_Cut = tuple[int, TableVersion | None]
"""The frame with which a version of a table begins; None has no name."""

_Truncates = dict[int, tuple[messages.Truncate, tuple[str, ...]]]
"""By frame, with the names that the tables had then."""

_RELATION = ord("R")
_RARE = np.zeros(256, np.bool_)
_RARE[list(b"RYOTM")] = True


class Assembler:
    """Frames → change sets. One per slot; it remembers the relations and the transaction that is still open.

    Positions continue across feeds, however the frames are cut. Everything up to `position` is skipped: a server sends
    transactions again after a reconnect, and after its own crash even acknowledged ones.

    Attributes:
        position: The last change that was delivered; pass it as `skip_until` to resume elsewhere.
        end_lsn: The end of the last complete transaction, which may be acknowledged once its changes are durable.
        in_transaction: Whether a committed transaction was received and not yet delivered to its end.
        pending: Whether `feed` would return more without new frames: call it with none before the next poll.
        parked: The tables that are parked; None if tables never are. What can't be decoded is added to them, and comes
            as a `ParkedBatch`.
    """

    def __init__(
        self,
        origin: tuple[tuple[str, str], ...] = (),
        *,
        skip_until: Position | None = None,
        on_misfit: str = "raw",
        look_up: LookUp | None = None,
        streamed: StreamedTransactions | None = None,
        known_tables: Mapping[str, Sequence[str]] | None = None,
        types: Mapping[int, PgType] = TYPES,
        metadata_prefix: str = "_",
    ) -> None:
        self.relations = Relations(origin, look_up, known_tables, types, metadata_prefix)
        self.parked: Parked | None = None
        self._streamed = streamed
        self.on_misfit = on_misfit
        self.position = skip_until
        self.end_lsn = Lsn(0)
        self.skipped = 0
        self._last_end = Lsn(0)
        self._open: Open | None = None

    @property
    def in_transaction(self) -> bool:
        """Whether a committed transaction was received and not yet delivered to its end.

        One that is still in progress does not count: its commit is after every position that the server has reported,
        so the server sends all of it again, whichever of these is acknowledged.
        """
        return self._open is not None or self.pending

    @property
    def pending(self) -> bool:
        """Whether `feed` would return more without new frames: pieces of a streamed transaction that has committed."""
        return self._streamed is not None and self._streamed.pending

    @property
    def whole(self) -> bool:
        """Whether no part of a transaction is kept: everything that was fed was delivered or skipped."""
        return self._open is None and (self._streamed is None or not self._streamed.keeping)

    def close(self) -> None:
        """Release temporary files."""
        if self._streamed is not None:
            self._streamed.close()

    def reconnected(self) -> None:
        """A new connection starts: the server begins with a whole transaction and may repeat what was delivered."""
        self._open = None
        self._last_end = Lsn(0)
        if self._streamed is not None:
            self._streamed.reconnected()

    def feed(self, frames: Sequence[Frame]) -> ChangeSet:
        """What these frames say; `frames` are CopyData payloads with their header, and keepalives are ignored.

        Changes of a table that can't be decoded concern only those who take this table: they are an `UndecodedBatch`.

        Raises:
            ProtocolError: An illegal order of messages, or bytes that are not a message. The stream can't continue. The
                error names the frame's LSN, or where the last transaction ended if the frame has none.
            SchemaChanged: The name of a table changed and must not, or it is unknown.
            SpillError: A temporary file of a transaction in progress failed.
        """
        try:
            return self._fed(frames)
        except ProtocolError as e:
            e.lsn = self.end_lsn if e.lsn is None else e.lsn
            raise

    def _fed(self, frames: Sequence[Frame]) -> ChangeSet:
        if self._streamed is not None:
            self._streamed.add(frames)
        f = Frames(frames if self._streamed is None else self._streamed.take())
        if not len(f):
            return ChangeSet(())
        inside = check_order(f, inside=self._open is not None)
        transactions = transactions_of(f, self._open, self._last_end)
        versions, truncates, found = self._rare(f, transactions, inside)
        changes, relation = changes_of(f, transactions, {i: t.relation_ids for i, (t, _) in truncates.items()})
        rows, relation = after(changes, relation, self.position)
        self.skipped += len(changes) - len(rows)
        batches = self._batches(f, rows, relation, versions)
        self._open = transactions.left_open(f, changes)
        self._advance(transactions, rows)
        return ChangeSet(tuple(batches), tuple(found), tuple(_truncates(f, rows, truncates)))

    def _rare(
        self, f: Frames, t: Transactions, inside: Bools
    ) -> tuple[dict[int, list[_Cut]], _Truncates, list[Message]]:
        """Schema versions by relation (first frame, schema), truncates by frame, and logical messages."""
        versions: dict[int, list[_Cut]] = {}
        truncates: _Truncates = {}
        found: list[Message] = []
        rare = np.flatnonzero(_RARE[f.tag])
        self.relations.expect(_announced(f, rare[f.tag[rare] == _RELATION]))
        for i in rare.tolist():
            try:
                message = f.message(i)
                match messages.decode(message):
                    case messages.Relation() as relation:
                        xid = int(t.xid[t.index[i]])
                        for relation_id, before, version in self.relations.announce(relation, xid, message):
                            if version is not None and version.error is not None:
                                version.error.lsn = int(t.commit_lsn[t.index[i]])
                            first: list[_Cut] = [] if before is None else [(-1, before)]
                            versions.setdefault(relation_id, first).append((i, version))
                    case messages.Type() as kind:
                        self.relations.name_type(kind, message)
                    case messages.Truncate() as truncate:
                        emptied = map(self.relations.find, truncate.relation_ids)
                        truncates[i] = truncate, tuple(schema.table for schema in emptied if schema is not None)
                    case messages.Message() as m:
                        found += self._message(t, i, m, inside=bool(inside[i]))
            except ProtocolError as e:
                e.lsn = e.lsn if e.lsn is not None else f.lsn_of(i)
                raise
            except SchemaChanged as e:
                e.lsn = int(t.commit_lsn[t.index[i]])
                raise
        return versions, truncates, found

    def _message(self, t: Transactions, i: int, m: messages.Message, *, inside: bool) -> list[Message]:
        if m.prefix == HEARTBEAT:
            return []
        if not m.transactional:
            return [Message(m.lsn, m.prefix, m.content, False)]
        k = int(t.index[i])
        commit_lsn = int(t.commit_lsn[k])
        if not inside:
            raise ProtocolError("a transactional Message outside a transaction", lsn=int(m.lsn), hint=UNTRUSTED)
        if self.position is not None and commit_lsn < self.position.commit_lsn:
            return []
        when = pg_datetime(int(t.commit_ts[k]))
        return [Message(m.lsn, m.prefix, m.content, True, Lsn(commit_lsn), int(t.xid[k]), when)]

    def _batches(
        self,
        f: Frames,
        rows: Rows,
        relation: NDArray[np.uint32],
        versions: dict[int, list[_Cut]],
    ) -> list[ChangeBatch]:
        groups: list[tuple[Position, Rows, TableVersion]] = []
        if len(rows):
            one = bool((relation == relation[0]).all())
            for relation_id in relation[:1].tolist() if one else np.unique(relation).tolist():
                of_relation = None if one else np.flatnonzero(relation == relation_id)
                mine = rows if of_relation is None else rows.take(of_relation)
                try:
                    cuts = versions.get(relation_id) or [(-1, self.relations.current(relation_id))]
                except (ProtocolError, SchemaChanged) as e:
                    e.lsn = int(f.lsn[mine.frame[0]])
                    raise
                groups += _cut(f, mine, cuts)
        groups.sort(key=lambda g: g[0])
        return [self._decoded(f, part, version) for _, part, version in groups]

    def _decoded(self, f: Frames, rows: Rows, version: TableVersion) -> ChangeBatch:
        if self.parked is None:
            return decode(f, rows, version, on_misfit=self.on_misfit)
        if version.schema in self.parked:
            version = replace(version, error=ALREADY)
        batch = decode(f, rows, version, on_misfit=self.on_misfit)
        if not isinstance(batch, UndecodedBatch):
            return batch
        self.parked.add(batch)
        return ParkedBatch(batch, raw_of(f, rows, version, self.relations.type_messages(version.schema)))

    def _advance(self, t: Transactions, rows: Rows) -> None:
        if len(rows):
            self.position = Position(Lsn(int(rows.commit_lsn[-1])), int(rows.seq[-1]))
        if len(t.ends):
            self._last_end = Lsn(int(t.ends[-1]))
            self.end_lsn = max(self.end_lsn, self._last_end)


def _announced(f: Frames, frame: NDArray[np.int64]) -> set[int]:
    """The relations of these frames, which are Relation messages."""
    whole = frame[f.payload[frame] + 5 <= f.end[frame]]
    return set(f.integers(">u4", f.payload[whole] + 1).tolist())


def _truncates(f: Frames, rows: Rows, truncates: _Truncates) -> Iterator[Truncate]:
    """The truncates whose rows are delivered."""
    for i, (truncate, tables) in truncates.items():
        row = int(np.searchsorted(rows.frame, i))
        if row < len(rows) and rows.frame[row] == i:
            yield Truncate(
                position=Position(Lsn(int(rows.commit_lsn[row])), int(rows.seq[row])),
                lsn=Lsn(f.lsn_of(i)),
                tables=tables,
                cascade=truncate.cascade,
                restart_identity=truncate.restart_identity,
            )


def _cut(f: Frames, rows: Rows, cuts: list[_Cut]) -> list[tuple[Position, Rows, TableVersion]]:
    """Rows of one relation, cut where its schema changes."""
    bounds = [*np.searchsorted(rows.frame, [at for at, _ in cuts]).tolist(), len(rows)]
    if bounds[0] > 0:
        raise ProtocolError(
            "a change of a relation before its Relation message", lsn=int(f.lsn[rows.frame[0]]), hint=UNTRUSTED
        )
    parts: list[tuple[Position, Rows, TableVersion]] = []
    known: TableVersion | None = None
    for (_, version), low, high in zip(cuts, bounds, bounds[1:], strict=False):
        if high > low:
            if version is None:
                assert known is not None, "a table loses a name that it had"
                raise nameless(known.schema, int(f.lsn[rows.frame[low]]))
            part = rows if (low, high) == (0, len(rows)) else rows.take(slice(low, high))
            # One truncate's frame can be the first change of several tables, so the frame would not order them.
            parts.append((Position(Lsn(int(part.commit_lsn[0])), int(part.seq[0])), part, version))
        known = version or known
    return parts
