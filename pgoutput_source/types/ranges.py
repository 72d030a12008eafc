"""Ranges and multiranges.

A range is a struct of its bounds, whether they are inclusive, and whether it is empty. A null bound means unbounded,
unless the range is empty. PostgreSQL writes ranges of integers and dates in their canonical form, ``[1,6)``. A range is
a misfit if its Arrow type can't hold one of its bounds: ``[2024-01-01,infinity)`` is not ``[2024-01-01,)``.

https://www.postgresql.org/docs/current/rangetypes.html
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pgoutput_source.types.base import Decode, PgType, Texts, dense, one_of, refuse
from pgoutput_source.types.nested import Cells, cells_of, cut, decode_cells, gather, outside, quoting_of
from pgoutput_source.types.nested_binary import multirange_binary, range_binary

_OPENING, _CLOSING = np.frombuffer(b"[(", np.uint8), np.frombuffer(b"])", np.uint8)


def range_type(bound: pa.DataType) -> pa.DataType:
    """The struct of a range over `bound`."""
    return pa.struct(
        [
            pa.field("lower", bound),
            pa.field("upper", bound),
            pa.field("lower_inc", pa.bool_()),
            pa.field("upper_inc", pa.bool_()),
            pa.field("empty", pa.bool_()),
        ]
    )


def range_of(bound: PgType, oid: int, name: str, array: int = 0, typmod: int = -1) -> PgType:
    """The row of the range type `name` over `bound`."""
    kind = range_type(bound.arrow(typmod))
    misfits = f"bounds: {bound.misfits}" if bound.misfits and bound.arrow(typmod) != pa.utf8() else ""
    decode = _range_decoder(bound.decode)
    return PgType(oid, name, lambda _: kind, decode, misfits, array, binary=range_binary(bound))


def _range_decoder(bound: Decode) -> Decode:
    def not_empty(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        cells = cells_of(values, b"[(", b"])", b",", "range")
        if (cells.counts != 2).any():
            refuse("range")
        outside = Texts(cells.texts.filter(pa.array(~cells.quoted)))
        if np.isin(outside.data, np.frombuffer(b"[]()", np.uint8)).any():
            refuse("range")
        unbounded = (Texts(cells.texts).lengths == 0) & ~cells.quoted
        decoded, misfit = decode_cells(cells, unbounded, bound, kind.field("lower").type)
        t = Texts(values)
        lower, upper = (decoded.take(pa.array(np.arange(side, len(decoded), 2))) for side in (0, 1))
        inclusive = pa.array(t.at(0) == ord("[")), pa.array(t.at(-1) == ord("]"))
        nothing = pa.array(np.zeros(len(t), bool))
        mask = pa.array(misfit) if misfit.any() else None
        return pa.StructArray.from_arrays([lower, upper, *inclusive, nothing], fields=list(kind), mask=mask)

    @dense
    def decode(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        empty = one_of(values, b"empty") == 0
        if not empty.any():
            return not_empty(values, kind)
        ranges = not_empty(values.filter(pa.array(~empty)), kind)
        neither = pa.array([{"lower_inc": False, "upper_inc": False, "empty": True}], kind)
        at = np.where(empty, len(ranges), np.cumsum(~empty) - 1)
        return pa.concat_arrays([ranges, neither]).take(pa.array(at))

    return decode


def multirange_of(one: PgType, oid: int, name: str, array: int = 0) -> PgType:
    """The row of the multirange type over the range type `one`: a list of ranges, none of them empty."""

    @dense
    def decode(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        cells = _ranges_in(values)
        decoded, misfit = decode_cells(cells, cells.quoted, one.decode, kind.value_type)
        offsets = pa.array(np.append(0, np.cumsum(cells.counts)).astype(np.int32))
        return pa.ListArray.from_arrays(offsets, decoded, type=kind, mask=pa.array(misfit) if misfit.any() else None)

    binary = multirange_binary(one)
    return PgType(oid, name, lambda typmod: pa.list_(one.arrow(typmod)), decode, one.misfits, array, binary=binary)


def _ranges_in(values: pa.BinaryArray) -> Cells:
    """The ranges of ``{[1,3),[5,8)}``: a comma outside of quotes separates two if it follows the end of one."""
    t = Texts(values)
    if len(t) and (t.lengths.min() < 2 or (t.at(0) != ord("{")).any() or (t.at(-1) != ord("}")).any()):
        refuse("multirange")
    quoting, _ = quoting_of(t, "multirange")
    commas = np.flatnonzero(t.data == ord(","))
    commas = commas[outside(quoting, commas) & np.isin(t.data[commas - 1], _CLOSING)]
    filled = t.lengths > 2
    counts = np.zeros(len(t), np.int64)
    cells, starts, ends = cut(t.starts[filled] + 1, t.ends[filled] - 1, commas)
    counts[filled] = cells
    if not (ends > starts).all() or not np.isin(t.data[starts], _OPENING).all():
        refuse("multirange")  # an empty range is not in one
    return Cells(counts, gather(t.data, starts, ends), np.zeros(len(starts), bool))
