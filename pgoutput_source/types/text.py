"""Types whose values are text, and arrive as it: character types, XML and JSON.

https://www.postgresql.org/docs/current/datatype-character.html
"""

from __future__ import annotations

import re

import pyarrow as pa

from pgoutput_source.types.base import PgType, Texts, always, dense, refuse, text

_OCTAL = re.compile(rb"\\[23][0-7][0-7]")


@dense
def char(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    r"""``"char"``, the one-byte type of the system catalogues.

    PostgreSQL 16 and newer write a byte above 127 as ``\377``; older servers send the byte itself, which is no UTF-8.
    It becomes the same text here.
    """
    t = Texts(values)
    if (t.lengths > 1).any() or (t.data > 127).any():
        return pa.array(list(map(_one_char, values.to_pylist())), kind)
    return values.cast(kind)


def _one_char(value: bytes) -> str:
    if len(value) == 1 and value[0] > 127:
        return f"\\{value[0]:o}"
    if len(value) > 1 and _OCTAL.fullmatch(value) is None:
        refuse('"char"')
    return value.decode()


# arrow.json was tried for json and jsonb: Polars reads it as an extension type that neither its string functions nor a
# cast accept, and pyarrow has no kernel for it (no filter, no group, no sort). As utf8 everything works, DuckDB's JSON
# functions included. The text is the exact one: duplicate keys, 1.10 and 1e400 survive.
_UTF8 = always(pa.utf8())

TEXT = (
    PgType(25, "text", _UTF8, text),
    PgType(1043, "character varying", _UTF8, text),
    PgType(1042, "character", _UTF8, text),
    PgType(19, "name", _UTF8, text),
    PgType(18, '"char"', _UTF8, char),
    PgType(142, "xml", _UTF8, text),
    PgType(114, "json", _UTF8, text),
    PgType(3802, "jsonb", _UTF8, text),
)
