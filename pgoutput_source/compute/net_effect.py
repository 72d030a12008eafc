"""The net effect of changes on a keyed table: each key's final row, and where it came from.

A key's changes, in order, are split into *lives*. A life begins with an insert, or when an update moves the row here
from another key. It ends with a delete, or when an update moves the row to another key. The last change of a key's last
life is its row. A large value that PostgreSQL did not send again comes from earlier in the same life, or from the row's
life under its old key. All of this is sorting and accumulating over whole columns.

Between the changes of one transaction several rows may have the same key: ``UPDATE t SET id = id + 1`` moves row 1 to
key 2 before row 2 leaves it. Only a deferrable constraint allows that, and such a key can't be a replica identity: the
identity is FULL, and the old row tells which of the rows a change belongs to. In these cases the rows are followed one
by one (`Crowd`). Otherwise a key has one row at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pgoutput_source.compute.metadata import DELETE, INSERT, READ, Bools, Ints

Contents = Callable[[Ints], Sequence[bytes]]
"""Returns digests of whole rows, for the changes at these indexes; equal for equal rows."""


class ValueOrigin(NamedTuple):
    """Where a value comes from.

    Attributes:
        change: The last change that sent it, or -1.
        key: If there is no such change: the row's key before all these changes, or -1 if the row was inserted since.
    """

    change: Ints
    key: Ints


@dataclass(frozen=True, slots=True)
class Lives:
    """*Events* by key and in order: changes, where an update of the key is also an event of its old key.

    Attributes:
        code: Each event's key.
        row: Each event's change.
        leaves: Whether the event takes the row to another key.
        ends: Whether the event leaves its key without a row.
        start: The first event of the event's life.
        parent: The event at the old key, if this one moves the row here from there; otherwise -1.
        born: Whether the event is an insert, so that the life it begins has no earlier one.
    """

    code: Ints
    row: Ints
    leaves: Bools
    ends: Bools
    start: Ints
    parent: Ints
    born: Bools

    def last(self) -> Ints:
        """The last event of each key that has one."""
        if not len(self.code):
            return self.code
        return np.flatnonzero(np.append(self.code[1:] != self.code[:-1], True))

    def origins(self, sent: Bools, events: Ints) -> ValueOrigin:
        """Where the rows' values after these events come from; `sent` tells which changes have the value."""
        here = np.where(sent[self.row] & ~self.leaves, np.arange(len(self.row)), -1)
        latest = np.maximum.accumulate(here) if len(here) else here
        change, key = np.full(len(events), -1, np.int64), np.full(len(events), -1, np.int64)
        open_, at = np.arange(len(events)), events
        while len(open_):
            known = latest[at] >= self.start[at]
            change[open_[known]] = self.row[latest[at[known]]]
            open_, first = open_[~known], self.start[at[~known]]
            at = self.parent[first]
            over = at < 0
            key[open_[over]] = np.where(self.born[first[over]], -1, self.code[first[over]])
            open_, at = open_[~over], at[~over]
        return ValueOrigin(change, key)


def lives(ops: NDArray[np.int8], code: Ints, moves: Ints, old_code: Ints, crowd: Crowd | None = None) -> Lives:
    """The lives in some changes, none of them a truncate, in position order.

    Args:
        ops: `_op` of each change, as its index in `OPS`.
        code: The key of each change's new row (for a delete, of its old row), as an integer.
        moves: The updates that changed the key.
        old_code: The old keys of these updates.
        crowd: Tells the rows of one key apart; needed with identity FULL.
    """
    n = len(ops)
    if len(moves):
        codes = np.concatenate([code, old_code])
        row = np.concatenate([np.arange(n), moves])
        leaves: Bools = np.arange(len(row)) >= n
        order = np.lexsort((row, codes))
        codes, row, leaves = codes[order], row[order], leaves[order]
    else:
        row = np.argsort(code, kind="stable").astype(np.int64)
        codes, leaves = code[row], np.zeros(n, np.bool_)
    brought = np.zeros(n, np.bool_)
    brought[moves] = True
    op = ops[row]
    ends = leaves | (op == DELETE)
    born = ~leaves & ((op == INSERT) | (op == READ))
    arrives = born | (brought[row] & ~leaves)
    if crowd is not None and (settled := crowd.in_order(codes, row, arrives, ends)) is not None:
        codes, row, leaves = codes[settled], row[settled], leaves[settled]
        ends, born, arrives = ends[settled], born[settled], arrives[settled]
    back = np.full(n, -1, np.int64)
    back[row[leaves]] = np.flatnonzero(leaves)
    parent = np.where(arrives & ~born, back[row], -1)
    begins = arrives.copy()
    begins[:1] = True
    begins[1:] |= (codes[1:] != codes[:-1]) | ends[:-1]
    start = np.maximum.accumulate(np.where(begins, np.arange(len(row)), 0)) if len(row) else row
    return Lives(codes, row, leaves, ends, start, parent, born)


# ------------------------------------------------------------------------------------- several rows with the same key


@dataclass(slots=True)
class _Member:
    """One row of a crowd: of those that have the same key between the changes of a transaction.

    `rank` decides which one wins if several stay: 0 is a row from before the transaction, 1 one from earlier batches of
    it, 2 one from this batch.
    """

    rank: int
    content: bytes
    events: list[int] = field(default_factory=list)
    gone: bool = False


@dataclass(slots=True)
class Standing:
    """What a transaction that may continue in the next batch has so far: digests of keys and of their rows."""

    commit_lsn: int = -1
    rows: dict[bytes, list[bytes]] = field(default_factory=dict)


class Crowd:
    """Tells the rows of one key apart between the changes of a transaction, by their whole contents.

    Args:
        transaction: Each change's transaction; equal ones are adjacent.
        is_whole: Changes whose old row has all columns. Others are never told apart.
        news: Digests of new rows.
        olds: Digests of old rows.
        standing: What earlier batches of the first transaction had, by the digests from `key_of`.
        key_of: The digest of a key's code.
    """

    def __init__(
        self,
        transaction: Ints,
        is_whole: Bools,
        news: Contents,
        olds: Contents,
        standing: Standing | None = None,
        key_of: Callable[[Ints], Sequence[bytes]] | None = None,
    ) -> None:
        self.transaction, self.is_whole, self.news, self.olds = transaction, is_whole, news, olds
        self.standing, self.key_of = standing, key_of
        self.left: dict[tuple[int, int], list[bytes]] = {}
        """By key and transaction, the rows that it added and that still exist, if rows had to be followed."""

    def in_order(self, codes: Ints, row: Ints, arrives: Bools, ends: Bools) -> Ints | None:
        """The events in an order in which a key has one row at a time; None if they are already in such an order.

        A row that comes and goes within one transaction leaves the key as it was, so its events are left out.
        """
        n = len(codes)
        if not n:
            return None
        transaction = self.transaction[row]
        first = np.append(True, (codes[1:] != codes[:-1]) | (transaction[1:] != transaction[:-1]))
        group = np.cumsum(first) - 1
        starts = np.flatnonzero(first)
        wanted = np.zeros(len(starts), np.bool_)
        wanted[group[ends & ~first & self.is_whole[row]]] = True
        earlier = self._earlier(codes[starts], transaction[starts])
        for at in earlier:
            wanted[at] = True
        if not wanted.any():
            return None
        stops = np.append(starts[1:], n)
        events = np.flatnonzero(wanted[group])
        news = dict(zip(events.tolist(), self.news(row[events]), strict=True))
        departing = events[~arrives[events]]
        olds = dict(zip(departing.tolist(), self.olds(row[departing]), strict=True))
        order = np.arange(n)
        keep = np.ones(n, np.bool_)
        for at in np.flatnonzero(wanted).tolist():
            inside = range(int(starts[at]), int(stops[at]))
            found, left = _followed(inside, arrives, ends, news, olds, earlier.get(at, []))
            keep[inside.start + len(found) : inside.stop] = False
            order[inside.start : inside.start + len(found)] = found
            self.left[int(codes[inside.start]), int(transaction[inside.start])] = left
        return order[keep]

    def _earlier(self, codes: Ints, transaction: Ints) -> dict[int, list[bytes]]:
        """The rows at the keys of these groups that come from earlier batches of their transaction."""
        if self.standing is None or self.key_of is None or not self.standing.rows:
            return {}
        groups = np.flatnonzero(transaction == self.standing.commit_lsn)
        keys = self.key_of(codes[groups])
        rows = self.standing.rows
        return {at: rows[key] for at, key in zip(groups.tolist(), keys, strict=True) if key in rows}


def _followed(
    events: Sequence[int],
    arrives: Bools,
    ends: Bools,
    news: dict[int, bytes],
    olds: dict[int, bytes],
    earlier: list[bytes],
) -> tuple[list[int], list[bytes]]:
    """The events of one key in one transaction, row by row; and the contents of the rows that it added and that stay.

    A change of an unknown row belongs to a row from before the transaction.
    """
    rows = [_Member(1, content) for content in earlier]
    for event in events:
        if arrives[event]:
            rows.append(_Member(2, news[event], [event]))
            continue
        row = next((r for r in reversed(rows) if not r.gone and r.content == olds[event]), None)
        if row is None:
            row = _Member(0, b"")
            rows.append(row)
        row.events.append(event)
        row.gone, row.content = bool(ends[event]), news[event]
    stay = sorted((r for r in rows if not r.gone), key=lambda r: r.rank)
    left = [r.content for r in stay if r.rank]
    if stay and not stay[-1].events:
        return [], left  # a row of an earlier batch stays as it is
    gone = [r for r in rows if r.gone and r.rank < 2]
    return [event for r in [*gone, *stay] for event in r.events], left


def digests(columns: Sequence[pa.Array]) -> list[bytes]:
    """A digest of 8 bytes for each row, equal for equal rows, in every process."""
    if not columns:
        return []
    texts = [_binary(column) for column in columns]
    whole = pc.binary_join_element_wise(*texts, pa.scalar(b"\x1f", pa.large_binary()))
    return [hashlib.blake2b(text, digest_size=8).digest() for text in whole.to_pylist()]


def _binary(column: pa.Array) -> pa.Array:
    kind = column.type
    if pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType):
        values = pa.array([None if v is None else repr(v).encode() for v in column.to_pylist()], pa.large_binary())
    elif pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        values = column.cast(pa.large_binary())
    else:
        values = column.cast(pa.large_utf8()).cast(pa.large_binary())
    # A length before each value keeps ('a', 'bc') and ('ab', 'c') apart. A NULL has no length.
    lengths = pc.binary_length(values).cast(pa.large_utf8()).cast(pa.large_binary())
    marked = pc.binary_join_element_wise(lengths, values, pa.scalar(b":", pa.large_binary()))
    return pc.fill_null(marked, pa.scalar(b"-", pa.large_binary()))
