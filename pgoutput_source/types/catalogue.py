"""Types that a database defines: rows made from what its catalogue says.

Enums, domains, composites, ranges, their arrays and the types of extensions have OIDs of their own in each database.
`FACTS` reads about some of them and about all the types they consist of; `from_catalogue` makes the rows.
Nothing here touches a server.

The catalogue may be newer than the WAL that a value comes from. Text is robust against that: a new label of an enum is
just another text. But the text of a composite does not name its attributes, and the stream does not announce that they
were altered. So values that are not newer than the last alteration are misfits, and never wrong.
A run reads the facts of a type once. If the attributes of a composite are altered during the run, its values are
misfits when the number of attributes changed. If as many were added as dropped, restart the run: the values would
otherwise arrive under the old names.

https://www.postgresql.org/docs/current/catalog-pg-type.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa

from pgoutput_source.types.arrays import array_of
from pgoutput_source.types.base import PgType, always, text
from pgoutput_source.types.composite import composite_of
from pgoutput_source.types.extensions import DEFINED, EXTENSIONS
from pgoutput_source.types.ranges import multirange_of, range_of
from pgoutput_source.types.text import AS_TEXT

# pg_range.rngmultitypid exists since PostgreSQL 14: as a key of the row's JSON it may be absent.
FACTS = """
WITH RECURSIVE ranges AS (
    SELECT rngtypid AS range, rngsubtype AS bound, (to_jsonb(r) ->> 'rngmultitypid')::oid AS multirange
    FROM pg_catalog.pg_range AS r
), needed AS (
    SELECT unnest(%(oids)s::oid[]) AS oid
    UNION
    SELECT part.oid
    FROM needed
    JOIN pg_catalog.pg_type AS t ON t.oid = needed.oid
    CROSS JOIN LATERAL (
        SELECT unnest(ARRAY[t.typbasetype, t.typelem])
        UNION SELECT bound FROM ranges WHERE range = t.oid
        UNION SELECT range FROM ranges WHERE multirange = t.oid
        UNION SELECT atttypid FROM pg_catalog.pg_attribute
              WHERE attrelid = t.typrelid AND t.typtype = 'c' AND attnum > 0 AND NOT attisdropped
    ) AS part (oid)
    WHERE part.oid <> 0
)
SELECT t.oid::bigint, pg_catalog.format_type(t.oid, NULL), t.typname::text, t.typtype::text,
       (SELECT extname::text FROM pg_catalog.pg_depend AS d JOIN pg_catalog.pg_extension AS e ON e.oid = d.refobjid
        WHERE d.classid = 'pg_catalog.pg_type'::regclass AND d.objid = t.oid AND d.deptype = 'e'
          AND d.refclassid = 'pg_catalog.pg_extension'::regclass LIMIT 1),
       t.typbasetype::bigint, t.typtypmod,
       (SELECT e.oid::bigint FROM pg_catalog.pg_type AS e WHERE e.oid = t.typelem AND e.typarray = t.oid),
       (SELECT e.typdelim::text FROM pg_catalog.pg_type AS e WHERE e.oid = t.typelem AND e.typarray = t.oid),
       (SELECT bound::bigint FROM ranges WHERE range = t.oid),
       (SELECT range::bigint FROM ranges WHERE multirange = t.oid),
       (SELECT json_agg(json_build_array(attname, atttypid::bigint, atttypmod) ORDER BY attnum)
        FROM pg_catalog.pg_attribute
        WHERE attrelid = t.typrelid AND t.typtype = 'c' AND attnum > 0 AND NOT attisdropped),
       (SELECT CASE WHEN bool_or(attisdropped) OR min(age(a.xmin)) <> max(age(a.xmin)) OR min(age(a.xmin)) < age(t.xmin)
                    THEN min(ARRAY[age(a.xmin), a.xmin::text::bigint]) FILTER (WHERE age(a.xmin) >= 0) END
        FROM pg_catalog.pg_attribute AS a WHERE attrelid = t.typrelid AND t.typtype = 'c' AND attnum > 0)
FROM needed JOIN pg_catalog.pg_type AS t USING (oid)
ORDER BY t.oid
"""
"""Reads the facts of the types `oids` and of all that they are made of, a row each: `TypeFacts(*row)`."""


@dataclass(frozen=True, slots=True)
class TypeFacts:
    """What the catalogue says about one type; the fields have the order of the columns of `FACTS`.

    `typtype` is PostgreSQL's letter: b base, c composite, d domain, e enum, m multirange, p pseudo, r range.
    `changed` is the age of the last transaction that altered the attributes, and its ID; None if none did.
    """

    oid: int
    name: str
    typname: str
    typtype: str
    extension: str | None = None
    base: int = 0
    typmod: int = -1
    element: int | None = None
    delimiter: str | None = None
    bound: int | None = None
    range: int | None = None
    attributes: Sequence[Sequence[Any]] | None = None
    changed: Sequence[int] | None = None


def from_catalogue(facts: Iterable[TypeFacts], known: Mapping[int, PgType]) -> dict[int, PgType]:
    """The rows of the types that `facts` describe and `known`, the type table, does not have."""
    defined = _Defined(facts, known)
    return {oid: replace(defined.row(oid), changed=defined.changed_by(oid)) for oid in defined.facts}


class _Defined:
    """The types that a database defines, each made once from its facts and the rows of its parts."""

    def __init__(self, facts: Iterable[TypeFacts], known: Mapping[int, PgType]) -> None:
        self.facts = {fact.oid: fact for fact in facts if fact.oid not in known}
        self._known = known
        self._rows: dict[int, PgType] = {}

    def row(self, oid: int) -> PgType:
        """A type's row, from the type table or made here. One that can't be resolved, or contains itself, is text."""
        if oid in self._known:
            return self._known[oid]
        if oid not in self._rows:
            fact = self.facts.get(oid)
            # A placeholder, in case the type contains itself.
            self._rows[oid] = PgType(oid, fact.name if fact else "unknown", always(pa.utf8()), text)
            if fact is not None:
                self._rows[oid] = self._made(fact, self._rows[oid])
        return self._rows[oid]

    def _made(self, fact: TypeFacts, as_text: PgType) -> PgType:
        if fact.name in DEFINED:
            return DEFINED[fact.name](fact.oid, fact.name)
        if fact.typtype in _KINDS:
            return _KINDS[fact.typtype](self, fact, as_text)
        if fact.element:
            return array_of(self.row(fact.element), fact.oid, fact.delimiter or ",")
        extension = EXTENSIONS.get((fact.extension, fact.typname)) if fact.extension else None
        return extension(fact.oid, fact.name) if extension else as_text

    def changed_by(self, oid: int) -> int:
        """The last transaction that altered a type or any of its parts; 0 if none did."""
        return min(self._changes(oid, frozenset()), default=(0, 0))[1]

    def _changes(self, oid: int, seen: frozenset[int]) -> Iterator[tuple[int, int]]:
        """The changes of a type and of its parts: how many transactions ago, and by which one."""
        fact = self.facts.get(oid)
        if fact is None or oid in seen:
            return
        if fact.changed:
            yield fact.changed[0], fact.changed[1]
        for part in (fact.base, fact.element, fact.bound, fact.range, *(a[1] for a in fact.attributes or ())):
            if part:
                yield from self._changes(part, seen | {oid})


def _domain(defined: _Defined, fact: TypeFacts, _: PgType) -> PgType:
    base = defined.row(fact.base)
    describe = base.metadata
    # A column of a domain has no typmod of its own.
    return replace(
        base,
        oid=fact.oid,
        name=fact.name,
        arrow=lambda _: base.arrow(fact.typmod),
        array=0,
        metadata=describe and (lambda _: describe(fact.typmod)),
    )


def _range(defined: _Defined, fact: TypeFacts, as_text: PgType) -> PgType:
    return range_of(defined.row(fact.bound), fact.oid, fact.name) if fact.bound else as_text


def _multirange(defined: _Defined, fact: TypeFacts, as_text: PgType) -> PgType:
    return multirange_of(defined.row(fact.range), fact.oid, fact.name) if fact.range else as_text


def _composite(defined: _Defined, fact: TypeFacts, as_text: PgType) -> PgType:
    if not fact.attributes:
        return as_text
    attributes = [(name, defined.row(oid), typmod) for name, oid, typmod in fact.attributes]
    return composite_of(attributes, fact.oid, fact.name, defined.row)


def _enum(defined: _Defined, fact: TypeFacts, as_text: PgType) -> PgType:
    return replace(as_text, binary=AS_TEXT)


_KINDS: Final[dict[str, Callable[[_Defined, TypeFacts, PgType], PgType]]] = {
    "c": _composite,
    "d": _domain,
    "e": _enum,
    "m": _multirange,
    "r": _range,
}
"""By PostgreSQL's letter (`TypeFacts.typtype`): makes the row of a type from its facts, or gives back that of text."""
