"""UUIDs.

https://www.postgresql.org/docs/current/datatype-uuid.html
"""

from __future__ import annotations

import pyarrow as pa

from pgoutput_source.types.base import PgType, Texts, always, dense, refuse


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


# arrow.uuid was tried: it survives Parquet, DuckDB reads it as UUID, but Polars as bytes, and pyarrow has no kernel for
# it (no filter by value, no group, no sort, no dictionary). The commonest type of key must not fail there: it is text,
# which every one of them, JSON and Bytewax's keys too, takes as it is.
IDENTIFIERS = (PgType(2950, "uuid", always(pa.utf8()), uuid),)
