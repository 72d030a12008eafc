"""What has to be altered in a store's table so that it takes the next version of the source's table."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import pyarrow as pa

from pgoutput_source.changes.schema import attnum_of


class StoredColumn(NamedTuple):
    """A column of a store's table.

    Attributes:
        name: Its name, the same at the source.
        attnum: The number of the source's column; None if unknown.
        type: Its type in the store.
        source: The source's type.
    """

    name: str
    attnum: int | None
    type: str
    source: str

    @classmethod
    def of(cls, field: pa.Field, type: str) -> StoredColumn:
        """From a column's Arrow field, and its type in the store."""
        metadata = field.metadata or {}
        source, typmod = (metadata.get(name, b"").decode() for name in (b"pg.type", b"pg.typmod"))
        return cls(field.name, attnum_of(field), type, source if typmod in ("", "-1") else f"{source} ({typmod})")


class Alterations(NamedTuple):
    """The steps from one version to the next, in this order. Columns that are gone stay in the store.

    Attributes:
        renamed: New names by old ones. They may form cycles.
        retyped: Columns of another type, before and after, both under the new name.
        added: Columns that are new.
    """

    renamed: dict[str, str]
    retyped: list[tuple[StoredColumn, StoredColumn]]
    added: list[StoredColumn]


def alterations(
    known: Iterable[StoredColumn],
    columns: Sequence[StoredColumn],
    names: Collection[str],
    *,
    recreated: bool = False,
    folded: bool = False,
) -> Alterations:
    """How to alter a table.

    A column that stays is told by its number. Without numbers, or in a table that was recreated, its name tells.

    Args:
        known: The columns of the previous version.
        columns: The columns of the next one.
        names: All names in the store's table, those of columns that are gone for long included.
        recreated: The source's table was dropped and created again, so that numbers mean something else now.
        folded: The store takes names that differ only in upper and lower case for the same.

    >>> id, a, b = (StoredColumn(name, i, "INTEGER", "integer") for i, name in enumerate(("id", "a", "b"), 1))
    >>> alterations([id, a, b], [id, a._replace(name="b"), b._replace(name="a")], ["id", "a", "b"]).renamed
    {'a': 'b', 'b': 'a'}
    >>> renamed, retyped, added = alterations([id, a], [id, StoredColumn("a", 3, "VARCHAR", "text")], ["id", "a"])
    >>> renamed, retyped, [column.name for column in added]
    ({'a': 'a__2'}, [], ['a'])
    """
    by_name = {column.name: column for column in known}
    by_number = {} if recreated else {c.attnum: c for c in by_name.values() if c.attnum is not None}
    stay: dict[str, StoredColumn] = {}
    for column in columns:
        before = None if column.attnum is None else by_number.get(column.attnum)
        same = by_name.get(column.name)
        if before is None and same is not None and (recreated or None in (same.attnum, column.attnum)):
            before = same
        if before is not None:
            stay[column.name] = before
    renamed = {before.name: name for name, before in stay.items() if before.name != name}
    kept = {before.name for before in stay.values()}
    taken = {_fold(name, folded) for name in (*names, *(c.name for c in columns))}
    wanted = {_fold(c.name, folded) for c in columns}
    for name in names:
        if name not in kept and _fold(name, folded) in wanted:
            renamed[name] = aside(name, taken, folded=folded)
            taken.add(_fold(renamed[name], folded))
    retyped = [
        (stay[c.name]._replace(name=c.name), c)
        for c in columns
        if c.name in stay and (stay[c.name].type, stay[c.name].source) != (c.type, c.source)
    ]
    return Alterations(renamed, retyped, [c for c in columns if c.name not in stay])


def aside(name: str, taken: Collection[str], *, folded: bool = False) -> str:
    """A free name for a column that makes room for another: ``name__2``."""
    number = 2
    while _fold(f"{name}__{number}", folded) in taken:
        number += 1
    return f"{name}__{number}"


def _fold(name: str, folded: bool) -> str:
    return name.casefold() if folded else name
