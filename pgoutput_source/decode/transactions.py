"""The transactions of a feed and the positions of its changes, as arithmetic on arrays.

Begin and Commit have a fixed size, so they are gathered like everything else. A cumulative sum finds the transaction of
each frame, and a search finds where each transaction's changes begin. A stream of single-row transactions costs no
Python per transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pgoutput_source.changes.schema import Position
from pgoutput_source.decode.frames import Frames, Ints
from pgoutput_source.decode.order import UNTRUSTED
from pgoutput_source.errors import ProtocolError
from pgoutput_source.protocol.wire import PG_EPOCH_US

_BEGIN, _COMMIT = b"BC"
_BEGIN_SIZE, _COMMIT_SIZE = 21, 26
_LAST_MOMENT = 2**63 - 1 - PG_EPOCH_US
_IS_ROW = np.zeros(256, np.bool_)
_IS_ROW[list(b"IUD")] = True


class Open(NamedTuple):
    """A transaction whose Commit is still to come: what its Begin said, and what came of it so far."""

    commit_lsn: int
    commit_ts: int
    xid: int
    changes: int
    lsn: int  # where its last change stands in the WAL


_NONE = Open(0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Transactions:
    """The transactions of one feed, in commit order.

    Element 0 of `commit_lsn`, `commit_ts` and `xid` is the transaction that was `open` before; without one it is zero,
    and no frame belongs to it. `index` gives the element of each frame, `ends` the ends of those that commit here.
    """

    open: Open
    index: Ints
    commit_lsn: NDArray[np.uint64]
    commit_ts: NDArray[np.int64]
    xid: NDArray[np.uint32]
    ends: NDArray[np.uint64]
    complete: bool  # the last one commits here

    def left_open(self, f: Frames, rows: Rows) -> Open | None:
        """The transaction that goes on after these frames; `rows` are all their changes."""
        if self.complete:
            return None
        changes, lsn = (self.open.changes, self.open.lsn) if len(self.commit_lsn) == 1 else (0, 0)
        if len(rows) and rows.commit_lsn[-1] == self.commit_lsn[-1]:
            changes, lsn = int(rows.seq[-1]) + 1, f.lsn_of(rows.frame[-1])
        return Open(int(self.commit_lsn[-1]), int(self.commit_ts[-1]), int(self.xid[-1]), changes, lsn)


@dataclass(slots=True)
class Rows:
    """Which frames of a poll are rows of one table version, and where they stand in the total order.

    All arrays have one element per row, in position order. `frame` indexes `Frames`; a truncate's frame stands for a
    row without a tuple.
    """

    frame: Ints
    commit_lsn: NDArray[np.uint64]
    seq: NDArray[np.uint64]
    xid: NDArray[np.uint32]
    commit_ts: Ints

    def __len__(self) -> int:
        return len(self.frame)

    def take(self, rows: Ints | slice) -> Rows:
        """Some of the rows."""
        return Rows(self.frame[rows], self.commit_lsn[rows], self.seq[rows], self.xid[rows], self.commit_ts[rows])


# -- transactions ---------------------------------------------------------------------------------------------------


def transactions_of(f: Frames, carried: Open | None, last_end: int) -> Transactions:
    """The transactions of frames in legal order, each checked against its Commit and the one before.

    `carried` is the transaction that was left open by the frames before, `last_end` where the last one before ended.

    Raises:
        ProtocolError: A Begin or Commit that is none, or that contradicts another.
    """
    begins = f.tag == _BEGIN
    begin, commit = np.flatnonzero(begins), np.flatnonzero(f.tag == _COMMIT)
    _check_size(f, begin, _BEGIN_SIZE, "Begin")
    _check_size(f, commit, _COMMIT_SIZE, "Commit")
    first, at, index = carried or _NONE, f.payload[begin], np.cumsum(begins)
    commit_lsn = _with_first(first.commit_lsn, f.integers(">u8", at + 1))
    commit_ts = _with_first(first.commit_ts, f.integers(">i8", at + 9))
    xid = _with_first(first.xid, f.integers(">u4", at + 17))
    _check_moments(commit_lsn, commit_ts)
    ends = _ends(f, commit, commit_lsn[index[commit]])
    _check_commit_order(f, begin, commit_lsn[1:], _with_first(last_end, ends)[np.searchsorted(commit, begin)])
    complete = len(commit) == len(begin) + (carried is not None)
    return Transactions(first, index, commit_lsn, commit_ts, xid, ends, complete)


def _with_first(first: int, values: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([np.array([first], values.dtype), values])


def _check_size(f: Frames, frame: Ints, size: int, name: str) -> None:
    wrong = np.flatnonzero(f.end[frame] - f.payload[frame] != size)
    if len(wrong):
        bad = frame[wrong[0]]
        got = int(f.end[bad] - f.payload[bad])
        raise ProtocolError(f"{name}: expected {size} bytes, got {got}", lsn=f.lsn_of(bad), hint=UNTRUSTED)


def _check_moments(commit_lsn: NDArray[np.uint64], commit_ts: NDArray[np.int64]) -> None:
    """A replication origin may set any moment. Added to Unix's epoch a late one would wrap around."""
    late = np.flatnonzero(commit_ts > _LAST_MOMENT)
    if len(late):
        raise ProtocolError(
            "Begin.commit_ts: expected a moment that 64 bits can hold",
            lsn=int(commit_lsn[late[0]]),
            hint="look at what sets this transaction's time: pg_replication_origin_xact_setup()",
        )


def _ends(f: Frames, commit: Ints, announced: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Where the transactions of these Commits end; each Commit must name the LSN that its Begin `announced`."""
    at = f.payload[commit]
    commit_lsn, ends = f.integers(">u8", at + 2), f.integers(">u8", at + 10)
    fits = (commit_lsn == announced) & (ends > commit_lsn) & (f.u1[at + 1] == 0)
    if not fits.all():
        bad = commit[int(np.argmin(fits))]
        raise ProtocolError("a Commit that does not fit its Begin", lsn=f.lsn_of(bad), hint=UNTRUSTED)
    return ends


def _check_commit_order(f: Frames, begin: Ints, commit_lsn: NDArray[np.uint64], before: NDArray[np.uint64]) -> None:
    """Each transaction commits after the end of the one `before` it."""
    early = (commit_lsn < before) | (commit_lsn == 0)
    if early.any():
        bad = begin[int(np.argmax(early))]
        raise ProtocolError("transactions that are not in commit order", lsn=f.lsn_of(bad), hint=UNTRUSTED)


# -- changes --------------------------------------------------------------------------------------------------------


def changes_of(
    f: Frames, transactions: Transactions, truncated: Mapping[int, Sequence[int]]
) -> tuple[Rows, NDArray[np.uint32]]:
    """Every change of these frames with its position, and its relation.

    `truncated` gives the relations of each frame that is a Truncate.

    Raises:
        ProtocolError: A change that names no relation, or that is not in the order of the WAL.
    """
    frame, relation = _row_frames(f)
    if truncated:
        frame, relation = _with_truncates(frame, relation, truncated)
    index = transactions.index[frame]
    _check_wal_order(f, transactions, frame, index)
    seq = _numbers(index, len(transactions.commit_lsn), transactions.open.changes)
    commit_lsn, commit_ts, xid = transactions.commit_lsn[index], transactions.commit_ts[index], transactions.xid[index]
    return Rows(frame, commit_lsn, seq, xid, commit_ts), relation


def _row_frames(f: Frames) -> tuple[Ints, NDArray[np.uint32]]:
    """The frames that are rows, and their relations."""
    frame = np.flatnonzero(_IS_ROW[f.tag])
    at = f.payload[frame]
    short = at + 5 > f.end[frame]
    if short.any():
        bad = frame[int(np.argmax(short))]
        raise ProtocolError("a change without a relation", lsn=f.lsn_of(bad), hint=UNTRUSTED)
    return frame, f.integers(">u4", at + 1)


def _with_truncates(
    frame: Ints, relation: NDArray[np.uint32], truncated: Mapping[int, Sequence[int]]
) -> tuple[Ints, NDArray[np.uint32]]:
    """A truncate is one change per table, in the message's order; a stable sort puts them between their neighbours."""
    at = np.repeat(np.fromiter(truncated, np.int64), [len(ids) for ids in truncated.values()])
    ids = np.array([i for ids in truncated.values() for i in ids], np.uint32)
    order = np.argsort(np.concatenate([frame, at]), kind="stable")
    return np.concatenate([frame, at])[order], np.concatenate([relation, ids])[order]


def _check_wal_order(f: Frames, transactions: Transactions, frame: Ints, index: Ints) -> None:
    """A transaction's changes come in the order of the WAL, and all of them stand before its commit.

    Rows of one COPY share a record. PostgreSQL asserts the same where it merges subtransactions.
    """
    lsn = _with_first(transactions.open.lsn, f.integers(">u8", f.start[frame] + 1))
    same = index == np.concatenate([np.zeros(1, np.int64), index[:-1]])  # as the change before
    wrong = ((lsn[1:] < lsn[:-1]) & same) | (lsn[1:] > transactions.commit_lsn[index])
    if wrong.any():
        bad = frame[int(np.argmax(wrong))]
        raise ProtocolError("a change that is not in the order of the WAL", lsn=f.lsn_of(bad), hint=UNTRUSTED)


def _numbers(index: Ints, transactions: int, carried: int) -> NDArray[np.uint64]:
    """Each change's number within its transaction, from 0; the first transaction has `carried` changes already.

    Changes are counted through; a search finds each transaction's first one, as `index` ascends.
    """
    first = np.searchsorted(index, np.arange(transactions))
    first[0] -= carried
    return (np.arange(len(index)) - first[index]).astype(np.uint64)


def after(rows: Rows, relation: NDArray[np.uint32], position: Position | None) -> tuple[Rows, NDArray[np.uint32]]:
    """The changes that come after `position`, all if it is None."""
    if position is None or not len(rows) or rows.commit_lsn[0] > np.uint64(position.commit_lsn):
        return rows, relation
    lsn, seq = np.uint64(position.commit_lsn), np.uint64(position.seq)
    later = np.flatnonzero((rows.commit_lsn > lsn) | ((rows.commit_lsn == lsn) & (rows.seq > seq)))
    return rows.take(later), relation[later]
