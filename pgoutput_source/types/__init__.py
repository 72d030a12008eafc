"""The type table: one row per PostgreSQL type, one file per family.

A row knows the canonical Arrow type (which may depend on the typmod) and how to turn a *whole column* of PostgreSQL's
text into it. In come the gathered values of one column, out goes an Arrow array; rows never become Python objects.

The rule that everything rests on: **no value is ever silently wrong.** `decode` gets a `pa.BinaryArray` of PostgreSQL
text (UTF-8, NULL is null) and the Arrow type, and returns an array of this type and the same length in which

- a NULL is null,
- a legitimate value that the Arrow type can't hold (NaN in a decimal, infinity, 24:00, a BC date in …) is null as well:
  the caller sees it by the difference in nulls and keeps its exact text in `_raw`,
- and for bytes that are no text of the type, a ValueError (pa.ArrowInvalid is one) is raised, never a value returned.

https://www.postgresql.org/docs/current/datatype.html
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

Decode = Callable[[pa.BinaryArray, pa.DataType], pa.Array]


@dataclass(frozen=True, slots=True)
class PgType:
    """One row of the table.

    `oid` is PostgreSQL's; `arrow` gives the canonical Arrow type for a typmod (-1: none); `decode` is described above.
    """

    oid: int
    name: str
    arrow: Callable[[int], pa.DataType]
    decode: Decode


def text(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    """PostgreSQL's text as it is. Raises pa.ArrowInvalid where it is not UTF-8."""
    return values.cast(kind)


OPAQUE = PgType(0, "unknown", lambda typmod: pa.utf8(), text)
"""A type that the table does not know: its exact text."""

TYPES: dict[int, PgType] = {}


def type_of(oid: int) -> PgType:
    """The row for a type's OID; types that the table does not know arrive as their exact text."""
    return TYPES.get(oid, OPAQUE)
