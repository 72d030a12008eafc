"""Compares what the publications publish with what the steps of a flow take.

`check_tables` runs at the start: a table that a step takes and that will never come is an error. `remarks` tells a
person beforehand what may surprise.
https://www.postgresql.org/docs/current/sql-createpublication.html
"""

from __future__ import annotations

import difflib
import fnmatch
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from pgoutput_source.changes.schema import MetadataNames, TableName
from pgoutput_source.errors import PublicationError
from pgoutput_source.postgres.connection import Connection
from pgoutput_source.postgres.publications import text_columns
from pgoutput_source.postgres.remedies import quote_name
from pgoutput_source.settings import SourceSettings

logger = logging.getLogger(__name__)

Name = tuple[str, str]
"""Schema and table."""

_NEVER: Final = {
    "v": "is a view",
    "m": "is a materialized view",
    "f": "is a foreign table",
    "S": "is a sequence",
    "i": "is an index",
    "u": "is an unlogged table",
    "t": "is a temporary table",
}
"""Relations without logical replication, by `relkind` or `relpersistence`."""

_SHOWN: Final = 5  # names in one text


@dataclass(frozen=True, slots=True)
class Publication:
    """A publication, without its list of tables.

    Attributes:
        name: Its name.
        all_tables: Whether it publishes every table of the database, including future ones.
        schemas: The schemas of which it publishes every table, including future ones.
        kinds: What it publishes: some of insert, update, delete, truncate.
        via_root: Whether changes of a partition come under the name of the partitioned table.
    """

    name: str
    all_tables: bool
    schemas: tuple[str, ...]
    kinds: tuple[str, ...]
    via_root: bool

    @property
    def withheld(self) -> tuple[str, ...]:
        """The kinds of changes that it does not publish."""
        return tuple(kind for kind in ("insert", "update", "delete", "truncate") if kind not in self.kinds)

    def grows_to(self, table: Name) -> bool:
        """Whether it would publish a table of this name as soon as one exists."""
        return self.all_tables or table[0] in self.schemas


@dataclass(frozen=True, slots=True)
class Remark:
    """Something that works, but perhaps not as expected. `hint` says what to do then."""

    text: str
    hint: str


class Published:
    """What some publications publish now.

    Attributes:
        publications: The publications that exist.
        tables: The names under which changes come, each with the publications that publish them.
    """

    def __init__(self, conn: Connection, names: Sequence[str]) -> None:
        schemas = "ARRAY(SELECT nspname::text FROM pg_publication_namespace JOIN pg_namespace n ON n.oid = pnnspid"
        schemas = f"{schemas} WHERE pnpubid = p.oid)" if conn.info.server_version >= 150_000 else "'{}'::text[]"
        rows = conn.execute(
            f"SELECT pubname::text, puballtables, {schemas}, array_remove(ARRAY[CASE WHEN pubinsert THEN 'insert' END,"
            " CASE WHEN pubupdate THEN 'update' END, CASE WHEN pubdelete THEN 'delete' END,"
            " CASE WHEN pubtruncate THEN 'truncate' END], NULL), pubviaroot"
            "  FROM pg_publication p WHERE pubname = ANY(%s) ORDER BY 1",
            [list(names)],
        ).fetchall()
        self.publications = [
            Publication(name, every, tuple(s), tuple(kinds), root) for name, every, s, kinds, root in rows
        ]
        self.tables: dict[Name, list[Publication]] = {}
        by_name = {each.name: each for each in self.publications}
        for schema, table, publication in conn.execute(
            "SELECT schemaname::text, tablename::text, pubname::text FROM pg_publication_tables"
            " WHERE pubname = ANY(%s) ORDER BY 1, 2, 3",
            [list(names)],
        ):
            self.tables.setdefault((schema, table), []).append(by_name[publication])

    @property
    def named(self) -> str:
        """The publications, for a message."""
        return f"publication{'s'[: len(self.publications) > 1]} {', '.join(repr(p.name) for p in self.publications)}"


def check_tables(
    conn: Connection,
    settings: SourceSettings,
    wanted: Iterable[Name],
    once: Iterable[Name] = (),
    patterns: Iterable[str] = (),
) -> None:
    """Check that the tables that steps take will come.

    A missing table is only a warning in two cases: a publication will include it as soon as it is created (FOR ALL
    TABLES, FOR TABLES IN SCHEMA), or this flow received it before, and the slot may still hold changes of it. A
    pattern without a table is a warning: it may be meant for tables to come.

    Args:
        conn: An ordinary connection.
        settings: Names the publications.
        wanted: The tables.
        once: The tables that were published at an earlier start of the flow.
        patterns: Patterns of tables that steps take.

    Raises:
        PublicationError: Some tables will never come. The hint has the nearest name, or what to do.
    """
    wanted, once, patterns = sorted(set(wanted)), set(once), sorted(set(patterns))
    if not wanted and not patterns:
        return
    published = Published(conn, settings.publication)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(str(TableName(*table)), pattern) for table in published.tables):
            there = f"it has {_some_of(list(map(_text, published.tables)))}" if published.tables else "it has none"
            logger.warning("no table of %s matches %r, which a step takes; %s", published.named, pattern, there)
    missing: list[Remark] = []
    never = False
    for table in wanted:
        if table in published.tables:
            withheld = set.intersection(*(set(p.withheld) for p in published.tables[table]))
            if withheld:
                logger.warning(
                    "%s: no %s of it will come, because %s publishes none",
                    _text(table),
                    " and no ".join(kind for kind in ("insert", "update", "delete", "truncate") if kind in withheld),
                    published.named,
                )
            continue
        remark, may_come = _missing(conn, published, table)
        missing.append(remark)
        never = never or not (may_come or table in once)
    if never:
        raise PublicationError(
            "; ".join(each.text for each in missing), hint="\n  ".join(each.hint for each in missing)
        )
    for remark in missing:
        logger.warning("%s: %s", remark.text, remark.hint)


def _missing(conn: Connection, published: Published, table: Name) -> tuple[Remark, bool]:
    """Why a table is not published, and whether it may still come."""
    name, where = _text(table), published.named
    row = conn.execute(
        "SELECT c.relkind::text, c.relpersistence::text, c.oid::bigint FROM pg_class c"
        "  JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s",
        table,
    ).fetchone()
    if row is None:
        grows = any(p.grows_to(table) for p in published.publications)
        rather = _nearest(table, published.tables)
        if not grows:
            return Remark(f"there is no table {name}, and a step takes it", rather), False
        return Remark(f"there is no table {name} yet, and a step takes it", f"{where} will have it. {rather}"), True
    kind, persistence, oid = row
    never = _NEVER.get(kind) or _NEVER.get(persistence)
    if never:
        return Remark(f"{name} {never}: logical replication does not cover it", "take the table instead"), False
    family = conn.execute(
        "SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.oid IN (SELECT relid FROM pg_partition_tree(%s::bigint::oid)"
        "                 UNION ALL SELECT relid FROM pg_partition_ancestors(%s::bigint::oid) AS a (relid))"
        " ORDER BY 1, 2",
        [oid, oid],
    ).fetchall()
    instead = [(schema, each) for schema, each in family if (schema, each) in published.tables]
    if instead and kind == "p":
        return Remark(
            f"{name} is partitioned, and {where} has its changes under the names of its partitions: {_some(instead)}",
            f"{_via_root(published.publications)} gives them the name {name}, for changes from then on; or take the "
            "partitions",
        ), False
    if instead:
        return Remark(
            f"{name} is a partition, and {where} has its changes under the name {_some(instead)}",
            f"take {_some(instead)}; or, for changes from then on, ALTER PUBLICATION … SET "
            "(publish_via_partition_root = false)",
        ), False
    sql_name = ".".join(map(quote_name, table))
    add = [f"ALTER PUBLICATION {quote_name(p.name)} ADD TABLE {sql_name}" for p in published.publications]
    text = f"table {name} is not in {where}, and a step takes it"
    return Remark(text, f"{add[0] if add else 'CREATE PUBLICATION …'}; {_nearest(table, published.tables)}"), False


def remarks(conn: Connection, settings: SourceSettings) -> Iterator[Remark]:
    """What may surprise a reader of these publications, and what would stop a flow."""
    published = Published(conn, settings.publication)
    for p in published.publications:
        if p.withheld:
            yield Remark(
                f"publication {p.name!r} publishes {' and '.join(p.kinds) or 'nothing'} only: no "
                f"{' and no '.join(p.withheld)} will come",
                f"ALTER PUBLICATION {quote_name(p.name)} SET (publish = 'insert, update, delete, truncate')",
            )
    yield from _partitions(conn, published)
    yield from _columns(conn, settings)
    if settings.binary == "auto" and (columns := text_columns(conn, settings.publication, by_value=True)):
        yield Remark(
            f"binary='auto': all values of all tables come as text, because of {_some_of(columns)}",
            "leave these columns out of the publication with a column list (PostgreSQL 15), or move their tables to "
            "another publication with its own slot; the values are the same either way",
        )


def _partitions(conn: Connection, published: Published) -> Iterator[Remark]:
    rows = conn.execute(
        "SELECT rn.nspname::text, r.relname::text,"
        "       array_agg(ARRAY[n.nspname::text, c.relname::text] ORDER BY n.nspname, c.relname)"
        "  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        "  JOIN pg_class r ON r.oid = pg_partition_root(c.oid) AND r.oid <> c.oid"
        "  JOIN pg_namespace rn ON rn.oid = r.relnamespace"
        " WHERE c.relispartition GROUP BY 1, 2 ORDER BY 1, 2"
    ).fetchall()
    for schema, root, family in rows:
        leaves = [(each[0], each[1]) for each in family if (each[0], each[1]) in published.tables]
        if leaves and (schema, root) not in published.tables:
            owners = [p for p in published.publications if any(p in published.tables[leaf] for leaf in leaves)]
            yield Remark(
                f"{_text((schema, root))} is partitioned, and its changes come under the names of its partitions: "
                f"{_some(leaves)}",
                f"{_via_root(owners)} makes them come under the name of the partitioned table",
            )


def _columns(conn: Connection, settings: SourceSettings) -> Iterator[Remark]:
    metadata = MetadataNames.with_prefix(settings.metadata_prefix)
    # Column lists exist from PostgreSQL 15 on. As a key of the row's JSON, attnames may be absent.
    rows = conn.execute(
        """
        SELECT p.schemaname::text, p.tablename::text, array_remove(array_agg(DISTINCT a.attname::text), NULL)
          FROM pg_publication_tables AS p
          JOIN pg_namespace AS n ON n.nspname = p.schemaname
          JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = p.tablename
          LEFT JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
               AND coalesce((to_jsonb(p) -> 'attnames') ? a.attname, a.attgenerated = '')
         WHERE p.pubname = ANY(%s) GROUP BY 1, 2 ORDER BY 1, 2
        """,
        [list(settings.publication)],
    ).fetchall()
    for schema, table, columns in rows:
        name = _text((schema, table))
        if clash := [column for column in metadata if column in columns]:
            yield Remark(
                f"table {name} has columns with the names of metadata columns: {', '.join(clash)}. A flow stops at the "
                "first change of it",
                metadata.remedy,
            )
        if not columns:
            yield Remark(f"table {name} has no published columns: its changes have no values", "leave it out")


def _nearest(table: Name, others: Iterable[Name]) -> str:
    others = list(others)
    if not others:
        return "the publications have no tables yet"
    by_text = {_text(other).lower(): other for other in others}
    by_text |= {other[1].lower(): other for other in others if [each[1] for each in others].count(other[1]) == 1}
    for text in (_text(table), table[1]):
        if near := difflib.get_close_matches(text.lower(), by_text, 1, 0.75):
            return f"did you mean {_text(by_text[near[0]])}?"
    return f"the published tables are {_some(others)}"


def _via_root(publications: Sequence[Publication]) -> str:
    return "; ".join(
        f"ALTER PUBLICATION {quote_name(p.name)} SET (publish_via_partition_root = true)" for p in publications
    )


def _text(table: Name) -> str:
    return ".".join(table)


def _some(tables: Sequence[Name]) -> str:
    return _some_of([_text(table) for table in tables])


def _some_of(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
