"""Values with values inside, in binary: arrays, ranges, multiranges, composites, and those of two extensions.

All consist of items; a length precedes each, and -1 means NULL. `Items` finds them for a whole column. Then all items
of one type are decoded together. The texts are composed of the items' texts, with the quotes that PostgreSQL's output
functions write.

https://github.com/postgres/postgres/blob/REL_18_STABLE/src/backend/utils/adt/arrayfuncs.c (array_send)
https://github.com/postgres/postgres/blob/REL_18_STABLE/src/backend/utils/adt/rangetypes.c (range_send)
https://github.com/postgres/postgres/blob/REL_18_STABLE/src/backend/utils/adt/rowtypes.c (record_send)
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pgoutput_source.types.base import Binary, Bools, Decode, PgType, Sent, refuse
from pgoutput_source.types.numbers import float_text

Ints = npt.NDArray[np.integer[Any]]

_MOST_DIMENSIONS: Final = 6
_FEW: Final = 32  # up to so many values are walked one by one


class Items:
    """The items of a column's values, end to end: those of value i are [edges[i], edges[i + 1]).

    `missing` tells which are NULL.
    """

    __slots__ = ("edges", "missing", "sent")

    def __init__(self, sent: Sent, at: Ints, counts: Ints, name: str, *, nulls: bool) -> None:
        """Each value's first item begins `at` bytes after its start; the last one ends with the value."""
        if (at + 4 * counts > sent.length).any():
            refuse(name)
        self.edges = np.append(0, np.cumsum(counts))
        start, length = np.empty(self.edges[-1], np.int64), np.empty(self.edges[-1], np.int64)
        pos, end = sent.start + at, sent.start + sent.length
        if self.edges[-1] and not self._regular(sent, pos, end, counts, start, length):
            self._walk(sent, pos, end, counts, start, length, name)
        elif self.edges[-1] == 0 and (pos != end).any():
            refuse(name)
        self.missing: Bools = length < 0
        if self.missing.any() and not nulls:
            refuse(name)
        self.sent = Sent(sent.raw, start, length)

    def _regular(self, sent: Sent, pos: Ints, end: Ints, counts: Ints, start: Ints, length: Ints) -> bool:
        """Find items that all have the same length."""
        first = int(np.flatnonzero(counts)[0])
        width = int(sent.integers(">i4", pos - sent.start)[first])
        if width < 0 or (pos + counts * (4 + width) != end).any():
            return False
        start[:] = np.repeat(pos - self.edges[:-1] * (4 + width), counts) + np.arange(len(start)) * (4 + width) + 4
        length[:] = width
        return bool((Sent(sent.raw, start, length).integers(">i4", -4) == width).all())

    def _walk(self, sent: Sent, pos: Ints, end: Ints, counts: Ints, start: Ints, length: Ints, name: str) -> None:
        """Step from item to item, in all values at once as long as these are many."""
        pos = pos.copy()
        step, active = 0, np.flatnonzero(counts)
        while len(active) > _FEW:
            here = pos[active]
            if (here + 4 > end[active]).any():
                refuse(name)
            found = Sent(sent.raw, here, here).integers(">i4").astype(np.int64)
            here = here + 4
            item = self.edges[active] + step
            start[item], length[item] = here, found
            pos[active] = here + np.maximum(found, 0)
            if (found < -1).any() or (pos[active] > end[active]).any():
                refuse(name)
            step += 1
            active = active[counts[active] > step]
        for i in active.tolist():
            at, last = int(pos[i]), int(end[i])
            for n in range(int(self.edges[i]) + step, int(self.edges[i + 1])):
                if at + 4 > last:
                    refuse(name)
                size = int.from_bytes(sent.raw[at : at + 4], "big", signed=True)
                at += 4
                start[n], length[n] = at, size
                at += max(size, 0)
                if size < -1 or at > last:
                    refuse(name)
            pos[i] = at
        if (pos != end).any():
            refuse(name)

    def decoded(self, binary: Binary, kind: pa.DataType) -> tuple[pa.Array, Bools]:
        """All items, null where they are missing, and whether each *value* has an item that is a misfit."""
        misfit = np.zeros(len(self.edges) - 1, bool)
        values, lost = decode_items(self.sent, self.missing, binary, kind)
        if lost is not None:
            misfit[np.searchsorted(self.edges, np.flatnonzero(lost), "right") - 1] = True
        return values, misfit


def decode_items(sent: Sent, missing: Bools, binary: Binary, kind: pa.DataType) -> tuple[pa.Array, Bools | None]:
    """Items, null where they are missing, and which of them are misfits; None if there are none."""
    if not missing.any():
        values = binary.decode(sent, kind)
        return values, values.is_null().to_numpy(zero_copy_only=False) if values.null_count else None
    present = binary.decode(sent.take(~missing), kind)
    values = present.take(pa.array(np.cumsum(~missing) - 1, mask=missing))
    if not present.null_count:
        return values, None
    return values, values.is_null().to_numpy(zero_copy_only=False) & ~missing


def _items(value: bytes, at: int, count: int, name: str) -> Iterator[bytes | None]:
    """The items of one value, to its end."""
    for _ in range(count):
        (size,) = struct.unpack_from(">i", value, at)
        at += 4
        if size < -1 or at + size > len(value):
            refuse(name)
        yield None if size < 0 else value[at : at + size]
        at += max(size, 0)
    if at != len(value):
        refuse(name)


def _checked(name: str, to_text: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    def checked(value: bytes) -> bytes:
        try:
            return to_text(value)
        except struct.error:
            refuse(name)  # it ends too early

    return checked


# -- arrays -----------------------------------------------------------------------------------------------------------


def array_binary(element: PgType, delimiter: str) -> Binary | None:
    """Arrays over `element`: dimensions, a flag, the element's type, each dimension's size and lower bound, items."""
    binary = element.binary
    if binary is None:
        return None
    odd = re.compile(rb'[\s"\\{}' + re.escape(delimiter.encode()) + rb"]|\A\Z|\A(?i:NULL)\Z")

    def decode(sent: Sent, kind: pa.DataType) -> pa.Array:
        header = _Header(sent, element.oid)
        items = Items(sent, header.size, header.counts, "array", nulls=True)
        values, misfit = items.decoded(binary, kind.value_type)
        misfit |= (header.dimensions > 1) | header.shifted(1)
        return _lists(items, values, kind, misfit)

    def write(value: bytes) -> bytes:
        sizes, bounds, at = _shape(value, element.oid)
        cells = []
        for item in _items(value, at, _product(sizes), "array"):
            text = b"NULL" if item is None else binary.text(item)
            if item is not None and odd.search(text):
                text = b'"' + re.sub(rb'["\\]', rb"\\\g<0>", text) + b'"'
            cells.append(text)
        if not sizes:
            return b"{}"
        for size in reversed(sizes):
            cells = [b"{" + delimiter.encode().join(cells[i : i + size]) + b"}" for i in range(0, len(cells), size)]
        if any(bound != 1 for bound in bounds):
            shown = (f"[{low}:{low + size - 1}]" for low, size in zip(bounds, sizes, strict=True))
            return "".join(shown).encode() + b"=" + cells[0]
        return cells[0]

    return Binary(decode, _checked("array", write), binary.by_value)


def vector_binary(element: PgType) -> Binary | None:
    """``int2vector`` and ``oidvector`` are arrays of one dimension that begin at 0, and may be empty."""
    binary = element.binary
    if binary is None:
        return None

    def decode(sent: Sent, kind: pa.DataType) -> pa.Array:
        header = _Header(sent, element.oid, least=0)
        if (header.dimensions != 1).any() or header.shifted(0).any():
            refuse("vector")
        items = Items(sent, header.size, header.counts, "vector", nulls=False)
        values, misfit = items.decoded(binary, kind.value_type)
        return _lists(items, values, kind, misfit)

    def write(value: bytes) -> bytes:
        sizes, bounds, at = _shape(value, element.oid, least=0)
        if bounds != [0]:
            refuse("vector")
        return b" ".join(b"" if item is None else binary.text(item) for item in _items(value, at, sizes[0], "vector"))

    return Binary(decode, _checked("vector", write), binary.by_value)


class _Header:
    """The header of arrays: `size` bytes, for `counts` items in so many `dimensions`."""

    def __init__(self, sent: Sent, element: int, least: int = 1) -> None:
        self.sent = sent
        if (sent.length < 12).any():
            refuse("array")
        self.dimensions: Ints = sent.integers(">i4").astype(np.int64)
        if ((self.dimensions < 0) | (self.dimensions > _MOST_DIMENSIONS)).any():
            refuse("array")
        self.size = 12 + 8 * self.dimensions
        if (
            (sent.integers(">u4", 4) > 1).any()
            or (sent.integers(">u4", 8) != element).any()
            or (self.size > sent.length).any()
        ):
            refuse("array")
        self.counts = (self.dimensions > 0).astype(np.int64)
        self.bounds: list[tuple[Bools, Ints]] = []
        for dimension in range(int(self.dimensions.max(initial=0))):
            has = self.dimensions > dimension
            at = np.where(has, 12 + 8 * dimension, 0)
            size = np.where(has, sent.integers(">i4", at), 1).astype(np.int64)
            low = np.where(has, sent.integers(">i4", at + 4), 1).astype(np.int64)
            # An item takes at least 4 bytes, so that the product can't grow beyond what was sent.
            if (size < least).any() or (low + size >= 2**31).any() or (self.counts * size * 4 > sent.length).any():
                refuse("array")
            self.counts = self.counts * size
            self.bounds.append((has, low))

    def shifted(self, first: int) -> Bools:
        """Which arrays have a dimension that does not begin at `first`."""
        found = np.zeros(len(self.sent), bool)
        for has, low in self.bounds:
            found |= has & (low != first)
        return found


def _shape(value: bytes, element: int, least: int = 1) -> tuple[list[int], list[int], int]:
    """Sizes and lower bounds of one array, and where its items begin."""
    header = _Header(Sent.of([value]), element, least)
    dimensions = int(header.dimensions[0])
    numbers = struct.unpack_from(f">{2 * dimensions}i", value, 12)
    return list(numbers[::2]), list(numbers[1::2]), int(header.size[0])


def _product(sizes: Sequence[int]) -> int:
    return int(np.prod(sizes)) if sizes else 0


def _lists(items: Items, values: pa.Array, kind: pa.DataType, misfit: Bools) -> pa.Array:
    return pa.ListArray.from_arrays(
        pa.array(items.edges.astype(np.int32)), values, type=kind, mask=pa.array(misfit) if misfit.any() else None
    )


# -- ranges -----------------------------------------------------------------------------------------------------------

_EMPTY, _LOWER_INC, _UPPER_INC, _LOWER_INF, _UPPER_INF = 1, 2, 4, 8, 16
_FLAGS: Final = [
    flags
    for flags in range(32)
    if flags == _EMPTY
    or not (
        flags & _EMPTY or (flags & _LOWER_INC and flags & _LOWER_INF) or (flags & _UPPER_INC and flags & _UPPER_INF)
    )
]
_RANGE_ODD: Final = re.compile(rb'[\s"\\()\[\],]|\A\Z')


def range_binary(bound: PgType) -> Binary | None:
    """Ranges over `bound`: a byte of flags, and an item for each bound but the unbounded ones."""
    binary = bound.binary
    if binary is None:
        return None

    def decode(sent: Sent, kind: pa.DataType) -> pa.Array:
        if (sent.length < 1).any():
            refuse("range")
        flags = sent.u1[sent.start]
        if not np.isin(flags, _FLAGS).all():
            refuse("range")
        empty = flags & _EMPTY != 0
        has_lower, has_upper = ~empty & (flags & _LOWER_INF == 0), ~empty & (flags & _UPPER_INF == 0)
        counts = has_lower.astype(np.int64) + has_upper
        items = Items(sent, np.ones(len(sent), np.int64), counts, "range", nulls=False)
        values, misfit = items.decoded(binary, kind.field("lower").type)
        first = items.edges[:-1]
        lower = values.take(pa.array(first, mask=~has_lower))
        upper = values.take(pa.array(first + has_lower, mask=~has_upper))
        inclusive = (pa.array(flags & flag != 0) for flag in (_LOWER_INC, _UPPER_INC))
        return pa.StructArray.from_arrays(
            [lower, upper, *inclusive, pa.array(empty)],
            fields=list(kind),
            mask=pa.array(misfit) if misfit.any() else None,
        )

    def write(value: bytes) -> bytes:
        (flags,) = struct.unpack_from(">B", value)
        if flags not in _FLAGS:
            refuse("range")
        has = [not flags & (_EMPTY | _LOWER_INF), not flags & (_EMPTY | _UPPER_INF)]
        items = _items(value, 1, sum(has), "range")
        bounds = []
        for there in has:
            item = next(items) if there else None
            text = b"" if item is None else binary.text(item)
            if there and _RANGE_ODD.search(text):
                text = b'"' + re.sub(rb'["\\]', rb"\g<0>\g<0>", text) + b'"'
            bounds.append(text)
        if next(items, None) is not None:
            refuse("range")
        if flags & _EMPTY:
            return b"empty"
        opening, closing = b"[" if flags & _LOWER_INC else b"(", b"]" if flags & _UPPER_INC else b")"
        return opening + b",".join(bounds) + closing

    return Binary(decode, _checked("range", write), binary.by_value)


def multirange_binary(one: PgType) -> Binary | None:
    """Multiranges over the range type `one`: how many there are, and an item for each."""
    binary = one.binary
    if binary is None:
        return None

    def decode(sent: Sent, kind: pa.DataType) -> pa.Array:
        if (sent.length < 4).any():
            refuse("multirange")
        counts = sent.integers(">u4").astype(np.int64)
        items = Items(sent, np.full(len(sent), 4, np.int64), counts, "multirange", nulls=False)
        if (items.sent.u1[items.sent.start] == _EMPTY).any():
            refuse("multirange")
        values, misfit = items.decoded(binary, kind.value_type)
        return _lists(items, values, kind, misfit)

    def write(value: bytes) -> bytes:
        (count,) = struct.unpack_from(">I", value)
        ranges = _items(value, 4, count, "multirange")
        return b"{" + b",".join(b"" if item is None else binary.text(item) for item in ranges) + b"}"

    return Binary(decode, _checked("multirange", write), binary.by_value)


# -- composites -------------------------------------------------------------------------------------------------------

_COMPOSITE_ODD: Final = re.compile(rb'[\s"\\(),]|\A\Z')


def composite_binary(
    attributes: Sequence[PgType], type_of: Callable[[int], PgType], from_text: Decode, name: str
) -> Binary | None:
    """Composites: how many attributes, and the type of each before its item.

    Values with other attributes than the catalogue's are older or newer than it. They are turned into text, with the
    types that `type_of` knows, and `from_text` decodes it.
    """
    readers = [row.binary for row in attributes]
    binaries = [binary for binary in readers if binary is not None]
    if len(binaries) < len(readers):
        return None

    def decode(sent: Sent, kind: pa.DataType) -> pa.Array:
        same, items = _same_attributes(sent, attributes)
        children, misfit = [], np.zeros(int(same.sum()), bool)
        for (part, missing), binary, field in zip(items, binaries, kind, strict=True):
            values, lost = decode_items(part, missing, binary, field.type)
            children.append(values)
            if lost is not None:
                misfit |= lost
        structs = pa.StructArray.from_arrays(
            children, fields=list(kind), mask=pa.array(misfit) if misfit.any() else None
        )
        if same.all():
            return structs
        others = from_text(pa.array(list(map(write, sent.take(~same).values())), pa.binary()), kind)
        index = np.cumsum(same) - 1
        index[~same] = len(structs) + np.arange(len(others))
        return pa.concat_arrays([structs, others]).take(pa.array(index))

    def write_checked(value: bytes) -> bytes:
        (count,) = struct.unpack_from(">i", value)
        at, cells = 4, []
        for _ in range(max(count, -1)):
            oid, size = struct.unpack_from(">Ii", value, at)
            at += 8
            if size < -1 or at + size > len(value):
                refuse(name)
            if size < 0:
                cells.append(b"")
                continue
            binary = type_of(oid).binary
            if binary is None:
                raise ValueError(f"an attribute of a type that can be read as text only, OID {oid}")
            text = binary.text(value[at : at + size])
            if _COMPOSITE_ODD.search(text):
                text = b'"' + re.sub(rb'["\\]', rb"\g<0>\g<0>", text) + b'"'
            cells.append(text)
            at += size
        if count < 0 or at != len(value):
            refuse(name)
        return b"(" + b",".join(cells) + b")"

    write = _checked(name, write_checked)
    return Binary(decode, write, any(binary.by_value for binary in binaries))


def _same_attributes(sent: Sent, attributes: Sequence[PgType]) -> tuple[Bools, list[tuple[Sent, Bools]]]:
    """Which values have exactly these attributes; for these, the items of each attribute and which are NULL."""
    same: Bools = (sent.length >= 4 + 8 * len(attributes)) & (sent.integers(">i4") == len(attributes))
    pos, end = sent.start + 4, sent.start + sent.length
    found: list[tuple[Ints, Ints]] = []
    for row in attributes:
        inside = same & (pos + 8 <= end)
        at = Sent(sent.raw, np.where(inside, pos, sent.start), sent.length)
        length = at.integers(">i4", 4).astype(np.int64)
        same = inside & (at.integers(">u4") == row.oid) & (length >= -1)
        found.append((pos + 8, length))
        pos = np.where(same, pos + 8 + np.maximum(length, 0), pos)
        same &= pos <= end
    same &= pos == end
    return same, [(Sent(sent.raw, start[same], length[same]), length[same] < 0) for start, length in found]


# -- extensions -------------------------------------------------------------------------------------------------------


def _pairs(value: bytes) -> tuple[list[bytes], list[bytes | None]]:
    (count,) = struct.unpack_from(">I", value)
    if 8 * count > len(value):
        refuse("hstore")
    items = list(_items(value, 4, 2 * count, "hstore"))
    keys = [key for key in items[::2] if key is not None]
    if len(keys) < count:
        refuse("hstore")
    return keys, items[1::2]


def _hstore(sent: Sent, kind: pa.DataType) -> pa.Array:
    if (sent.length < 4).any():
        refuse("hstore")
    counts = sent.integers(">u4").astype(np.int64)
    items = Items(sent, np.full(len(sent), 4, np.int64), 2 * counts, "hstore", nulls=True)
    if items.missing[::2].any():
        refuse("hstore")
    keys = items.sent.take(slice(0, None, 2)).slices().cast(kind.key_type)
    values, missing = items.sent.take(slice(1, None, 2)), items.missing[1::2]
    present = values.take(~missing).slices().cast(kind.item_type)
    texts = present.take(pa.array(np.cumsum(~missing) - 1, mask=missing))
    return pa.MapArray.from_arrays(pa.array((items.edges // 2).astype(np.int32)), keys, texts, type=kind)


def _hstore_text(value: bytes) -> bytes:
    def quoted(text: bytes | None) -> bytes:
        return b"NULL" if text is None else b'"' + re.sub(rb'["\\]', rb"\\\g<0>", text) + b'"'

    return b", ".join(quoted(key) + b"=>" + quoted(text) for key, text in zip(*_pairs(value), strict=True))


HSTORE: Final = Binary(_hstore, _checked("hstore", _hstore_text))


def vector_of_floats(dtype: str) -> Binary:
    """The vectors of `pgvector`: how many numbers, two bytes of zero, and the numbers."""
    width = np.dtype(dtype).itemsize

    def decode(sent: Sent, kind: pa.DataType) -> pa.Array:
        if (sent.length < 4).any():
            refuse("vector")
        counts = sent.integers(">u2").astype(np.int64)
        if (sent.integers(">u2", 2) != 0).any() or (sent.length != 4 + width * counts).any():
            refuse("vector")
        edges = np.append(0, np.cumsum(counts))
        at = np.repeat(sent.start + 4 - width * edges[:-1], counts) + width * np.arange(edges[-1])
        numbers = pa.array(Sent(sent.raw, at, at).integers(dtype).astype(np.float32))
        if not pa.types.is_fixed_size_list(kind):
            return pa.ListArray.from_arrays(pa.array(edges.astype(np.int32)), numbers, type=kind)
        if (counts != kind.list_size).any():
            refuse(f"vector({kind.list_size})")
        return pa.FixedSizeListArray.from_arrays(numbers, type=kind)

    def write(value: bytes) -> bytes:
        count, unused = struct.unpack_from(">HH", value)
        if unused or len(value) != 4 + width * count:
            refuse("vector")
        numbers = np.frombuffer(value, dtype, offset=4).astype(np.float32)
        return b"[" + b",".join(float_text(number, 32).encode() for number in numbers.tolist()) + b"]"

    return Binary(decode, _checked("vector", write))
