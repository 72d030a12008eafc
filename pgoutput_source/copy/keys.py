"""Locates keys among the bounds of chunks, in the order of the *server*.

A key is the PostgreSQL text of its values, one `str` per column, which SQL accepts whatever the type. Integers are
compared here. Everything else (collations, numeric's NaN, infinite timestamps, enums in their own order) is compared by
the server, with the operators of the key's own index, in one query for all keys of a poll.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, Final, TypeAlias
from uuid import UUID

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from psycopg import sql

from pgoutput_source.changes.schema import Column
from pgoutput_source.changes.values import to_python

Key: TypeAlias = tuple[str, ...]
"""One key: the text of each column's value."""

Ask: TypeAlias = Callable[[sql.Composed, list[list[str]]], list[int]]
"""Runs a query with parameters on the server, and returns the numbers in its only column."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CollatedColumn:
    """A column of a table's key: its name, its type as SQL writes it, and its collation ("" if it has none)."""

    name: str
    type_name: str
    collation: str = ""

    @property
    def integer(self) -> bool:
        """Whether it sorts like Python's integers."""
        return self.type_name in _INTEGERS


_INTEGERS: Final = {"smallint", "integer", "bigint"}


class Keys:
    """Compares the keys of one table.

    Args:
        columns: The key's columns, in the key's order.
        ask: Runs a query with parameters on the server, and returns the numbers in its only column. A key of one
            integer needs none.

    Example:
        >>> keys = Keys((CollatedColumn("id", "bigint"),))
        >>> keys.places([("5",), ("10",), ("70",)], [("10",), ("50",)]).tolist()
        [0, 1, 2]
    """

    def __init__(self, columns: Sequence[CollatedColumn], ask: Ask | None = None) -> None:
        self.columns = tuple(columns)
        self._asked = ask
        self._integer = len(self.columns) == 1 and self.columns[0].integer

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(column.name for column in self.columns)

    def places(self, keys: Sequence[Key], bounds: Sequence[Key]) -> Ints:
        """For each key, how many of the ascending `bounds` are at or below it."""
        if not keys or not bounds:
            return np.zeros(len(keys), np.int64)
        if self._integer:
            found: Ints = np.searchsorted(_integers(bounds), _integers(keys), side="right").astype(np.int64)
            return found
        return self._ask("pg_catalog.width_bucket({row}, ({array}))", keys, bounds)

    def matches(self, keys: Sequence[Key], others: Sequence[Key]) -> Ints:
        """For each key, the index of the first of `others` that equals it; -1 if none does."""
        if not keys or not others:
            return np.full(len(keys), -1, np.int64)
        if self._integer:
            index = {key: i for i, key in reversed(list(enumerate(_integers(others).tolist())))}
            return np.array([index.get(key, -1) for key in _integers(keys).tolist()], np.int64)
        return self._ask("coalesce(pg_catalog.array_position(({array}), {row}), 0)", keys, others) - 1

    def _ask(self, question: str, keys: Sequence[Key], others: Sequence[Key]) -> Ints:
        assert self._asked is not None
        names = [f"k{i}" for i in range(len(self.columns))]
        row = sql.SQL("ROW({})").format(
            sql.SQL(", ").join(
                sql.SQL("{}::" + c.type_name + (f" COLLATE {c.collation}" if c.collation else "")).format(
                    sql.Identifier(n)
                )
                for n, c in zip(names, self.columns, strict=True)
            )
        )
        unnested = sql.SQL("unnest({}) WITH ORDINALITY AS u({}, n)").format(
            sql.SQL(", ").join([sql.SQL("%s::text[]")] * len(names)), sql.SQL(", ").join(map(sql.Identifier, names))
        )
        # The subquery depends on nothing outside, so it is computed once.
        array = sql.SQL("SELECT pg_catalog.array_agg({} ORDER BY n) FROM {}").format(row, unnested)
        query = sql.SQL("SELECT {} FROM {} ORDER BY n").format(sql.SQL(question).format(row=row, array=array), unnested)
        parameters = [[key[i] for key in some] for some in (others, keys) for i in range(len(names))]
        return np.array(self._asked(query, parameters), np.int64)

    def of(
        self, data: pa.StructArray | pa.RecordBatch, columns: Sequence[Column], raw: Sequence[dict[str, str]]
    ) -> list[Key]:
        """The keys of rows.

        Args:
            data: The rows, with all key columns.
            columns: The columns of the table's version.
            raw: For each row, the texts of its misfits by column.

        Raises:
            KeyError: A column of the key is missing.
        """
        by_name = {column.name: column for column in columns}
        texts = []
        for name in self.names:
            column = by_name[name]
            array = data.field(name) if isinstance(data, pa.StructArray) else data.column(name)
            texts.append(_texts(array, column, [row.get(name) for row in raw] if raw else None))
        return list(zip(*texts, strict=True))


def comparable(kind: pa.DataType) -> bool:
    """Whether the values of an Arrow type can be written as the text of a key."""
    checks = pa.types
    return (
        checks.is_integer(kind)
        or checks.is_boolean(kind)
        or checks.is_floating(kind)
        or checks.is_decimal(kind)
        or checks.is_string(kind)
        or checks.is_binary(kind)
        or checks.is_date(kind)
        or checks.is_timestamp(kind)
        or checks.is_time(kind)
        or (isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.uuid")
    )


def _integers(keys: Sequence[Key]) -> Ints:
    return np.fromiter((int(key[0]) for key in keys), np.int64, len(keys))


def _texts(array: pa.Array, column: Column, raw: list[str | None] | None) -> list[str]:
    if pa.types.is_integer(array.type):
        texts: list[Any] = array.cast(pa.utf8()).to_pylist()
    else:
        texts = [None if value is None else _text(value) for value in to_python(array, column)]
    if raw is not None:
        texts = [exact if text is None else text for text, exact in zip(texts, raw, strict=True)]
    return texts


def _text(value: Any) -> str:
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case int() | Decimal() | UUID():
            return str(value)
        case float():
            return repr(value)
        case bytes():
            return "\\x" + value.hex()
        case datetime() | date() | time():
            return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not a type of keys")
