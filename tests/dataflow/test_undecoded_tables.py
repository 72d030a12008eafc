"""A table whose changes can't be decoded concerns those who take it, and nobody else."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import bytewax.operators as op
import psycopg
import pyarrow as pa
import pytest
from bytewax.dataflow import Dataflow, Stream
from harness.database import Database

import pgoutput_source.operators as cdc
from pgoutput_source import ParquetSink, PgOutputReader, PgOutputSource, peek, read, run
from pgoutput_source.changes import ChangeBatch, ChangeSet
from pgoutput_source.changes.batches import UndecodedBatch, known_fields
from pgoutput_source.errors import ConfigurationError, DecodeError, PgOutputError, SchemaChanged
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.testing import batch


class Kind(NamedTuple):
    """How changes of `audit`, which has one row already, come to be undecodable with `options`.

    With the options `mend` they can be decoded, and have these `ids`; None if there are no such options.
    """

    table: str
    poison: str
    error: type[PgOutputError]
    words: str
    options: Mapping[str, Any] = MappingProxyType({})
    mend: Mapping[str, Any] | None = None
    ids: tuple[int, ...] = (1, 2)


KINDS = {
    "a column with a name of ours": Kind(
        "id int, _op text",
        "INSERT INTO audit VALUES (2, 'x')",
        ConfigurationError,
        "column _op",
        mend={"metadata_prefix": "cdc_"},
    ),
    "a truncate of such a table": Kind("id int, _seq int", "TRUNCATE audit", ConfigurationError, "column _seq"),
    "a misfit": Kind(
        "id int, n numeric(8, 2)",
        "INSERT INTO audit VALUES (2, 'NaN')",
        DecodeError,
        "column n, type numeric",
        {"on_misfit": "error"},
        {},
    ),
    "a misfit of an old row": Kind(
        "id int, d date DEFAULT 'infinity'",
        "ALTER TABLE audit REPLICA IDENTITY FULL; UPDATE audit SET id = 2, d = NULL",
        DecodeError,
        "column d, type date",
        {"on_misfit": "error"},
        {},
    ),
    "a type that is gone, in binary": Kind(
        "id int, n int",
        "CREATE TYPE mood AS ENUM ('sad'); ALTER TABLE audit ADD m mood; INSERT INTO audit VALUES (2, 2, 'sad');"
        "ALTER TABLE audit DROP m; DROP TYPE mood",
        DecodeError,
        "can't be read of this type",
        {"binary": "auto"},
        {"binary": "off"},
    ),
    "a change of shape": Kind(
        "id int, n int",
        "ALTER TABLE audit ADD more int; INSERT INTO audit VALUES (2)",
        SchemaChanged,
        "now column 'more' integer",
        {"on_schema_change": "fail"},
        {},
    ),
}

Taking = Callable[[Stream[ChangeSet]], Stream[ChangeBatch]]


def flow(db: Database, out: Path, taking: Taking, **options: Any) -> None:
    """What `taking` takes, as files in `out`; the slot is called like this folder."""
    dataflow = Dataflow("flow")
    source = PgOutputSource(db.dsn, slot=out.name, publication="p", until="current", **options)
    cdc.output("out", taking(op.input("pg", dataflow, source)), ParquetSink(out))
    run(dataflow, recovery=out.with_suffix(".store"), epoch=timedelta(0))


def orders(changes: Stream[ChangeSet]) -> Stream[ChangeBatch]:
    return cdc.table("orders", changes, "public.orders")


def audit(changes: Stream[ChangeSet]) -> Stream[ChangeBatch]:
    return cdc.table("audit", changes, "public.audit")


def by_hand(changes: Stream[ChangeSet]) -> Stream[ChangeBatch]:
    return op.flat_map("orders", changes, lambda s: [b for b in s if b.table == "public.orders"])


def everything(changes: Stream[ChangeSet]) -> Stream[ChangeBatch]:
    return op.flat_map("all", changes, lambda s: s.batches)


TAKING: dict[str, Taking] = {"orders": orders, "by_hand": by_hand, "audit": audit, "everything": everything}


def ids(out: Path, table: str) -> list[int]:
    return sorted(read(out, table=table).to_table()["id"].to_pylist())


def poisoned(db: Database, kind: Kind) -> psycopg.Connection[Any]:
    """Changes of `orders` around those of `audit`, in a slot for each way to take them."""
    c = db.connect()
    c.execute(f"CREATE TABLE orders (id int PRIMARY KEY); CREATE TABLE audit ({kind.table})".encode())
    c.execute("CREATE PUBLICATION p FOR ALL TABLES")
    for slot in TAKING:
        c.execute(f"SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')".encode())
    c.execute("INSERT INTO orders VALUES (1)")
    c.execute("INSERT INTO audit VALUES (1)")
    c.execute(f"BEGIN; INSERT INTO orders VALUES (2); {kind.poison}; INSERT INTO orders VALUES (3); COMMIT".encode())
    c.execute("INSERT INTO orders VALUES (4)")
    return c


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_table_that_no_step_takes_fails_no_flow_and_one_that_is_taken_loses_nothing(
    db: Database, tmp_path: Path, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    c = poisoned(db, kind)
    end = Lsn(c.execute("SELECT pg_current_wal_lsn()::text").fetchall()[0][0])

    for name in ("orders", "by_hand"):
        caplog.clear()
        flow(db, tmp_path / name, TAKING[name], **kind.options)
        assert ids(tmp_path / name, "public.orders") == [1, 2, 3, 4]
        said = [r.message for r in caplog.records if "changes of public.audit can't be decoded" in r.message]
        assert len(said) == 1
        assert kind.words in said[0]
        flow(db, tmp_path / name, TAKING[name], **kind.options)
        assert ids(tmp_path / name, "public.orders") == [1, 2, 3, 4]

    for name in ("audit", "everything"):
        for _ in range(2):
            with pytest.raises(kind.error) as caught:
                flow(db, tmp_path / name, TAKING[name], **kind.options)
            assert kind.words in str(caught.value)
            assert caught.value.table == "public.audit"
            assert caught.value.lsn
        if kind.mend is not None:
            flow(db, tmp_path / name, TAKING[name], **kind.mend)
            assert ids(tmp_path / name, "public.audit") == list(kind.ids)
            if name == "everything":
                assert ids(tmp_path / name, "public.orders") == [1, 2, 3, 4]

    done = "SELECT slot_name, confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = ANY (%s)"
    mended = kind.mend is not None
    assert dict(c.execute(done, [str(end), [*TAKING]]).fetchall()) == {
        "orders": True, "by_hand": True, "audit": mended, "everything": mended
    }  # fmt: skip


@pytest.mark.parametrize("kind", [KINDS["a column with a name of ours"], KINDS["a misfit"]], ids=["name", "misfit"])
def test_a_reader_fails_where_it_touches_the_table(db: Database, kind: Kind) -> None:
    poisoned(db, kind)
    options = {"publication": "p", "until": "current", **kind.options}
    seen: list[int] = []
    with PgOutputReader(db.dsn, slot="by_hand", **options) as reader:
        for changes in reader.sets():
            seen += changes.table("public.orders")["id"].to_pylist() if changes.of("public.orders") else []
            for touch in (changes.events, lambda changes=changes: changes.table("public.audit")):
                if "public.audit" in changes.tables:
                    with pytest.raises(kind.error, match=kind.words):
                        list(touch())
            reader.ack(changes)
    assert seen == [1, 2, 3, 4]
    with PgOutputReader(db.dsn, slot="by_hand", **options) as reader:
        assert list(reader) == []  # all is acknowledged

    with PgOutputReader(db.dsn, slot="everything", **options) as reader, pytest.raises(kind.error, match=kind.words):
        list(reader)

    found = peek(db.dsn, slot="everything", publication="p")
    assert found.table("public.orders")["id"].to_pylist() == [1, 2, 3, 4]
    if kind.error is ConfigurationError:
        with pytest.raises(ConfigurationError, match=kind.words):
            found.table("public.audit")


def test_the_initial_copy_passes_over_a_table_that_no_step_takes(db: Database, tmp_path: Path) -> None:
    c = db.connect()
    c.execute("CREATE TABLE orders (id int PRIMARY KEY); INSERT INTO orders SELECT generate_series(1, 3)")
    c.execute("CREATE TABLE audit (id int PRIMARY KEY, _op text); INSERT INTO audit VALUES (1, 'x')")
    c.execute("CREATE TABLE amounts (id int PRIMARY KEY, n numeric(8, 2)); INSERT INTO amounts VALUES (1, 'NaN')")
    c.execute("CREATE TABLE keyless (_op int, n numeric(8, 2)); INSERT INTO keyless VALUES (1, 'NaN')")
    options = {"create": True, "snapshot": "initial", "on_misfit": "error"}
    flow(db, tmp_path / "orders", orders, **options)
    c.execute(
        "INSERT INTO orders VALUES (4); INSERT INTO audit VALUES (2); TRUNCATE amounts; DELETE FROM audit WHERE id < 2"
    )
    flow(db, tmp_path / "orders", orders, **options)
    assert ids(tmp_path / "orders", "public.orders") == [1, 2, 3, 4]

    with pytest.raises(ConfigurationError, match="column _op"):
        flow(db, tmp_path / "audit", audit, **options)


def test_a_table_that_is_renamed_and_must_not_change_fails_every_flow(db: Database, tmp_path: Path) -> None:
    # Whoever takes it by its name would not notice that its changes go elsewhere.
    c = poisoned(db, Kind("id int", "INSERT INTO audit VALUES (2)", SchemaChanged, ""))
    c.execute("ALTER TABLE audit RENAME TO log; INSERT INTO log VALUES (3)")

    with pytest.raises(SchemaChanged, match=r"no more public\.audit, now public\.log"):
        flow(db, tmp_path / "orders", orders, on_schema_change="fail")


def test_an_undecoded_batch_knows_all_but_its_values_and_travels_to_other_processes() -> None:
    made = batch("public.t", [("I", {"id": 1}), ("U", {"id": 1}), ("D", {"id": 1})])
    error = DecodeError("no", table="public.t", column="id", lsn=7, hint="mend it")
    unreadable = UndecodedBatch(made.schema, made.data.select([field.name for field in known_fields()]), error)

    for one in (unreadable, pickle.loads(pickle.dumps(unreadable))):
        assert (len(one), one.table, one.first, one.last) == (3, made.table, made.first, made.last)
        assert all(one.metadata(name).equals(made.metadata(name)) for name in ("op", "seq", "lsn", "xid", "commit_ts"))
        assert one == unreadable
        for touch in (
            lambda one=one: one.data,
            lambda one=one: pa.record_batch(one),
            lambda one=one: list(one.events()),
            lambda one=one: ChangeSet((made, one)).of("public.t"),
            lambda one=one: list(ChangeSet((made, one)).events()),
        ):
            with pytest.raises(DecodeError) as caught:
                touch()
            assert str(caught.value) == str(error)
