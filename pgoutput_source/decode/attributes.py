"""Which column of a table's catalogue a column of a Relation message is: its `attnum`, as far as that can be known.

The wire only has the names of columns, so a column that was renamed looks like another one, and one that was dropped
and added again looks like the same. The catalogue has numbers that never change. But it describes the present, and the
changes may be older. Each of its rows names the transaction that wrote it (`xmin`). If that transaction is older than
the one that a Relation message belongs to, the row was valid then, too. The other columns are found by elimination,
because columns keep their order and are only ever added at the end.

Anything that does not follow from this is unknown (None). One case goes undetected: a transaction that got its number
before this one, and altered the table after it, while the changes are read later still.

https://www.postgresql.org/docs/current/catalog-pg-attribute.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pgoutput_source.changes.schema import Missing
from pgoutput_source.protocol.messages import RelationColumn

QUERY = """
SELECT c.oid::bigint, CASE c.relkind WHEN 'r' THEN c.relfilenode::bigint END, a.attnum::int, a.attname::text,
       a.atttypid::bigint, a.atttypmod, a.attisdropped, a.attgenerated <> '', a.xmin::text::bigint, a.atthasmissing,
       (a.attmissingval::text::text[])[1]
FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0
WHERE c.oid = ANY (%(relations)s::bigint[]::oid[])
ORDER BY c.oid, a.attnum
"""
"""Reads the attributes of the tables `relations`, dropped ones too: `attributes_of` makes objects of the rows."""


_FIRST_NORMAL = 3  # lower transaction numbers mean bootstrap and frozen rows


class Attribute(NamedTuple):
    """A row of `pg_attribute`. `xmin` is the transaction that wrote the row, `generated` columns may be unpublished."""

    attnum: int
    name: str
    type_oid: int
    typmod: int
    dropped: bool
    generated: bool
    xmin: int
    has_missing: bool
    missing: str | None


@dataclass(frozen=True, slots=True)
class Attributes:
    """All columns that a table has or had, as the catalogue describes them now.

    Attributes:
        never_rewritten: Whether the table still has the file that it was created with.
        file: The table's file, by its number; None if it has none of its own.
        rows: The columns.
        known: The value of each column in rows older than it, as far as an earlier look at the table revealed it.
    """

    never_rewritten: bool
    file: int | None
    rows: tuple[Attribute, ...]
    known: Mapping[int, Missing] = field(default_factory=dict)

    def following(self, earlier: Attributes) -> Attributes:
        """These attributes, with what an earlier look at the table revealed.

        The catalogue does not say why a table has a new file. TRUNCATE and VACUUM FULL write one, which says nothing
        about a column, and so does ADD COLUMN with a default that is not constant. But a column that was added while
        the file stayed had no such default, and what was known of a column holds until its catalogue row is rewritten.
        """
        old = {a.attnum: a for a in earlier.rows}
        known: dict[int, Missing] = {}
        for a in self.rows:
            missing = Missing(None) if self.file is not None and self.file == earlier.file else None
            if a.attnum in old:
                missing = earlier.missing(a.attnum) if old[a.attnum].xmin == a.xmin else None
            if missing is not None:
                known[a.attnum] = missing
        return replace(self, known=known)

    def numbers(self, columns: Sequence[RelationColumn], xid: int) -> list[int | None]:
        """The `attnum` of each column of a Relation message that came in transaction `xid`."""
        certain = {a.attnum for a in self.rows if self._is_older(a, xid)}
        live = {a.name: a for a in self.rows if a.attnum in certain and not a.dropped}
        found: list[int | None] = []
        for column in columns:
            same = live.get(column.name)
            fits = same is not None and (same.type_oid, same.typmod) == (column.type_oid, column.typmod)
            found.append(same.attnum if same is not None and fits else None)
        numbers = [n for n in found if n is not None]
        if numbers != sorted(numbers):
            return [None] * len(columns)  # columns stand in the order of their numbers: this is another table
        unsent = any(a.attnum not in numbers and not a.generated for a in live.values())
        return self._eliminated(found, certain, unsent=unsent)

    def _eliminated(self, found: list[int | None], certain: set[int], *, unsent: bool) -> list[int | None]:
        """Number the remaining columns, where as many lie between two known ones as there are possible numbers."""
        possible = [a.attnum for a in self.rows if a.attnum not in certain and not a.generated]
        dropped = {a.attnum for a in self.rows if a.dropped}
        done = list(found)
        low, at = 0, 0
        while at < len(done):
            number = done[at]
            if number is not None:
                low, at = number, at + 1
                continue
            end = next((i for i in range(at, len(done)) if done[i] is not None), len(done))
            high = done[end] if end < len(done) else None
            between = [n for n in possible if n > low and (high is None or n < high)]
            if high is None and not unsent and dropped.isdisjoint(between[: end - at]):
                # Columns that were added later have higher numbers than all that were there. Those that were dropped
                # may or may not have been there.
                between = between[: end - at]
            if len(between) == end - at:
                done[at:end] = between
            at = end
        return done

    def missing(self, attnum: int) -> Missing | None:
        """The value of the column in rows that are older than it; None if it is unknown."""
        row = next(a for a in self.rows if a.attnum == attnum)
        if row.has_missing:
            return Missing(row.missing)
        # A default that is not constant rewrites the table, and so does VACUUM FULL, which forgets the value.
        return Missing(None) if self.never_rewritten else self.known.get(attnum)

    def _is_older(self, attribute: Attribute, xid: int) -> bool:
        """Whether the row was written before transaction `xid`, or by it when it created the table."""
        if attribute.xmin < _FIRST_NORMAL:
            return True
        age = (xid - attribute.xmin) & 0xFFFFFFFF  # transaction numbers wrap around
        created = attribute.xmin == xid and all(a.xmin == xid and not a.dropped for a in self.rows)
        return created or 0 < age < 1 << 31


def attributes_of(rows: Sequence[Sequence[object]]) -> dict[int, Attributes]:
    """What `QUERY` found, by relation."""
    files: dict[int, int | None] = {}
    found: dict[int, list[Attribute]] = {}
    for number, file, *attribute in rows:
        relation_id = int(str(number))
        files[relation_id] = None if file is None else int(str(file))
        found.setdefault(relation_id, []).append(Attribute(*attribute))  # type: ignore[arg-type]
    return {each: Attributes(files[each] == each, files[each], tuple(rows)) for each, rows in found.items()}
