"""The hot path: many Insert, Update and Delete frames of one version of one table → one `ChangeBatch`.

All frames of a poll lie joined in one buffer. A tuple is walked column by column, left to right, *one step for all
rows at once*: `kind = buf[pos]; length = u4[pos + 1]; start = pos + 5; pos = start + length`. A column's values are
then gathered by Arrow in one C++ pass and parsed by Arrow as a whole. No row ever becomes a Python object.

Three shapes of frames exist, and all share their first step:

    Insert           'I' relid 'N' tuple
    Update           'U' relid 'N' tuple         or 'U' relid ('K' | 'O') tuple 'N' tuple
    Delete           'D' relid ('K' | 'O') tuple

Every read is checked against the end of its own frame, so that hostile bytes end in `ProtocolError`.
This file may be dense; the order of messages, positions and relations live elsewhere (`assembler`, `relations`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.changes.schema import OP_CODE, OPS, Column, TableSchema
from pgoutput_source.decode.cells import BadValue, decoded
from pgoutput_source.decode.relations import ColumnType, TableVersion
from pgoutput_source.errors import ConfigurationError, DecodeError, ProtocolError
from pgoutput_source.protocol.wire import PG_EPOCH_US, XLOG_DATA_HEADER
from pgoutput_source.types.base import Sent, exact_text, numbers_at, ranges_of

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_PADDING = bytes(32)  # a gather may look a few bytes past the last frame before its bounds are known
_MOST_BYTES = 2**31 - 1 - len(_PADDING)
_KEEPALIVE_SIZE = 18
_N, _K, _O = b"NKO"
_NULL, _UNCHANGED, _TEXT, _BINARY = b"nutb"
_INSERT, _UPDATE, _DELETE, _TRUNCATE = b"IUDT"

_CODE = np.zeros(256, np.int8)
for _op, _code in OP_CODE.items():
    _CODE[ord(_op)] = _code
_OPS = pa.array(OPS, pa.utf8())

_MARKERS: dict[int, bytes] = {_INSERT: b"N", _UPDATE: b"NKO", _DELETE: b"KO"}
_MARKER_OK = np.zeros((256, 256), np.bool_)
for _tag, _allowed in _MARKERS.items():
    _MARKER_OK[_tag, list(_allowed)] = True

_SHOWN = 32  # characters of an undecodable value that an error may show
_TEXT_INSTEAD = 'binary="off" has the server send text, which can always be read'


class Joined(NamedTuple):
    """XLogData frames that lie joined already, perhaps with gaps: their bytes, and where each frame, its message and
    its end are in them. Each message has at least its first byte.
    """

    parts: list[bytes | bytearray | memoryview]
    start: Ints
    payload: Ints
    end: Ints


class Frames:
    """CopyData frames joined into one buffer, with readers of big-endian integers at any offset, for many at once.

    `start` and `end` are the byte offsets of the XLogData frames; keepalives are skipped. `tag` is the pgoutput
    message's first byte, `lsn` the WAL start of its frame.

    Raises:
        ProtocolError: A frame is neither XLogData nor a keepalive, or has no payload.
        ConfigurationError: More than 2 GiB at once.
    """

    def __init__(self, frames: Sequence[bytes | memoryview] | Joined) -> None:
        if isinstance(frames, Joined):
            parts: list[bytes | bytearray | memoryview] = [*frames.parts]
            start, payload, end = frames.start, frames.payload, frames.end
        else:
            parts = [*frames]
            length = np.fromiter(map(len, frames), np.int64, len(frames))
            end = np.cumsum(length)
            start = end - length
            payload = start + XLOG_DATA_HEADER
        size = int(end.max(initial=0))
        if size > _MOST_BYTES:
            raise ConfigurationError(
                f"{size} bytes of frames in one feed; Arrow's offsets end at {_MOST_BYTES}",
                hint="feed fewer frames at a time; PostgreSQL never sends more than 1 GiB in one",
            )
        parts.append(_PADDING)
        self.raw = b"".join(parts)
        self.u1 = np.frombuffer(self.raw, np.uint8)
        kind = self.u1[start]
        data = kind == ord("w")
        if not data.all():
            other = ~data
            if not ((kind[other] == ord("k")) & ((end - start)[other] == _KEEPALIVE_SIZE)).all():
                raise ProtocolError("a frame that is neither XLogData nor a keepalive")
            start, payload, end = start[data], payload[data], end[data]
        if (payload >= end).any():
            raise ProtocolError(
                f"XLogData: expected more than {XLOG_DATA_HEADER} bytes, got {int((end - start).min())}"
            )
        self.start: Ints = start
        self.end: Ints = end
        self.payload: Ints = payload
        self.tag: NDArray[np.uint8] = self.u1[payload]

    def __len__(self) -> int:
        return len(self.start)

    def integers(self, dtype: str, offsets: Ints) -> NDArray[Any]:
        """Big-endian integers of `dtype` at any byte offsets, in native byte order."""
        return numbers_at(self.raw, dtype, offsets)

    @property
    def lsn(self) -> NDArray[np.uint64]:
        """WAL start of each frame."""
        return self.integers(">u8", self.start + 1)

    def message(self, index: int) -> bytes:
        """One pgoutput message, for the rare kinds that are decoded one by one."""
        return self.raw[self.payload[index] : self.end[index]]

    def slices(self, start: Ints, length: Ints, valid: Bools | None) -> pa.BinaryArray:
        """The byte ranges [start, start + length) as one array, null where not valid; see `ranges_of`."""
        return ranges_of(self.raw, start, length, valid)


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


@dataclass(slots=True)
class _Tuples:
    """One tuple per row: kind, start and length of each value, by column; `after` is where each tuple ends."""

    kind: list[NDArray[np.uint8]]
    start: list[Ints]
    length: list[Ints]
    after: Ints

    def subset(self, rows: Ints | Bools) -> _Tuples:
        return _Tuples(
            [k[rows] for k in self.kind],
            [s[rows] for s in self.start],
            [n[rows] for n in self.length],
            self.after[rows],
        )


def decode(frames: Frames, rows: Rows, version: TableVersion, *, on_misfit: str = "raw") -> ChangeBatch:
    """Rows of one table version as a batch; its columns are described in `changes.metadata_fields`.

    Raises:
        ProtocolError: A frame doesn't hold the tuples that its message must have.
        DecodeError: A value is not text of its column's type; or, with on_misfit="error", doesn't fit its Arrow type.
    """
    schema = version.schema
    tag = frames.tag[rows.frame]
    new, old, old_rows = _read(frames, rows.frame, tag, len(schema.columns), schema)
    decoder = _Decoder(frames, rows, version, on_misfit)
    arrays = [decoder.column(i, new.kind[i], new.start[i], new.length[i], None) for i in range(len(schema.columns))]
    before = _before(decoder, schema, old, old_rows, len(rows))
    arrays += [
        pa.DictionaryArray.from_arrays(pa.array(_CODE[tag]), _OPS),
        pa.array(rows.commit_lsn),
        pa.array(rows.seq),
        pa.array(frames.integers(">u8", frames.start[rows.frame] + 1)),
        pa.array(rows.xid),
        pa.array(rows.commit_ts + PG_EPOCH_US).view(pa.timestamp("us", "UTC")),
        before,
        _unchanged(schema, new.kind, len(rows)),
        decoder.raw_column(),
    ]
    return ChangeBatch(schema, pa.RecordBatch.from_arrays(arrays, schema=schema.arrow))


def _read(
    f: Frames, frame: Ints, tag: NDArray[np.uint8], width: int, schema: TableSchema
) -> tuple[_Tuples, _Tuples, Ints]:
    """The new row of each frame (a delete's: what is known of the old), the old tuples, and the rows these are of."""
    here = np.arange(len(frame))
    if (tag == _TRUNCATE).any():
        here = np.flatnonzero(tag != _TRUNCATE)
    at, end, lsn = f.payload[frame[here]], f.end[frame[here]], f.start[frame[here]]
    where = _Where(f, lsn, schema)
    where.check(at + 8 <= end, "a change without a tuple")
    marker = f.u1[at + 5]
    where.check(_MARKER_OK[tag[here], marker], "a tuple of a kind that its message can't have")
    first = _walk(f, at + 6, end, width, where)
    has_old = marker != _N
    if has_old.any():
        # The server detoasts what it logs of an old row: one value that was not sent would look like a NULL.
        for kind in first.kind:
            where.check(~has_old | (kind != _UNCHANGED), "an old tuple with a value that was not sent")
    both = has_old & (tag[here] == _UPDATE)
    if both.any():
        again = np.flatnonzero(both)
        at2, end2, where2 = first.after[again], end[again], _Where(f, lsn[again], schema)
        where2.check(at2 + 3 <= end2, "an update without its new tuple")
        where2.check(f.u1[at2] == _N, "an update without its new tuple")
        second = _walk(f, at2 + 1, end2, width, where2)
        after = first.after.copy()
        after[again] = second.after
        new = _fill(first, second, again)
    else:
        again, after, new = here[:0], first.after, first
    where.check(after == end, "bytes after the last tuple")
    # An old tuple's 'n' in a K tuple is "not sent"; either way its cell in `_before` is null.
    old_at = np.flatnonzero(has_old)
    old = first.subset(old_at)
    if len(here) != len(frame):
        new = _spread(new, here, f.payload[frame])
    return new, old, here[old_at]


def _fill(first: _Tuples, second: _Tuples, again: Ints) -> _Tuples:
    """The new tuples: those of `again` come second in their frame; their unchanged values come from the old tuple."""
    kinds, starts, lengths = [], [], []
    for k1, s1, n1, k2, s2, n2 in zip(
        first.kind, first.start, first.length, second.kind, second.start, second.length, strict=True
    ):
        # An 'O' tuple holds every value and a 'K' tuple the key's: where the old value was sent, unchanged means this.
        use_old = (k2 == _UNCHANGED) & _is_sent(k1[again])
        kind, start, length = k1.copy(), s1.copy(), n1.copy()
        kind[again] = np.where(use_old, k1[again], k2)
        start[again] = np.where(use_old, s1[again], s2)
        length[again] = np.where(use_old, n1[again], n2)
        kinds.append(kind)
        starts.append(start)
        lengths.append(length)
    return _Tuples(kinds, starts, lengths, first.after)


def _spread(tuples: _Tuples, here: Ints, at: Ints) -> _Tuples:
    """Tuples of the rows `here` among rows that have none (truncates), whose values are all NULL."""
    kinds, starts, lengths = [], [], []
    for k, s, n in zip(tuples.kind, tuples.start, tuples.length, strict=True):
        kind, start, length = np.full(len(at), _NULL, np.uint8), at.copy(), np.zeros(len(at), np.int64)
        kind[here], start[here], length[here] = k, s, n
        kinds.append(kind)
        starts.append(start)
        lengths.append(length)
    return _Tuples(kinds, starts, lengths, at)


def _walk(f: Frames, pos: Ints, end: Ints, width: int, where: _Where) -> _Tuples:
    """Walk one tuple of every row; `pos` points at the tuples' column counts."""
    where.check(f.integers(">u2", pos) == width, f"a tuple that has not {width} columns")
    pos = pos + 2
    kinds, starts, lengths = [], [], []
    for _ in range(width):
        where.check(pos < end, "a tuple that ends early")
        kind = f.u1[pos]
        sent = _is_sent(kind)
        if sent.all():
            length = f.integers(">i4", pos + 1).astype(np.int64)
            start = pos + 5
        else:
            where.check(sent | (kind == _NULL) | (kind == _UNCHANGED), "a value of unknown kind")
            length = np.where(sent, f.integers(">i4", pos + 1), 0).astype(np.int64)
            start = pos + np.where(sent, 5, 1)
        pos = start + length
        where.check((length >= 0) & (pos <= end), "a value that is longer than its frame")
        kinds.append(kind)
        starts.append(start)
        lengths.append(length)
    return _Tuples(kinds, starts, lengths, pos)


def _is_sent(kind: NDArray[np.uint8]) -> Bools:
    """Which values came, as text or in binary."""
    sent: Bools = kind == _TEXT
    if not sent.all():
        sent |= kind == _BINARY
    return sent


class _Where:
    """Turns the first row that fails a check into an error that names its LSN."""

    __slots__ = ("frames", "schema", "start")

    def __init__(self, frames: Frames, start: Ints, schema: TableSchema) -> None:
        self.frames, self.start, self.schema = frames, start, schema

    def check(self, ok: Bools, problem: str) -> None:
        if not ok.all():
            bad = int(np.argmin(ok))
            lsn = int(self.frames.integers(">u8", self.start[bad : bad + 1] + 1)[0])
            raise ProtocolError(problem, table=self.schema.table, lsn=lsn)


@dataclass(slots=True)
class _Cells:
    """One column of new or old tuples: for each value how it came, and where it lies.

    `rows` maps them to rows of the batch when they are the old tuples'; `order` is the column's place.
    """

    column: Column
    type: ColumnType
    kind: NDArray[np.uint8]
    start: Ints
    length: Ints
    rows: Ints | None
    order: int


class _Decoder:
    """Decodes one table version's columns and collects the values that their Arrow type can't hold."""

    def __init__(self, frames: Frames, rows: Rows, version: TableVersion, on_misfit: str) -> None:
        self.frames, self.rows, self.on_misfit = frames, rows, on_misfit
        self.schema, self.types = version.schema, version.types
        self.misfits: dict[int, list[tuple[int, str, str]]] = {}

    def column(self, order: int, kind: NDArray[np.uint8], start: Ints, length: Ints, rows: Ints | None) -> pa.Array:
        """One column's values. `rows` maps the values to rows of the batch when they are the old tuples'."""
        column, column_type = self.schema.columns[order], self.types[order]
        if not len(kind):
            return pa.nulls(0, column.arrow)
        cells = _Cells(column, column_type, kind, start, length, rows, order)
        sent = kind == _TEXT
        every = bool(sent.all())
        binary = None if every else kind == _BINARY
        if binary is not None and binary.any():
            values = self._mixed(cells, sent, binary)
            sent |= binary
        elif every or sent.any():
            text = self.frames.slices(start, length, None if every else sent)
            values = self._decoded(cells, column_type.pg_type.decode, text, None)
        else:
            return pa.nulls(len(kind), column.arrow)
        older = column_type.older(self.rows.xid if rows is None else self.rows.xid[rows])
        if older is not None:
            values = values.take(pa.array(np.arange(len(values)), mask=older))
        if values.null_count != len(kind) - np.count_nonzero(sent):
            self._keep(cells, values, sent)
        return values

    def _mixed(self, cells: _Cells, text: Bools, binary: Bools) -> pa.Array:
        """A column with values in binary: PostgreSQL decides for each one how it is sent."""
        pg_type = cells.type.pg_type
        if pg_type.binary is None:
            bad = int(np.argmax(binary))
            raise self._error(cells, bad, "a value in binary, which can't be read of this type", _TEXT_INSTEAD)
        at = np.flatnonzero(binary)
        sent = Sent(self.frames.raw, cells.start[at], cells.length[at])
        values = self._decoded(cells, pg_type.binary.decode, sent, at)
        if len(at) == len(binary):
            return values
        index = np.cumsum(binary) - 1
        if text.any():
            at = np.flatnonzero(text)
            texts = self.frames.slices(cells.start[at], cells.length[at], None)
            index[at] = len(values) + np.arange(len(at))
            values = pa.concat_arrays([values, self._decoded(cells, pg_type.decode, texts, at)])
        return values.take(pa.array(index, mask=~(text | binary)))

    def _decoded(
        self,
        cells: _Cells,
        decode_part: Callable[[Any, pa.DataType], pa.Array],
        values: pa.BinaryArray | Sent,
        at: Ints | None,
    ) -> pa.Array:
        """`values` decoded; these are the cells `at`, all if it is None."""
        try:
            return decoded(values, cells.type.pg_type, decode_part, cells.column.arrow, defined=cells.type.defined)
        except BadValue as e:
            bad = e.index if at is None else int(at[e.index])
            raise self._error(cells, bad, "not a value of its type") from e

    def _keep(self, cells: _Cells, values: pa.Array, sent: Bools) -> None:
        column, rows = cells.column, cells.rows
        name = column.name if rows is None else self.schema.metadata_names.old + column.name
        for i in np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False) & sent):
            if self.on_misfit == "error":
                raise self._error(cells, int(i), f"a value that {column.arrow} can't hold")
            row = int(i) if rows is None else int(rows[i])
            text = exact_text(self._text(cells, int(i)))
            place = cells.order if rows is None else cells.order + len(self.schema.columns)
            self.misfits.setdefault(row, []).append((place, name, text))

    def _text(self, cells: _Cells, index: int) -> bytes:
        """PostgreSQL's exact text of one value."""
        value = self._bytes(cells, index)
        binary = cells.type.pg_type.binary
        if cells.kind[index] == _TEXT or binary is None:
            return value
        try:
            return binary.text(value)
        except ValueError as e:
            raise self._error(cells, index, "not a value of its type") from e

    def _bytes(self, cells: _Cells, index: int) -> bytes:
        return self.frames.raw[cells.start[index] : cells.start[index] + cells.length[index]]

    def _error(self, cells: _Cells, index: int, problem: str, hint: str | None = None) -> DecodeError:
        column, rows = cells.column, cells.rows
        row = index if rows is None else int(rows[index])
        frame = self.rows.frame[row : row + 1]
        value, shown = self._bytes(cells, index), ""
        if cells.kind[index] == _TEXT:
            shown = repr(value[:_SHOWN].decode(errors="replace") + ("…" if len(value) > _SHOWN else ""))
        else:
            shown = f"{len(value)} bytes in binary"
            hint = hint or _TEXT_INSTEAD
        return DecodeError(
            f"{problem}: {shown}",
            table=self.schema.table,
            column=column.name,
            type_name=column.type_name,
            lsn=int(self.frames.integers(">u8", self.frames.start[frame] + 1)[0]),
            hint=hint,
        )

    def raw_column(self) -> pa.MapArray:
        """`_raw`: the exact text of the values that were left null, by column."""
        kind = pa.map_(pa.utf8(), pa.utf8())
        if not self.misfits:
            return pa.nulls(len(self.rows), kind)
        found = {row: [(name, text) for _, name, text in sorted(items)] for row, items in self.misfits.items()}
        return pa.array([found.get(i) for i in range(len(self.rows))], kind)


def _before(decoder: _Decoder, schema: TableSchema, old: _Tuples, old_rows: Ints, n: int) -> pa.Array:
    """`_before`: the old tuples as structs, null in rows that have none."""
    if not len(old_rows):
        return pa.nulls(n, schema.row_type)
    children = [
        decoder.column(i, old.kind[i], old.start[i], old.length[i], old_rows) for i in range(len(schema.columns))
    ]
    if children:
        rows = pa.StructArray.from_arrays(children, fields=list(schema.row_type))
    else:
        rows = pa.array([{}] * len(old_rows), schema.row_type)
    if len(old_rows) == n:
        return rows
    index = np.zeros(n, np.int64)
    index[old_rows] = np.arange(len(old_rows))
    missing = np.ones(n, np.bool_)
    missing[old_rows] = False
    return rows.take(pa.array(index, mask=missing))


def _unchanged(schema: TableSchema, kinds: list[NDArray[np.uint8]], n: int) -> pa.ListArray:
    """`_unchanged`: the columns whose value PostgreSQL did not send, null where it sent them all."""
    masks = [k == _UNCHANGED for k in kinds]
    if not any(m.any() for m in masks):
        return pa.nulls(n, pa.list_(pa.utf8()))
    table = np.stack(masks, axis=1)
    offsets = np.zeros(n + 1, np.int32)
    np.cumsum(table.sum(axis=1), out=offsets[1:])
    names = pa.array([c.name for c in schema.columns], pa.utf8())
    values = names.take(pa.array(np.nonzero(table)[1]))
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(~table.any(axis=1)))
