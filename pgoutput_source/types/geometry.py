"""Geometric types. A point is a struct; the shapes made of points stay PostgreSQL's text.

https://www.postgresql.org/docs/current/datatype-geometric.html
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pgoutput_source.types.base import PgType, always, charset, dense, refuse
from pgoutput_source.types.nested import cells_of
from pgoutput_source.types.numbers import floating_text

_DOUBLE = floating_text("point")


@dense
def point(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    """``(1,2.5)``."""
    cells = cells_of(values, b"(", b")", b",", "point")
    if (cells.counts != 2).any() or cells.quoted.any():
        refuse("point")
    numbers = _DOUBLE(cells.texts, pa.float64())
    x, y = (numbers.take(pa.array(np.arange(side, len(numbers), 2))) for side in (0, 1))
    return pa.StructArray.from_arrays([x, y], fields=list(kind))


POINT = pa.struct([pa.field("x", pa.float64()), pa.field("y", pa.float64())])
_SHAPE = b"()[]{}<>,0123456789+-.eNaInfity"

GEOMETRY = (
    PgType(600, "point", always(POINT), point, array=1017),
    PgType(601, "lseg", always(pa.utf8()), charset(_SHAPE, "lseg"), array=1018),
    PgType(602, "path", always(pa.utf8()), charset(_SHAPE, "path"), array=1019),
    PgType(603, "box", always(pa.utf8()), charset(_SHAPE, "box"), array=1020, delimiter=";"),
    PgType(604, "polygon", always(pa.utf8()), charset(_SHAPE, "polygon"), array=1027),
    PgType(628, "line", always(pa.utf8()), charset(_SHAPE, "line"), array=629),
    PgType(718, "circle", always(pa.utf8()), charset(_SHAPE, "circle"), array=719),
)
