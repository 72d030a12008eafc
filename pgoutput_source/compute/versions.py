"""Versions of a table: which relation it is, and what rows of an earlier version have in a current column.

The metadata of Arrow schemas decides: ``pg.relation_id`` of the table, ``pg.attnum``, ``pg.oid`` and ``pg.typmod`` of a
column.

https://www.postgresql.org/docs/current/sql-altertable.html
"""

from __future__ import annotations

import json
import logging
from typing import Any, Final, NamedTuple

import pyarrow as pa

from pgoutput_source.compute.metadata import own_columns
from pgoutput_source.types import type_of
from pgoutput_source.types.numbers import precision_and_scale

logger = logging.getLogger(__name__)


class Relation(NamedTuple):
    """A table by identity, not by name. It is `told` if its database system and database are known."""

    relation_id: str
    system: str
    database: str

    @property
    def told(self) -> bool:
        """Whether it may be recognized under another name."""
        return bool(self.system)


class Past(NamedTuple):
    """What rows of an earlier version have in a current column.

    Attributes:
        name: The column's name in them; None if they did not have it.
        known: Whether its value is known, from that column or from `value`.
        value: The value, as an Arrow scalar, that it has in every row from before it was added; None is NULL.
        reason: Why the value is unknown, if it is.
    """

    name: str | None
    known: bool
    value: Any = None
    reason: str = ""


def relation_of(schema: pa.Schema) -> Relation | None:
    """The relation that a schema's metadata names; None if it names none."""
    metadata = schema.metadata or {}
    if b"pg.relation_id" not in metadata:
        return None
    return Relation(*(metadata.get(key, b"").decode() for key in (b"pg.relation_id", b"pg.system", b"pg.database")))


class Seen:
    """The last version of a table that a step has seen: its own columns, and its relation."""

    def __init__(self, packed: bytes | None = None) -> None:
        self.schema: pa.Schema | None = None if packed is None else pa.ipc.read_schema(pa.py_buffer(packed))
        self._last: pa.Schema | None = None

    def pack(self) -> bytes | None:
        """The version as bytes, for a state."""
        return None if self.schema is None else self.schema.serialize().to_pybytes()

    def changed(self, schema: pa.Schema) -> tuple[pa.Schema | None, bool]:
        """Note a batch's schema.

        Returns:
            The previous version, None if there is none or it is the same; and whether this is another table, which was
            created or renamed in place of the previous one.
        """
        if schema is self._last:
            return None, False
        self._last, before = schema, self.schema
        self.schema = pa.schema([schema.field(name) for name in own_columns(schema)], metadata=schema.metadata)
        if before is None or before.equals(self.schema, check_metadata=True):
            return None, False
        relations = relation_of(before), relation_of(self.schema)
        other = None not in relations and relations[0] != relations[1]
        if other:
            logger.warning(
                "%s is another table now: it was recreated, or another one took its name. The rows of the previous "
                "table are gone", (schema.metadata or {}).get(b"pg.table", b"").decode(),
            )  # fmt: skip
        return before, other


def column_in(schema: pa.Schema, field: pa.Field) -> Past:
    """What a schema of an earlier version knows about `field`, a column of the newest version."""
    old = _same_column(schema, field)
    if old is None:
        return _before_it_was_added(field)
    if _same_values(old, field):
        return Past(old.name, True)
    return Past(old.name, False, reason=f"changed its type from {_type(old)} to {_type(field)}")


def _before_it_was_added(field: pa.Field) -> Past:
    text = _said(field, b"pg.missing")
    if text is None:
        return Past(None, False, reason="was added later, and its value in older rows was not recorded")
    value = json.loads(text)
    if value is None:
        return Past(None, True)
    try:
        cell = type_of(int(_oid(field) or 0)).decode(pa.array([value.encode()], pa.binary()), field.type)
        cell = cell if cell.type == field.type else cell.cast(field.type)
    except (ValueError, pa.ArrowException):
        cell = pa.nulls(1, field.type)
    if cell.null_count:
        return Past(None, False, reason=f"was added with the default {value}, which {field.type} can't hold")
    return Past(None, True, cell[0])


def _same_column(schema: pa.Schema, field: pa.Field) -> pa.Field | None:
    number = _said(field, b"pg.attnum")
    if number is not None and any(_said(old, b"pg.attnum") for old in schema):
        return next((old for old in schema if _said(old, b"pg.attnum") == number), None)
    index = schema.get_field_index(field.name)
    return None if index < 0 else schema.field(index)


def _same_values(old: pa.Field, new: pa.Field) -> bool:
    """Whether a change of type left the values as they were.

    ALTER COLUMN … TYPE … USING may compute anything, and the wire does not tell. Old values only count as the new ones
    if PostgreSQL does not rewrite the table, because the new type just allows more.
    """
    if old.type == new.type and (_oid(old) is None or _oid(new) is None):
        return True
    if _oid(old) is not None and _oid(old) == _oid(new) and _said(old, b"pg.typmod") == _said(new, b"pg.typmod"):
        return True
    was, now = _type(old), _type(new)
    limit, new_limit = _modifier(old), _modifier(new)
    if was in _TEXTS and now in _TEXTS:
        return new_limit is None or (limit is not None and limit <= new_limit)
    if was == now and was in _TIMES:
        return new_limit is None or new_limit >= _DIGITS or (limit is not None and limit <= new_limit)
    if was == now == "numeric":
        if limit is None or new_limit is None:
            return new_limit is None
        (precision, scale), (new_precision, new_scale) = map(precision_and_scale, (limit, new_limit))
        return scale == new_scale and precision <= new_precision
    return False


_TEXTS: Final = ("character varying", "text")
_TIMES: Final = (
    *("time without time zone", "time with time zone"),
    *("timestamp without time zone", "timestamp with time zone"),
)
_DIGITS: Final = 6  # of a second, in every time


def _modifier(field: pa.Field) -> int | None:
    """The type modifier, which limits values; None if nothing does."""
    typmod = int(_said(field, b"pg.typmod") or -1)
    return None if typmod < 0 else typmod


def _oid(field: pa.Field) -> str | None:
    """The type's OID; None if unknown. "0" stands for a column that PostgreSQL does not have."""
    oid = _said(field, b"pg.oid")
    return None if oid == "0" else oid


def _type(field: pa.Field) -> str:
    return _said(field, b"pg.type") or str(field.type)


def _said(field: pa.Field, key: bytes) -> str | None:
    value = (field.metadata or {}).get(key)
    return None if value is None else value.decode()
