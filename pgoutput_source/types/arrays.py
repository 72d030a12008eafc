"""Arrays: ``T[]`` is a list of what T is.

PostgreSQL declares neither the number of an array's dimensions nor its lower bounds: each value has its own. A list
holds an array of one dimension that begins at 1, as nearly all do. Others are misfits, and so is an array with an
element that is a misfit.

https://www.postgresql.org/docs/current/arrays.html
"""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa

from pgoutput_source.types.base import Decode, PgType, Texts, dense, nulled, one_of, refuse
from pgoutput_source.types.nested import Cells, cells_of, cut, decode_cells, gather
from pgoutput_source.types.nested_binary import array_binary, vector_binary

_BOUNDS = re.compile(rb"((?:\[-?\d+:-?\d+\]){1,6})=")
_BOUND = re.compile(rb"\[(-?\d+):(-?\d+)\]")


def array_of(element: PgType, oid: int, delimiter: str = ",") -> PgType:
    """The row of the array type over `element`."""
    return PgType(
        oid,
        f"{element.name}[]",
        lambda typmod: pa.list_(element.arrow(typmod)),  # The typmod of an array is that of its elements.
        _decoder(element.decode, delimiter.encode()),
        misfits="several dimensions, lower bound not 1" + (f", elements: {element.misfits}" if element.misfits else ""),
        binary=array_binary(element, delimiter),
    )


def _decoder(element: Decode, delimiter: bytes) -> Decode:
    def one_dimension(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        cells = cells_of(values, b"{", b"}", delimiter, "array")
        cells = _without_empty(values, cells)
        unquoted = Texts(cells.texts.filter(pa.array(~cells.quoted)) if cells.quoted.any() else cells.texts)
        raw = unquoted.data.tobytes()
        if (unquoted.lengths == 0).any() or b"{" in raw or b"}" in raw:
            refuse("array")
        missing = np.zeros(len(cells.texts), bool)
        if (unquoted.lengths == 4).any() and b"NULL" in raw.upper():
            missing = (one_of(cells.texts, b"NULL") == 0) & ~cells.quoted
            # PostgreSQL would read null and Null as NULL too, so it always puts such texts in quotes.
            four = unquoted.starts[unquoted.lengths == 4]
            anycase = [(unquoted.data[four + at] & 0xDF) == letter for at, letter in enumerate(b"NULL")]
            if np.logical_and.reduce(anycase).sum() != missing.sum():
                refuse("array")
        decoded, misfit = decode_cells(cells, missing, element, kind.value_type)
        offsets = np.append(0, np.cumsum(cells.counts)).astype(np.int32)
        mask = pa.array(misfit) if misfit.any() else None
        return pa.ListArray.from_arrays(pa.array(offsets), decoded, type=kind, mask=mask)

    @dense
    def decode(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        t = Texts(values)
        if not len(t):
            return pa.nulls(0, kind)
        if t.lengths.min() < 2:
            refuse("array")
        other = (t.at(0) == ord("[")) | (t.at(1) == ord("{"))
        if not other.any():
            return one_dimension(values, kind)
        leaves = [_flat(value, delimiter) for value in values.filter(pa.array(other)).to_pylist()]
        one_dimension(pa.array(leaves, pa.binary()), kind)  # Misfits or not, they must be arrays of the element's type.
        return dense(one_dimension)(nulled(values, other), kind)

    return decode


def _flat(value: bytes, delimiter: bytes) -> bytes:
    """The elements of an array of any shape as one of a single dimension: ``[0:1]={{1,2},{3,4}}`` is ``{1,2,3,4}``."""
    bounds = _BOUNDS.match(value)
    body = value[bounds.end() :] if bounds else value
    leaves: list[bytes] = []

    def leaf(found: re.Match[bytes]) -> bytes:
        leaves.append(found[0])
        return b"x"

    skeleton = re.sub(rb'"(?:[^"\\]|\\.)*"|[^"\\{}\s' + re.escape(delimiter) + rb"]+", leaf, body, flags=re.DOTALL)
    lengths: list[int] = []
    while skeleton != b"x":  # All the innermost arrays have the same length. Each becomes an element of the next.
        innermost = re.findall(rb"\{x(?:" + re.escape(delimiter) + rb"x)*\}", skeleton)
        if len(set(innermost)) != 1 or skeleton.count(b"x") != len(innermost) * innermost[0].count(b"x"):
            refuse("array")
        lengths.insert(0, innermost[0].count(b"x"))
        skeleton = skeleton.replace(innermost[0], b"x")
    declared = [(int(low), int(high)) for low, high in _BOUND.findall(bounds[1])] if bounds else []
    if not 1 <= len(lengths) <= 6 or (bounds and [high - low + 1 for low, high in declared] != lengths):
        refuse("array")
    # PostgreSQL's limits. It writes bounds only if a dimension does not begin at 1.
    if any(low < -(2**31) or high >= 2**31 - 1 for low, high in declared) or (
        bounds and {1} == {low for low, _ in declared}
    ):
        refuse("array")
    return b"{" + delimiter.join(leaves) + b"}"


def _without_empty(values: pa.BinaryArray, cells: Cells) -> Cells:
    """``{}`` has no cell, though the reader finds one between its braces."""
    empty = Texts(values).lengths == 2
    if not empty.any():
        return cells
    keep = ~empty[cells.owners]
    return Cells(cells.counts - empty, cells.texts.filter(pa.array(keep)), cells.quoted[keep])


def vector_of(element: PgType, oid: int, name: str, array: int) -> PgType:
    """The row of ``int2vector`` or ``oidvector``, arrays of the system catalogues that are written ``1 2 3``."""

    @dense
    def decode(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        t = Texts(values)
        filled = t.lengths > 0
        cells, starts, ends = cut(t.starts[filled], t.ends[filled], np.flatnonzero(t.data == ord(" ")))
        elements = gather(t.data, starts, ends)
        counts = np.zeros(len(t), np.int64)
        counts[filled] = cells
        offsets = pa.array(np.append(0, np.cumsum(counts)).astype(np.int32))
        return pa.ListArray.from_arrays(offsets, element.decode(elements, kind.value_type), type=kind)

    kind = pa.list_(element.arrow(-1))
    return PgType(oid, name, lambda typmod: kind, decode, array=array, binary=vector_binary(element))
