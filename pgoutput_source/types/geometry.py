"""Geometric types. A point is a struct; the shapes made of points stay PostgreSQL's text.

https://www.postgresql.org/docs/current/datatype-geometric.html
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pgoutput_source.types.base import Binary, PgType, Sent, always, charset, dense, refuse
from pgoutput_source.types.nested import cells_of
from pgoutput_source.types.numbers import FLOAT8, floating_text
from pgoutput_source.types.text_binary import SHAPES, point_text

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


def _points(sent: Sent, kind: pa.DataType) -> pa.Array:
    sent.fixed(16, "point")
    sides = [FLOAT8.decode(sent.part(at, sent.length - 8), pa.float64()) for at in (0, 8)]
    return pa.StructArray.from_arrays(sides, fields=list(kind))


POINT = pa.struct([pa.field("x", pa.float64()), pa.field("y", pa.float64())])
_SHAPE = b"()[]{}<>,0123456789+-.eNaInfity"

GEOMETRY = (
    PgType(600, "point", always(POINT), point, array=1017, binary=Binary(_points, point_text)),
    PgType(601, "lseg", always(pa.utf8()), charset(_SHAPE, "lseg"), array=1018, binary=SHAPES[601]),
    PgType(602, "path", always(pa.utf8()), charset(_SHAPE, "path"), array=1019, binary=SHAPES[602]),
    PgType(603, "box", always(pa.utf8()), charset(_SHAPE, "box"), array=1020, delimiter=";", binary=SHAPES[603]),
    PgType(604, "polygon", always(pa.utf8()), charset(_SHAPE, "polygon"), array=1027, binary=SHAPES[604]),
    PgType(628, "line", always(pa.utf8()), charset(_SHAPE, "line"), array=629, binary=SHAPES[628]),
    PgType(718, "circle", always(pa.utf8()), charset(_SHAPE, "circle"), array=719, binary=SHAPES[718]),
)
