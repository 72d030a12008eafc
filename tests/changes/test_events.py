"""Events: their values given back to PostgreSQL, their JSON, their order, their identity; on a real server."""

from __future__ import annotations

import copy
import json
import pickle
import struct
import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from itertools import zip_longest
from typing import Any

import bytewax.operators as op
import pyarrow.compute as pc
import pytest
from bytewax.dataflow import Dataflow
from bytewax.testing import TestingSink, TestingSource, run_main
from harness.database import Database
from harness.type_cases import CASES
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from psycopg import sql
from pydantic import ValidationError

import pgoutput_source.operators as cdc
from pgoutput_source.changes import ChangeSet, Position
from pgoutput_source.changes.exact_json import to_json
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.events import ChangeEvent, TableFacts, events_of, row_model
from pgoutput_source.postgres.connection import PINNED
from pgoutput_source.protocol.wire import Lsn

SYSTEM, SLOT = "7000000000000000000", "events"


class Captured:
    """A database whose every change since the beginning can be looked at, again and again."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.connection = db.connect(
            options=" ".join(f"-c {name}={value}" for name, value in (PINNED | {"search_path": "public"}).items())
        )
        self.execute = self.connection.execute
        self.execute("CREATE PUBLICATION p FOR ALL TABLES")
        self.slot = f"{SLOT}_{db.name}"
        self.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [self.slot])

    def frames(self) -> list[bytes]:
        found = self.connection.execute(
            "SELECT lsn - '0/0'::pg_lsn, data"
            " FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL, 'proto_version', '1', 'publication_names', 'p')",
            [self.slot],
            binary=True,
        )
        return [b"w" + struct.pack(">QQq", int(lsn), int(lsn), 0) + data for lsn, data in found]

    def changes(self, step: int = 1 << 30, slot: str = SLOT) -> list[ChangeSet]:
        assembler = Assembler((("system", SYSTEM), ("database", self.db.name), ("slot", slot)))
        frames = self.frames()
        return [assembler.feed(frames[at : at + step]) for at in range(0, len(frames), step)]

    def events(self, step: int = 1 << 30, slot: str = SLOT) -> list[ChangeEvent]:
        return [event for changes in self.changes(step, slot) for event in changes.events()]


@pytest.fixture
def captured(db: Database) -> Captured:
    return Captured(db)


def mixed(captured: Captured, rounds: int = 30) -> None:
    """Transactions over several tables, with updates, key changes, deletes and truncates between each other."""
    for name in ("a", "b", "c"):
        captured.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, v text)")
    captured.execute("ALTER TABLE b REPLICA IDENTITY FULL")
    for i in range(rounds):
        with captured.connection.transaction():
            for name in ("a", "b", "c", "a"):
                captured.execute(
                    sql.SQL("INSERT INTO {} VALUES (%s, 'v') ON CONFLICT (id) DO UPDATE SET v = 'w'").format(
                        sql.Identifier(name)
                    ),
                    [i // 2],
                )
            captured.execute("UPDATE a SET id = id + 1000 WHERE id % 5 = 0")
            if i % 7 == 3:
                captured.execute("DELETE FROM b WHERE id % 3 = 0")
            if i % 10 == 9:
                captured.execute("TRUNCATE a, c")


def back(value: Any, kind: str) -> Any:
    """A value of an event's JSON as `json_populate_record` reads it: what is an object becomes PostgreSQL's text."""
    match value:
        case {"months": months, "days": days, "microseconds": us}:
            return f"{months} mons {days} days {us} us"
        case {"x": x, "y": y}:
            return f"({x},{y})"
        case {"empty": True}:
            return "empty"
        case {"lower": lower, "upper": upper, "lower_inc": lower_inc, "upper_inc": upper_inc}:
            low, high = ("" if bound is None else f'"{bound}"' for bound in (lower, upper))
            return f"{'[' if lower_inc else '('}{low},{high}{']' if upper_inc else ')'}"
        case int() if kind == "pg_lsn":
            return str(Lsn(value))
        case list() if kind.endswith("vector"):
            return " ".join(map(str, value))
        case list() if kind.endswith("multirange"):
            return "{" + ",".join(back(v, kind) for v in value) + "}"
        case list() if kind.endswith("[]") and "json" not in kind:
            return [back(v, kind.removesuffix("[]")) for v in value]
    return value


@given(data=st.data())
@settings(max_examples=4, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
def test_every_value_of_every_type_comes_back_to_postgresql_through_the_events_json(
    captured: Captured, data: st.DataObject
) -> None:
    # PostgreSQL does not read these back itself as it writes them: a lone byte, and the class that is none.
    cases = [case for case in CASES if '"char"' not in case.sql and case.sql != "regclass"]
    assert len({case.sql for case in cases}) > 80
    columns = [f"c{i}" for i in range(len(cases))]
    documents = [c for c, case in zip(columns, cases, strict=True) if "json" in case.sql]
    declared = ", ".join(f"{c} {case.sql}" for c, case in zip(columns, cases, strict=True))
    captured.execute("DROP TABLE IF EXISTS t")
    captured.execute(f"CREATE TABLE t (n serial PRIMARY KEY, {declared})")
    # In a JSON document a number that no float holds comes as a string: see the next test.
    samples = [
        [value for value in [*case.edges, *data.draw(st.lists(case.inputs, max_size=5))] if "e400" not in value]
        for case in cases
    ]
    marks = ", ".join(
        f"CASE WHEN pg_input_is_valid(%s::text, '{case.sql}') THEN (%s::text)::{case.sql} END" for case in cases
    )
    for row in zip_longest(*samples):
        twice = [value for value in row for _ in range(2)]
        captured.execute(f"INSERT INTO t ({', '.join(columns)}) VALUES ({marks})", twice)
    relation = captured.execute("SELECT 't'::regclass::oid").fetchall()[0][0]
    events = [e for e in captured.events() if e.table_schema.relation_id == relation]
    assert len(events) == max(map(len, samples)) > 10
    for event in events:
        after = json.loads(event.model_dump_json())["after"]
        ours = {c: back(after[c], case.sql) for c, case in zip(columns, cases, strict=True)}
        # JSON is compared as what it means: of numbers only the value comes back, not 1.10's last digit.
        same = ", ".join(
            f"coalesce(to_jsonb(theirs.{c}), 'null') = sent.j -> '{c}'"
            if "json" in case.sql
            else f"theirs.{c}::text IS NOT DISTINCT FROM ours.{c}::text"
            for c, case in zip(columns, cases, strict=True)
        )
        answer = captured.execute(
            f"SELECT {same} FROM t AS theirs, (SELECT %s::text::jsonb AS j) AS sent,"
            " json_populate_record(NULL::t, %s::text::json) AS ours WHERE theirs.n = %s",
            [json.dumps(ours), json.dumps(ours | dict.fromkeys(documents)), after["n"]],
        ).fetchall()
        differ = [(k.sql, after[c]) for c, k, ok in zip(columns, cases, answer[0], strict=True) if not ok]
        assert not differ


def test_values_are_pythons_own(captured: Captured) -> None:
    captured.execute(
        "CREATE TABLE t (id int PRIMARY KEY, price numeric(10,2), amount numeric, at timestamptz, local timestamp,"
        " day date, real real, doc jsonb, bytes bytea, flag bool)"
    )
    captured.execute(
        "INSERT INTO t VALUES (1, 9.5, 1e-7, '2024-02-29 12:00+02', '2024-02-29 12:00', '2024-02-29', 0.1,"
        """'{"n": 1.5, "long": 0.12345678901234567890, "list": [true, null]}', '\\x00ff', true),"""
        " (2, 'NaN', 'Infinity', 'infinity', '0044-03-15 BC', '12024-02-29', 'NaN', '1e400', '', false)"
    )
    one, two = (event.after for event in captured.events())
    assert one == {
        "id": 1, "price": Decimal("9.50"), "amount": Decimal("1e-7"), "at": datetime(2024, 2, 29, 10, tzinfo=UTC),
        "local": datetime(2024, 2, 29, 12), "day": date(2024, 2, 29), "real": 0.1,
        "doc": {"n": 1.5, "long": Decimal("0.12345678901234567890"), "list": [True, None]}, "bytes": b"\0\xff",
        "flag": True,
    }  # fmt: skip
    assert str(one["price"]) == "9.50"
    assert two is not None
    assert str(two.pop("price")) == "NaN"
    assert str(two.pop("real")) == "nan"
    assert two == {
        "id": 2, "amount": Decimal("Infinity"), "at": "infinity", "local": "0044-03-15 00:00:00 BC",
        "day": "12024-02-29", "doc": Decimal("1e400"), "bytes": b"", "flag": False,
    }  # fmt: skip


def test_the_json_is_pypgoutputs(captured: Captured) -> None:
    captured.execute("CREATE TABLE readme (id integer PRIMARY KEY, price numeric(8,2), created_at timestamptz)")
    captured.execute("INSERT INTO readme VALUES (1, 2.5, '2022-01-14 17:22:10.29674+00')")
    captured.execute("UPDATE readme SET id = 2")
    relation = captured.execute("SELECT 'readme'::regclass::oid").fetchall()[0][0]
    insert, update = captured.events()
    got = json.loads(insert.json(indent=2))
    assert isinstance(got["lsn"], int)
    assert got["lsn"] < got["transaction"]["begin_lsn"]
    assert datetime.fromisoformat(got["transaction"]["commit_ts"]).tzinfo is not None
    expected = {
        "op": "I",
        "message_id": got["message_id"],
        "lsn": got["lsn"],
        "transaction": {
            "tx_id": insert.transaction.tx_id,
            "begin_lsn": got["transaction"]["begin_lsn"],
            "commit_ts": insert.transaction.commit_ts.isoformat(),
        },
        "table_schema": {
            "column_definitions": [
                {"name": "id", "part_of_pkey": True, "type_id": 23, "type_name": "integer", "optional": False},
                {
                    "name": "price",
                    "part_of_pkey": False,
                    "type_id": 1700,
                    "type_name": "numeric(8,2)",
                    "optional": True,
                },
                {
                    "name": "created_at",
                    "part_of_pkey": False,
                    "type_id": 1184,
                    "type_name": "timestamp with time zone",
                    "optional": True,
                },
            ],
            "db": captured.db.name,
            "schema_name": "public",
            "table": "readme",
            "relation_id": relation,
        },
        "before": None,
        "after": {"id": 1, "price": "2.50", "created_at": "2022-01-14T17:22:10.296740+00:00"},
    }
    assert insert.json(indent=2) == json.dumps(expected, indent=2)  # the keys' order and the spaces as well
    assert json.loads(insert.model_dump_json()) == expected
    assert (update.before, update.row["id"]) == ({"id": 1}, 2)
    read = ChangeEvent.model_validate_json(insert.model_dump_json())
    assert read.message_id == insert.message_id
    with pytest.raises(ConfigurationError):
        _ = read.position


@pytest.mark.parametrize("step", [1 << 30, 37, 1])
def test_events_of_all_tables_come_in_the_order_in_which_postgresql_sent_them(captured: Captured, step: int) -> None:
    mixed(captured)
    sent = []
    for frame in captured.frames():
        tag = chr(frame[25])
        if tag in "IUD":
            sent.append((tag, struct.unpack_from(">I", frame, 26)[0]))
        elif tag == "T":
            sent += [("T", i) for i in struct.unpack_from(f">{struct.unpack_from('>I', frame, 26)[0]}I", frame, 31)]
    events = captured.events(step)
    assert [(e.op, e.table_schema.relation_id) for e in events] == sent
    assert {op for op, _ in sent} == set("IUDT")
    positions = [e.position for e in events]
    assert positions == sorted(set(positions))


def test_message_ids_are_equal_under_replay_and_differ_otherwise(captured: Captured) -> None:
    mixed(captured)
    once, again = captured.events(), captured.events(step=11)
    assert once == again
    ids = {e.message_id for e in once}
    assert ids == {e.message_id for e in again}
    assert len(ids) == len(once)
    assert ids.isdisjoint(e.message_id for e in captured.events(slot="another"))
    for event in once:
        name = f"pgoutput:{SYSTEM}/{SLOT}/{event.position}"
        assert event.message_id == uuid.uuid5(uuid.NAMESPACE_URL, name)


def test_an_event_is_what_pydantic_would_have_made(captured: Captured) -> None:
    mixed(captured, 10)
    for event in captured.events():
        made = ChangeEvent(**{name: getattr(event, name) for name in ChangeEvent.model_fields})
        assert made == event
        assert ChangeEvent.model_validate(event.model_dump() | {"seq": event.seq}) == event
        for twin in (
            pickle.loads(pickle.dumps(event)),
            copy.deepcopy(event),
            event.model_copy(update={"op": event.op}),
        ):
            assert twin == event
            assert (hash(twin), repr(twin), twin.model_dump_json()) == (hash(made), repr(made), made.model_dump_json())
        with pytest.raises(ValidationError):
            event.op = "X"


def test_before_is_the_key_or_the_whole_row_as_the_replica_identity_says(captured: Captured) -> None:
    captured.execute("CREATE TABLE t (a int, b int NOT NULL, c text, PRIMARY KEY (a))")
    captured.execute("CREATE UNIQUE INDEX i ON t (b)")
    captured.execute("INSERT INTO t VALUES (1, 10, 'x')")
    for identity in ("DEFAULT", "USING INDEX i", "FULL"):
        captured.execute(f"ALTER TABLE t REPLICA IDENTITY {identity}")
        captured.execute("UPDATE t SET c = c || '!'")
        captured.execute("UPDATE t SET a = a + 1, b = b + 1")
    captured.execute("DELETE FROM t")
    assert [(e.op, e.before, e.after) for e in captured.events()] == [
        ("I", None, {"a": 1, "b": 10, "c": "x"}),
        ("U", None, {"a": 1, "b": 10, "c": "x!"}),
        ("U", {"a": 1}, {"a": 2, "b": 11, "c": "x!"}),
        ("U", None, {"a": 2, "b": 11, "c": "x!!"}),
        ("U", {"b": 11}, {"a": 3, "b": 12, "c": "x!!"}),
        ("U", {"a": 3, "b": 12, "c": "x!!"}, {"a": 3, "b": 12, "c": "x!!!"}),
        ("U", {"a": 3, "b": 12, "c": "x!!!"}, {"a": 4, "b": 13, "c": "x!!!"}),
        ("D", {"a": 4, "b": 13, "c": "x!!!"}, None),
    ]


def test_a_large_unchanged_value_is_absent_and_never_none(captured: Captured) -> None:
    captured.execute("CREATE TABLE t (id int PRIMARY KEY, big text, big2 text, n int)")
    captured.execute("ALTER TABLE t ALTER big SET STORAGE EXTERNAL, ALTER big2 SET STORAGE EXTERNAL")
    captured.execute("INSERT INTO t VALUES (1, repeat('x', 10000), NULL, 1)")
    captured.execute("UPDATE t SET n = 2")
    captured.execute("ALTER TABLE t REPLICA IDENTITY FULL")
    captured.execute("UPDATE t SET n = 3")
    _, partial, full = captured.events()
    assert partial.after == {"id": 1, "big2": None, "n": 2}
    assert partial.unchanged == ("big",)
    assert "big" not in json.loads(partial.model_dump_json())["after"]
    assert full.after == {"id": 1, "big": "x" * 10000, "big2": None, "n": 3}
    assert full.unchanged == ()
    (batch,) = (b for b in captured.changes()[0].of("public.t") if b.schema.replica_identity == "d")
    with pytest.raises(ValidationError):
        row_model(batch.schema).model_validate(partial.after)


def test_misfits_of_the_old_row_are_exact_as_well(captured: Captured) -> None:
    captured.execute("CREATE TABLE t (id int PRIMARY KEY, day date, price numeric(5,1))")
    captured.execute("ALTER TABLE t REPLICA IDENTITY FULL")
    captured.execute("INSERT INTO t VALUES (1, 'infinity', 'NaN')")
    captured.execute("UPDATE t SET day = '-infinity', price = 1")
    captured.execute("DELETE FROM t")
    _, update, delete = captured.events()
    assert update.before is not None
    assert (update.before["day"], str(update.before["price"])) == ("infinity", "NaN")
    assert update.after == {"id": 1, "day": "-infinity", "price": Decimal("1.0")}
    assert (delete.before, delete.after) == (update.after, None)
    assert delete.row == update.after


def test_the_catalogues_facts_win_over_the_replica_identity(captured: Captured) -> None:
    captured.execute("CREATE TABLE t (id int PRIMARY KEY, v text NOT NULL)")
    captured.execute("ALTER TABLE t REPLICA IDENTITY FULL")
    captured.execute("INSERT INTO t VALUES (1, 'x')")
    (changes,) = captured.changes()

    def seen(events: Iterator[ChangeEvent]) -> list[tuple[str, bool, bool]]:
        return [(c.name, c.part_of_pkey, c.optional) for e in events for c in e.table_schema.column_definitions]

    assert seen(changes.events()) == [("id", False, True), ("v", False, True)]
    facts = TableFacts(frozenset(["id"]), frozenset(["id", "v"]))
    assert seen(events_of(changes, lambda schema: facts)) == [("id", True, False), ("v", False, False)]


def test_declared_types_are_written_as_postgresql_writes_them(captured: Captured) -> None:
    kinds = ("integer", "numeric(10,2)", "numeric", "varchar(20)", "char(3)", "timestamp(3)", "timestamptz(0)",
             "time(2)", "text", "double precision", "boolean", "uuid", "jsonb", "bytea", "date")  # fmt: skip
    captured.execute(f"CREATE TABLE t ({', '.join(f'c{i} {kind}' for i, kind in enumerate(kinds))})")
    captured.execute("INSERT INTO t DEFAULT VALUES")
    (event,) = captured.events()
    theirs = captured.execute(
        "SELECT format_type(atttypid, atttypmod) FROM pg_attribute"
        " WHERE attrelid = 't'::regclass AND attnum > 0 ORDER BY attnum"
    ).fetchall()
    assert [(c.type_name,) for c in event.table_schema.column_definitions] == theirs


def test_a_row_model_takes_what_events_and_their_json_hold(captured: Captured) -> None:
    captured.execute(
        'CREATE TABLE "Line items" (id int PRIMARY KEY, price numeric(10,2), at timestamptz, day date, bytes bytea,'
        ' doc jsonb, "class" text, "order no" int, json text, _private int, "1st" int)'
    )
    captured.execute(
        """INSERT INTO "Line items" VALUES (1, 9.5, now(), 'infinity', '\\x00ff', '{"a": 1}', 'c', 2, 'j', 3, 4),"""
        " (2, 'NaN', '2024-02-29', '2024-02-29', '', '[]', NULL, NULL, NULL, NULL, NULL)"
    )
    (changes,) = captured.changes()
    model = row_model(changes.batches[0].schema)
    assert model is row_model(changes.batches[0].schema)
    assert model.__name__ == "LineItems"
    for event in changes.events():
        row = model.model_validate(event.after)
        assert repr(row.model_dump(by_alias=True)) == repr(event.after)
        again = model.model_validate(json.loads(event.model_dump_json())["after"])
        assert to_json(again.model_dump()) == to_json(row.model_dump())
    first: Any = model.model_validate(next(changes.events()).after)
    assert (first.class_, first.order_no, first.json_, first.private, first.column_1st) == ("c", 2, "j", 3, 4)
    for wrong in ({"id": "x"}, {"id": None}, {"other": 1}):
        with pytest.raises(ValidationError):
            model.model_validate(dict(next(changes.events()).row) | wrong)


def test_events_follow_what_is_left_of_a_batch(captured: Captured) -> None:
    captured.execute("CREATE TABLE t (id int PRIMARY KEY, secret text, v text)")
    captured.execute("INSERT INTO t SELECT i, 's', 'v' FROM generate_series(1, 5000) i")
    captured.execute("DELETE FROM t WHERE id = 7")
    batch = captured.changes()[0].batches[0]
    data = batch.data.drop_columns(["secret"]).filter(pc.field("id") > 4998)
    left = list(batch.replace(data).events())
    assert [e.after for e in left] == [{"id": 4999, "v": "v"}, {"id": 5000, "v": "v"}]
    assert [c.name for c in left[0].table_schema.column_definitions] == ["id", "v"]
    assert left[0].unchanged == ()
    assert left[0].position == Position(Lsn(left[0].transaction.begin_lsn), 4998)
    assert left == [e.model_copy(update={"after": left[i].after, "table_schema": left[i].table_schema})
                    for i, e in enumerate(e for e in batch.events() if e.row["id"] > 4998)]  # fmt: skip


def test_the_operator_gives_the_same_events_in_the_same_order(captured: Captured) -> None:
    mixed(captured, 10)
    out: list[ChangeEvent] = []
    flow = Dataflow("events")
    sets = op.input("in", flow, TestingSource(captured.changes(step=20)))
    op.output("out", cdc.events("events", sets), TestingSink(out))
    run_main(flow)  # type: ignore[no-untyped-call]
    assert out == captured.events()
    of_one: list[ChangeEvent] = []
    flow = Dataflow("events_of_one")
    batches = cdc.table("b", op.input("in", flow, TestingSource(captured.changes())), "public.b")
    op.output("out", cdc.events("events", batches), TestingSink(of_one))
    run_main(flow)  # type: ignore[no-untyped-call]
    assert of_one == [e for e in out if e.table == "public.b"]
