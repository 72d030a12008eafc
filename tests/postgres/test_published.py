"""The tables of steps compared with what is published, on real servers: what is refused, what is only said, and why."""

from __future__ import annotations

from typing import Any

import pytest
from harness.database import Database

from pgoutput_source.errors import PublicationError
from pgoutput_source.postgres.checks import check
from pgoutput_source.postgres.connection import connect
from pgoutput_source.postgres.published import check_tables, remarks
from pgoutput_source.settings import SourceSettings

SCHEMA = """
CREATE TABLE orders (id int PRIMARY KEY);
CREATE TABLE "Items" (id int PRIMARY KEY);
CREATE TABLE payment (id int, at date, PRIMARY KEY (at, id)) PARTITION BY RANGE (at);
CREATE TABLE payment_2022 PARTITION OF payment FOR VALUES FROM ('2022-01-01') TO ('2023-01-01');
CREATE UNLOGGED TABLE cache (id int PRIMARY KEY);
CREATE VIEW recent AS SELECT * FROM orders;
CREATE PUBLICATION few FOR TABLE orders, payment;
CREATE PUBLICATION roots FOR TABLE orders, payment WITH (publish_via_partition_root = true);
CREATE PUBLICATION every FOR ALL TABLES;
CREATE PUBLICATION inserts FOR TABLE orders WITH (publish = 'insert');
"""


def of(db: Database, publication: str, **options: Any) -> SourceSettings:
    return SourceSettings.of(**{"dsn": db.dsn, "slot": f"{db.name}_s", "publication": publication} | options)


def test_a_table_that_will_never_come_is_refused_with_the_reason(any_db: Database) -> None:
    any_db.connect().execute(SCHEMA)
    for publication, table, says in (
        ("few", "ordres", "did you mean public.orders?"),
        ("few", "Items", 'ALTER PUBLICATION "few" ADD TABLE "public"."Items"'),
        ("few", "payment", "publish_via_partition_root = true"),
        ("every", "payment", "payment_2022"),
        ("roots", "payment_2022", "take public.payment"),
        ("every", "cache", "unlogged"),
        ("every", "recent", "is a view"),
    ):
        with connect(any_db.dsn) as conn, pytest.raises(PublicationError) as caught:
            check_tables(conn, of(any_db, publication), [("public", table)])
        assert says in str(caught.value), (publication, table)
        assert f"public.{table}" in caught.value.message
        assert "drop" not in str(caught.value)


def test_a_pattern_that_no_table_matches_is_said(db: Database, caplog: pytest.LogCaptureFixture) -> None:
    db.connect().execute(SCHEMA)
    with connect(db.dsn) as conn:
        check_tables(conn, of(db, "every"), [], patterns=["public.*", "*.Item?", "*.payment_[0-9]*"])
        assert caplog.text == ""
        check_tables(conn, of(db, "few"), [], patterns=["sales.*", "public.*"])
        assert caplog.messages == [
            "no table of publication 'few' matches 'sales.*', which a step takes; it has public.orders, "
            "public.payment_2022"
        ]


def test_a_table_that_comes_or_may_come_is_not_refused(any_db: Database, caplog: pytest.LogCaptureFixture) -> None:
    any_db.connect().execute(SCHEMA)
    with connect(any_db.dsn) as conn:
        for publication, table in (("few", "orders"), ("roots", "payment"), ("every", "payment_2022")):
            check_tables(conn, of(any_db, publication), [("public", table)])
        assert caplog.text == ""
        check_tables(conn, of(any_db, "every"), [("public", "oders")])  # may be created later
        assert "there is no table public.oders yet" in caplog.text
        assert "did you mean public.orders?" in caplog.text
        caplog.clear()
        check_tables(conn, of(any_db, "few"), [("public", "gone")], once=[("public", "gone")])
        assert "public.gone" in caplog.text  # what the slot holds of it still comes
        caplog.clear()
        check_tables(conn, of(any_db, "inserts"), [("public", "orders")])
        assert "no update and no delete and no truncate" in caplog.text


def test_what_may_surprise_is_remarked_beforehand(any_db: Database) -> None:
    with any_db.connect() as c:
        c.execute(SCHEMA)
        c.execute("CREATE TABLE log (_seq int PRIMARY KEY, words tsvector); CREATE TABLE bare ()")
    with connect(any_db.dsn) as conn:
        said = {
            p: " | ".join(r.text for r in remarks(conn, of(any_db, p, binary="auto"))) for p in ("every", "inserts")
        }

    for words in ("metadata columns: _seq", "public.payment is partitioned", "bare has no published columns", "words"):
        assert words in said["every"]
    assert (
        said["inserts"]
        == "publication 'inserts' publishes insert only: no update and no delete and no truncate will come"
    )


def test_a_typing_error_in_a_publication_lists_those_that_exist(any_db: Database) -> None:
    with any_db.connect() as c:
        c.execute(SCHEMA)
        c.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [f"{any_db.name}_s"])
    with connect(any_db.dsn) as conn, pytest.raises(PublicationError) as caught:
        check(conn, of(any_db, "insert"))

    assert "did you mean 'inserts'? the publications of this database are 'every', 'few', 'inserts', 'roots'" in str(
        caught.value
    )
    assert "drop" not in str(caught.value)
