"""Which tables a flow takes is known however it is built, and what will never come is an error at the start."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import bytewax.operators as op
import pytest
from bytewax.dataflow import Dataflow, Stream, operator
from bytewax.testing import TestingSink, TestingSource
from harness.database import Database
from harness.flow import confirmed, publish

import pgoutput_source.operators as cdc
from pgoutput_source import ChangeBatch, ChangeSet, ParquetSink, PgOutputSource, read, run
from pgoutput_source.dataflow.taken import taken_from
from pgoutput_source.errors import PublicationError


@operator
def nested(step_id: str, up: Stream[ChangeSet], name: str) -> Stream[ChangeBatch]:
    """An operator of a user's own around `cdc.table`."""
    return cdc.table("inner", op.map("same", up, lambda changes: changes), name)


def test_the_tables_of_a_source_are_those_of_all_steps_below_it() -> None:
    one, two = (PgOutputSource("", slot=name, publication="p") for name in ("one", "two"))
    flow = Dataflow("f")
    first, second = op.input("one", flow, one), op.input("two", flow, two)
    other = op.input("other", flow, TestingSource([ChangeSet(())]))
    both = op.merge("both", first, second)
    split = op.branch("split", op.redistribute("spread", first), lambda changes: len(changes) > 1)
    cdc.table("direct", first, "public.direct")
    cdc.table("again", first, "public.direct")
    cdc.table("large", split.trues, 'a."b.c"')
    nested("own", split.falses, "public.nested")
    cdc.table("of both", both, "public.shared")
    cdc.table("of another", other, "public.elsewhere")
    keyed = op.key_on("keyed", second, lambda _: "k")
    cdc.table("late", op.key_rm("unkeyed", keyed), "public.late")
    cdc.tables("some", first, ["sales.*", "public.named"], exclude="sales.old*")
    cdc.tables("all", second)
    cdc.output("out", second, ParquetSink("out/{table}", tables=["shop.?"]))

    assert one.tables == {
        ("public", "direct"),
        ("a", "b.c"),
        ("public", "nested"),
        ("public", "shared"),
        ("public", "named"),
    }
    assert two.tables == {("public", "shared"), ("public", "late")}
    assert [taken_from(source)[1] for source in (one, two)] == [{"sales.*"}, {"shop.?"}]


def test_all_tables_that_match_come_those_of_later_too(db: Database, caplog: pytest.LogCaptureFixture) -> None:
    out: list[ChangeBatch] = []
    flow = Dataflow("some")
    changes = op.input("pg", flow, PgOutputSource(db.dsn, slot="cdc", publication="cdc", until="current"))
    op.output("out", cdc.tables("some", changes, ["public.*", "sales.*"], exclude="*.audit_*"), TestingSink(out))
    with db.connect() as c:
        c.execute("CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE audit_1 (id int PRIMARY KEY)")
        c.execute("CREATE TABLE audit_2 (id int PRIMARY KEY, _op int)")  # it can't be decoded, and nothing takes it
        c.execute("CREATE SCHEMA sales; CREATE SCHEMA hr; CREATE TABLE hr.c (id int PRIMARY KEY)")
        publish(db)
        c.execute("CREATE TABLE sales.b (id int PRIMARY KEY)")
        for table in ("a", "audit_1", "audit_2", "sales.b", "hr.c", "a"):
            c.execute(f"INSERT INTO {table} (id) SELECT coalesce(max(id), 0) + 1 FROM {table}".encode())
        run(flow)
    assert [(batch.table, batch.data["id"].to_pylist()) for batch in out] == [("public.a", [1, 2]), ("sales.b", [1])]
    assert "matches" not in caplog.text


def history(db: Database, out: Path, table: str) -> Dataflow:
    flow = Dataflow("history")
    changes = op.input("pg", flow, PgOutputSource(db.dsn, slot="cdc", publication="cdc", until="current"))
    cdc.output("out", nested("t", changes, table), ParquetSink(out))
    op.output("rest", changes, TestingSink([]))
    return flow


def test_a_table_that_will_never_come_ends_the_flow_before_anything_is_acknowledged(
    db: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE orders (id int PRIMARY KEY)")
        c.execute("CREATE TABLE items (id int PRIMARY KEY)")
        publish(db)
        c.execute("DROP PUBLICATION cdc; CREATE PUBLICATION cdc FOR TABLE orders, items")
        c.execute("SELECT pg_replication_slot_advance('cdc', pg_current_wal_lsn())")
        c.execute("INSERT INTO orders VALUES (1)")
        before = confirmed(db)
        with pytest.raises(PublicationError, match=r"no table public\.ordres") as caught:
            run(history(db, tmp_path / "out", "public.ordres"), recovery=tmp_path / "store")
        assert "did you mean public.orders?" in (caught.value.hint or "")
        assert confirmed(db) == before

        # With the right name it runs; and a table that it had goes on, though nothing of it will come again.
        for rows in (1, 2):
            flow = history(db, tmp_path / "out", "public.orders")
            run(flow, recovery=tmp_path / "store", epoch=timedelta(0))
            assert read(tmp_path / "out").count_rows() == rows
            c.execute("ALTER PUBLICATION cdc DROP TABLE orders")
            if rows == 1:
                c.execute("ALTER PUBLICATION cdc ADD TABLE orders; INSERT INTO orders VALUES (2)")
        run(history(db, tmp_path / "out", "public.orders"), recovery=tmp_path / "store")
        assert "public.orders is not in" in caplog.text
        with pytest.raises(PublicationError, match=r"public\.orders is not in"):
            run(history(db, tmp_path / "out", "public.orders"))
