r"""Types of extensions. Their OIDs differ from database to database, so they are known by extension and name.

A type of your own is an entry here, made before a reader or a flow starts, in `EXTENSIONS` by extension and type, in
`DEFINED` by schema and name. A column of the domain ``public.celsius`` arrives as doubles, whatever its base type is:

>>> import pyarrow as pa
>>> from pgoutput_source.types import DEFINED, TYPES, PgType, always
>>> DEFINED["public.celsius"] = lambda oid, name: PgType(oid, name, always(pa.float64()), TYPES[701].decode)

A decoder of your own gets a whole column as PostgreSQL's text (UTF-8, without NULLs behind `dense`) and returns one of
the same length. It must refuse, with a ValueError, what it does not understand.

>>> import pyarrow.compute as pc
>>> from pgoutput_source.types import EXTENSIONS, dense
>>> @dense
... def version(values, kind):
...     return pc.split_pattern(values.cast(pa.utf8()), ".").cast(kind)
>>> EXTENSIONS["semver", "semver"] = lambda oid, name: PgType(oid, name, always(pa.list_(pa.int32())), version)
>>> version(pa.array([b"1.2.3", None]), pa.list_(pa.int32())).to_pylist()
[[1, 2, 3], None]
>>> del DEFINED["public.celsius"], EXTENSIONS["semver", "semver"]

https://www.postgresql.org/docs/current/contrib.html
https://github.com/pgvector/pgvector
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.types.base import Binary, Decode, PgType, Texts, always, dense, refuse, text
from pgoutput_source.types.nested import cells_of
from pgoutput_source.types.numbers import floating_text, integer_text
from pgoutput_source.types.sent import HSTORE, vector_of_floats
from pgoutput_source.types.text import AS_TEXT, VERSIONED

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
    """PostGIS writes the extended well-known binary form of a geometry as hexadecimal digits.

    The bytes are kept as they are, the SRID of each value in them; GeoArrow's readers take this form for WKB.
    """
    t = Texts(values)
    if (t.lengths == 0).any() or (t.lengths & 1).any():
        refuse("geometry")
    edges = (np.append(t.starts, len(t.data)) >> 1).astype(np.int32)
    data = binascii.unhexlify(t.data.tobytes())
    return pa.Array.from_buffers(kind, len(t), [None, pa.py_buffer(edges), pa.py_buffer(data)])


def _geometry(typmod: int) -> dict[str, str]:
    """What makes a geometry of bytes in Arrow's eyes; a declared SRID is in the typmod's bits 8 to 28."""
    srid = typmod >> 8 & 0x1FFFFF if typmod >= 0 else 0
    crs = f'{{"crs":"{srid}","crs_type":"srid"}}' if srid else "{}"
    return {"ARROW:extension:name": "geoarrow.wkb", "ARROW:extension:metadata": crs}


_SPARSE = r"^\{(?P<cells>[^{}]*)\}/(?P<dim>[1-9][0-9]*)$"
_INDEX = integer_text("sparsevec")


@dense
def sparsevec(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    """``{1:1.5,3:2}/5``. The text counts from 1; what is written in binary, and SciPy, from 0, as the indices here."""
    halves = pc.extract_regex(values.cast(pa.utf8()), _SPARSE)
    if halves.null_count:
        refuse("sparsevec")
    cells = pc.split_pattern(halves.field("cells"), ",")
    filled = pc.not_equal(halves.field("cells"), "").to_numpy(zero_copy_only=False)
    counts = np.where(filled, pc.list_value_length(cells).to_numpy(zero_copy_only=False), 0)
    pairs = pc.split_pattern(cells.filter(pa.array(filled)).flatten(), ":")
    if not (pc.list_value_length(pairs).to_numpy(zero_copy_only=False) == 2).all():
        refuse("sparsevec")
    sides = pairs.flatten().cast(pa.binary())
    place, number = (sides.take(pa.array(np.arange(side, len(sides), 2))) for side in (0, 1))
    index = _INDEX(place, pa.int32()).to_numpy(zero_copy_only=False) - 1
    dim = _INDEX(halves.field("dim").cast(pa.binary()), pa.int32())
    owner = np.repeat(np.arange(len(counts)), counts)
    ascending = (np.diff(index) > 0) | (np.diff(owner) > 0)
    if (index < 0).any() or (index >= dim.to_numpy(zero_copy_only=False)[owner]).any() or not ascending.all():
        refuse("sparsevec")
    offsets = pa.array(np.append(0, np.cumsum(counts)).astype(np.int32))
    indices = pa.ListArray.from_arrays(offsets, pa.array(index, pa.int32()))
    return pa.StructArray.from_arrays(
        [indices, pa.ListArray.from_arrays(offsets, _FLOAT(number, pa.float32())), dim], fields=list(kind)
    )


SPARSEVEC = pa.struct(
    [
        pa.field("indices", pa.list_(pa.int32())),
        pa.field("values", pa.list_(pa.float32())),
        pa.field("dim", pa.int32()),
    ]
)

Make = Callable[[int, str], PgType]


def _row(arrow: Callable[[int], pa.DataType], decode: Decode, binary: Binary | None = None) -> Make:
    return lambda oid, name: PgType(oid, name, arrow, decode, binary=binary)


_EWKB = Binary(lambda sent, kind: sent.slices().cast(kind), lambda value: binascii.hexlify(value).upper())

EXTENSIONS: dict[tuple[str, str], Make] = {
    ("hstore", "hstore"): _row(always(pa.map_(pa.utf8(), pa.utf8())), hstore, HSTORE),
    ("vector", "vector"): _row(_vector_arrow, vector, vector_of_floats(">f4")),
    # float16 would hold halfvec, but DuckDB does not read it.
    ("vector", "halfvec"): _row(_vector_arrow, vector, vector_of_floats(">f2")),
    ("vector", "sparsevec"): _row(always(SPARSEVEC), sparsevec),
    ("postgis", "geometry"): lambda oid, name: PgType(
        oid, name, always(pa.binary()), ewkb, binary=_EWKB, metadata=_geometry
    ),
    # GeoArrow can tell that edges run on a sphere, but DuckDB refuses to read a table that has such a column.
    ("postgis", "geography"): _row(always(pa.binary()), ewkb, _EWKB),
    ("citext", "citext"): _row(always(pa.utf8()), text, AS_TEXT),
    ("ltree", "ltree"): _row(always(pa.utf8()), text, VERSIONED),
}
"""By extension and type name, what makes the row for an OID. Other types of extensions arrive as their exact text."""

DEFINED: dict[str, Make] = {}
"""The same for types that the database itself defines, by schema and name as `format_type` writes them, in quotes where
SQL needs them: ``public.price``, ``shop."Unit"``. It wins over what the catalogue says of the type."""
