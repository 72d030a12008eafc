r"""Values with values inside: how PostgreSQL writes arrays, ranges and composites.

All three are cells between an opening and a closing character, separated by a delimiter. An ambiguous cell is in double
quotes; inside them, a quote is written ``\"`` or ``""`` and a backslash ``\\``. So one reader serves all: it finds the
delimiters outside quotes for the whole column at once.

https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO
https://www.postgresql.org/docs/current/rowtypes.html#ROWTYPES-IO-SYNTAX
https://www.postgresql.org/docs/current/rangetypes.html#RANGETYPES-IO
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pgoutput_source.types.base import Bools, Decode, Ints, Texts, Uint8s, between, nulled, refuse

_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_SPACES = np.frombuffer(b" \t\n\r\v\f", np.uint8)
_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells of a column of nested values, end to end: `counts` says how many belong to each value.

    `texts` holds them without their quotes; `quoted` tells which had some: ``"NULL"`` is not ``NULL``.
    """

    counts: Ints
    texts: pa.BinaryArray
    quoted: Bools

    @property
    def owners(self) -> Ints:
        """The value that each cell belongs to."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


def cells_of(values: pa.BinaryArray, opening: bytes, closing: bytes, delimiter: bytes, name: str) -> Cells:
    """Take apart a column without NULLs. Each value begins with one of `opening` and ends with one of `closing`."""
    t = Texts(values)
    if not len(t):
        return Cells(np.zeros(0, np.int64), pa.array([], pa.binary()), np.zeros(0, bool))
    if t.lengths.min() < 2 or not _all_in(t.at(0), opening) or not _all_in(t.at(-1), closing):
        refuse(name)
    quoting, escapes = quoting_of(t, name)
    delimiters = np.flatnonzero(t.data == delimiter[0])
    if len(quoting):
        delimiters = delimiters[outside(quoting, delimiters)]
    # Quotes are paired within each value. Outside of them there are only cells, delimiters and the two ends.
    raw = t.data.tobytes()
    spaces = np.flatnonzero(np.isin(t.data, _SPACES)) if any(space in raw for space in _SPACES.tolist()) else _NONE
    if not outside(quoting, t.ends - 1).all() or outside(quoting, spaces).any():
        refuse(name)
    counts, starts, ends = cut(t.starts + 1, t.ends - 1, delimiters)
    if not len(quoting) and not len(escapes):
        return Cells(counts, gather(t.data, starts, ends), np.zeros(len(starts), bool))
    quotes = np.zeros(len(t.data), bool)
    quotes[quoting] = True
    enclosed = (ends - starts >= 2) & quotes[starts] & quotes[ends - 1]
    inner = _NONE
    if len(quoting) != 2 * np.count_nonzero(enclosed):
        quotes[starts[enclosed]] = quotes[ends[enclosed] - 1] = False
        inner = np.flatnonzero(quotes)
        # A pair of them means one quote, except in arrays.
        if opening == b"{" or len(inner) & 1 or (inner[1::2] != inner[0::2] + 1).any():
            refuse(name)
    within = np.searchsorted(starts, np.concatenate([inner, escapes]), "right") - 1
    if not enclosed[within].all():
        refuse(name)
    dropped = np.concatenate([inner[0::2], escapes])
    return Cells(counts, gather(t.data, starts + enclosed, ends - enclosed, dropped), enclosed)


def quoting_of(t: Texts, name: str) -> tuple[Ints, Ints]:
    """Where the quotes are that open or close, and the backslashes that escape."""
    # Looking for a byte in all values is nearly free, and most columns have none.
    raw = t.data.tobytes()
    escapes = _escapes(np.flatnonzero(t.data == _BACKSLASH)) if b"\\" in raw else _NONE
    escaped = (escapes + 1)[escapes + 1 < len(t.data)]
    # Bytes 10xxxxxx continue a character: dropping the backslash that splits it would turn invalid UTF-8 into valid.
    if (t.data[escaped] & 0xC0 == 0x80).any():
        refuse(name)
    if b'"' not in raw:
        return _NONE, escapes
    quotes = t.data == _QUOTE
    quotes[escaped] = False
    return np.flatnonzero(quotes), escapes


def _escapes(backslashes: Ints) -> Ints:
    """The backslashes that escape the next character; the second of a pair does not."""
    index = np.arange(len(backslashes))
    begins = np.append(True, np.diff(backslashes) != 1)
    escapes: Ints = backslashes[(index - np.maximum.accumulate(np.where(begins, index, 0))) & 1 == 0]
    return escapes


def outside(quoting: Ints, at: Ints) -> Bools:
    """Whether these places are outside of quotes."""
    even: Bools = np.searchsorted(quoting, at) & 1 == 0
    return even


def cut(first: Ints, last: Ints, delimiters: Ints) -> tuple[Ints, Ints, Ints]:
    """Cut values at their delimiters: how many cells each value has, and where each cell begins and ends.

    `first` and `last` say where the first cell of each value begins and its last one ends.
    """
    before = np.append(np.searchsorted(delimiters, first), len(delimiters))
    inner = np.diff(before)
    value = np.arange(len(first))
    closing_cell = np.arange(len(delimiters)) + np.repeat(value, inner)
    starts, ends = np.empty((2, len(first) + len(delimiters)), np.int64)
    starts[value + before[:-1]] = first
    starts[closing_cell + 1] = delimiters + 1
    ends[closing_cell] = delimiters
    ends[value + before[1:]] = last
    return inner + 1, starts, ends


def _all_in(column: Uint8s, allowed: bytes) -> bool:
    if len(allowed) == 1:
        return bool((column == allowed[0]).all())
    return bool(np.isin(column, np.frombuffer(allowed, np.uint8)).all())


def gather(data: Uint8s, starts: Ints, ends: Ints, dropped: Ints = _NONE) -> pa.BinaryArray:
    """Ascending ranges of bytes as one array, without the bytes at the places `dropped`."""
    if len(dropped):
        kept = np.ones(len(data) + 1, bool)
        kept[dropped] = False
        place = np.cumsum(kept, dtype=np.int32) - kept  # where each byte goes
        data, starts, ends = data[kept[:-1]], place[starts], place[ends]
    edges = np.empty(2 * len(starts), np.int32)
    edges[0::2], edges[1::2] = starts, ends
    return between(np.ascontiguousarray(data), edges)


def decode_cells(cells: Cells, missing: Bools, decode: Decode, kind: pa.DataType) -> tuple[pa.Array, Bools]:
    """The decoded cells, null where `missing`, and whether each *value* has a cell that is a misfit."""
    texts = nulled(cells.texts, missing) if missing.any() else cells.texts
    decoded = decode(texts, kind)
    misfit = np.zeros(len(cells.counts), bool)
    if decoded.null_count != texts.null_count:
        lost = decoded.is_null().to_numpy(zero_copy_only=False) & ~missing
        misfit[cells.owners[lost]] = True
    return decoded, misfit
