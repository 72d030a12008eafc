"""Bytes.

https://www.postgresql.org/docs/current/datatype-binary.html
"""

from __future__ import annotations

import binascii

import numpy as np
import pyarrow as pa

from pgoutput_source.types.base import Binary, PgType, Texts, always, dense, refuse

_LONG = 1 << 16  # average digits of a value


@dense
def bytea(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    r"""The hex format, ``\x00ff``: one pass over the bytes of the whole column."""
    t = Texts(values)
    if not len(t):
        return values.cast(kind)
    if t.lengths.min() < 2 or (t.lengths & 1).any() or (t.at(0) != ord("\\")).any() or (t.at(1) != ord("x")).any():
        refuse("bytea")
    if len(t.data) > _LONG * len(t):
        # Copies of all digits would take several times the memory of the values.
        parts = [binascii.unhexlify(t.data[start + 2 : end].data) for start, end in zip(t.starts, t.ends, strict=True)]
        edges = np.cumsum([0, *map(len, parts)], dtype=np.int32)
        return pa.Array.from_buffers(kind, len(t), [None, pa.py_buffer(edges), pa.py_buffer(b"".join(parts))])
    digits = t.without(b"\\x")
    if len(digits) != len(t.data) - 2 * len(t):
        refuse("bytea")
    edges = (np.append(t.starts, len(t.data)) - 2 * np.arange(len(t) + 1)) >> 1
    # unhexlify raises binascii.Error, a ValueError.
    buffers = [None, pa.py_buffer(edges.astype(np.int32)), pa.py_buffer(binascii.unhexlify(digits))]
    return pa.Array.from_buffers(kind, len(t), buffers)


BYTES = Binary(lambda sent, kind: sent.slices().cast(kind), lambda value: b"\\x" + binascii.hexlify(value))

BINARY = (PgType(17, "bytea", always(pa.binary()), bytea, array=1001, binary=BYTES),)
