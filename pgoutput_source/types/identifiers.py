"""UUIDs, object identifiers, transaction ids and positions in the WAL.

https://www.postgresql.org/docs/current/datatype-uuid.html
https://www.postgresql.org/docs/current/datatype-oid.html
https://www.postgresql.org/docs/current/datatype-pg-lsn.html
"""

from __future__ import annotations

import binascii
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.types.base import Binary, PgType, Sent, Texts, always, dense, fixed_width, pattern, refuse
from pgoutput_source.types.numbers import as_it_is, integer_binary, integer_text


@dense
def uuid(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    """The canonical form, 8-4-4-4-12 lower-case hexadecimal digits."""
    t = Texts(values)
    if not (t.lengths == 36).all() or t.without(b"0123456789abcdef") != b"----" * len(t):
        refuse("uuid")
    rows = t.data.reshape(-1, 36)
    if any((rows[:, at] != ord("-")).any() for at in (8, 13, 18, 23)):
        refuse("uuid")
    return values.cast(kind)


_hexadecimal = pattern("[0-9A-F]{1,8}/[0-9A-F]{1,8}", "pg_lsn")


@dense
def pg_lsn(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    """Two hexadecimal numbers: ``16/B374D848``."""
    halves = pc.split_pattern(_hexadecimal(values, pa.utf8()), "/").flatten()
    # Arrow parses hexadecimal numbers, if they say that they are.
    words = pc.binary_join_element_wise("0x", halves, "").cast(pa.uint64()).to_numpy(zero_copy_only=False)
    return pa.array(words[0::2] << 32 | words[1::2], kind)


# The 32 digits of a UUID as they follow each other, and as they stand between the four hyphens, in words.
_WORDS = ("<u8", "<u4", "<u4", "<u4", "<u8", "<u4")
_PARTS = [f"part{i}" for i in range(len(_WORDS))]
_DIGITS = np.dtype({"names": _PARTS, "formats": _WORDS, "offsets": [0, 8, 12, 16, 20, 28], "itemsize": 32})
_HYPHENATED = np.dtype({"names": _PARTS, "formats": _WORDS, "offsets": [0, 9, 14, 19, 24, 32], "itemsize": 36})


def _uuids(sent: Sent, kind: pa.DataType) -> pa.Array:
    sent.fixed(16, "uuid")
    if not len(sent):
        return pa.array([], kind)
    digits = np.frombuffer(binascii.hexlify(Texts(sent.slices()).data.data), _DIGITS)
    characters = np.empty((len(sent), 36), np.uint8)
    characters[:, [8, 13, 18, 23]] = ord("-")
    words = characters.view(_HYPHENATED).reshape(-1)
    for part in _PARTS:
        words[part] = digits[part]
    edges = np.arange(0, 36 * (len(sent) + 1), 36, dtype=np.int32)
    return pa.Array.from_buffers(kind, len(sent), [None, pa.py_buffer(edges), pa.py_buffer(characters)])


def _uuid_text(value: bytes) -> bytes:
    return str(UUID(bytes=value)).encode()


# arrow.uuid was tried: it survives Parquet, DuckDB reads it as UUID, but Polars as bytes, and pyarrow has no kernel for
# it (no filter by value, no group, no sort, no dictionary). The commonest type of key must not fail there: it is text,
# which every one of them, JSON and Bytewax's keys too, takes as it is.
IDENTIFIERS = (
    PgType(2950, "uuid", always(pa.utf8()), uuid, array=2951, binary=Binary(_uuids, _uuid_text)),
    PgType(26, "oid", always(pa.uint32()), integer_text("oid"), array=1028, binary=integer_binary(">u4", "oid")),
    PgType(28, "xid", always(pa.uint32()), integer_text("xid"), array=1011, binary=integer_binary(">u4", "xid")),
    PgType(29, "cid", always(pa.uint32()), integer_text("cid"), array=1012, binary=integer_binary(">u4", "cid")),
    PgType(5069, "xid8", always(pa.uint64()), integer_text("xid8"), array=271, binary=integer_binary(">u8", "xid8")),
    PgType(
        3220,
        "pg_lsn",
        always(pa.uint64()),
        pg_lsn,
        array=3221,
        binary=fixed_width(">u8", "pg_lsn", as_it_is, lambda lsn: f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"),
    ),
)
