"""Types whose values are text, or arrive as text: characters, XML, JSON, network addresses, bit strings, text search.

https://www.postgresql.org/docs/current/datatype-character.html
"""

from __future__ import annotations

import re

import pyarrow as pa

from pgoutput_source.types.base import (
    Binary,
    PgType,
    Sent,
    Texts,
    always,
    charset,
    dense,
    refuse,
    same_bytes,
    text,
    through_text,
)
from pgoutput_source.types.text_binary import BITS, CIDR, INET, SNAPSHOT, TID, TSVECTOR, hardware_address

_OCTAL = re.compile(rb"\\[23][0-7][0-7]")


@dense
def char(values: pa.BinaryArray, kind: pa.DataType) -> pa.Array:
    r"""``"char"``, the one-byte type of the system catalogues.

    PostgreSQL 16 and newer write a byte above 127 as ``\377``; older servers send the byte itself, which is not UTF-8.
    Here it becomes the same text.
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


def _one_byte(value: bytes) -> bytes:
    """`"char"` in binary is always one byte; 0 means the empty text."""
    if len(value) != 1:
        refuse('"char"')
    return value.strip(b"\0") if value[0] < 128 else f"\\{value[0]:o}".encode()


def _without_version(value: bytes) -> bytes:
    if value[:1] != b"\x01":
        refuse("jsonb")
    return value[1:]


def _versioned(sent: Sent, kind: pa.DataType) -> pa.Array:
    """A type that sends the number of its format, which is 1, before its text."""
    if (sent.length < 1).any() or (sent.u1[sent.start] != 1).any():
        refuse("jsonb")
    return sent.part(1, sent.length - 1).slices().cast(kind)


AS_TEXT = same_bytes(text)
VERSIONED = Binary(_versioned, _without_version)

# arrow.json was tried for json and jsonb: Polars reads it as an extension type that neither its string functions nor a
# cast accept, and pyarrow has no kernel for it (no filter, no group, no sort). As utf8 everything works, DuckDB's JSON
# functions included. The text is the exact one: duplicate keys, 1.10 and 1e400 survive. Metadata of the field alone is
# no way around: from IPC, Parquet and the C data interface pyarrow gives it back as the extension type. The same holds
# for arrow.opaque, which the notations below could be.
_UTF8 = always(pa.utf8())

TEXT = (
    PgType(25, "text", _UTF8, text, array=1009, binary=AS_TEXT),
    PgType(1043, "character varying", _UTF8, text, array=1015, binary=AS_TEXT),
    PgType(1042, "character", _UTF8, text, array=1014, binary=AS_TEXT),
    PgType(19, "name", _UTF8, text, array=1003, binary=AS_TEXT),
    PgType(18, '"char"', _UTF8, char, array=1002, binary=through_text(_one_byte, char)),
    PgType(142, "xml", _UTF8, text, array=143, binary=AS_TEXT),
    PgType(114, "json", _UTF8, text, array=199, binary=AS_TEXT),
    PgType(3802, "jsonb", _UTF8, text, array=3807, binary=VERSIONED),
)

# Types without an Arrow type that every reader knows keep PostgreSQL's notation: every server casts it back.
_IP, _MAC = b"0123456789abcdef.:/", b"0123456789abcdef:"
NOTATIONS = (
    PgType(869, "inet", _UTF8, charset(_IP, "inet"), array=1041, binary=INET),
    PgType(650, "cidr", _UTF8, charset(_IP, "cidr"), array=651, binary=CIDR),
    PgType(829, "macaddr", _UTF8, charset(_MAC, "macaddr"), array=1040, binary=hardware_address(6)),
    PgType(774, "macaddr8", _UTF8, charset(_MAC, "macaddr8"), array=775, binary=hardware_address(8)),
    PgType(1560, "bit", _UTF8, charset(b"01", "bit"), array=1561, binary=BITS),
    PgType(1562, "bit varying", _UTF8, charset(b"01", "bit varying"), array=1563, binary=BITS),
    PgType(3614, "tsvector", _UTF8, text, array=3643, binary=TSVECTOR),
    PgType(3615, "tsquery", _UTF8, text, array=3645),
    PgType(4072, "jsonpath", _UTF8, text, array=4073, binary=VERSIONED),
    PgType(24, "regproc", _UTF8, text, array=1008),
    PgType(2202, "regprocedure", _UTF8, text, array=2207),
    PgType(2203, "regoper", _UTF8, text, array=2208),
    PgType(2204, "regoperator", _UTF8, text, array=2209),
    PgType(2205, "regclass", _UTF8, text, array=2210),
    PgType(2206, "regtype", _UTF8, text, array=2211),
    PgType(3734, "regconfig", _UTF8, text, array=3735),
    PgType(3769, "regdictionary", _UTF8, text, array=3770),
    PgType(4089, "regnamespace", _UTF8, text, array=4090),
    PgType(4096, "regrole", _UTF8, text, array=4097),
    PgType(4191, "regcollation", _UTF8, text, array=4192),
    PgType(27, "tid", _UTF8, text, array=1010, binary=TID),
    PgType(5038, "pg_snapshot", _UTF8, text, array=5039, binary=SNAPSHOT),
    PgType(2970, "txid_snapshot", _UTF8, text, array=2949, binary=SNAPSHOT),
    PgType(1033, "aclitem", _UTF8, text, array=1034),
    PgType(1790, "refcursor", _UTF8, text, array=2201, binary=AS_TEXT),
)
