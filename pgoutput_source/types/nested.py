r"""Values with values inside: how PostgreSQL writes arrays, ranges and composites.

All three are cells between an opening and a closing character, separated by a delimiter; a cell that could be mistaken
is in double quotes, within which a quote is written ``\"`` or ``""`` and a backslash ``\\``. So one reader serves all:
it finds the delimiters that stand outside quotes for the whole column at once. Only cells that hold a quote or a
backslash are unescaped one by one.

https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO
https://www.postgresql.org/docs/current/rowtypes.html#ROWTYPES-IO-SYNTAX
https://www.postgresql.org/docs/current/rangetypes.html#RANGETYPES-IO
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.types.base import Bools, Decode, Ints, Texts, Uint8s, nulled, refuse

_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_SPACES = np.frombuffer(b" \t\n\r\v\f", np.uint8)
# A quoted cell and the escaped characters in it. Arrays know only backslashes; in ranges and composites a quote may
# also be doubled.
_QUOTED = re.compile(rb'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_QUOTED_OR_DOUBLED = re.compile(rb'"((?:[^"\\]|\\.|"")*)"', re.DOTALL)
_ESCAPED = re.compile(rb'\\(.)|""', re.DOTALL)


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
        """For each cell the value that it belongs to."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


def cells_of(values: pa.BinaryArray, opening: bytes, closing: bytes, delimiter: bytes, name: str) -> Cells:
    """Take apart a column without NULLs. Each value begins with one of `opening` and ends with one of `closing`."""
    t = Texts(values)
    if not len(t):
        return Cells(np.zeros(0, np.int64), pa.array([], pa.binary()), np.zeros(0, bool))
    if t.lengths.min() < 2 or not _all_in(t.at(0), opening) or not _all_in(t.at(-1), closing):
        refuse(name)
    # Looking for a byte in all values is nearly free; most columns have no quotes, spaces or backslashes.
    raw = t.data.tobytes()
    quotes = t.data == _QUOTE if b'"' in raw else None
    escapes = t.data == _BACKSLASH if b"\\" in raw else None
    if escapes is not None and quotes is not None:
        quotes &= ~_escaped(escapes)
    quoting = np.zeros(0, np.int64) if quotes is None else np.flatnonzero(quotes)
    delimiters = np.flatnonzero(t.data == delimiter[0])
    if len(quoting):
        delimiters = delimiters[_outside(quoting, delimiters)]
    # Quotes are paired within each value, and nothing but cells, delimiters and the two ends stands outside of them.
    spaces = (
        np.flatnonzero(np.isin(t.data, _SPACES)) if any(space in raw for space in _SPACES.tolist()) else delimiters[:0]
    )
    if not _outside(quoting, t.ends - 1).all() or _outside(quoting, spaces).any():
        refuse(name)
    counts, starts, ends = _cut(t, delimiters)
    if not len(quoting) and escapes is None:
        return Cells(counts, _gather(t.data, starts, ends), np.zeros(len(starts), bool))
    enclosed = ends - starts >= 2
    if quotes is not None:
        enclosed &= quotes[starts] & quotes[ends - 1]
    texts = _gather(t.data, starts + enclosed, ends - enclosed)
    if escapes is not None or len(quoting) != 2 * np.count_nonzero(enclosed):
        odd = np.diff(np.searchsorted(quoting, np.stack([starts, ends], 1)), axis=1)[:, 0] != 2 * enclosed
        if escapes is not None:
            backslashes = np.flatnonzero(escapes)
            odd |= np.diff(np.searchsorted(backslashes, np.stack([starts, ends], 1)), axis=1)[:, 0] > 0
        if not enclosed[odd].all():
            refuse(name)
        form = _QUOTED if opening == b"{" else _QUOTED_OR_DOUBLED
        cells = _gather(t.data, starts[odd], ends[odd]).to_pylist()
        unescaped = pa.array([_unescape(cell, form, name) for cell in cells], pa.binary())
        texts = pc.replace_with_mask(texts, pa.array(odd), unescaped)
    return Cells(counts, texts, enclosed)


def _outside(quoting: Ints, at: Ints) -> Bools:
    """Whether these places, which ascend, are outside of quotes."""
    outside: Bools = np.searchsorted(quoting, at) & 1 == 0
    return outside


def _cut(t: Texts, delimiters: Ints) -> tuple[Ints, Ints, Ints]:
    """How many cells each value has, and where each cell begins and ends, from the places of the delimiters."""
    before = np.append(np.searchsorted(delimiters, t.starts), len(delimiters))
    inner = np.diff(before)
    value = np.arange(len(t))
    behind = np.arange(len(delimiters)) + np.repeat(value, inner)
    starts, ends = np.empty((2, len(t) + len(delimiters)), np.int64)
    starts[value + before[:-1]] = t.starts + 1
    starts[behind + 1] = delimiters + 1
    ends[behind] = delimiters
    ends[value + before[1:]] = t.ends - 1
    return inner + 1, starts, ends


def _all_in(column: Uint8s, allowed: bytes) -> bool:
    if len(allowed) == 1:
        return bool((column == allowed[0]).all())
    return bool(np.isin(column, np.frombuffer(allowed, np.uint8)).all())


def _escaped(backslash: Bools) -> Bools:
    """Which characters stand behind an odd number of backslashes."""
    index = np.arange(len(backslash))
    last_other = np.maximum.accumulate(np.where(backslash, -1, index))
    run = index - last_other  # how many backslashes end here
    return np.append(False, run[:-1] & 1 == 1)


def _gather(data: Uint8s, starts: Ints, ends: Ints) -> pa.BinaryArray:
    """The ranges of bytes, which ascend, as one array: every second value of one whose others are the gaps."""
    offsets = np.empty(2 * len(starts) + 1, np.int32)
    offsets[0:-1:2], offsets[1::2], offsets[-1] = starts, ends, len(data)
    every = pa.Array.from_buffers(
        pa.binary(), 2 * len(starts), [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(data))]
    )
    return every.take(pa.array(np.arange(0, 2 * len(starts), 2)))


def _unescape(cell: bytes, form: re.Pattern[bytes], name: str) -> bytes:
    if (match := form.fullmatch(cell)) is None:
        refuse(name)
    return _ESCAPED.sub(lambda m: m[1] or b'"', match[1])


def decode_cells(cells: Cells, missing: Bools, decode: Decode, kind: pa.DataType) -> tuple[pa.Array, Bools]:
    """The decoded cells, null where `missing`, and for each *value* whether one of its cells is a misfit."""
    texts = nulled(cells.texts, missing) if missing.any() else cells.texts
    decoded = decode(texts, kind)
    misfit = np.zeros(len(cells.counts), bool)
    if decoded.null_count != texts.null_count:
        lost = decoded.is_null().to_numpy(zero_copy_only=False) & ~missing
        misfit[cells.owners[lost]] = True
    return decoded, misfit
