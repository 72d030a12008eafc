"""The tuples of many Insert, Update and Delete frames, walked column by column with one step for all rows at once.

Three shapes of frames exist, and all share their first step:

    Insert           'I' relid 'N' tuple
    Update           'U' relid 'N' tuple         or 'U' relid ('K' | 'O') tuple 'N' tuple
    Delete           'D' relid ('K' | 'O') tuple

Every read is checked against the end of its own frame, so that hostile bytes end in `ProtocolError`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pgoutput_source.changes.schema import TableSchema
from pgoutput_source.decode.frames import Bools, Frames, Ints
from pgoutput_source.errors import ProtocolError

Numbers = TypeVar("Numbers", bound=NDArray[Any])

NULL, UNCHANGED, TEXT, BINARY = b"nutb"
"""How PostgreSQL sends a value."""

_NEW = ord("N")
_UPDATE, _TRUNCATE = b"UT"
_MARKERS: dict[bytes, bytes] = {b"I": b"N", b"U": b"NKO", b"D": b"KO"}
_MARKER_OK = np.zeros((256, 256), np.bool_)
for _tag, _allowed in _MARKERS.items():
    _MARKER_OK[ord(_tag), list(_allowed)] = True


class TupleColumn(NamedTuple):
    """One column of many tuples: for each row how its value came (`NULL`, `UNCHANGED`, `TEXT`, `BINARY`), and where."""

    kind: NDArray[np.uint8]
    start: Ints
    length: Ints

    def take(self, rows: Ints) -> TupleColumn:
        """The column of some rows."""
        return TupleColumn(self.kind[rows], self.start[rows], self.length[rows])


def read_tuples(
    f: Frames, frame: Ints, tag: NDArray[np.uint8], schema: TableSchema
) -> tuple[list[TupleColumn], list[TupleColumn], Ints]:
    """The new tuple of each frame (a delete's: what is known of the old), the old tuples, and the rows these belong to.

    Raises:
        ProtocolError: A frame doesn't hold the tuples that its message must have.
    """
    truncates = tag == _TRUNCATE
    if truncates.any():
        rows = np.flatnonzero(~truncates)
        new, old, with_old = read_tuples(f, frame[rows], tag[rows], schema)
        return _spread(new, rows, f.payload[frame]), old, rows[with_old]
    cursor = _Cursor(f, frame, schema)
    old_first = cursor.marker(tag) != _NEW
    first = cursor.walk()
    if not old_first.any():
        cursor.finish()
        return first, [], frame[:0]
    # The server detoasts what it logs of an old row: one value that was not sent would look like a NULL.
    for column in first:
        cursor.check(~old_first | (column.kind != UNCHANGED), "an old tuple with a value that was not sent")
    new = first
    again = np.flatnonzero(old_first & (tag == _UPDATE))
    if len(again):
        new = [_replaced(old, update, again) for old, update in zip(first, cursor.walk_again(again), strict=True)]
    cursor.finish()
    # An old tuple's NULL in a K tuple is "not sent"; either way its cell in `_before` is null.
    with_old = np.flatnonzero(old_first)
    return new, [column.take(with_old) for column in first], with_old


def _replaced(old: TupleColumn, update: TupleColumn, again: Ints) -> TupleColumn:
    """`old`, but in the rows `again` the values of the `update`, whose unchanged values are the old ones.

    An 'O' tuple holds every value and a 'K' tuple the key's: where the old value was sent, unchanged means this.
    """
    before = old.take(again)
    kept = (update.kind == UNCHANGED) & is_sent(before.kind)

    def replaced(values: Numbers, was: Numbers, now: Numbers) -> Numbers:
        values = values.copy()
        values[again] = np.where(kept, was, now)
        return values

    return TupleColumn(
        replaced(old.kind, before.kind, update.kind),
        replaced(old.start, before.start, update.start),
        replaced(old.length, before.length, update.length),
    )


def _spread(tuples: list[TupleColumn], rows: Ints, at: Ints) -> list[TupleColumn]:
    """The tuples of these rows among others that have none (truncates), whose values are all NULL."""

    def among(values: Numbers, others: Numbers) -> Numbers:
        others[rows] = values
        return others

    return [
        TupleColumn(
            among(column.kind, np.full(len(at), NULL, np.uint8)),
            among(column.start, at.copy()),
            among(column.length, np.zeros(len(at), np.int64)),
        )
        for column in tuples
    ]


def is_sent(kind: NDArray[np.uint8]) -> Bools:
    """Which values came, as text or in binary."""
    sent: Bools = kind == TEXT
    if not sent.all():
        sent |= kind == BINARY
    return sent


class _Cursor:
    """A place in each of many frames, from which all of them are read in step.

    A check that fails names the first frame that fails it.
    """

    __slots__ = ("at", "end", "frame", "frames", "schema")

    def __init__(self, frames: Frames, frame: Ints, schema: TableSchema) -> None:
        self.frames, self.frame, self.schema = frames, frame, schema
        self.at, self.end = frames.payload[frame], frames.end[frame]

    def check(self, ok: Bools, problem: str) -> None:
        if not ok.all():
            bad = self.frame[int(np.argmin(ok))]
            raise ProtocolError(problem, table=self.schema.table, lsn=self.frames.lsn_of(bad))

    def marker(self, tag: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Read the message up to its first tuple: the letter that says of which kind that is."""
        self.check(self.at + 8 <= self.end, "a change without a tuple")
        marker = self.frames.u1[self.at + 5]
        self.check(_MARKER_OK[tag, marker], "a tuple of a kind that its message can't have")
        self.at = self.at + 6
        return marker

    def walk(self) -> list[TupleColumn]:
        """Read one tuple of each frame."""
        f, end, width = self.frames, self.end, len(self.schema.columns)
        self.check(f.integers(">u2", self.at) == width, f"a tuple that has not {width} columns")
        at = self.at + 2
        tuples: list[TupleColumn] = []
        for _ in range(width):
            self.check(at < end, "a tuple that ends early")
            kind = f.u1[at]
            sent = is_sent(kind)
            if sent.all():
                length = f.integers(">i4", at + 1).astype(np.int64)
                start = at + 5
            else:
                self.check(sent | (kind == NULL) | (kind == UNCHANGED), "a value of unknown kind")
                length = np.where(sent, f.integers(">i4", at + 1), 0).astype(np.int64)
                start = at + np.where(sent, 5, 1)
            at = start + length
            self.check((length >= 0) & (at <= end), "a value that is longer than its frame")
            tuples.append(TupleColumn(kind, start, length))
        self.at = at
        return tuples

    def walk_again(self, rows: Ints) -> list[TupleColumn]:
        """Read the second tuple of the frames that have one: the new row of an update."""
        second = _Cursor(self.frames, self.frame[rows], self.schema)
        second.at = self.at[rows]
        second.check(second.at + 3 <= second.end, "an update without its new tuple")
        second.check(self.frames.u1[second.at] == _NEW, "an update without its new tuple")
        second.at = second.at + 1
        tuples = second.walk()
        self.at[rows] = second.at
        return tuples

    def finish(self) -> None:
        """Nothing may follow the last tuple."""
        self.check(self.at == self.end, "bytes after the last tuple")
