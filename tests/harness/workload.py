"""A random workload over many tables, and the replay of its changes: PostgreSQL's tables are the oracle.

`Workload` runs SQL; `replayed` applies the rows of a folder of Parquet files in position order and gives what the
tables must hold; `tables` asks PostgreSQL what they do hold.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Self

import psycopg
import pyarrow.parquet as pq
from psycopg import sql

from pgoutput_source.changes.schema import TableName

Row = tuple[tuple[str, Any], ...]
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
TOASTED = "(SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 100))"


NAMES = {0: ("public", 'odd "name", really'), 4: ("a", "b.c"), 5: ("a.b", "c")}


class Table:
    """One of the workload's tables; every third has no key and REPLICA IDENTITY FULL, every fourth a TOASTed column."""

    def __init__(self, number: int, rng: random.Random) -> None:
        self.name = TableName(*NAMES.get(number, ("public", f"t{number}")))
        self.keyed = number % 3 != 2
        self.toasted = number % 4 == 1
        self.columns = {f"c{i}": kind for i, kind in enumerate(rng.sample(sorted(TYPES), rng.randint(2, 7)))}

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(*self.name)

    def ddl(self) -> Iterable[sql.Composed]:
        columns: list[sql.Composable] = [
            sql.SQL("id integer {}").format(sql.SQL("PRIMARY KEY" if self.keyed else "NOT NULL"))
        ]
        columns += [sql.SQL("{} {}").format(sql.Identifier(c), sql.SQL(t)) for c, t in self.columns.items()]
        if self.toasted:
            columns.append(sql.SQL("doc text"))
        yield sql.SQL("CREATE TABLE {} ({})").format(self.identifier, sql.SQL(", ").join(columns))
        if not self.keyed:
            yield sql.SQL("ALTER TABLE {} REPLICA IDENTITY FULL").format(self.identifier)
        if self.toasted:
            yield sql.SQL("ALTER TABLE {} ALTER doc SET STORAGE EXTERNAL").format(self.identifier)


class Workload:
    """Transactions of 1 to `largest` rows over `tables` tables, the same for the same seed but for random values."""

    def __init__(self, dsn: str, *, seed: int, tables: int = 20, largest: int = 10_000) -> None:
        self.rng = random.Random(seed)
        self.connection = psycopg.connect(dsn, autocommit=True)
        self.connection.execute(sql.SQL("SELECT setseed({})").format(sql.Literal(seed % 1000 / 1000)))
        self.tables = [Table(i, self.rng) for i in range(tables)]
        self.largest = largest
        self.next_id = 1
        self.changes = 0

    def __enter__(self) -> Self:
        self.create()
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def create(self) -> None:
        self.connection.execute("CREATE SEQUENCE moved INCREMENT -1")
        for schema in dict.fromkeys(table.name.namespace for table in self.tables):
            self.connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(schema)))
        for table in self.tables:
            for statement in table.ddl():
                self.connection.execute(statement)

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
        if dice < 0.5:
            statement = self._insert(table, size)
        elif dice < 0.75:
            statement = self._update(table, size)
        elif dice < 0.8 and table.keyed:
            statement = sql.SQL("UPDATE {} SET id = nextval('moved') WHERE {}").format(
                table.identifier, self._some(table, min(size, 200))
            )
        elif dice < 0.8:
            statement = self._rotate(table, min(size, 200))
        elif dice < 0.96:
            statement = sql.SQL("DELETE FROM {} WHERE {}").format(table.identifier, self._some(table, size // 3 + 1))
        elif dice < 0.97:
            self.connection.execute(sql.SQL("DROP TABLE {}").format(table.identifier))
            for ddl in table.ddl():
                self.connection.execute(ddl)
            statement = self._insert(table, size)  # without a change, nothing says that the rows are gone
        elif dice < 0.98:
            statement = sql.SQL("TRUNCATE {}").format(table.identifier)
        elif len(table.columns) < 12:
            name, kind = f"c{len(table.columns)}", self.rng.choice(sorted(TYPES))
            table.columns[name] = kind
            statement = sql.SQL("ALTER TABLE {} ADD {} {}").format(
                table.identifier, sql.Identifier(name), sql.SQL(kind)
            )
        else:
            return
        self.changes += max(0, self.connection.execute(statement).rowcount)

    def _ids(self, count: int) -> int:
        first, self.next_id = self.next_id, self.next_id + count
        return first

    def _some(self, table: Table, size: int) -> sql.Composed:
        # ctid, not id: tables without a key may hold equal rows.
        return sql.SQL("ctid = ANY(ARRAY(SELECT ctid FROM {} ORDER BY random() LIMIT {}))").format(
            table.identifier, sql.Literal(size)
        )

    def _value(self, kind: str) -> sql.SQL:
        value = TYPES[kind]
        return sql.SQL(f"CASE WHEN random() < 0.1 THEN NULL ELSE {value} END")

    def _insert(self, table: Table, size: int) -> sql.Composed:
        first = self._ids(size)
        names = [sql.Identifier("id"), *map(sql.Identifier, table.columns)]
        values: list[sql.Composable] = [sql.SQL("i"), *map(self._value, table.columns.values())]
        if table.toasted:
            names.append(sql.Identifier("doc"))
            values.append(sql.SQL(f"CASE WHEN i % 5 = 0 THEN {TOASTED} ELSE 'short ' || i END"))
        return sql.SQL("INSERT INTO {} ({}) SELECT {} FROM generate_series({}, {}) i").format(
            table.identifier,
            sql.SQL(", ").join(names),
            sql.SQL(", ").join(values),
            sql.Literal(first),
            sql.Literal(first + size - 1),
        )

    def _update(self, table: Table, size: int) -> sql.Composed:
        column, kind = self.rng.choice(sorted(table.columns.items()))
        return sql.SQL("UPDATE {} SET {} = {} WHERE {}").format(
            table.identifier, sql.Identifier(column), self._value(kind), self._some(table, size)
        )

    def _rotate(self, table: Table, size: int) -> sql.Composed:
        # Each row gets the id of the next one: within the statement, two rows have the same.
        return sql.SQL(
            "UPDATE {} t SET id = s.next FROM ("
            " SELECT id, coalesce(lead(id) OVER w, min(id) OVER ()) AS next FROM {} WHERE {} WINDOW w AS (ORDER BY id)"
            ") s WHERE t.id = s.id"
        ).format(table.identifier, table.identifier, self._some(table, size))


def tables(workload: Workload) -> dict[str, Counter[Row]]:
    """What each table that is not empty holds, as a multiset of rows; types that Arrow lacks as their text."""
    connection = workload.connection
    found: dict[str, Counter[Row]] = {}
    for name in (table.name for table in workload.tables):
        cursor = connection.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(*name)))
        assert cursor.description is not None
        casts = {"jsonb": "text", "inet": "text", "numeric": "text", "uuid": "text", "float4": "float8"}
        columns = [
            sql.SQL("{}::{}").format(sql.Identifier(d.name), sql.SQL(casts.get(d.type_display, d.type_display)))
            for d in cursor.description
        ]
        rows = connection.execute(
            sql.SQL("SELECT {} FROM {}").format(sql.SQL(", ").join(columns), sql.Identifier(*name))
        ).fetchall()
        labels = [d.name for d in cursor.description]
        found[str(name)] = Counter(_row(dict(zip(labels, row, strict=True))) for row in rows)
    return {name: rows for name, rows in found.items() if rows}


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
        key = [f.name for f in table.schema if not f.name.startswith("_")]
        identity, relation = (table.schema.metadata[entry].decode() for entry in (b"pg.identity", b"pg.relation_id"))
        for row in table.to_pylist():
            changes[name].append(row | {"__columns": key, "__identity": identity, "__relation": relation})
    states: dict[str, Counter[Row]] = {}
    total = 0
    for name, rows in changes.items():
        if repeats:
            rows = list({(r["_commit_lsn"], r["_seq"]): r for r in rows}.values())
        rows.sort(key=lambda r: (r["_commit_lsn"], r["_seq"]))
        positions = [(r["_commit_lsn"], r["_seq"]) for r in rows]
        assert len(positions) == len(set(positions)), f"{name}: a change came twice"
        states[name] = _replay(name, rows)
        total += len(rows)
    return {name: rows for name, rows in states.items() if rows}, total


def _replay(name: str, rows: list[dict[str, Any]]) -> Counter[Row]:
    keyed: dict[Any, dict[str, Any]] = {}
    full: Counter[Row] = Counter()
    identity, relation = rows[-1]["__identity"], rows[0]["__relation"]
    for row in rows:
        if row["__relation"] != relation:  # the table was recreated
            keyed.clear()
            full.clear()
            relation = row["__relation"]
        columns = row["__columns"]
        new = {c: row[c] for c in columns}
        match row["_op"], identity:
            case "T", _:
                keyed.clear()
                full.clear()
            case "I" | "R", "f":
                full[_row(new)] += 1
            case "U" | "D", "f":
                old = _row({c: row["_before"][c] for c in columns})
                assert full[old] > 0, f"{name}: {row['_op']} of a row that is not there"
                full[old] -= 1
                if row["_op"] == "U":
                    assert row["_unchanged"] is None
                    full[_row(new)] += 1
            case "I" | "R", _:
                assert new["id"] not in keyed, f"{name}: a row inserted twice"
                keyed[new["id"]] = new
            case "U", _:
                old_key = new["id"] if row["_before"] is None else row["_before"]["id"]
                kept = keyed.pop(old_key)
                for column in row["_unchanged"] or ():
                    new[column] = kept[column]
                keyed[new["id"]] = new
            case "D", _:
                del keyed[new["id"]]
            case op, _:
                raise AssertionError(f"{name}: unknown op {op}")
    return Counter(map(_row, keyed.values())) + full


def differences(found: dict[str, Counter[Row]], expected: dict[str, Counter[Row]]) -> list[str]:
    """What is in one and not in the other, a few of each table."""
    texts = []
    for name in sorted(found.keys() | expected.keys()):
        more, less = found.get(name, Counter()), expected.get(name, Counter())
        texts += [f"{name}: only in the files: {row}" for row in list((more - less).elements())[:3]]
        texts += [f"{name}: only in the table: {row}" for row in list((less - more).elements())[:3]]
    print(*texts, sep="\n")
    return texts


def _row(values: dict[str, Any]) -> Row:
    # Without NULLs, so that rows from before a column was added compare equal.
    return tuple((k, v) for k, v in values.items() if v is not None)
