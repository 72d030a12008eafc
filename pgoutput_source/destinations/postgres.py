"""Tables of a publication in another PostgreSQL: every type, all tables of a commit in one transaction.

    pgoutput.published    a row for each table: how far it is, whose it is, and the columns that it was made from
    pgoutput.complete     a row for each slot: everything that committed before its LSN is here

Values travel as text, which the server's own input functions read, through COPY.
https://www.postgresql.org/docs/current/sql-copy.html
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final, NamedTuple

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from psycopg import sql

from pgoutput_source.changes.schema import MetadataNames, attnum_of, missing_of
from pgoutput_source.compute.metadata import own_columns
from pgoutput_source.compute.net_effect import Standing
from pgoutput_source.compute.net_rows import net_rows
from pgoutput_source.destinations.base import Destination, Job, Mode, Reached, Refused
from pgoutput_source.destinations.policies import SchemaPolicy
from pgoutput_source.destinations.targets import Target
from pgoutput_source.errors import ServerError, SinkError
from pgoutput_source.postgres.connection import Connection, connect
from pgoutput_source.postgres.refusals import explained, passing
from pgoutput_source.types.written import copy_text, written

logger = logging.getLogger(__name__)

_FIRST_OF_USERS: Final = 16384  # types with a smaller OID are the same in every database
_BY_ARROW: Final[tuple[tuple[Any, str], ...]] = (
    (pa.types.is_boolean, "boolean"),
    (pa.types.is_int16, "smallint"),
    (pa.types.is_int32, "integer"),
    (pa.types.is_int64, "bigint"),
    (pa.types.is_float32, "real"),
    (pa.types.is_float64, "double precision"),
    (pa.types.is_decimal, "numeric"),
    (pa.types.is_binary, "bytea"),
    (pa.types.is_date32, "date"),
    (pa.types.is_time64, "time"),
    (pa.types.is_timestamp, "timestamptz"),
)
"""Types for columns whose own type the destination does not have: a domain, an enum, an extension's."""

_NOWHERE: Final = 0
"""In `published`, the relation of a name that its table has no more."""

_OF_THE_STORE: Final = ("08", "25", "28", "3D", "58")
"""What no table can help: the connection, its rights, a database that is read-only, its disk.

https://www.postgresql.org/docs/current/errcodes-appendix.html
"""

_CREATE: Final = """
CREATE SCHEMA IF NOT EXISTS {schema};
CREATE TABLE IF NOT EXISTS {schema}.published (
    namespace text, name text, number bigint NOT NULL, commit_lsn pg_lsn NOT NULL, seq bigint NOT NULL,
    system text NOT NULL, database text NOT NULL, slot text NOT NULL, mode text NOT NULL, relation bigint NOT NULL,
    key text[] NOT NULL, columns jsonb NOT NULL, prefix text NOT NULL, PRIMARY KEY (namespace, name));
CREATE TABLE IF NOT EXISTS {schema}.complete (
    system text, database text, slot text, lsn pg_lsn NOT NULL, PRIMARY KEY (system, database, slot));
"""
_TYPES: Final = MetadataNames(
    op="text",
    commit_lsn="pg_lsn",
    seq="bigint",
    lsn="pg_lsn",
    xid="bigint",
    commit_ts="timestamptz",
    before="jsonb",
    unchanged="text[]",
    raw="jsonb",
)
"""The types of the metadata columns."""


class _Column(NamedTuple):
    """A column at the destination: its name, the number of the source's column that it holds, and its type."""

    name: str
    attnum: int | None
    type: str


class _Table(NamedTuple):
    """A table as `published` has it."""

    number: int
    relation: int
    key: tuple[str, ...]
    columns: tuple[_Column, ...]
    prefix: str  # of the metadata columns


class PostgresDestination(Destination):
    """Tables in a PostgreSQL database; see `PostgresSink`."""

    follows_renames = True

    def __init__(self, dsn: str, *, mode: Mode, schema: str = "pgoutput", policy: SchemaPolicy | None = None) -> None:
        self.dsn, self.mode, self.schema = dsn, mode, schema
        self.policy = policy or SchemaPolicy()
        self._connection: Connection | None = None
        self._asking: Connection | None = None
        self._asking_lock = threading.Lock()
        self._standing: dict[Target, Standing | None] = {}

    def __repr__(self) -> str:
        return "PostgreSQL"

    def close(self) -> None:
        """Close the connections."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        with self._asking_lock:
            if self._asking is not None:
                self._asking.close()
                self._asking = None

    def reached(self, target: Target) -> Reached | None:
        """How far a table is. Over a connection of its own, as the other one's thread may be busy."""
        with self._asking_lock:
            if self._asking is None or self._asking.closed:
                self._asking = connect(self.dsn)
                self._prepare(self._asking)
            try:
                return self._reached(self._asking, target)
            except ServerError:
                self._asking.close()
                raise

    def _reached(self, connection: Connection, target: Target) -> Reached | None:
        row = connection.execute(
            self._sql(
                "SELECT number, commit_lsn - '0/0'::pg_lsn, seq, system, database, slot, mode"
                " FROM {schema}.published WHERE (namespace, name) = (%s, %s)"
            ),
            target,
        ).fetchone()
        if row is None:
            exists = connection.execute(
                "SELECT FROM pg_class WHERE relname = %s AND relnamespace = to_regnamespace(quote_ident(%s))",
                (target.name, target.namespace),
            ).fetchone()
            if exists is not None:
                raise Refused.at(
                    target,
                    f"{target} is there already, and was not made by this package",
                    hint="drop or rename it, or choose another target",
                )
            return None
        number, lsn, seq, system, database, slot, mode = row
        if mode != self.mode:
            raise SinkError(
                f"{target} holds a {mode}, and this is mode {self.mode!r}", hint="choose another target, or drop it"
            )
        return Reached(number, (int(lsn), seq), (system, database, slot))

    def complete(self, origin: tuple[str, ...], lsn: int) -> None:
        """In a transaction of its own, after those that it speaks of."""
        self._connected().execute(
            self._sql(
                "INSERT INTO {schema}.complete VALUES (%s, %s, %s, '0/0'::pg_lsn + %s::numeric)"
                " ON CONFLICT (system, database, slot) DO UPDATE SET lsn = excluded.lsn"
            ),
            (*origin, lsn),
        )

    def completed(self) -> dict[str, int]:
        """By origin, as JSON of system, database and slot, what `complete` was told last; for any reader."""
        if self._connection is None or self._connection.closed:
            self._connection = connect(self.dsn)
        there = self._connection.execute("SELECT to_regclass(%s)", (f'"{self.schema}".complete',)).fetchone()
        if there is None or there[0] is None:
            return {}
        rows = self._connection.execute(
            self._sql("SELECT system, database, slot, lsn - '0/0'::pg_lsn FROM {schema}.complete")
        ).fetchall()
        return {json.dumps(origin): int(lsn) for *origin, lsn in rows}

    def apply(self, jobs: Iterable[Job]) -> None:
        """All jobs in one transaction."""
        self._standing = {}
        connection = self._connected()
        applied: list[Target] = []
        try:
            with explained(), connection.transaction():
                for job in jobs:
                    applied.append(job.target)
                    self._apply(connection, job)
        except ServerError as e:
            if passing(e):
                raise
            cause = e.__cause__.diag if isinstance(e.__cause__, psycopg.Error) else None
            named = Target(cause.schema_name or "", cause.table_name or "") if cause is not None else None
            if named in applied:  # a deferred constraint, at the commit
                raise _refused(named, e) from e
            raise SinkError(f"{self}: {e.message}", hint=e.hint) from e

    def _connected(self) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = connect(self.dsn)
            self._prepare(self._connection)
        return self._connection

    # -- one job ----------------------------------------------------------------------------------------------------

    def _apply(self, connection: Connection, job: Job) -> None:
        metadata = job.changes.schema.metadata or {}
        relation = int(metadata.get(b"pg.relation_id", b"0"))
        known = self._lock(connection, job.target)
        if known is not None:
            done, changes = job.split(known.number)
            self._passed(job, done)
            if known.number >= job.number:
                return
            job = job._replace(changes=changes, parts=())
        try:
            if self.mode == "mirror" and relation and (known is None or known.relation != relation):
                known = self._moved(connection, job, known, relation)
            columns = self._columns(connection, job.changes.schema)
            if known is None or known.relation == _NOWHERE:
                self._create(connection, job, columns)
            else:
                self._follow_prefix(connection, job, known.prefix)
                columns = self._evolve(connection, job, known, relation, columns)
            if self.mode == "history":
                self._append(connection, job)
            else:
                self._merge(connection, job)
        except ServerError as e:
            if passing(e) or (e.sqlstate or "08").startswith(_OF_THE_STORE):
                raise
            raise _refused(job.target, e) from e
        lsn, seq = job.last
        connection.execute(
            self._sql(
                "INSERT INTO {schema}.published VALUES"
                " (%s, %s, %s, '0/0'::pg_lsn + %s::numeric, %s, %s, %s, %s, %s, %s, %s, %s::jsonb, %s)"
                " ON CONFLICT (namespace, name) DO UPDATE SET number = excluded.number,"
                " commit_lsn = excluded.commit_lsn, seq = excluded.seq, relation = excluded.relation,"
                " key = excluded.key, columns = excluded.columns, prefix = excluded.prefix"
            ),
            (
                *(*job.target, job.number, lsn, seq, *job.origin, self.mode, relation, list(job.key)),
                *(json.dumps(columns), MetadataNames.of(job.changes.schema).prefix),
            ),
        )

    def _passed(self, job: Job, done: pa.Table) -> None:
        """Note what the last transaction of changes that are there already has left, as it may go on."""
        if self.mode == "mirror" and job.identity == "f" and len(done):
            data, standing = done.combine_chunks().to_batches()[0], self._standing.get(job.target)
            self._standing[job.target] = net_rows(data, job.key, whole=True, standing=standing)[1]

    def _prepare(self, connection: Connection) -> None:
        exists = connection.execute("SELECT to_regclass(%s)", (f'"{self.schema}".complete',)).fetchone()
        if exists is None or exists[0] is None:
            # Two sinks that begin at once would both create it.
            with connection.transaction():
                connection.execute("SELECT pg_advisory_xact_lock(hashtext('pgoutput_source'))")
                connection.execute(self._sql(_CREATE))

    def _lock(self, connection: Connection, target: Target) -> _Table | None:
        """What is known of the table. Its row stays locked, so that another publisher waits, and then sees ours."""
        row = connection.execute(
            self._sql(
                "SELECT number, relation, key, columns, prefix FROM {schema}.published"
                " WHERE (namespace, name) = (%s, %s) FOR UPDATE"
            ),
            target,
        ).fetchone()
        if row is None:
            return None
        number, relation, key, columns, prefix = row
        return _Table(number, relation, tuple(key), tuple(_Column(*column) for column in columns), prefix)

    def _columns(self, connection: Connection, schema: pa.Schema) -> list[_Column]:
        """The table's own columns with the types that the destination has for them."""
        own = [schema.field(name) for name in own_columns(schema)]
        if not own:
            return []
        facts = [(field.metadata or {}) for field in own]
        oids = [int(fact.get(b"pg.oid", b"0")) for fact in facts]
        names = [fact.get(b"pg.type", b"").decode() for fact in facts]
        typmods = [int(fact.get(b"pg.typmod", b"-1")) for fact in facts]
        rows = connection.execute(
            "SELECT format_type(CASE WHEN oid < %s THEN oid::oid ELSE to_regtype(name) END, typmod)"
            " FROM unnest(%s::bigint[], %s::text[], %s::int[]) WITH ORDINALITY AS u (oid, name, typmod, n) ORDER BY n",
            (_FIRST_OF_USERS, oids, names, typmods),
        ).fetchall()
        return [
            _Column(field.name, attnum_of(field), found if found not in (None, "???", "-") else _by_arrow(field.type))
            for field, (found,) in zip(own, rows, strict=True)
        ]

    def _create(self, connection: Connection, job: Job, columns: Sequence[_Column]) -> None:
        names = MetadataNames.of(job.changes.schema)
        ours = list(zip(names, _TYPES, strict=True))
        if self.mode == "mirror":
            ours = [(names.commit_lsn, _TYPES.commit_lsn), (names.unchanged, _TYPES.unchanged)]
        parts = [sql.SQL("{} {}").format(sql.Identifier(c.name), sql.SQL(c.type)) for c in columns]
        parts += [sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(kind)) for name, kind in ours]
        if job.key:
            parts.append(sql.SQL("PRIMARY KEY ({})").format(_names(job.key)))
        connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(job.target.namespace)))
        connection.execute(sql.SQL("CREATE TABLE {} ({})").format(_table(job.target), sql.SQL(", ").join(parts)))

    # -- a table that changes its name ------------------------------------------------------------------------------

    def _moved(self, connection: Connection, job: Job, known: _Table | None, relation: int) -> _Table | None:
        """What is known of the table after it has taken the rows along that it has under its earlier name.

        The earlier name's row in `published` stays, with its number: its parts may come again after a crash. What had
        the new name before is set aside, until its own changes say what it is called now.
        """
        row = connection.execute(
            self._sql(
                "SELECT namespace, name, number FROM {schema}.published WHERE relation = %s AND mode = %s"
                " AND (system, database, slot) = (%s, %s, %s) FOR UPDATE"
            ),
            (relation, self.mode, *job.origin),
        ).fetchone()
        if row is None:
            return known
        earlier, target = Target(row[0], row[1]), job.target
        self._say(job, f"was {earlier}", refused=self.policy.on_rename == "fail")
        number = 0
        if known is not None:
            number = known.number
            if known.relation != _NOWHERE:
                aside = Target(target.namespace, f"{target.name[:40]} (relation {known.relation})")
                self._give_name(connection, target, aside)
                self._copy_row(connection, target, aside, 0)
        self._give_name(connection, earlier, target)
        self._copy_row(connection, earlier, target, number)
        if row[2]:
            connection.execute(
                self._sql(
                    "UPDATE {schema}.published SET relation = %s, key = '{{}}', columns = '[]'"
                    " WHERE (namespace, name) = (%s, %s)"
                ),
                (_NOWHERE, *earlier),
            )
        else:  # it was set aside
            connection.execute(self._sql("DELETE FROM {schema}.published WHERE (namespace, name) = (%s, %s)"), earlier)
        self._standing[target] = self._standing.pop(earlier, None)
        return self._lock(connection, target)

    def _give_name(self, connection: Connection, target: Target, to: Target) -> None:
        moving = Target(target.namespace, "pgoutput moving")
        rename = sql.SQL("ALTER TABLE {} RENAME TO {}")
        connection.execute(rename.format(_table(target), sql.Identifier(moving.name)))
        if to.namespace != target.namespace:
            connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(to.namespace)))
            connection.execute(
                sql.SQL("ALTER TABLE {} SET SCHEMA {}").format(_table(moving), sql.Identifier(to.namespace))
            )
            moving = Target(to.namespace, moving.name)
        connection.execute(rename.format(_table(moving), sql.Identifier(to.name)))

    def _copy_row(self, connection: Connection, target: Target, to: Target, number: int) -> None:
        connection.execute(
            self._sql(
                "INSERT INTO {schema}.published SELECT %s, %s, %s, commit_lsn, seq, system, database, slot, mode,"
                " relation, key, columns, prefix FROM {schema}.published WHERE (namespace, name) = (%s, %s)"
                " ON CONFLICT (namespace, name) DO UPDATE SET relation = excluded.relation, key = excluded.key,"
                " columns = excluded.columns, prefix = excluded.prefix"
            ),
            (*to, number, *target),
        )

    # -- a table that changes its shape -----------------------------------------------------------------------------

    def _evolve(
        self, connection: Connection, job: Job, known: _Table, relation: int, columns: list[_Column]
    ) -> list[_Column]:
        """Alter the table into the version of the job, as the policy says."""
        policy = self.policy
        recreated = relation != known.relation
        if recreated:
            self._say(job, "was dropped and created again at the source", refused=policy.on_recreate == "fail")
            if self.mode == "mirror":
                connection.execute(sql.SQL("DELETE FROM {}").format(_table(job.target)))
        if tuple(columns) == known.columns and job.key == known.key:
            return columns
        alter = sql.SQL("ALTER TABLE {} ").format(_table(job.target))
        if known.key != job.key and known.key:
            connection.execute(
                alter + sql.SQL("DROP CONSTRAINT IF EXISTS {}").format(self._primary_key(connection, job.target))
            )
            for name in known.key:
                connection.execute(alter + sql.SQL("ALTER {} DROP NOT NULL").format(sql.Identifier(name)))
        stay = _staying(columns, known.columns, recreated=recreated)
        for name, before in list(stay.items()):
            if before.name != name:
                self._say(job, f"column {before.name} was renamed to {name}", refused=policy.on_rename == "fail")
                if policy.on_rename == "add" and name not in job.key:
                    del stay[name]
            if before.type != (after := next(c.type for c in columns if c.name == name)):
                what = f"column {name} was of type {before.type} and is of type {after}"
                self._say(job, what, refused=policy.on_retype == "fail")
        there = set(self._names_there(connection, job.target))
        for column in known.columns:
            if column not in stay.values():
                self._say(job, f"column {column.name} is gone", refused=policy.on_drop == "fail")
                if policy.on_drop == "drop":
                    connection.execute(alter + sql.SQL("DROP COLUMN {}").format(sql.Identifier(column.name)))
                    there.discard(column.name)
        renamed = {before.name: name for name, before in stay.items() if before.name != name}
        for name in sorted((there - {before.name for before in stay.values()}) & {c.name for c in columns}):
            renamed[name] = _aside(name, {*there, *(c.name for c in columns), *renamed.values()})
        for before_name in renamed:
            self._rename(connection, job, before_name, f"pgoutput {before_name}"[:60])
        for before_name, name in renamed.items():
            self._rename(connection, job, f"pgoutput {before_name}"[:60], name)
        there = {renamed.get(name, name) for name in there}
        for column in columns:
            if column.name not in stay:
                self._say(job, f"column {column.name} {column.type} is new", refused=policy.on_add == "fail")
                self._add(connection, job, column)
            elif stay[column.name].type != column.type:
                self._retype(connection, job, column, there)
        if known.key != job.key and job.key:
            connection.execute(alter + sql.SQL("ADD PRIMARY KEY ({})").format(_names(job.key)))
        return columns

    def _follow_prefix(self, connection: Connection, job: Job, prefix: str) -> None:
        """Rename the metadata columns, if their prefix is another one from now on."""
        before, names = MetadataNames.with_prefix(prefix), MetadataNames.of(job.changes.schema)
        if before == names:
            return
        ours = [(before.commit_lsn, names.commit_lsn), (before.unchanged, names.unchanged)]
        for old, new in ours if self.mode == "mirror" else zip(before, names, strict=True):
            connection.execute(
                sql.SQL("ALTER TABLE {} RENAME {} TO {}").format(
                    _table(job.target), sql.Identifier(old), sql.Identifier(new)
                )
            )

    def _say(self, job: Job, what: str, *, refused: bool) -> None:
        """Log a change of the table's shape, or refuse it."""
        if refused:
            raise Refused.at(
                job.target,
                f"{job.target}: {what}, and the policy is to fail",
                hint="choose another policy, or alter the destination's table and its row in the table published",
            )
        logger.info("%s: %s", job.target, what)

    def _names_there(self, connection: Connection, target: Target) -> list[str]:
        rows = connection.execute(
            "SELECT attname::text FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped",
            (_table(target).as_string(None),),
        ).fetchall()
        return [name for (name,) in rows]

    def _rename(self, connection: Connection, job: Job, name: str, to: str) -> None:
        """Rename a column, also where rows name it as unknown."""
        connection.execute(
            sql.SQL("ALTER TABLE {} RENAME {} TO {}").format(
                _table(job.target), sql.Identifier(name), sql.Identifier(to)
            )
        )
        if self.mode == "mirror":
            connection.execute(
                sql.SQL("UPDATE {0} SET {1} = array_replace({1}, {2}, {3}) WHERE {2} = ANY({1})").format(
                    _table(job.target), _unchanged(job), sql.Literal(name), sql.Literal(to)
                )
            )

    def _add(self, connection: Connection, job: Job, column: _Column, *, known: bool = True) -> None:
        """Add a column; `known` says that older rows hold what the source says they do, if it says so."""
        missing = missing_of(job.changes.schema.field(column.name)) if known else None
        add = sql.SQL("ALTER TABLE {} ADD COLUMN {} {}").format(
            _table(job.target), sql.Identifier(column.name), sql.SQL(column.type)
        )
        if missing is not None and missing.text is not None and self.mode == "mirror":
            add += sql.SQL(" DEFAULT {}").format(sql.Literal(missing.text))
        connection.execute(add)
        connection.execute(
            sql.SQL("ALTER TABLE {} ALTER {} DROP DEFAULT").format(_table(job.target), sql.Identifier(column.name))
        )
        if missing is None:
            self._unknown(connection, job, column.name)

    def _retype(self, connection: Connection, job: Job, column: _Column, there: Collection[str]) -> None:
        if self.policy.on_retype == "add" and column.name not in job.key:
            self._beside(connection, job, column, there)
            return
        name = sql.Identifier(column.name)
        change = sql.SQL("ALTER TABLE {} ALTER {} TYPE {} USING {}::text::{}").format(
            _table(job.target), name, sql.SQL(column.type), name, sql.SQL(column.type)
        )
        try:
            with connection.transaction():
                connection.execute(change)
        except ServerError as e:
            if getattr(e, "transient", False):
                raise
            self._beside(connection, job, column, there)
            return
        self._unknown(connection, job, column.name)

    def _beside(self, connection: Connection, job: Job, column: _Column, there: Collection[str]) -> None:
        """A column of the new type, and the old one with its values under another name."""
        self._rename(connection, job, column.name, _aside(column.name, there))
        self._add(connection, job, column, known=False)

    def _unknown(self, connection: Connection, job: Job, name: str) -> None:
        """Older rows may hold anything in this column: PostgreSQL did not send them again."""
        if self.mode == "mirror":
            connection.execute(
                sql.SQL("UPDATE {0} SET {1} = array_append(coalesce({1}, '{{}}'), {2})").format(
                    _table(job.target), _unchanged(job), sql.Literal(name)
                )
            )

    def _primary_key(self, connection: Connection, target: Target) -> sql.Identifier:
        row = connection.execute(
            "SELECT conname FROM pg_constraint WHERE contype = 'p' AND conrelid = %s::regclass",
            (_table(target).as_string(None),),
        ).fetchone()
        return sql.Identifier(row[0] if row else f"{target.name}_pkey")

    # -- rows -------------------------------------------------------------------------------------------------------

    def _append(self, connection: Connection, job: Job) -> None:
        own, names = own_columns(job.changes.schema), MetadataNames.of(job.changes.schema)
        columns = _names([*own, *names])
        for batch in job.changes.to_batches():
            texts = _texts(batch, own)
            texts += [written(batch.column(name), kind) for name, kind in zip(names[:6], _TYPES[:6], strict=True)]
            texts += [_before(batch), written(batch.column(names.unchanged), "text[]"), _raw(batch)]
            _copy(connection, sql.SQL("COPY {} ({}) FROM STDIN").format(_table(job.target), columns), texts)

    def _merge(self, connection: Connection, job: Job) -> None:
        data = job.changes.combine_chunks().to_batches()
        if not data:
            return
        standing = self._standing.get(job.target)
        net, self._standing[job.target] = net_rows(data[0], job.key, whole=job.identity == "f", standing=standing)
        own, names = own_columns(net.puts.schema), MetadataNames.of(net.puts.schema)
        columns = _names([*own, names.commit_lsn, names.unchanged])
        if net.emptied:
            connection.execute(sql.SQL("DELETE FROM {}").format(_table(job.target)))
        sources = [f"pgoutput from {i}" for i in range(len(job.key))]
        aliases = [
            sql.SQL("{} AS {}").format(sql.Identifier(k), sql.Identifier(s))
            for k, s in zip(job.key, sources, strict=True)
        ]
        make = sql.SQL("CREATE TEMP TABLE {} ON COMMIT DROP AS SELECT {} FROM {} LIMIT 0")
        puts, gone = sql.Identifier("pgoutput_puts"), sql.Identifier("pgoutput_gone")
        connection.execute(make.format(puts, sql.SQL(", ").join([columns, *aliases]), _table(job.target)))
        texts = [
            *_texts(net.puts, own),
            written(net.puts.column(names.commit_lsn), "pg_lsn"),
            written(net.puts.column(names.unchanged), "text[]"),
            *_texts(net.sources, list(job.key)),
        ]
        _copy(connection, sql.SQL("COPY {} FROM STDIN").format(puts), texts)
        if net.puts.column(names.unchanged).null_count < len(net.puts):
            self._fill(connection, job, net.puts, sources)
        if not net.emptied:
            if len(net.gone):
                connection.execute(make.format(gone, _names(job.key), _table(job.target)))
                _copy(connection, sql.SQL("COPY {} FROM STDIN").format(gone), _texts(net.gone, list(job.key)))
                self._delete(connection, job, gone)
                connection.execute(sql.SQL("DROP TABLE {}").format(gone))
            self._delete(connection, job, puts)
        connection.execute(
            sql.SQL("INSERT INTO {} ({}) SELECT {} FROM {}; DROP TABLE {}").format(
                _table(job.target), columns, columns, puts, puts
            )
        )

    def _delete(self, connection: Connection, job: Job, keys: sql.Identifier) -> None:
        same = [sql.SQL("t.{0} = k.{0}").format(sql.Identifier(name)) for name in job.key]
        connection.execute(
            sql.SQL("DELETE FROM {} AS t USING {} AS k WHERE {}").format(
                _table(job.target), keys, sql.SQL(" AND ").join(same)
            )
        )

    def _fill(self, connection: Connection, job: Job, puts: pa.RecordBatch, sources: Sequence[str]) -> None:
        """Take from the table what PostgreSQL did not send, and the names of what the table does not know either."""
        unsent = puts.column(MetadataNames.of(puts.schema).unchanged)
        names = pc.unique(pc.list_flatten(unsent)).to_pylist()
        sets = [
            sql.SQL("{0} = CASE WHEN {1} = ANY(p.{2}) THEN t.{0} ELSE p.{0} END").format(
                sql.Identifier(name), sql.Literal(name), _unchanged(job)
            )
            for name in names
        ]
        same = [
            sql.SQL("t.{} = p.{}").format(sql.Identifier(k), sql.Identifier(s))
            for k, s in zip(job.key, sources, strict=True)
        ]
        connection.execute(
            sql.SQL(
                "UPDATE pgoutput_puts AS p SET {0}, {1} = nullif(ARRAY(SELECT n FROM unnest(p.{1}) AS n"
                " WHERE n = ANY(coalesce(t.{1}, '{{}}'))), '{{}}') FROM {2} AS t"
                " WHERE p.{1} IS NOT NULL AND {3}"
            ).format(sql.SQL(", ").join(sets), _unchanged(job), _table(job.target), sql.SQL(" AND ").join(same))
        )

    def _sql(self, statement: str) -> sql.Composed:
        return sql.SQL(statement).format(schema=sql.Identifier(self.schema))


def _refused(target: Target, error: ServerError) -> Refused:
    cause = error.__cause__
    said = cause.diag.message_hint if isinstance(cause, psycopg.Error) else None
    hint = said or f"alter {target} there so that it takes the changes, or exclude the table"
    return Refused.at(target, f"PostgreSQL: {target}: {error.message}", hint=hint)


def _staying(columns: Sequence[_Column], known: Sequence[_Column], *, recreated: bool) -> dict[str, _Column]:
    """By their new names, the columns that were there before under any name."""
    there = {c.name: c for c in known}
    by_number = {} if recreated else {c.attnum: c for c in known if c.attnum is not None}
    stay: dict[str, _Column] = {}
    for column in columns:
        before = by_number.get(column.attnum) if column.attnum is not None else None
        if before is None and (same := there.get(column.name)) is not None:
            # Without numbers a column is told by its name.
            before = same if recreated or None in (same.attnum, column.attnum) else None
        if before is not None:
            stay[column.name] = before
    return stay


def _aside(name: str, taken: Collection[str]) -> str:
    number = 2
    while f"{name}__{number}" in taken:
        number += 1
    return f"{name}__{number}"


def _by_arrow(kind: pa.DataType) -> str:
    if pa.types.is_timestamp(kind) and kind.tz is None:
        return "timestamp"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"{_by_arrow(kind.value_type)}[]"
    return next((name for matches, name in _BY_ARROW if matches(kind)), "text")


def _unchanged(job: Job) -> sql.Identifier:
    return sql.Identifier(MetadataNames.of(job.changes.schema).unchanged)


def _table(target: Target) -> sql.Identifier:
    return sql.Identifier(*target)


def _names(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, names))


def _texts(batch: pa.RecordBatch, names: Sequence[str]) -> list[pa.Array]:
    """Columns as text; a value that its Arrow type can't hold has its exact text in `_raw`."""
    raw = batch.column(MetadataNames.of(batch.schema).raw)
    out = []
    for name in names:
        field = batch.schema.field(name)
        text = written(batch.column(name), (field.metadata or {}).get(b"pg.type", b"").decode())
        if raw.null_count < len(raw) and text.null_count:
            text = pc.coalesce(text, pc.map_lookup(raw, pa.scalar(name), "first").cast(text.type))
        out.append(text)
    return out


def _before(batch: pa.RecordBatch) -> pa.Array:
    """Old rows as JSON of texts."""
    metadata = MetadataNames.of(batch.schema)
    before = batch.column(metadata.before)
    if before.null_count == len(before) or not before.type.num_fields:
        return pa.nulls(len(batch), pa.large_utf8())
    rows = pa.RecordBatch.from_struct_array(before)
    names = rows.schema.names
    types = [(batch.schema.field(name).metadata or {}).get(b"pg.type", b"").decode() for name in names]
    texts = [written(rows.column(i), kind).to_pylist() for i, kind in enumerate(types)]
    raws = batch.column(metadata.raw).to_pylist()
    out: list[str | None] = []
    for i, there in enumerate(before.is_valid().to_pylist()):
        if not there:
            out.append(None)
            continue
        row = dict(zip(names, (column[i] for column in texts), strict=True))
        row |= {name.removeprefix(metadata.old): text for name, text in raws[i] or () if name.startswith(metadata.old)}
        out.append(json.dumps(row, ensure_ascii=False))
    return pa.array(out, pa.large_utf8())


def _raw(batch: pa.RecordBatch) -> pa.Array:
    raw = batch.column(MetadataNames.of(batch.schema).raw)
    if raw.null_count == len(raw):
        return pa.nulls(len(batch), pa.large_utf8())
    rows = [None if row is None else json.dumps(dict(row), ensure_ascii=False) for row in raw.to_pylist()]
    return pa.array(rows, pa.large_utf8())


def _copy(connection: Connection, statement: sql.SQL | sql.Composed, texts: Sequence[pa.Array]) -> None:
    with connection.cursor().copy(statement) as copy:
        copy.write(copy_text(texts))
