"""Tables of a publication in a DuckDB file: all tables of a commit in one transaction.

    pgoutput.published    a row for each table: how far it is, whose it is, and the columns that it was made from

Rows go from Arrow to DuckDB as they are. The tables have no keys and no indexes: net effects touch each key once, an
insert into a table with a key takes several times as long, and a key's type can't be altered.
https://duckdb.org/docs/stable/guides/performance/indexing
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.changes.schema import MetadataNames, missing_of
from pgoutput_source.compute.keys import KeyColumns
from pgoutput_source.compute.metadata import own_columns
from pgoutput_source.compute.net_effect import Standing
from pgoutput_source.compute.net_rows import net_rows
from pgoutput_source.destinations.alterations import StoredColumn, alterations, aside
from pgoutput_source.destinations.base import Destination, Job, Mode, Reached, Refused
from pgoutput_source.destinations.duckdb_file import DuckDBFile
from pgoutput_source.destinations.duckdb_types import METADATA, TEXTS, held, literal, quoted, type_for
from pgoutput_source.destinations.old_rows import old_rows
from pgoutput_source.destinations.targets import Target
from pgoutput_source.errors import SinkError
from pgoutput_source.files import local_path
from pgoutput_source.types import type_of
from pgoutput_source.types.keys import cells_tell
from pgoutput_source.types.written import written

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_CREATE: Final = """
CREATE SCHEMA IF NOT EXISTS {0}.pgoutput;
CREATE TABLE IF NOT EXISTS {0}.pgoutput.published (
    namespace VARCHAR NOT NULL, name VARCHAR NOT NULL, number BIGINT NOT NULL, commit_lsn UBIGINT NOT NULL,
    seq UBIGINT NOT NULL, system VARCHAR NOT NULL, database VARCHAR NOT NULL, slot VARCHAR NOT NULL,
    mode VARCHAR NOT NULL, relation BIGINT NOT NULL, key VARCHAR[] NOT NULL, columns JSON NOT NULL);
"""
_ROW, _AT = quoted("pgoutput row"), quoted("pgoutput at")
# Names of Arrow tables and temporary tables, which live outside of the file.
_ROWS, _KEYS, _FOUND, _FILLED, _VALUE = (f'"pgoutput {name}"' for name in ("rows", "keys", "found", "filled", "value"))


class _Known(NamedTuple):
    """A table as `published` has it."""

    number: int
    relation: int
    key: tuple[str, ...]
    columns: tuple[StoredColumn, ...]


class DuckDBDestination(Destination):
    """Tables in a DuckDB file; see `DuckDBSink`."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mode: Mode,
        publish_copy: str | os.PathLike[str] | None = None,
        patience: timedelta = timedelta(seconds=30),
    ) -> None:
        self.file, self.mode = DuckDBFile(path, patience), mode
        self.publish_copy = None if publish_copy is None else local_path(publish_copy).absolute()
        self._standing: dict[Target, Standing | None] = {}

    def __repr__(self) -> str:
        return "DuckDB"

    def reached(self, target: Target) -> Reached | None:
        """How far a table is."""
        with self.file.opened() as connection, _transaction(connection):  # one snapshot: `apply` may go on meanwhile
            if not _names_in(connection, Target("pgoutput", "published")):
                row = None
            else:
                row = _row(
                    connection,
                    "SELECT number, commit_lsn, seq, system, database, slot, mode"
                    f" FROM {_published(connection)} WHERE (namespace, name) = (?, ?)",
                    target,
                )
            if row is None:
                if _names_in(connection, target):
                    raise Refused.at(
                        target,
                        f"{target} is in {self.file} already, and was not made by this package",
                        hint="drop or rename it, or choose another target",
                    )
                return None
        number, lsn, seq, system, database, slot, mode = row
        if mode != self.mode:
            raise SinkError(
                f"{target} in {self.file} holds a {mode}, and this is mode {self.mode!r}",
                hint="choose another target or file, or drop it",
            )
        return Reached(number, (lsn, seq), (system, database, slot))

    def apply(self, jobs: Iterable[Job]) -> None:
        """All jobs in one transaction."""
        self._standing = {}
        with self.file.opened() as connection:
            with _transaction(connection):
                connection.execute(_CREATE.format(_file(connection)))
                for job in jobs:
                    with self.file.refusing(job.target):
                        self._apply(connection, job)
            if self.publish_copy is not None:
                self.file.copy_to(self.publish_copy, connection)

    def _apply(self, connection: DuckDBPyConnection, job: Job) -> None:
        metadata = job.changes.schema.metadata or {}
        relation = int(metadata.get(b"pg.relation_id", b"0"))
        known = _known(connection, job.target)
        if known is not None:
            done, changes = job.split(known.number)
            self._passed(job, done)
            if known.number >= job.number:
                return
            job = job._replace(changes=changes, parts=())
        table = _Table(connection, job, self.mode)
        if known is None:
            table.create()
        else:
            table.evolve(known, recreated=relation != known.relation)
        if self.mode == "history":
            table.append()
        else:
            self._standing[job.target] = table.merge(self._standing.get(job.target))
        columns, published = json.dumps(table.columns), _published(connection)
        connection.execute(f"DELETE FROM {published} WHERE (namespace, name) = (?, ?)", job.target)
        connection.execute(
            f"INSERT INTO {published} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*job.target, job.number, *job.last, *job.origin, self.mode, relation, list(job.key), columns),
        )

    def _passed(self, job: Job, done: pa.Table) -> None:
        """Note what the last transaction of changes that are there already has left, as it may go on."""
        if self.mode == "mirror" and job.identity == "f" and len(done):
            data, standing = done.combine_chunks().to_batches()[0], self._standing.get(job.target)
            self._standing[job.target] = net_rows(data, job.key, whole=True, standing=standing)[1]


class _Table:
    """One table, and the job that it is to take, within a transaction."""

    def __init__(self, connection: DuckDBPyConnection, job: Job, mode: Mode) -> None:
        self.connection, self.job, self.mode = connection, job, mode
        self.schema = job.changes.schema
        self.metadata = MetadataNames.of(self.schema)
        self.own = own_columns(self.schema)
        self.columns = [StoredColumn.of(f, type_for(f.type)) for f in map(self.schema.field, self.own)]
        self.file = _file(connection)
        self.name = f"{self.file}.{quoted(_schema(job.target))}.{quoted(job.target.name)}"
        names = self.metadata
        kept = names if mode == "history" else (names.commit_lsn, names.unchanged, names.raw)
        self.ours = {name: kind for name, kind in zip(names, METADATA, strict=True) if name in kept}
        self._check_names()

    def _check_names(self) -> None:
        seen: dict[str, str] = {}
        for name in (*self.own, *self.ours):
            other = seen.setdefault(name.casefold(), name)
            if other != name:
                raise Refused.at(
                    self.job.target,
                    f"columns {other!r} and {name!r} of {self.job.target} have one name in DuckDB, which does not tell "
                    "upper and lower case apart",
                    hint="rename one of them, give metadata columns another metadata_prefix, or leave the table out "
                    "with exclude=",
                )

    def run(self, statement: str, *values: object) -> None:
        self.connection.execute(statement, values or None)

    def create(self) -> None:
        """Create it with the types of the job."""
        parts = [f"{quoted(c.name)} {c.type}" for c in self.columns]
        parts += [f"{quoted(name)} {kind}" for name, kind in self.ours.items()]
        self.run(f"CREATE SCHEMA IF NOT EXISTS {self.file}.{quoted(_schema(self.job.target))}")
        self.run(f"CREATE TABLE {self.name} ({', '.join(parts)})")

    # -- a table that changes its shape -----------------------------------------------------------------------------

    def evolve(self, known: _Known, *, recreated: bool) -> None:
        """Alter it into the version of the job; what it has of columns that are gone stays."""
        if recreated and self.mode == "mirror":
            self.run(f"DELETE FROM {self.name}")
        there = _names_in(self.connection, self.job.target)
        if missing := set(self.ours) - set(there):
            raise Refused.at(
                self.job.target,
                f"{self.job.target} has no column {min(missing)!r} in DuckDB",
                hint="keep metadata_prefix as it was, or drop the table and copy it again",
            )
        if tuple(self.columns) == known.columns:
            return
        names = [name for name in there if name not in self.ours]
        renamed, retyped, added = alterations(known.columns, self.columns, names, recreated=recreated, folded=True)
        for before in renamed:
            self._rename(before, f"pgoutput {before}")
        for before, name in renamed.items():
            self._rename(f"pgoutput {before}", name)
        for old, new in retyped:
            self._retype(old, new)
        for column in added:
            self._add(column, known=True)

    def _rename(self, name: str, to: str) -> None:
        """Rename a column, also where rows name it."""
        self.run(f"ALTER TABLE {self.name} RENAME {quoted(name)} TO {quoted(to)}")
        unchanged, raw, before = (quoted(n) for n in (self.metadata.unchanged, self.metadata.raw, self.metadata.before))
        self.run(
            f"UPDATE {self.name} SET {unchanged} = list_transform({unchanged},"
            f" lambda x: if(x = {literal(name)}, {literal(to)}, x)) WHERE list_contains({unchanged}, {literal(name)})"
        )
        maps = [(raw, name, to)]
        if self.mode == "history":
            maps += [(raw, self.metadata.old + name, self.metadata.old + to), (before, name, to)]
        for column, old, new in maps:
            self.run(
                f"UPDATE {self.name} SET {column} = map_from_entries(list_transform(map_entries({column}), lambda x:"
                f" {{'key': if(x.key = {literal(old)}, {literal(new)}, x.key), 'value': x.value}}))"
                f" WHERE list_contains(map_keys({column}), {literal(old)})"
            )

    def _add(self, column: StoredColumn, *, known: bool) -> None:
        """Add a column; `known` says that older rows hold what the source says they do, if it says so."""
        name, field = quoted(column.name), self.schema.field(column.name)
        self.run(f"ALTER TABLE {self.name} ADD COLUMN {name} {column.type}")
        if self.mode == "history":
            return
        missing = missing_of(field) if known else None
        value = None if missing is None else _value(missing.text, field)
        if value is None:
            self._unknown(column.name)
        elif value.null_count == 0:
            self.connection.register(_bare(_VALUE), pa.table({"value": value}))
            self.run(f"UPDATE {self.name} SET {name} = (SELECT value FROM {_VALUE})")
            self.connection.unregister(_bare(_VALUE))
        elif missing is not None and missing.text is not None:
            raw = quoted(self.metadata.raw)
            entry = f"MAP {{{literal(column.name)}: {literal(missing.text)}}}"
            self.run(f"UPDATE {self.name} SET {raw} = map_concat({raw}, {entry})")

    def _retype(self, old: StoredColumn, new: StoredColumn) -> None:
        """Give a column another type, and cast its values; if one is lost by that, all of them move aside."""
        name = quoted(new.name)
        if old.type != new.type:
            if new.type == "VARCHAR":
                self._as_text(new, old)
            elif self._casts(name, old, new):
                self.run(f"ALTER TABLE {self.name} ALTER {name} TYPE {new.type}")
            elif self.mode == "mirror" and new.name in self.job.key:
                raise Refused.at(
                    self.job.target,
                    f"{self.job.target}: the key {new.name!r} became {new.source}, and not all values of {old.source} "
                    "can be cast",
                    hint="drop the table and its row in pgoutput.published, and copy it again",
                )
            else:
                taken = {n.casefold() for n in _names_in(self.connection, self.job.target)}
                self._rename(new.name, aside(new.name, taken, folded=True))
                self._add(new, known=False)
                return
        self._unknown(new.name)

    def _casts(self, name: str, old: StoredColumn, new: StoredColumn) -> bool:
        """Whether each value has one of the new type, and is what that one was before."""
        back = f"TRY_CAST({name} AS {new.type})"
        lost = f"{back} IS NULL" if old.type == "VARCHAR" else f"TRY_CAST({back} AS {old.type}) IS DISTINCT FROM {name}"
        row = _row(self.connection, f"SELECT count(*) FROM {self.name} WHERE {name} IS NOT NULL AND {lost}")
        return row == (0,)

    def _as_text(self, column: StoredColumn, old: StoredColumn) -> None:
        """Turn values into PostgreSQL's texts: DuckDB writes some of them in other words."""
        name, text = quoted(column.name), quoted(f"pgoutput {column.name}")
        values = _arrow(self.connection, f"SELECT rowid AS {_ROW}, {name} AS value FROM {self.name}")
        texts = [written(chunk, old.source.split(" (")[0]) for chunk in values.column("value").chunks]
        self.run(f"ALTER TABLE {self.name} ADD COLUMN {text} VARCHAR")
        rows = pa.table({"pgoutput row": values.column(0), "value": pa.chunked_array(texts, pa.large_utf8())})
        self.connection.register(_bare(_VALUE), rows)
        self.run(f"UPDATE {self.name} AS t SET {text} = v.value FROM {_VALUE} AS v WHERE t.rowid = v.{_ROW}")
        self.connection.unregister(_bare(_VALUE))
        self.run(f"ALTER TABLE {self.name} DROP COLUMN {name}")
        self.run(f"ALTER TABLE {self.name} RENAME {text} TO {name}")

    def _unknown(self, name: str) -> None:
        """Older rows may hold anything in this column: PostgreSQL did not send them again."""
        if self.mode == "mirror" and name not in self.job.key:
            unchanged = quoted(self.metadata.unchanged)
            self.run(
                f"UPDATE {self.name} SET {unchanged} = list_append(coalesce({unchanged}, []), {literal(name)})"
                f" WHERE NOT list_contains(coalesce({unchanged}, []), {literal(name)})"
            )

    # -- rows -------------------------------------------------------------------------------------------------------

    def append(self) -> None:
        """Every change is a row."""
        at = self.schema.get_field_index(self.metadata.before)
        batches = []
        for batch in self.job.changes.to_batches():
            olds = old_rows(batch)
            batches.append(held(batch).set_column(at, pa.field(self.metadata.before, olds.type), olds))
        if batches:
            self._insert(pa.Table.from_batches(batches))

    def merge(self, standing: Standing | None) -> Standing | None:
        """Put the rows that the changes leave, and remove the others."""
        data = self.job.changes.combine_chunks().to_batches()
        if not data:
            return None
        key, names = self.job.key, self.metadata
        net, standing = net_rows(data[0], key, whole=self.job.identity == "f", standing=standing)
        puts = pa.Table.from_batches([held(net.puts)]).select([*self.own, *self.ours])
        filled = False
        if net.emptied:
            self.run(f"DELETE FROM {self.name}")
        else:
            came_from = np.flatnonzero(np.any([column.is_valid() for column in net.sources.columns], axis=0))
            if filled := len(came_from) > 0:
                self._find(net.sources.take(pa.array(came_from)), came_from)
                self._fill(puts)
            keys = pa.Table.from_batches([net.gone, net.puts.select([*key, names.raw]).cast(net.gone.schema)])
            for batch in keys.combine_chunks().to_batches():
                self._find(batch, np.arange(len(batch)))
                self.run(f"DELETE FROM {self.name} WHERE rowid IN (SELECT {_ROW} FROM {_FOUND})")
        if filled:
            listed = ", ".join(map(quoted, [*self.own, *self.ours]))
            self.run(f"INSERT INTO {self.name} ({listed}) SELECT {listed} FROM {_FILLED}")
        else:
            self._insert(puts)
        return standing

    def _insert(self, rows: pa.Table) -> None:
        listed = ", ".join(map(quoted, [*self.own, *self.ours]))
        self.connection.register(_bare(_ROWS), rows)
        self.run(f"INSERT INTO {self.name} ({listed}) SELECT {listed} FROM {_ROWS}")
        self.connection.unregister(_bare(_ROWS))

    def _find(self, keys: pa.RecordBatch, at: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        """Make a table of the rows that have these keys: `row`, and the number in `at` that its key has."""
        key = self.job.key
        numbered = pa.table([*(keys.column(name) for name in key), pa.array(at)], [*key, _bare(_AT)])
        if all(cells_tell(self.schema.field(n)) and not keys.column(n).null_count for n in key):
            same = " AND ".join(f"t.{quoted(name)} = k.{quoted(name)}" for name in key)
            found = f"SELECT t.rowid AS {_ROW}, k.{_AT} FROM {_KEYS} AS k JOIN {self.name} AS t ON {same}"
        else:
            numbered = self._compared(keys, at)
            found = f"SELECT * FROM {_KEYS}"
        self.connection.register(_bare(_KEYS), numbered)
        self.run(f"CREATE OR REPLACE TEMP TABLE {_FOUND} AS {found}")
        self.connection.unregister(_bare(_KEYS))

    def _compared(self, keys: pa.RecordBatch, at: np.ndarray[Any, np.dtype[np.int64]]) -> pa.Table:
        """The same for keys whose cells don't tell: 1.0 and 1.00 are one numeric, a misfit is only in `_raw`."""
        key, raw = self.job.key, self.metadata.raw
        listed = ", ".join(map(quoted, [*key, raw]))
        there = _arrow(self.connection, f"SELECT rowid AS {_ROW}, {listed} FROM {self.name}").combine_chunks()
        if not len(there) or not len(keys):
            return pa.table({_bare(_ROW): pa.array([], pa.int64()), _bare(_AT): pa.array([], pa.int64())})
        rows = there.to_batches()[0]
        cells = {name: rows.column(name).cast(keys.schema.field(name).type) for name in key}
        known = KeyColumns.of(cells, keys.schema, rows.column(raw).cast(keys.schema.field(raw).type))
        asked = KeyColumns.of({name: keys.column(name) for name in key}, keys.schema, keys.column(raw))
        codes, _ = known.followed_by(asked).encode()
        have = pa.table({_bare(_ROW): rows.column(0), "code": pa.array(codes[: len(rows)])})
        want = pa.table({_bare(_AT): pa.array(at), "code": pa.array(codes[len(rows) :])})
        return have.join(want, "code", join_type="inner").select([_bare(_ROW), _bare(_AT)])

    def _fill(self, puts: pa.Table) -> None:
        """Take from the rows that were found what PostgreSQL did not send, and what they don't know either."""
        names = self.metadata
        unsent = set(pc.unique(pc.list_flatten(puts.column(names.unchanged))).to_pylist())
        unchanged, raw = quoted(names.unchanged), quoted(names.raw)
        parts = []
        for name in self.own:
            put, old = f"p.{quoted(name)}", f"t.{quoted(name)}"
            if name in unsent:
                put = f"if(f.{_ROW} IS NOT NULL AND list_contains(p.{unchanged}, {literal(name)}), {old}, {put})"
            parts.append(f"{put} AS {quoted(name)}")
        parts.append(f"p.{quoted(names.commit_lsn)}")
        parts.append(
            f"if(f.{_ROW} IS NULL, p.{unchanged}, nullif(list_filter(p.{unchanged},"
            f" lambda x: list_contains(coalesce(t.{unchanged}, []), x)), [])) AS {unchanged}"
        )
        own = f"list_filter(coalesce(map_entries(p.{raw}), []), lambda x: NOT list_contains(p.{unchanged}, x.key))"
        old = f"list_filter(coalesce(map_entries(t.{raw}), []), lambda x: list_contains(p.{unchanged}, x.key))"
        entries = f"list_concat({own}, {old})"
        parts.append(
            f"if(p.{unchanged} IS NULL, p.{raw}, if(len({entries}) = 0, NULL, map_from_entries({entries})))::{TEXTS}"
            f" AS {raw}"
        )
        numbered = puts.append_column(_bare(_AT), pa.array(np.arange(len(puts))))
        self.connection.register(_bare(_ROWS), numbered)
        self.run(
            f"CREATE OR REPLACE TEMP TABLE {_FILLED} AS SELECT {', '.join(parts)} FROM {_ROWS} AS p"
            f" LEFT JOIN {_FOUND} AS f ON f.{_AT} = p.{_AT} LEFT JOIN {self.name} AS t ON t.rowid = f.{_ROW}"
        )
        self.connection.unregister(_bare(_ROWS))


# -- a table of the file ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _transaction(connection: DuckDBPyConnection) -> Iterator[None]:
    connection.execute("BEGIN")
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # DuckDB rolls back by itself after some errors; ours is the first
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _row(connection: DuckDBPyConnection, query: str, values: Sequence[object] = ()) -> tuple[Any, ...] | None:
    rows = connection.execute(query, list(values)).fetchall()
    return rows[0] if rows else None


def _arrow(connection: DuckDBPyConnection, query: str) -> pa.Table:
    found = connection.sql(query).to_arrow_table()
    assert isinstance(found, pa.Table)
    return found


def _known(connection: DuckDBPyConnection, target: Target) -> _Known | None:
    row = _row(
        connection,
        f"SELECT number, relation, key, columns FROM {_published(connection)} WHERE (namespace, name) = (?, ?)",
        target,
    )
    if row is None:
        return None
    number, relation, key, columns = row
    return _Known(number, relation, tuple(key), tuple(StoredColumn(*column) for column in json.loads(columns)))


def _names_in(connection: DuckDBPyConnection, target: Target) -> list[str]:
    """The columns of a table; none if it is not there."""
    rows = connection.execute(
        "SELECT column_name FROM duckdb_columns() WHERE lower(schema_name) = lower(?) AND lower(table_name) = lower(?)"
        " AND database_name = current_database() ORDER BY column_index",
        [_schema(target), target.name],
    ).fetchall()
    return [name for (name,) in rows]


def _value(text: str | None, field: pa.Field) -> pa.Array | None:
    """The value with this text, as the one of an array; None if its type is not known here."""
    if text is None:
        return pa.nulls(1, field.type)
    metadata: Mapping[bytes, bytes] = field.metadata or {}
    row = type_of(int(metadata.get(b"pg.oid", b"0")))
    if row.arrow(int(metadata.get(b"pg.typmod", b"-1"))) != field.type:
        return None
    return row.decode(pa.array([text.encode()], pa.binary()), field.type)


def _schema(target: Target) -> str:
    return target.namespace or "main"


def _file(connection: DuckDBPyConnection) -> str:
    """What statements call the file. Without it, ``shop.orders`` in ``shop.duckdb`` may mean two things."""
    row = _row(connection, "SELECT current_database()")
    assert row is not None
    return quoted(row[0])


def _published(connection: DuckDBPyConnection) -> str:
    return f"{_file(connection)}.pgoutput.published"


def _bare(quoted_name: str) -> str:
    return quoted_name[1:-1]
