"""What only the catalogue knows is taken from it where it describes the version of the table that a change is of."""

from __future__ import annotations

from harness.database import Database

from pgoutput_source import PgOutputReader
from pgoutput_source.events import ChangeEvent

Definitions = list[tuple[str, bool, bool]]


def events(db: Database, *statements: str, before: str, publish: str = "FOR ALL TABLES") -> list[ChangeEvent]:
    """What a reader gives that starts when all of `statements` are long done; `before` is what they find."""
    with db.connect() as c:
        c.execute(before.encode())
        c.execute(f"CREATE PUBLICATION p {publish}".encode())
        c.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        for statement in statements:
            c.execute(statement.encode())
    with PgOutputReader(db.dsn, slot="s", publication="p", until="current") as reader:
        return list(reader)


def definitions(event: ChangeEvent) -> Definitions:
    """Name, whether it is of the primary key, and whether it may be NULL."""
    return [(c.name, c.part_of_pkey, c.optional) for c in event.table_schema.column_definitions]


def test_a_table_that_is_as_it_was_tells_its_constraints(any_db: Database) -> None:
    (event,) = events(
        any_db,
        "INSERT INTO t VALUES (1, 'a', 2)",
        before="CREATE TABLE t (k int, v text NOT NULL, n int, PRIMARY KEY (k)); ALTER TABLE t REPLICA IDENTITY FULL",
    )
    assert definitions(event) == [("k", True, False), ("v", False, False), ("n", False, True)]


def test_a_column_list_hides_columns_and_no_facts(db: Database) -> None:
    (event,) = events(
        db,
        "INSERT INTO t VALUES (1, 'a', 2)",
        before="CREATE TABLE t (gone int, v text NOT NULL, k int PRIMARY KEY)",
        publish="FOR TABLE t (v, k)",
    )
    assert definitions(event) == [("v", False, False), ("k", True, False)]


def test_case_75_not_null_is_told_only_where_it_may_be_true(any_db: Database) -> None:
    first, second = events(
        any_db,
        "INSERT INTO t VALUES (1, NULL)",
        "UPDATE t SET v = 'x'",
        "ALTER TABLE t ALTER v SET NOT NULL",
        before="CREATE TABLE t (id int PRIMARY KEY, v text)",
    )
    assert first.after == {"id": 1, "v": None}
    assert definitions(first) == definitions(second) == [("id", True, False), ("v", False, True)]


def test_a_value_that_was_not_sent_or_does_not_fit_is_no_null(db: Database) -> None:
    _, second, _ = events(
        db,
        "INSERT INTO t VALUES (1, repeat('x', 3000), 'infinity')",
        "UPDATE t SET n = 'NaN'",
        "DELETE FROM t",
        before="""CREATE TABLE t (id int PRIMARY KEY, v text NOT NULL, d date NOT NULL, n numeric(5,2))
        ;ALTER TABLE t ALTER v SET STORAGE EXTERNAL""",
    )
    assert second.unchanged == ("v",)
    assert definitions(second) == [("id", True, False), ("v", False, False), ("d", False, False), ("n", False, True)]


def test_facts_of_a_later_version_of_the_table_are_not_those_of_an_earlier(any_db: Database) -> None:
    """DDL while nobody reads: each row's facts are the wire's own, and those of the last version the catalogue's."""
    found = events(
        any_db,
        "INSERT INTO t VALUES (1, 10, 'a', 'b')",
        # The key moves to another column.
        "ALTER TABLE t DROP CONSTRAINT t_pkey, ALTER id DROP NOT NULL, ADD PRIMARY KEY (other)",
        "INSERT INTO t VALUES (NULL, 11, 'a', 'b')",
        # A column goes, and one of the same name and type comes, at another place.
        "ALTER TABLE t DROP v",
        "ALTER TABLE t ADD v text NOT NULL DEFAULT ''",
        "INSERT INTO t VALUES (NULL, 12, 'b', 'a')",
        before="CREATE TABLE t (id int PRIMARY KEY, other int NOT NULL, v text, w text)",
    )
    assert [definitions(event) for event in found] == [
        [("id", True, False), ("other", False, True), ("v", False, True), ("w", False, True)],
        [("id", False, True), ("other", True, False), ("v", False, True), ("w", False, True)],
        [("id", False, True), ("other", True, False), ("w", False, True), ("v", False, False)],
    ]


def test_a_table_that_was_dropped_or_renamed_tells_what_the_wire_does(any_db: Database) -> None:
    gone, renamed = events(
        any_db,
        "INSERT INTO gone VALUES (1, 'a')",
        "INSERT INTO t VALUES (1, 'a')",
        "DROP TABLE gone",
        "ALTER TABLE t RENAME TO u",
        before="CREATE TABLE gone (id int PRIMARY KEY, v text NOT NULL); CREATE TABLE t (LIKE gone INCLUDING ALL)",
    )
    assert definitions(gone) == definitions(renamed) == [("id", True, False), ("v", False, True)]
