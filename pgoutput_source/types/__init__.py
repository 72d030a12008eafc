"""The type table: one row per PostgreSQL type, one file per family.

A row knows the canonical Arrow type (which may depend on the typmod) and how to turn a *whole column* of PostgreSQL's
text into it. In come the gathered values of one column, out goes an Arrow array; rows never become Python objects.

The rule that everything rests on: **no value is ever silently wrong.** `decode` gets a `pa.BinaryArray` of PostgreSQL
text (UTF-8, NULL is null) and the Arrow type, and returns an array of this type and the same length in which

- a NULL is null,
- a legitimate value that the Arrow type can't hold (NaN in a decimal, infinity in a date, 24:00 …) is null as well:
  the caller sees it by the difference in nulls and keeps its exact text in `_raw`,
- and for bytes that are no text of the type, a ValueError (pa.ArrowInvalid is one) is raised, never a value returned.

https://www.postgresql.org/docs/current/datatype.html
"""

from __future__ import annotations

import pyarrow as pa

from pgoutput_source.types import base
from pgoutput_source.types.base import Decode, PgType
from pgoutput_source.types.binary import BINARY
from pgoutput_source.types.datetime import DATETIME
from pgoutput_source.types.identifiers import IDENTIFIERS
from pgoutput_source.types.numbers import NUMBERS
from pgoutput_source.types.text import TEXT

__all__ = ["OPAQUE", "TYPES", "Decode", "PgType", "type_of"]

OPAQUE = PgType(0, "unknown", base.always(pa.utf8()), base.text)
"""A type that the table does not know: its exact text."""

TYPES: dict[int, PgType] = {row.oid: row for row in (*NUMBERS, *TEXT, *BINARY, *DATETIME, *IDENTIFIERS)}


def type_of(oid: int) -> PgType:
    """The row for a type's OID; types that the table does not know arrive as their exact text."""
    return TYPES.get(oid, OPAQUE)
