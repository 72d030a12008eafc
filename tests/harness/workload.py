"""A random workload over many tables, and the replay of its changes: PostgreSQL's tables are the oracle.

`Workload` runs SQL; `replayed` applies the rows of a folder of Parquet files in position order and gives what the
tables must hold; `tables` asks PostgreSQL what they do hold. A value that the changes do not tell is `UNKNOWN`, and
`differences` sees to it that only those are that can't be told.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
from psycopg import sql

from pgoutput_source.changes.schema import TableName
from pgoutput_source.compute.versions import column_in

Row = tuple[tuple[str, Any], ...]
UNKNOWN: Final = "(not known)"
TYPES = {
    "smallint": "(random() * 60000 - 30000)::smallint",
    "bigint": "(random() * 1e18)::bigint",
    "boolean": "random() < 0.5",
    "real": "(random() * 1000)::real",
    "double precision": "random() * 1e300",
    "numeric(12,2)": "(random() * 1e9)::numeric(12,2)",
    "numeric(30,10)": "(random() * 1e15)::numeric(30,10)",
    "numeric": "(random() * 1e15)::numeric / 7",
    "text": "repeat(md5(random()::text), (random() * 3)::int)",
    "varchar(40)": "md5(random()::text)",
    "date": "date '1900-01-01' + (random() * 80000)::int",
    "time": "time '00:00' + random() * interval '23:59:59'",
    "timestamp": "timestamp '1990-01-01' + random() * interval '20000 days'",
    "timestamptz": "timestamptz '1990-01-01 00:00+00' + random() * interval '20000 days'",
    "uuid": "gen_random_uuid()",
    "bytea": "decode(md5(random()::text), 'hex')",
    "jsonb": "jsonb_build_object('k', random(), 'l', jsonb_build_array(1, null, 'x'))",
    "inet": "('10.0.0.' || (random() * 255)::int || '/24')::inet",
}
ODD = {
    "date": ("infinity", "-infinity"),
    "time": ("24:00", "23:59:59"),
    "timestamp": ("infinity", "-infinity"),
    "timestamptz": ("infinity", "-infinity"),
    "real": ("NaN", "Infinity", "-0", "0"),
    "double precision": ("NaN", "-Infinity", "-0", "0"),
    "numeric(12,2)": ("NaN", "0"),
    "numeric": ("NaN", "1.0", "1.00"),
}
"""Values that Arrow's types can't hold, or that are equal to another one and not the same."""

FITS = {
    "date": "isfinite({0})",
    "time": "{0} < '24:00'",
    "timestamp": "isfinite({0})",
    "timestamptz": "isfinite({0})",
    "numeric(12,2)": "{0} <> 'NaN'",
}
"""Which values of a type its Arrow type can hold, where not all."""

HOSTILE = {
    "PGTZ": "Asia/Kolkata",
    "PGDATESTYLE": "German",
    "PGCLIENTENCODING": "LATIN1",
    "PGOPTIONS": "-c IntervalStyle=sql_standard -c extra_float_digits=-10 -c bytea_output=escape -c lock_timeout=1",
}
"""An environment of a reader whose settings would shape the values, if they were not pinned."""

TOASTED = "(SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 100))"


NAMES = {0: ("public", 'odd "name", really'), 4: ("a", "b.c"), 5: ("a.b", "c")}


class Table:
    """One of the workload's tables.

    Every third has no key that PostgreSQL sends, and REPLICA IDENTITY FULL. Half of these have a deferrable key: their
    rows trade keys within a statement, or take each other's for a while. Every fourth table has a TOASTed column, and
    so have those; every fifth a second column in its key that has odd values.
    """

    def __init__(self, number: int, rng: random.Random) -> None:
        self.name = TableName(*NAMES.get(number, ("public", f"t{number}")))
        self.keyed = number % 3 != 2
        self.deferrable = number % 6 == 2 and number % 5 != 3
        self.toasted = number % 4 == 1 or self.deferrable
        self.columns = {f"c{i}": kind for i, kind in enumerate(rng.sample(sorted(TYPES), rng.randint(2, 7)))}
        self.odd = rng.choice(sorted(ODD)) if number % 5 == 3 else None
        self.filter: str | None = None
        self.uncertain: set[str] = set()
        """Columns whose value in older rows PostgreSQL does not tell, or not always."""
        self.new_file = False

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(*self.name)

    @property
    def key(self) -> list[str]:
        """The columns that identify a row; those of a table without a key may not."""
        return ["id", "k"] if self.odd else ["id"]

    def published(self) -> sql.Composed:
        """The table as a publication lists it."""
        where = sql.SQL(f" WHERE ({self.filter})" if self.filter else "")
        return sql.SQL("{}{}").format(self.identifier, where)

    def use_filter(self) -> None:
        """Rows go in and out of the publication as their columns change."""
        self.filter = "id % 3 <> 0" if self.keyed else "id % 3 <> 0 AND c0 IS NOT NULL"
        if self.keyed and self.toasted:
            self.uncertain.add("doc")  # it does not come with a row that comes in

    def ddl(self) -> Iterable[sql.Composed]:
        columns: list[sql.Composable] = [sql.SQL("id integer NOT NULL")]
        columns += [sql.SQL("{} {}").format(sql.Identifier(c), sql.SQL(t)) for c, t in self.columns.items()]
        if self.odd:
            columns.append(sql.SQL(f"k {self.odd}"))
        if self.toasted:
            columns.append(sql.SQL("doc text"))
        if self.keyed:
            columns.append(sql.SQL(f"PRIMARY KEY ({', '.join(self.key)})"))
        if self.deferrable:
            columns.append(sql.SQL("UNIQUE (id) DEFERRABLE INITIALLY DEFERRED"))
        yield sql.SQL("CREATE TABLE {} ({})").format(self.identifier, sql.SQL(", ").join(columns))
        if not self.keyed:
            yield sql.SQL("ALTER TABLE {} REPLICA IDENTITY FULL").format(self.identifier)
        if self.toasted:
            yield sql.SQL("ALTER TABLE {} ALTER doc SET STORAGE EXTERNAL").format(self.identifier)


class Workload:
    """Transactions of 1 to `largest` rows over `tables` tables, the same for the same seed but for random values.

    Args:
        dsn: Of a database of its own. Whoever reads from it has a role that hears no warnings.
        seed: Of the random numbers.
        tables: How many tables.
        largest: How many rows a transaction may have.
        publication: A publication to make of the tables, half of them with a row filter from PostgreSQL 15 on.
    """

    def __init__(
        self, dsn: str, *, seed: int, tables: int = 20, largest: int = 10_000, publication: str | None = None
    ) -> None:
        self.rng = random.Random(seed)
        self.connection = psycopg.connect(dsn, autocommit=True)
        self.connection.execute(sql.SQL("SELECT setseed({})").format(sql.Literal(seed % 1000 / 1000)))
        self.tables = [Table(i, self.rng) for i in range(tables)]
        self.largest = largest
        self.publication = publication and sql.Identifier(publication)
        self.next_id = 1
        self.changes = 0

    def __enter__(self) -> Self:
        self.create()
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def create(self) -> None:
        info = self.connection.info
        self.connection.execute("CREATE SEQUENCE moved INCREMENT -1")
        self.connection.execute(
            sql.SQL("ALTER ROLE {} IN DATABASE {} SET client_min_messages = error").format(
                sql.Identifier(info.user), sql.Identifier(info.dbname)
            )
        )
        for schema in dict.fromkeys(table.name.namespace for table in self.tables):
            self.connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(schema)))
        for number, table in enumerate(self.tables):
            for statement in table.ddl():
                self.connection.execute(statement)
            if self.publication and number % 2 and info.server_version >= 150000:
                table.use_filter()
        if self.publication:
            every = sql.SQL(", ").join(table.published() for table in self.tables)
            self.connection.execute(sql.SQL("CREATE PUBLICATION {} FOR TABLE {}").format(self.publication, every))

    def run(self, changes: int) -> int:
        """Commit transactions until about so many changes were made; their real number."""
        goal = self.changes + changes
        while self.changes < goal:
            self.transaction()
        return self.changes

    def transaction(self) -> None:
        """One transaction: a few statements on a few tables; sometimes a savepoint that is rolled back."""
        with self.connection.transaction():
            size = int(math.exp(self.rng.uniform(0, math.log(self.largest))))
            for _ in range(self.rng.randint(1, 3)):
                self._statement(self.rng.choice(self.tables), max(1, size // 2))
            if self.rng.random() < 0.1:
                with self.connection.transaction() as savepoint:
                    self.connection.execute(self._insert(self.rng.choice(self.tables), 5))
                    raise psycopg.Rollback(savepoint)

    def _statement(self, table: Table, size: int) -> None:
        dice = self.rng.random()
        if dice >= 0.96:
            # A table whose keys are still to be checked can't be dropped, emptied or altered.
            self.connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
            self.connection.execute("SET CONSTRAINTS ALL DEFERRED")
        if dice < 0.5:
            self._do(self._insert(table, size))
        elif dice < 0.75 and table.odd and dice < 0.6:
            self._exchange(table, min(size, 200))
        elif dice < 0.75:
            self._do(self._update(table, size))
        elif dice < 0.8 and table.keyed:
            some = self._some(table, min(size, 200))
            self._do(sql.SQL("UPDATE {} SET id = nextval('moved') WHERE {}").format(table.identifier, some))
        elif dice < 0.78 and table.deferrable:
            self._visit(table)
        elif dice < 0.8:
            self._do(self._rotate(table, min(size, 200)))
        elif dice < 0.96:
            self._do(sql.SQL("DELETE FROM {} WHERE {}").format(table.identifier, self._some(table, size // 3 + 1)))
        elif dice < 0.97:
            self._recreate(table, size)
        elif dice < 0.98:
            self._do(sql.SQL("TRUNCATE {}").format(table.identifier))
            table.new_file = True
        elif len(table.columns) < 12:
            self._add(table)

    def _do(self, statement: sql.Composed) -> None:
        self.changes += max(0, self.connection.execute(statement).rowcount)

    def _recreate(self, table: Table, size: int) -> None:
        self._do(sql.SQL("DROP TABLE {}").format(table.identifier))
        for ddl in table.ddl():
            self._do(ddl)
        if self.publication:
            self._do(sql.SQL("ALTER PUBLICATION {} ADD TABLE {}").format(self.publication, table.published()))
        # Without a change that is sent, nothing says that the rows are gone.
        self._do(self._insert(table, max(size, 30)))
        table.new_file = False

    def _add(self, table: Table) -> None:
        """A column without a default, or with one that is in older rows without being sent."""
        name, kind = f"c{len(table.columns)}", self.rng.choice(sorted(TYPES))
        how = self.rng.choice(["plain", "constant", "drawn", "drawn and sent"])
        default: sql.Composable = sql.SQL("")
        if how == "constant":
            drawn = sql.SQL(f"SELECT ({TYPES[kind]})::text")
            row = self.connection.execute(drawn).fetchone() if self.rng.random() < 0.9 or kind not in ODD else None
            default = sql.SQL(" DEFAULT {}").format(sql.Literal(row[0] if row else ODD[kind][0]))
            if row is None and kind in FITS:
                table.uncertain.add(name)
        elif how != "plain":
            default = sql.SQL(f" DEFAULT {TYPES[kind]}")
            table.new_file = True
        if table.new_file:
            table.uncertain |= {name, *table.columns}
        added = sql.SQL("ALTER TABLE {} ADD {} {}{}")
        self._do(added.format(table.identifier, sql.Identifier(name), sql.SQL(kind), default))
        table.columns[name] = kind
        if how != "plain":
            self._do(self._insert(table, 30))  # without a change that is sent, nothing says that there is a column
        if how == "drawn and sent":
            self._do(sql.SQL("UPDATE {} SET {} = {}").format(table.identifier, *[sql.Identifier(name)] * 2))

    def _exchange(self, table: Table, size: int) -> None:
        """Other values in the second column of the key, if no two rows then have the same."""
        try:
            with self.connection.transaction():
                self._do(
                    sql.SQL("UPDATE {} SET k = {} WHERE {}").format(
                        table.identifier, self._odd(table), self._some(table, size)
                    )
                )
        except psycopg.errors.UniqueViolation:
            pass

    def _odd(self, table: Table) -> sql.SQL:
        """One of a few values, so that the first column of the key alone tells no rows apart."""
        assert table.odd is not None
        values = [f"'{value}'::{table.odd}" for value in ODD[table.odd]]
        few = TYPES[table.odd].replace("random()", "round(random()::numeric, 1)::float8")
        one = f"(ARRAY[{', '.join(values)}])[1 + (random() * {len(values) - 1})::int]"
        return sql.SQL(f"CASE WHEN random() < 0.5 THEN {one} ELSE {few} END")

    def _ids(self, count: int) -> int:
        first, self.next_id = self.next_id, self.next_id + count
        return first

    def _some(self, table: Table, size: int) -> sql.Composed:
        # ctid, not id: tables without a key may hold equal rows.
        return sql.SQL("ctid = ANY(ARRAY(SELECT ctid FROM {} ORDER BY random() LIMIT {}))").format(
            table.identifier, sql.Literal(size)
        )

    def _value(self, kind: str) -> sql.SQL:
        odd = f"WHEN random() < 0.02 THEN '{self.rng.choice(ODD[kind])}'" if kind in ODD else ""
        return sql.SQL(f"CASE WHEN random() < 0.1 THEN NULL {odd} ELSE {TYPES[kind]} END")

    def _insert(self, table: Table, size: int) -> sql.Composed:
        first = self._ids(size)
        names = [sql.Identifier("id"), *map(sql.Identifier, table.columns)]
        values: list[sql.Composable] = [sql.SQL("i"), *map(self._value, table.columns.values())]
        if table.toasted:
            names.append(sql.Identifier("doc"))
            values.append(sql.SQL(f"CASE WHEN i % 5 = 0 THEN {TOASTED} ELSE 'short ' || i END"))
        if table.odd:
            names.append(sql.Identifier("k"))
            if table.keyed:
                values[0] = sql.SQL("i / 4")  # several rows, told apart by the second column of the key
            values.append(self._odd(table))
        return sql.SQL("INSERT INTO {} ({}) SELECT {} FROM generate_series({}, {}) i{}").format(
            table.identifier,
            sql.SQL(", ").join(names),
            sql.SQL(", ").join(values),
            sql.Literal(first),
            sql.Literal(first + size - 1),
            sql.SQL("" if table.deferrable else " ON CONFLICT DO NOTHING"),
        )

    def _update(self, table: Table, size: int) -> sql.Composed:
        column, kind = self.rng.choice(sorted(table.columns.items()))
        return sql.SQL("UPDATE {} SET {} = {} WHERE {}").format(
            table.identifier, sql.Identifier(column), self._value(kind), self._some(table, size)
        )

    def _rotate(self, table: Table, size: int) -> sql.Composed:
        # Each row gets the id of the next one, or of its mirror image: within the statement, two rows have the same.
        other = self.rng.choice(["s.r % s.n + 1", "s.n + 1 - s.r"])
        return sql.SQL(
            "WITH s AS (SELECT id, row_number() OVER (ORDER BY id) AS r, count(*) OVER () AS n FROM {} WHERE {})"
            f" UPDATE {{}} t SET id = o.id FROM s JOIN s AS o ON o.r = {other} WHERE t.id = s.id"
        ).format(table.identifier, self._some(table, size), table.identifier)

    def _visit(self, table: Table) -> None:
        """A row takes the key of another one, and later its own again, or a new one."""
        row = self.connection.execute(
            sql.SQL("SELECT ctid, id FROM {} ORDER BY random() LIMIT 2").format(table.identifier)
        ).fetchall()
        if len(row) < 2:
            return
        (place, own), (_, others) = row
        move = sql.SQL("UPDATE {} SET id = {} WHERE ctid = {} RETURNING ctid")
        moved = self.connection.execute(
            move.format(table.identifier, sql.Literal(others), sql.Literal(str(place)))
        ).fetchone()
        assert moved is not None
        self._do(self._insert(self.rng.choice([t for t in self.tables if t is not table]), 20))
        back = own if self.rng.random() < 0.5 else self._ids(1)
        self._do(move.format(table.identifier, sql.Literal(back), sql.Literal(str(moved[0]))))
        self.changes += 1


class Held(dict[str, Counter[Row]]):
    """What tables hold, and which of their columns may be unknown in rows that were not sent again."""

    uncertain: Mapping[str, set[str]]


def tables(workload: Workload) -> Held:
    """What each table that is not empty holds, as a multiset of rows; types that Arrow lacks as their text."""
    connection = workload.connection
    held = Held()
    for table in workload.tables:
        where = sql.SQL(f" WHERE {table.filter}" if table.filter else "")
        cursor = connection.execute(sql.SQL("SELECT * FROM {} LIMIT 0").format(table.identifier))
        assert cursor.description is not None
        casts = {"jsonb": "text", "inet": "text", "numeric": "text", "uuid": "text", "float4": "float8"}
        columns: list[sql.Composable] = []
        for d in cursor.description:
            name = sql.Identifier(d.name)
            fits = FITS.get(d.type_display.replace("float8", "double precision"), "true")
            cell = sql.SQL("{}::{}").format(name, sql.SQL(casts.get(d.type_display, d.type_display)))
            fitting = sql.SQL(fits).format(name)
            columns.append(sql.SQL("CASE WHEN {} THEN {} END").format(fitting, cell))
            columns.append(sql.SQL("CASE WHEN NOT {} THEN {}::text END").format(fitting, name))
        query = sql.SQL("SELECT {} FROM {}{}").format(sql.SQL(", ").join(columns), table.identifier, where)
        labels = [d.name for d in cursor.description]
        held[str(table.name)] = Counter(
            row_of(dict(zip(labels, row[::2], strict=True)), dict(zip(labels, row[1::2], strict=True)))
            for row in connection.execute(query).fetchall()
        )
    held = Held({name: rows for name, rows in held.items() if rows})
    held.uncertain = {str(table.name): table.uncertain for table in workload.tables}
    return held


def row_of(values: Mapping[str, Any], texts: Mapping[str, str | None], unknown: Collection[str] = ()) -> Row:
    """A row: its values, the texts of those that Arrow can't hold, and those that are not known; without NULLs."""
    cells = {
        name: UNKNOWN if name in unknown else value if texts.get(name) is None else ("text", texts[name])
        for name, value in values.items()
    }
    # NaN equals itself here, and 0 is not -0.
    exact = {name: repr(cell) if isinstance(cell, float) else cell for name, cell in cells.items()}
    return tuple((name, cell) for name, cell in exact.items() if cell is not None)


def replayed(folder: Path, *, repeats: bool = False, but: Collection[str] = ()) -> tuple[dict[str, Counter[Row]], int]:
    """What the tables must hold after the changes in a folder's files, and how many changes there are.

    A position that comes twice, unless `repeats` are allowed, a delete or an update of a row that is not there:
    AssertionError. The tables in `but` are left out.
    """
    changes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for file in sorted(folder.glob("*.parquet")):
        name = (pq.read_schema(file).metadata or {})[b"pg.table"].decode()
        if name in but:
            continue
        table = pq.read_table(file)
        for row in table.to_pylist():
            changes[name].append(row | {"__schema": table.schema})
    states: dict[str, Counter[Row]] = {}
    total = 0
    for name, rows in changes.items():
        if repeats:
            rows = list({(r["_commit_lsn"], r["_seq"]): r for r in rows}.values())
        rows.sort(key=lambda r: (r["_commit_lsn"], r["_seq"]))
        positions = [(r["_commit_lsn"], r["_seq"]) for r in rows]
        assert len(positions) == len(set(positions)), f"{name}: a change came twice"
        replay = _Replay(name, rows[-1]["__schema"])
        for row in rows:
            replay.apply(row)
        states[name] = replay.rows()
        total += len(rows)
    return {name: rows for name, rows in states.items() if rows}, total


class _Replay:
    """The rows of one table, each as a dictionary of exact cells."""

    def __init__(self, name: str, last: pa.Schema) -> None:
        self.name = name
        self.whole = last.metadata[b"pg.identity"] == b"f"
        self.keyed: dict[Row, dict[str, Any]] = {}
        self.full: Counter[Row] = Counter()
        self.schema: pa.Schema | None = None
        self.loose: list[str] = []
        """Columns that may be unknown in a row of a table without a key."""

    def rows(self) -> Counter[Row]:
        return Counter(tuple(row.items()) for row in self.keyed.values()) + self.full

    def apply(self, change: dict[str, Any]) -> None:
        if change["__schema"] is not self.schema:
            self._altered(change["__schema"])
        op, texts, unknown = change["_op"], dict(change["_raw"] or ()), change["_unchanged"] or ()
        columns = [name for name in change["__schema"].names if not name.startswith("_")]
        new = row_of({name: change[name] for name in columns}, texts, unknown)
        before = change["_before"] and row_of(
            {name: value for name, value in change["_before"].items() if name in columns},
            {name: texts.get(f"_before.{name}") for name in columns},
        )
        if op == "T":
            self.keyed.clear()
            self.full.clear()
        elif self.whole:
            if op in "UD":
                self._take(dict(before))
            if op != "D":
                assert op != "U" or not unknown
                self.full[new] += 1
        elif op in "IR":
            assert self._key(new) not in self.keyed, f"{self.name}: a row inserted twice"
            self.keyed[self._key(new)] = dict(new)
        elif op == "U":
            kept = self.keyed.pop(self._key(before or new))
            row = {name: kept.get(name) if cell is UNKNOWN else cell for name, cell in new}
            self.keyed[self._key(new)] = {name: cell for name, cell in row.items() if cell is not None}
        else:
            assert op == "D", f"{self.name}: unknown op {op}"
            del self.keyed[self._key(before or new)]

    def _key(self, row: Row) -> Row:
        return tuple((name, cell) for name, cell in row if name in ("id", "k"))

    def _altered(self, schema: pa.Schema) -> None:
        """The table is another one, or has more columns: what older rows have in them was not sent."""
        before, self.schema = self.schema, schema
        if before is None or before.equals(schema, check_metadata=True):
            return
        if before.metadata[b"pg.relation_id"] != schema.metadata[b"pg.relation_id"]:
            self.keyed.clear()
            self.full.clear()
            return
        more: dict[str, Any] = {}
        for field in schema:
            if field.name.startswith("_") or field.name in before.names:
                continue
            past = column_in(before, field)
            more |= row_of(
                {field.name: None if past.value is None else past.value.as_py()}, {}, [] if past.known else [field.name]
            )
        self.loose += [name for name, cell in more.items() if cell is UNKNOWN]
        order = [name for name in schema.names if not name.startswith("_")]

        def longer(row: dict[str, Any]) -> dict[str, Any]:
            cells = row | more
            return {name: cells[name] for name in order if name in cells}

        self.keyed = {key: longer(row) for key, row in self.keyed.items()}
        full: Counter[Row] = Counter()
        for row, count in self.full.items():
            full[tuple(longer(dict(row)).items())] += count
        self.full = full

    def _take(self, old: dict[str, Any]) -> None:
        """Remove a row that is as `old` says, but for what is not known of it."""
        assert self.schema is not None
        for count in range(len(self.loose) + 1):
            for names in itertools.combinations(self.loose, count):
                cells = old | dict.fromkeys(names, UNKNOWN)
                row = tuple((name, cells[name]) for name in self.schema.names if name in cells)
                if self.full[row] > 0:
                    self.full[row] -= 1
                    return
        raise AssertionError(f"{self.name}: a change of a row that is not there: {old}")


def differences(found: Mapping[str, Counter[Row]], expected: Mapping[str, Counter[Row]]) -> list[str]:
    """What is in one and not in the other, a few of each table; and what is not known without a reason."""
    uncertain = expected.uncertain if isinstance(expected, Held) else {}
    texts = []
    for name in sorted(found.keys() | expected.keys()):
        more, less = found.get(name, Counter()) - expected.get(name, Counter()), expected.get(name, Counter())
        less = less - found.get(name, Counter())
        for names, rows in _by_unknown(more):
            if names - uncertain.get(name, names):
                texts.append(f"{name}: {sorted(names - uncertain[name])} not known")
            there: dict[Row, list[Row]] = defaultdict(list)
            for row in less.elements() if names else ():
                there[_without(row, names)].append(row)
            for row in rows.elements() if names else ():
                if same := there[_without(row, names)]:
                    less[same.pop()] -= 1
                    more[row] -= 1
        for place, rows in (("files", more), ("table", less)):
            shown = [[(column, str(cell)[:50]) for column, cell in row] for row in list((+rows).elements())[:3]]
            texts += [f"{name}: only in the {place}: {row}" for row in shown]
    print(*texts, sep="\n")
    return texts


def _by_unknown(rows: Counter[Row]) -> Iterator[tuple[frozenset[str], Counter[Row]]]:
    found: dict[frozenset[str], Counter[Row]] = defaultdict(Counter)
    for row, count in rows.items():
        found[frozenset(name for name, cell in row if cell is UNKNOWN)][row] = count
    # Those of which most is known choose first.
    yield from sorted(found.items(), key=lambda each: len(each[0]))


def _without(row: Row, names: frozenset[str]) -> Row:
    return tuple((name, cell) for name, cell in row if name not in names)
