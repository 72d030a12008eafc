"""The type table: one row per PostgreSQL type, one file per family.

A row knows the canonical Arrow type (which may depend on the typmod) and how to turn a *whole column* of PostgreSQL's
text into it: the gathered values of one column become an Arrow array. Rows never become Python objects.

One rule holds everywhere: **no value is ever silently wrong.** `decode` gets a `pa.BinaryArray` of PostgreSQL
text (UTF-8, NULL is null) and the Arrow type, and returns an array of this type and the same length in which

- a NULL is null,
- a legitimate value that the Arrow type can't hold (NaN in a decimal, infinity in a date, 24:00 …) is null as well:
  the caller sees it by the difference in nulls and keeps its exact text in `_raw`,
- bytes that are not a text of the type raise a ValueError (pa.ArrowInvalid is one) and never become a value.

With the option `binary`, the send functions of the types write the values. `PgType.binary` makes the same column from
them, and each value's text for `_raw`. Your own type may omit it: its tables then arrive as text.

https://www.postgresql.org/docs/current/datatype.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pyarrow as pa

from pgoutput_source.types import base
from pgoutput_source.types.arrays import array_of, vector_of
from pgoutput_source.types.base import Decode, PgType, always, dense
from pgoutput_source.types.bytea import BINARY
from pgoutput_source.types.catalogue import FACTS, TypeFacts, from_catalogue
from pgoutput_source.types.datetime import DATETIME
from pgoutput_source.types.datetime_binary import INTERVAL_BEFORE_17
from pgoutput_source.types.extensions import DEFINED, EXTENSIONS
from pgoutput_source.types.geometry import GEOMETRY
from pgoutput_source.types.identifiers import IDENTIFIERS
from pgoutput_source.types.numbers import NUMBERS
from pgoutput_source.types.ranges import multirange_of, range_of
from pgoutput_source.types.text import NOTATIONS, TEXT

__all__ = [
    "DEFINED",
    "EXTENSIONS",
    "FACTS",
    "OPAQUE",
    "TYPES",
    "Decode",
    "PgType",
    "TypeFacts",
    "always",
    "dense",
    "from_catalogue",
    "markdown_table",
    "type_of",
    "types_of",
]

OPAQUE = PgType(0, "unknown", base.always(pa.utf8()), base.text)  # the name `text` is the submodule's here
"""A type that the table does not know: its exact text."""

_SCALARS = {row.oid: row for row in (*NUMBERS, *TEXT, *BINARY, *DATETIME, *IDENTIFIERS, *GEOMETRY, *NOTATIONS)}

_RANGES = (
    (range_of(_SCALARS[23], 3904, "int4range", 3905), 4451, 6150),
    (range_of(_SCALARS[20], 3926, "int8range", 3927), 4536, 6157),
    (range_of(_SCALARS[1700], 3906, "numrange", 3907), 4532, 6151),
    (range_of(_SCALARS[1114], 3908, "tsrange", 3909), 4533, 6152),
    (range_of(_SCALARS[1184], 3910, "tstzrange", 3911), 4534, 6153),
    (range_of(_SCALARS[1082], 3912, "daterange", 3913), 4535, 6155),
)

_ROWS = (
    *_SCALARS.values(),
    *(row for row, _, _ in _RANGES),
    *(multirange_of(row, oid, row.name.replace("range", "multirange"), array) for row, oid, array in _RANGES),
    vector_of(_SCALARS[21], 22, "int2vector", 1006),
    vector_of(_SCALARS[26], 30, "oidvector", 1013),
)

TYPES: dict[int, PgType] = {row.oid: row for row in _ROWS} | {
    row.array: array_of(row, row.array, row.delimiter) for row in _ROWS if row.array
}
"""The rows of PostgreSQL's own types, whose OIDs are the same everywhere. For others see `from_catalogue`."""


_INTERVAL = replace(TYPES[1186], binary=INTERVAL_BEFORE_17)
_TYPES_BEFORE_17 = TYPES | {1186: _INTERVAL, 1187: array_of(_INTERVAL, 1187)}


def types_of(server_version: int) -> Mapping[int, PgType]:
    """The table for a server of this version, in libpq's notation: 180006.

    From PostgreSQL 17 on, an interval is infinite if each of its fields is the largest, or the smallest, number.
    """
    return TYPES if server_version >= 170_000 else _TYPES_BEFORE_17


def type_of(oid: int) -> PgType:
    """The row for a type's OID; types that the table does not know arrive as their exact text."""
    return TYPES.get(oid, OPAQUE)


def markdown_table() -> str:
    """The type table for people to read: PostgreSQL's type, Arrow's, and which values go to `_raw`."""
    cells: dict[tuple[str, str], list[str]] = {}
    declared = {1700: [("numeric(p,s), up to 38 digits", "decimal128(p, s)", "NaN"), ("numeric", "string", "")]}
    for row in _ROWS:
        for name, arrow, misfits in declared.get(row.oid, [(row.name, str(row.arrow(-1)), row.misfits)]):
            cells.setdefault((arrow, misfits), []).append(name)
    cells["list of T", "several dimensions, a lower bound other than 1, an element that is a misfit"] = ["T[]"]
    cells["what its base type is", "as its base type"] = ["domain"]
    cells["string", ""] += ["enum", "any other type"]
    cells["struct of its attributes", "another number of attributes, an attribute that is a misfit"] = ["composite"]
    for (extension, name), make in EXTENSIONS.items():
        row = make(0, name)
        label = name if name == extension else f"{name} ({extension})"
        cells.setdefault((str(row.arrow(-1)), row.misfits), []).append(label)
    lines = ["| PostgreSQL | Arrow | exact text kept in `_raw` for |", "|---|---|---|"]
    lines += [f"| {', '.join(names)} | `{arrow}` | {misfits or '–'} |" for (arrow, misfits), names in cells.items()]
    return "\n".join(lines) + "\n"
