"""Composite types: a struct of their attributes.

https://www.postgresql.org/docs/current/rowtypes.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from pgoutput_source.types.base import Bools, PgType, Texts, dense, nulled, refuse
from pgoutput_source.types.nested import Cells, cells_of, decode_cells
from pgoutput_source.types.nested_binary import composite_binary


def composite_of(
    attributes: Sequence[tuple[str, PgType, int]],
    oid: int,
    name: str,
    type_of: Callable[[int], PgType],
) -> PgType:
    """The row of a composite type with these attributes: name, type and typmod.

    The catalogue may be newer or older than a value. A value with another number of attributes is a misfit, and so is
    one with an attribute that is a misfit. `type_of` gives the row of any other type that a value in binary names.
    """
    kind = pa.struct([pa.field(attribute, row.arrow(typmod)) for attribute, row, typmod in attributes])
    rows = [row for _, row, _ in attributes]

    def same_shape(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        cells = cells_of(values, b"(", b")", b",", name)
        children, misfits = [], np.zeros(len(values), bool)
        for at, (row, attribute) in enumerate(zip(rows, kind, strict=True)):
            own = np.arange(at, len(cells.texts), len(rows))
            column = Cells(np.ones(len(own), np.int64), cells.texts.take(pa.array(own)), cells.quoted[own])
            missing = (Texts(column.texts).lengths == 0) & ~column.quoted
            decoded, misfit = decode_cells(column, missing, row.decode, attribute.type)
            children.append(decoded)
            misfits |= misfit
        mask = pa.array(misfits) if misfits.any() else None
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=mask)

    @dense
    def decode(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
        cells = cells_of(values, b"(", b")", b",", name)
        outside = Texts(cells.texts.filter(pa.array(~cells.quoted)))
        if np.isin(outside.data, np.frombuffer(b"()", np.uint8)).any():
            refuse(name)
        other: Bools = cells.counts != len(rows)
        return dense(same_shape)(nulled(values, other), kind) if other.any() else same_shape(values, kind)

    binary = composite_binary(rows, type_of, decode, name)
    return PgType(oid, name, lambda typmod: kind, decode, "another number of attributes", binary=binary)
