"""The legal order of messages as a table, and the assembler that turns frames into `ChangeSet`s.

Frames come in as one poll brought them, in order; out goes what they say, columnar by table. The whole of it is
arithmetic on arrays: Begin and Commit have a fixed size, so they are gathered like everything else, and a change finds
its transaction with a cumulative sum. A stream of single-row transactions costs no Python per transaction.
Only what is rare (Relation, Type, Origin, Truncate, Message) is decoded one by one.

This is protocol 1, in which PostgreSQL sends a transaction after its commit, contiguously, with the commit's LSN known
from Begin on. So a transaction may be cut anywhere: what was read of it is final. `in_progress` turns transactions
that are streamed before their commit into this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pgoutput_source.changes.batches import HEARTBEAT, ChangeBatch, ChangeSet, Message, Truncate
from pgoutput_source.changes.schema import Position
from pgoutput_source.decode.columns import Frames, Rows, decode
from pgoutput_source.decode.in_progress import StreamedTransactions
from pgoutput_source.decode.relations import LookUp, Relations, TableVersion, nameless
from pgoutput_source.errors import ProtocolError, SchemaChanged
from pgoutput_source.protocol import messages
from pgoutput_source.protocol.wire import PG_EPOCH_US, Lsn, pg_datetime
from pgoutput_source.types import TYPES, PgType

BETWEEN, INSIDE = "between transactions", "inside a transaction"
STATES: Final = (BETWEEN, INSIDE)

TRANSITIONS: Final[dict[str, dict[str, str]]] = {
    BETWEEN: {"B": INSIDE, "M": BETWEEN, "A": BETWEEN},
    INSIDE: {"C": BETWEEN} | dict.fromkeys("IUDTRYOM", INSIDE),
}
"""TRANSITIONS[state][tag]: the state after a message. What is not in the table is a `ProtocolError`.

A StreamAbort takes back what was streamed. Servers send it also to readers that asked for no streaming, when a large
transaction rolls back after it released a savepoint: nothing of it was sent, so there is nothing to take back.
"""

_LEGAL = np.zeros((len(STATES), 256), np.bool_)
for _state, _row in TRANSITIONS.items():
    _LEGAL[STATES.index(_state), [ord(t) for t in _row]] = True

_Cut = tuple[int, TableVersion | None]
"""The frame with which a version of a table begins; None has no name."""

_Truncates = dict[int, tuple[messages.Truncate, tuple[str, ...]]]
"""By frame, with the names that the tables had then."""

_BEGIN_SIZE, _COMMIT_SIZE = 21, 26
_LAST_MOMENT = 2**63 - 1 - PG_EPOCH_US
_B, _C, _I, _U, _D, _T, _R = b"BCIUDTR"
_RARE = np.zeros(256, np.bool_)
_RARE[list(b"RYOTM")] = True
_ROW = np.zeros(256, np.bool_)
_ROW[[_I, _U, _D]] = True


class Assembler:
    """Frames → change sets. One per slot; it remembers the relations and the transaction that is still open.

    Positions run on over feeds, however the frames are cut. Everything at or before `position` is dropped: a server
    re-sends transactions after a reconnect, and after its own crash even acknowledged ones.

    Attributes:
        position: The last change that was delivered; pass it as `skip_until` to resume elsewhere.
        end_lsn: The end of the last complete transaction, what may be acknowledged once its changes are durable.
        in_transaction: Whether a committed transaction was received and not yet delivered to its end.
        pending: Whether `feed` has more to give without new frames: call it with none before the next poll.
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
        self._streamed = streamed
        self.on_misfit = on_misfit
        self.position = skip_until
        self.end_lsn = Lsn(0)
        self.skipped = 0
        self._last_end = Lsn(0)
        # commit_lsn, commit_ts, xid, changes so far and where the last of them stands in the WAL
        self._open: tuple[int, int, int, int, int] | None = None

    @property
    def in_transaction(self) -> bool:
        """Whether a committed transaction was received and not yet delivered to its end.

        One that is still in progress does not count: its commit lies after every position that the server has
        reported, so the server sends all of it again, whichever of these is acknowledged.
        """
        return self._open is not None or self.pending

    @property
    def pending(self) -> bool:
        """Whether `feed` has more to give without new frames: pieces of a streamed transaction that has committed."""
        return self._streamed is not None and self._streamed.pending

    @property
    def whole(self) -> bool:
        """Whether nothing is kept of any transaction: all that was fed was delivered, or did not count."""
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

    def feed(self, frames: Sequence[bytes | memoryview]) -> ChangeSet:
        """What these frames say; `frames` are CopyData payloads with their header, keepalives are passed over.

        Raises:
            ProtocolError: An illegal order of messages, or bytes that are no message. The stream can't be used further.
                It names the frame's LSN, or where the last transaction ended if the frame has none.
            DecodeError: A value is not one of its column's type.
            SchemaChanged: A table is not what is known of it.
            SpillError: A temporary file of a transaction in progress failed.
        """
        try:
            return self._fed(frames)
        except ProtocolError as e:
            e.lsn = self.end_lsn if e.lsn is None else e.lsn
            raise

    def _fed(self, frames: Sequence[bytes | memoryview]) -> ChangeSet:
        if self._streamed is not None:
            self._streamed.add(frames)
        f = Frames(frames if self._streamed is None else self._streamed.take())
        if not len(f):
            return ChangeSet(())
        begins, commits = f.tag == _B, f.tag == _C
        inside = self._check_order(f, begins | commits)
        transactions = self._transactions(f, begins, commits)
        versions, truncates, found = self._rare(f, transactions, inside)
        tables = {i: t.relation_ids for i, (t, _) in truncates.items()}
        rows, relation = _rows(f, transactions, tables, self.position)
        self.skipped += transactions.changes - len(rows)
        batches = self._batches(f, rows, relation, versions)
        self._advance(f, transactions, begins, commits, rows)
        return ChangeSet(tuple(batches), tuple(found), tuple(_truncates(f, rows, truncates)))

    def _check_order(self, f: Frames, ends: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Begin and Commit say in which state all that follows is, up to the next of them: who is inside."""
        last = np.maximum.accumulate(np.where(ends, np.arange(1, len(f) + 1), 0))
        before = np.concatenate([[0], last[:-1]])
        state = np.where(before > 0, f.tag[before - 1] == _B, self._open is not None).astype(np.int8)
        legal = _LEGAL[state, f.tag]
        if not legal.all():
            bad = int(np.argmin(legal))
            raise ProtocolError(
                f"a message {chr(f.tag[bad])!r} {STATES[state[bad]]}", lsn=int(f.lsn[bad]), hint=_REPORT
            )
        inside: NDArray[np.bool_] = state == STATES.index(INSIDE)
        return inside

    def _transactions(self, f: Frames, begins: NDArray[np.bool_], commits: NDArray[np.bool_]) -> _Transactions:
        b, c = np.flatnonzero(begins), np.flatnonzero(commits)
        for at, size, name in ((b, _BEGIN_SIZE, "Begin"), (c, _COMMIT_SIZE, "Commit")):
            wrong = np.flatnonzero(f.end[at] - f.payload[at] != size)
            if len(wrong):
                bad = at[wrong[0]]
                got = int(f.end[bad] - f.payload[bad])
                raise ProtocolError(f"{name}: expected {size} bytes, got {got}", lsn=int(f.lsn[bad]), hint=_REPORT)
        p = f.payload[b]
        # Element 0 stands for the transaction that was open when these frames came, if there was one.
        carry = self._open or (0, 0, 0, 0, 0)
        t = _Transactions(
            index=np.cumsum(begins),
            commit_lsn=np.concatenate([np.array(carry[:1], np.uint64), f.integers(">u8", p + 1)]),
            commit_ts=np.concatenate([np.array(carry[1:2], np.int64), f.integers(">i8", p + 9)]),
            xid=np.concatenate([np.array(carry[2:3], np.uint32), f.integers(">u4", p + 17)]),
            carried=carry[3],
            lsn=carry[4],
        )
        late = np.flatnonzero(t.commit_ts > _LAST_MOMENT)
        if len(late):
            # A replication origin may set any moment. Added to Unix's epoch this one would wrap around.
            raise ProtocolError(
                "Begin.commit_ts: expected a moment that 64 bits can hold",
                lsn=int(t.commit_lsn[late[0]]),
                hint="look at what sets this transaction's time: pg_replication_origin_xact_setup()",
            )
        q = f.payload[c]
        commit_lsn, t.end_lsn = f.integers(">u8", q + 2), f.integers(">u8", q + 10)
        fits = (commit_lsn == t.commit_lsn[t.index[c]]) & (t.end_lsn > commit_lsn) & (f.u1[q + 1] == 0)
        if not fits.all():
            bad = c[int(np.argmin(fits))]
            raise ProtocolError("a Commit that does not fit its Begin", lsn=int(f.lsn[bad]), hint=_REPORT)
        ends = np.concatenate([np.array([self._last_end], np.uint64), t.end_lsn])
        early = (t.commit_lsn[1:] < ends[np.searchsorted(c, b)]) | (t.commit_lsn[1:] == 0)
        if early.any():
            bad = b[int(np.argmax(early))]
            raise ProtocolError("transactions that are not in commit order", lsn=int(f.lsn[bad]), hint=_REPORT)
        return t

    def _rare(
        self, f: Frames, t: _Transactions, inside: NDArray[np.bool_]
    ) -> tuple[dict[int, list[_Cut]], _Truncates, list[Message]]:
        """Schema versions by relation (first frame, schema), truncates by frame, and logical messages."""
        versions: dict[int, list[_Cut]] = {}
        truncates: _Truncates = {}
        found: list[Message] = []
        rare = np.flatnonzero(_RARE[f.tag])
        self.relations.expect(_announced(f, rare[f.tag[rare] == _R]))
        for i in rare.tolist():
            try:
                match messages.decode(f.message(i)):
                    case messages.Relation() as relation:
                        for relation_id, before, version in self.relations.announce(relation, int(t.xid[t.index[i]])):
                            first: list[_Cut] = [] if before is None else [(-1, before)]
                            versions.setdefault(relation_id, first).append((i, version))
                    case messages.Type() as kind:
                        self.relations.name_type(kind)
                    case messages.Truncate() as truncate:
                        emptied = map(self.relations.find, truncate.relation_ids)
                        truncates[i] = truncate, tuple(schema.table for schema in emptied if schema is not None)
                    case messages.Message() as m:
                        found += self._message(t, i, m, inside=bool(inside[i]))
            except ProtocolError as e:
                e.lsn = e.lsn if e.lsn is not None else int(f.lsn[i])
                raise
            except SchemaChanged as e:
                e.lsn = int(t.commit_lsn[t.index[i]])
                raise
        return versions, truncates, found

    def _message(self, t: _Transactions, i: int, m: messages.Message, *, inside: bool) -> list[Message]:
        if m.prefix == HEARTBEAT:
            return []
        if not m.transactional:
            return [Message(m.lsn, m.prefix, m.content, False)]
        k = int(t.index[i])
        commit_lsn = int(t.commit_lsn[k])
        if not inside:
            raise ProtocolError("a transactional Message outside a transaction", lsn=int(m.lsn), hint=_REPORT)
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
        return [decode(f, part, version, on_misfit=self.on_misfit) for _, part, version in groups]

    def _advance(
        self, f: Frames, t: _Transactions, begins: NDArray[np.bool_], commits: NDArray[np.bool_], rows: Rows
    ) -> None:
        ends = np.flatnonzero(begins | commits)
        is_open = f.tag[ends[-1]] == _B if len(ends) else self._open is not None
        if len(rows):
            self.position = Position(Lsn(int(rows.commit_lsn[-1])), int(rows.seq[-1]))
        if commits.any():
            self._last_end = Lsn(int(t.end_lsn[-1]))
            self.end_lsn = max(self.end_lsn, self._last_end)
        if is_open:
            self._open = (int(t.commit_lsn[-1]), int(t.commit_ts[-1]), int(t.xid[-1]), t.last_count, t.lsn)
        else:
            self._open = None


class _Transactions:
    """The transactions of one feed. `index` gives each frame's; element 0 is the one that was open before."""

    __slots__ = ("carried", "changes", "commit_lsn", "commit_ts", "end_lsn", "index", "last_count", "lsn", "xid")

    def __init__(
        self,
        *,
        index: NDArray[np.int64],
        commit_lsn: NDArray[np.uint64],
        commit_ts: NDArray[np.int64],
        xid: NDArray[np.uint32],
        carried: int,
        lsn: int,
    ) -> None:
        self.index, self.commit_lsn, self.commit_ts, self.xid = index, commit_lsn, commit_ts, xid
        self.carried = carried
        self.lsn = lsn  # of the last change
        self.end_lsn: NDArray[np.uint64] = commit_lsn[:0]
        self.changes = 0
        self.last_count = carried


def _rows(
    f: Frames, t: _Transactions, truncates: dict[int, tuple[int, ...]], skip_until: Position | None
) -> tuple[Rows, NDArray[np.uint32]]:
    """Every change with its position, but those at or before `skip_until`, and its relation."""
    frame = np.flatnonzero(_ROW[f.tag])
    short = f.payload[frame] + 5 > f.end[frame]
    if short.any():
        raise ProtocolError("a change without a relation", lsn=int(f.lsn[frame[int(np.argmax(short))]]), hint=_REPORT)
    relation: NDArray[np.uint32] = f.integers(">u4", f.payload[frame] + 1)
    if truncates:
        # A truncate is one change per table, in the message's order; a stable sort puts them between their neighbours.
        at = np.repeat(np.fromiter(truncates, np.int64), [len(ids) for ids in truncates.values()])
        ids = np.array([i for ids in truncates.values() for i in ids], np.uint32)
        order = np.argsort(np.concatenate([frame, at]), kind="stable")
        frame, relation = np.concatenate([frame, at])[order], np.concatenate([relation, ids])[order]
    index = t.index[frame]
    _check_lsns(f, t, frame, index)
    t.changes = len(frame)
    # Changes are counted through; a transaction's first one is found by a search, as `index` ascends.
    first = np.searchsorted(index, np.arange(len(t.commit_lsn)))
    first[0] -= t.carried
    seq = np.arange(len(frame)) - first[index]
    t.last_count = len(frame) - int(first[-1])
    rows = Rows(frame, t.commit_lsn[index], seq.astype(np.uint64), t.xid[index], t.commit_ts[index])
    if skip_until is not None and len(frame):
        lsn, last = np.uint64(skip_until.commit_lsn), np.uint64(skip_until.seq)
        if rows.commit_lsn[0] <= lsn:
            fresh = (rows.commit_lsn > lsn) | ((rows.commit_lsn == lsn) & (rows.seq > last))
            keep = np.flatnonzero(fresh)
            rows, relation = rows.take(keep), relation[keep]
    return rows, relation


def _check_lsns(f: Frames, t: _Transactions, frame: NDArray[np.int64], index: NDArray[np.int64]) -> None:
    """A transaction's changes come in the order of the WAL, and all of them stand before its commit.

    Rows of one COPY share a record. PostgreSQL asserts the same where it merges subtransactions.
    """
    lsn = np.concatenate([np.array([t.lsn], np.uint64), f.integers(">u8", f.start[frame] + 1)])
    before = np.concatenate([np.zeros(1, np.int64), index[:-1]])
    wrong = ((lsn[1:] < lsn[:-1]) & (index == before)) | (lsn[1:] > t.commit_lsn[index])
    if wrong.any():
        bad = int(np.argmax(wrong))
        raise ProtocolError("a change that is not in the order of the WAL", lsn=int(lsn[bad + 1]), hint=_REPORT)
    last = int(index[-1]) if len(index) else 0
    t.lsn = int(lsn[-1]) if last == len(t.commit_lsn) - 1 else 0


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
                lsn=Lsn(int(f.integers(">u8", f.start[i : i + 1] + 1)[0])),
                tables=tables,
                cascade=truncate.cascade,
                restart_identity=truncate.restart_identity,
            )


def _cut(f: Frames, rows: Rows, cuts: list[_Cut]) -> list[tuple[Position, Rows, TableVersion]]:
    """Rows of one relation, cut where its schema changes."""
    bounds = [*np.searchsorted(rows.frame, [at for at, _ in cuts]).tolist(), len(rows)]
    if bounds[0] > 0:
        raise ProtocolError(
            "a change of a relation before its Relation message", lsn=int(f.lsn[rows.frame[0]]), hint=_REPORT
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


_REPORT = "this stream can't be trusted any further; please report it with the server's version"
