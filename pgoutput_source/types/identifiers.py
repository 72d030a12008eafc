"""UUIDs, object identifiers, transaction ids and positions in the WAL.

https://www.postgresql.org/docs/current/datatype-uuid.html
https://www.postgresql.org/docs/current/datatype-oid.html
https://www.postgresql.org/docs/current/datatype-pg-lsn.html
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.types.base import PgType, Texts, always, dense, pattern, refuse
from pgoutput_source.types.numbers import integer_text


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


# arrow.uuid was tried: it survives Parquet, DuckDB reads it as UUID, but Polars as bytes, and pyarrow has no kernel for
# it (no filter by value, no group, no sort, no dictionary). The commonest type of key must not fail there: it is text,
# which every one of them, JSON and Bytewax's keys too, takes as it is.
IDENTIFIERS = (
    PgType(2950, "uuid", always(pa.utf8()), uuid, array=2951),
    PgType(26, "oid", always(pa.uint32()), integer_text("oid"), array=1028),
    PgType(28, "xid", always(pa.uint32()), integer_text("xid"), array=1011),
    PgType(29, "cid", always(pa.uint32()), integer_text("cid"), array=1012),
    PgType(5069, "xid8", always(pa.uint64()), integer_text("xid8"), array=271),
    PgType(3220, "pg_lsn", always(pa.uint64()), pg_lsn, array=3221),
)
