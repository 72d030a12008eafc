r"""Types of extensions. Their OIDs differ from database to database, so they are known by extension and name.

A type of your own is an entry here, made before a reader or a flow starts, in `EXTENSIONS` by extension and type, in
`DEFINED` by schema and name. A column of the domain ``public.celsius`` arrives as doubles, whatever its base type is:

>>> import pyarrow as pa
>>> from pgoutput_source.types import DEFINED, TYPES, PgType, always
>>> DEFINED["public.celsius"] = lambda oid, name: PgType(oid, name, always(pa.float64()), TYPES[701].decode)

A decoder of your own gets a whole column as PostgreSQL's text (UTF-8, without NULLs inside `dense`) and returns one of
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
import struct
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.types.base import (
    Binary,
    Bools,
    Decode,
    Ints,
    PgType,
    Texts,
    always,
    dense,
    refuse,
    text,
    through_text,
)
from pgoutput_source.types.nested import cells_of, gather, quoting_of
from pgoutput_source.types.nested_binary import HSTORE, vector_of_floats
from pgoutput_source.types.numbers import float_text, floating_text, integer_text
from pgoutput_source.types.text import AS_TEXT, VERSIONED

_FLOAT = floating_text("vector")
# What stands before a string of an hstore: nothing before the first key, an arrow before a value, and before another
# key the end of the last pair. `_FOLLOWS` says what each of them follows.
_NOTHING, _KEY, _VALUE = range(3)
_BEFORE = (b"", b"=>", b", ", b"=>NULL, ")
_FOLLOWS = np.array([_NOTHING, _KEY, _VALUE, _KEY])
_ARROW = _BEFORE.index(b"=>")
# What stands after the last string: nothing after a value, a NULL after a key.
_AFTER = (b"", b"=>NULL")


@dense
def hstore(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    """``"a"=>"1", "b c"=>NULL``: all strings are in quotes, and what stands between them says what each one is."""
    t = Texts(values)
    quoting, escapes = quoting_of(t, "hstore")
    if len(quoting) & 1:
        refuse("hstore")
    opens, closes = quoting[0::2], quoting[1::2]
    owner = np.searchsorted(t.starts, opens, "right") - 1
    if (closes >= t.ends[owner]).any():
        refuse("hstore")
    is_value = _hstore_values(t, opens, closes, owner)
    strings = gather(t.data, opens + 1, closes, escapes).cast(pa.utf8())
    key = np.flatnonzero(~is_value)
    has_value = np.append(is_value, False)[key + 1]
    offsets = np.append(0, np.cumsum(np.bincount(owner[key], minlength=len(t)))).astype(np.int32)
    items = strings.take(pa.array(key + 1, mask=~has_value))
    return pa.MapArray.from_arrays(pa.array(offsets), strings.take(pa.array(key)), items, type=kind)


def _hstore_values(t: Texts, opens: Ints, closes: Ints, owner: Ints) -> Bools:
    """Which strings are values; the others are keys. `owner` is the hstore that a string belongs to."""
    first = np.diff(owner, prepend=-1) > 0
    filled = np.flatnonzero(t.lengths)
    if len(filled) != np.count_nonzero(first):
        refuse("hstore")
    last = np.flatnonzero(np.diff(owner, append=len(t)) > 0)
    before = _which(t, np.where(first, t.starts[owner], np.append(0, closes[:-1]) + 1), opens, _BEFORE)
    is_value: Bools = before == _ARROW
    previous = np.where(first, _NOTHING, np.where(np.append(False, is_value[:-1]), _VALUE, _KEY))
    after = _which(t, closes[last] + 1, t.ends[filled], _AFTER)
    if (_FOLLOWS[before] != previous).any() or (after != ~is_value[last]).any():
        refuse("hstore")
    return is_value


def _which(t: Texts, start: Ints, end: Ints, words: Sequence[bytes]) -> Ints:
    """For each range of bytes the index of the word that it is."""
    which = np.full(len(start), -1)
    width = end - start
    for index, word in enumerate(words):
        at = np.flatnonzero(width == len(word))
        for i, character in enumerate(word):
            at = at[t.data[start[at] + i] == character]
        which[at] = index
    if (which < 0).any():
        refuse("hstore")
    return which


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


def _sparse_text(value: bytes) -> bytes:
    """The text of what is sent in binary: dimensions, how many are not zero, four bytes of zero, indices, values."""
    dim, count, unused = struct.unpack_from(">iii", value) if len(value) >= 12 else (0, 0, -1)
    if unused or count < 0 or len(value) != 12 + 8 * count:
        refuse("sparsevec")
    indices = np.frombuffer(value, ">i4", count, 12).astype(np.int64) + 1
    numbers = np.frombuffer(value, ">f4", count, 12 + 4 * count)
    pairs = (f"{i}:{float_text(number, 32)}" for i, number in zip(indices.tolist(), numbers.tolist(), strict=True))
    return f"{{{','.join(pairs)}}}/{dim}".encode()


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
    ("vector", "sparsevec"): _row(always(SPARSEVEC), sparsevec, through_text(_sparse_text, sparsevec)),
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
