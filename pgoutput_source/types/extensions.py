r"""Types of extensions. Their OIDs differ from database to database, so they are known by extension and name.

A type of your own needs three lines::

    from pgoutput_source.types.base import PgType, always, text
    from pgoutput_source.types.extensions import EXTENSIONS
    EXTENSIONS["my_extension", "my_type"] = lambda oid, name: PgType(oid, name, always(pa.utf8()), text)

https://www.postgresql.org/docs/current/contrib.html
https://github.com/pgvector/pgvector
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from pgoutput_source.types.base import PgType, Texts, always, dense, refuse, text
from pgoutput_source.types.nested import cells_of
from pgoutput_source.types.numbers import floating_text

_FLOAT = floating_text("vector")
_PAIR = re.compile(rb'"((?:[^"\\]|\\.)*)"=>(?:"((?:[^"\\]|\\.)*)"|NULL)(?:, (?=")|$)', re.DOTALL)
_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)


@dense
def hstore(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    """``"a"=>"1", "b c"=>NULL``, pair by pair."""
    keys: list[bytes] = []
    items: list[bytes | None] = []
    offsets = [0]
    for value in values.to_pylist():
        at = 0
        while at < len(value):
            if (pair := _PAIR.match(value, at)) is None:
                refuse("hstore")
            at = pair.end()
            keys.append(_ESCAPED.sub(rb"\1", pair[1]))
            items.append(None if pair[2] is None else _ESCAPED.sub(rb"\1", pair[2]))
        offsets.append(len(keys))
    columns = (pa.array(column, pa.binary()).cast(pa.utf8()) for column in (keys, items))
    return pa.MapArray.from_arrays(pa.array(offsets, pa.int32()), *columns, type=kind)


@dense
def vector(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    """``[1,2.5,-3]``, for `vector` and `halfvec`."""
    cells = cells_of(values, b"[", b"]", b",", "vector")
    if cells.quoted.any():
        refuse("vector")
    numbers = _FLOAT(cells.texts, kind.value_type)
    if not pa.types.is_fixed_size_list(kind):
        return pa.ListArray.from_arrays(
            pa.array(np.append(0, np.cumsum(cells.counts)).astype(np.int32)), numbers, type=kind
        )
    if (cells.counts != kind.list_size).any():
        refuse(f"vector({kind.list_size})")
    return pa.FixedSizeListArray.from_arrays(numbers, type=kind)


def _vector_arrow(typmod: int) -> pa.DataType:
    return pa.list_(pa.float32(), typmod) if typmod > 0 else pa.list_(pa.float32())


@dense
def ewkb(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    """PostGIS writes the extended well-known binary form of a geometry as hexadecimal digits."""
    t = Texts(values)
    if (t.lengths == 0).any() or (t.lengths & 1).any():
        refuse("geometry")
    edges = (np.append(t.starts, len(t.data)) >> 1).astype(np.int32)
    data = binascii.unhexlify(t.data.tobytes())
    return pa.Array.from_buffers(kind, len(t), [None, pa.py_buffer(edges), pa.py_buffer(data)])


def _row(arrow: Callable[[int], pa.DataType], decode: Callable[[pa.BinaryArray, pa.DataType], pa.Array]) -> Make:
    return lambda oid, name: PgType(oid, name, arrow, decode)


Make = Callable[[int, str], PgType]

EXTENSIONS: dict[tuple[str, str], Make] = {
    ("hstore", "hstore"): _row(always(pa.map_(pa.utf8(), pa.utf8())), hstore),
    ("vector", "vector"): _row(_vector_arrow, vector),
    # float16 would hold halfvec, but DuckDB does not read it.
    ("vector", "halfvec"): _row(_vector_arrow, vector),
    ("postgis", "geometry"): _row(always(pa.binary()), ewkb),
    ("postgis", "geography"): _row(always(pa.binary()), ewkb),
    ("citext", "citext"): _row(always(pa.utf8()), text),
    ("ltree", "ltree"): _row(always(pa.utf8()), text),
}
"""By extension and type name, what makes the row for an OID. Other types of extensions arrive as their exact text."""
