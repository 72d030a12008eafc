"""Decodes tuples of a binary COPY into the columns that the stream gives for the same rows, and their `_raw`.

A tuple is a count of fields, then for each field its length (-1 for NULL) and its bytes. The tuples of many rows lie in
one buffer. They are walked column by column, left to right, one step for all rows at once. Each column is then decoded
by the same row of the type table as in the stream.

A type without a binary decoder, or with a slow one, is read as text: ask the server for `TEXT_OF` the column instead of
the column. It is still a field of a binary COPY.

https://www.postgresql.org/docs/current/sql-copy.html#SQL-COPY-BINARY-FORMAT
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgoutput_source.changes.schema import Column
from pgoutput_source.decode.cells import BadValue, decoded
from pgoutput_source.errors import ConfigurationError, DecodeError, ProtocolError
from pgoutput_source.types import TYPES
from pgoutput_source.types.base import PgType, Sent, exact_text, numbers_at, ranges_of

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

TEXT_OF: Final = "CASE WHEN {0} IS DISTINCT FROM NULL THEN pg_catalog.format('%s', {0}) END"
"""An SQL expression for the text that a type's output function writes, with the identifier ``{0}``.

A cast to text is not the same for every type: it strips trailing spaces from `character`, and adds a netmask that the
output of `inet` does not show. And a composite value may be neither ``IS NULL`` nor ``IS NOT NULL``.
"""

_SIGNATURE: Final = b"PGCOPY\n\xff\r\n\0"
HEADER: Final = len(_SIGNATURE) + 8
"""The bytes before the first tuple of a binary COPY."""

PADDING: Final = bytes(32)
"""After the last tuple of a buffer: a gather may read a few bytes there before bounds are checked."""

_MOST_BYTES: Final = 2**31 - 1 - len(PADDING)
_SHOWN: Final = 32  # characters of an undecodable value that an error may show


def without_header(first: bytes) -> int:
    """How many bytes of the first message are before its tuple.

    Args:
        first: The header and two more bytes.

    Raises:
        ProtocolError: These are not the first bytes of a binary COPY.
    """
    if len(first) < HEADER + 2 or not first.startswith(_SIGNATURE + bytes(8)):
        raise ProtocolError("COPY: the data does not begin with the header of the binary format")
    return HEADER


class CopiedColumn(NamedTuple):
    """A column that COPY reads. `type` decodes it, from text if the query asks for `TEXT_OF` it."""

    column: Column
    type: PgType
    as_text: bool


def as_text(pg_type: PgType) -> bool:
    """Whether to read columns of this type as text."""
    return pg_type.binary is None or pg_type.binary.by_value


class DecodedTuples(NamedTuple):
    """The table's columns, and `_raw`: by column, the exact text of values that its Arrow type can't hold."""

    columns: list[pa.Array]
    raw: pa.MapArray


class Tuples:
    """Tuples of one COPY, joined into one buffer: tuple i is `raw[start[i]:end[i]]`.

    Each CopyData message holds one tuple. COPY's header, at the beginning of the first message, is left out, and so is
    the trailer, which is a separate message.

    Args:
        parts: The bytes of some messages, in order; a part may hold any number of them.
        lengths: The size of each message in bytes.
        first: Whether these are the first messages of their COPY.

    Raises:
        ProtocolError: The header is not that of a binary COPY, or the lengths are not those of the parts.
        ConfigurationError: More than 2 GiB at once.
    """

    __slots__ = ("end", "raw", "start")

    def __init__(self, parts: Sequence[bytes | memoryview], lengths: Sequence[int] | Ints, *, first: bool) -> None:
        length = np.asarray(lengths, np.int64)
        end = np.cumsum(length)
        size = int(end[-1]) if len(end) else 0
        if size > _MOST_BYTES:
            raise ConfigurationError(
                f"{size} bytes of COPY at once; Arrow's offsets end at {_MOST_BYTES}", hint="feed fewer rows at a time"
            )
        self.raw = b"".join([*parts, PADDING])
        if len(self.raw) != size + len(PADDING):
            raise ProtocolError(f"COPY: expected {size} bytes, got {len(self.raw) - len(PADDING)}")
        start = end - length
        if first and len(start):
            start[0] += without_header(self.raw[: min(length[0], HEADER + 2)])
        if (end - start < 2).any():
            raise ProtocolError("COPY: a message without a tuple")
        if len(start) and numbers_at(self.raw, ">i2", start[-1:])[0] == -1:
            if end[-1] - start[-1] != 2:
                raise ProtocolError("COPY: bytes after the trailer")
            start, end = start[:-1], end[:-1]
        self.start: Ints = start
        self.end: Ints = end

    @classmethod
    def of(cls, raw: bytes, start: Ints, end: Ints) -> Tuples:
        """The tuples that begin and end there in a buffer, which has `PADDING` after the last."""
        found = cls((), (), first=False)
        if (end - start < 2).any():
            raise ProtocolError("COPY: a message without a tuple")
        found.raw, found.start, found.end = raw, start, end
        return found

    def __len__(self) -> int:
        return len(self.start)


def decode_copied(
    tuples: Tuples, columns: Sequence[CopiedColumn], table: str, *, on_misfit: str = "raw"
) -> DecodedTuples:
    """The columns of these tuples, as the stream would give them for the same rows.

    Args:
        tuples: What COPY sent.
        columns: The columns of the query, in its order.
        table: The table's name in errors.
        on_misfit: What to do with a value that its Arrow type can't hold: "raw" keeps its text, "error" raises.

    Raises:
        ProtocolError: A tuple does not have these columns.
        DecodeError: A value is invalid for its column's type; or, with on_misfit="error", doesn't fit its Arrow type.
    """
    pos = tuples.start

    def check(ok: Bools, problem: str) -> None:
        if not ok.all():
            raise ProtocolError(f"COPY: {problem}", table=table)

    check(numbers_at(tuples.raw, ">i2", pos) == len(columns), f"a tuple that is not {len(columns)} columns wide")
    pos = pos + 2
    arrays: list[pa.Array] = []
    misfits: dict[int, list[tuple[str, str]]] = {}
    for one in columns:
        check(pos + 4 <= tuples.end, "a tuple that ends early")
        length = numbers_at(tuples.raw, ">i4", pos).astype(np.int64)
        null = length < 0
        check(length >= -1, "a value of negative length")
        if any_null := bool(null.any()):
            length = np.where(null, 0, length)
        fields = _Fields(tuples.raw, pos + 4, length, null if any_null else None, one, table)
        pos = pos + 4 + length
        check(pos <= tuples.end, "a value that is longer than its tuple")
        values = fields.decoded()
        if values.null_count != np.count_nonzero(null):
            for row in np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False) & ~null).tolist():
                if on_misfit == "error":
                    raise fields.error(row, f"a value that {one.column.arrow} can't hold")
                misfits.setdefault(row, []).append((one.column.name, fields.text(row)))
        arrays.append(values)
    check(pos == tuples.end, "bytes after the last column")
    kind = pa.map_(pa.utf8(), pa.utf8())
    raw = pa.array(list(map(misfits.get, range(len(tuples)))), kind) if misfits else pa.nulls(len(tuples), kind)
    return DecodedTuples(arrays, raw)


class _Fields(NamedTuple):
    """One column's values: where each lies, and which are NULL (None if no value is)."""

    raw: bytes
    start: Ints
    length: Ints
    null: Bools | None
    of: CopiedColumn
    table: str

    def decoded(self) -> pa.Array:
        column, pg_type, from_text = self.of
        start, length, kind = self.start, self.length, column.arrow
        there = None
        if self.null is not None:
            there = np.flatnonzero(~self.null)
            start, length = start[there], length[there]
        if not len(start):
            return pa.nulls(len(self.start), kind)
        try:
            if from_text:
                values, decode = ranges_of(self.raw, start, length, None), pg_type.decode
            elif pg_type.binary is None:
                raise self.error(0, "a type that has no binary decoder")
            else:
                values, decode = Sent(self.raw, start, length), pg_type.binary.decode
            found = decoded(values, pg_type, decode, kind, defined=column.type_oid not in TYPES)
        except BadValue as e:
            row = e.index if there is None else int(there[e.index])
            raise self.error(row, "not a value of its type") from e
        return found if self.null is None else found.take(pa.array(np.cumsum(~self.null) - 1, mask=self.null))

    def text(self, row: int) -> str:
        """PostgreSQL's exact text of one value."""
        value = self.raw[self.start[row] : self.start[row] + self.length[row]]
        if self.of.as_text or self.of.type.binary is None:
            return exact_text(value)
        try:
            return exact_text(self.of.type.binary.text(value))
        except ValueError as e:
            raise self.error(row, "not a value of its type") from e

    def error(self, row: int, problem: str) -> DecodeError:
        value = self.raw[self.start[row] : self.start[row] + self.length[row]]
        shown = f"{len(value)} bytes in binary"
        if self.of.as_text:
            shown = repr(value[:_SHOWN].decode(errors="replace") + ("…" if len(value) > _SHOWN else ""))
        column = self.of.column
        return DecodeError(
            f"{problem}: {shown}",
            table=self.table,
            column=column.name,
            type_name=column.type_name,
            hint="a column list of the publication can leave the column out (PostgreSQL 15 or newer)",
        )
