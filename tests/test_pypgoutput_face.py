"""What worked with pypgoutput 0.0.3 works here: the example of its README, and how its reader behaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from harness.database import Database
from psycopg.conninfo import conninfo_to_dict

from pgoutput_source.errors import PublicationError, SlotInUse
from pgoutput_source.pypgoutput import LogicalReplicationReader

ROOT = Path(__file__).parents[1]

# The example, but for its import and the name of the slot, which is one for the whole server.
README = """
import os
import pgoutput_source as pypgoutput

HOST = os.environ.get("PGHOST")
PORT = os.environ.get("PGPORT")
DATABASE_NAME = os.environ.get("PGDATABASE")
USER = os.environ.get("PGUSER")
PASSWORD = os.environ.get("PGPASSWORD")


cdc_reader = pypgoutput.LogicalReplicationReader(
                publication_name="test_pub",
                slot_name="test_slot",
                host=HOST,
                database=DATABASE_NAME,
                port=PORT,
                user=USER,
                password=PASSWORD,
            )
for message in cdc_reader:
    print(message.json(indent=2))

cdc_reader.stop()
"""


def connection_values(db: Database) -> dict[str, str]:
    parts = conninfo_to_dict(db.dsn)
    names = {"host": "host", "port": "port", "database": "dbname", "user": "user", "password": "password"}
    return {name: str(parts[option]) for name, option in names.items() if parts.get(option)}


def slot(db: Database) -> str:
    return f"slot_{db.name}"


@pytest.fixture
def cdc_reader(db: Database) -> Iterator[LogicalReplicationReader]:
    """A publication, a slot that the reader makes, and the reader."""
    db.connect().execute("CREATE PUBLICATION test_pub FOR ALL TABLES")
    reader = LogicalReplicationReader(publication_name="test_pub", slot_name=slot(db), **connection_values(db))
    yield reader
    reader.stop()


def test_the_readmes_example_runs_unchanged(db: Database) -> None:
    connection = db.connect()
    connection.execute("CREATE PUBLICATION test_pub FOR ALL TABLES")
    connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot(db)])
    variables = {f"PG{name.upper()}": value for name, value in connection_values(db).items()}
    program = README.replace('"test_slot"', f'"{slot(db)}"')
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", program], env=os.environ | variables, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process:
        connection.execute("CREATE TABLE public.readme (id integer primary key, created_at timestamptz default now())")
        connection.execute("INSERT INTO public.readme (id) SELECT data FROM generate_series(1, 3) AS data")
        assert process.stdout is not None
        text, found = "", []
        for line in process.stdout:
            text += line
            if line == "}\n":
                found.append(json.loads(text))
                text = ""
            if len(found) == 3:
                process.send_signal(signal.SIGINT)
                break
    relation = connection.execute("SELECT 'readme'::regclass::oid").fetchall()[0][0]
    times = {row[0]: row[1] for row in connection.execute("SELECT id, created_at FROM readme")}
    assert [m["after"]["id"] for m in found] == [1, 2, 3]
    for message in found:
        assert message == {
            "op": "I",
            "message_id": str(UUID(message["message_id"])),
            "lsn": message["lsn"],
            "transaction": {
                "tx_id": found[0]["transaction"]["tx_id"],
                "begin_lsn": found[0]["transaction"]["begin_lsn"],
                "commit_ts": found[0]["transaction"]["commit_ts"],
            },
            "table_schema": {
                "column_definitions": [
                    {"name": "id", "part_of_pkey": True, "type_id": 23, "type_name": "integer", "optional": False},
                    {
                        "name": "created_at",
                        "part_of_pkey": False,
                        "type_id": 1184,
                        "type_name": "timestamp with time zone",
                        "optional": True,
                    },
                ],
                "db": db.name,
                "schema_name": "public",
                "table": "readme",
                "relation_id": relation,
            },
            "before": None,
            "after": {
                "id": message["after"]["id"],
                "created_at": times[message["after"]["id"]].astimezone(UTC).isoformat(),
            },
        }


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
def test_every_operation_comes_as_pypgoutput_gave_it(
    db: Database, cdc_reader: LogicalReplicationReader, identity: str
) -> None:
    connection = db.connect()
    connection.execute("CREATE TABLE items (id int PRIMARY KEY, name text, price numeric(8,2))")
    connection.execute(f"ALTER TABLE items REPLICA IDENTITY {identity}")
    one, two, three = ({"id": i, "name": n} for i, n in ((1, "ball"), (1, "bat"), (2, "bat")))
    connection.execute("INSERT INTO items VALUES (1, 'ball', 2.50)")
    connection.execute("UPDATE items SET name = 'bat'")
    connection.execute("UPDATE items SET id = 2")
    connection.execute("DELETE FROM items")
    connection.execute("TRUNCATE items")
    messages = [next(cdc_reader) for _ in range(5)]
    full = identity == "FULL"

    def shown(row: dict[str, Any] | None) -> dict[str, Any] | None:
        return row and {name: value for name, value in row.items() if name != "price"}

    assert [(m.op, shown(m.before), shown(m.after)) for m in messages] == [
        ("I", None, one),
        ("U", one if full else None, two),
        ("U", two if full else {"id": 1}, three),
        ("D", three if full else {"id": 2}, None),
        ("T", None, None),
    ]
    assert [c.part_of_pkey for c in messages[0].table_schema.column_definitions] == [True, False, False]
    assert len({m.transaction.tx_id for m in messages}) == 5
    assert [m.lsn for m in messages] == sorted(m.lsn for m in messages)


def test_a_second_reader_of_an_active_slot_is_refused(db: Database, cdc_reader: LogicalReplicationReader) -> None:
    with pytest.raises(SlotInUse, match="in use"):
        LogicalReplicationReader(publication_name="test_pub", slot_name=slot(db), dsn=db.dsn)


def test_after_stop_the_slot_is_inactive(db: Database, cdc_reader: LogicalReplicationReader) -> None:
    query = "SELECT active FROM pg_replication_slots WHERE slot_name = %s"
    assert db.connect().execute(query, [slot(db)]).fetchall() == [(True,)]
    cdc_reader.stop()
    assert db.connect().execute(query, [slot(db)]).fetchall() == [(False,)]
    assert list(cdc_reader) == []


def test_an_error_is_raised_where_pypgoutput_ended_the_loop(db: Database) -> None:
    with pytest.raises(PublicationError):
        LogicalReplicationReader(publication_name="missing", slot_name=slot(db), dsn=db.dsn)


def test_what_was_read_does_not_come_again(db: Database, cdc_reader: LogicalReplicationReader) -> None:
    connection = db.connect()
    connection.execute("CREATE TABLE items (id int PRIMARY KEY)")
    for i in range(4):
        connection.execute("INSERT INTO items VALUES (%s)", [i])
    seen = []
    for message in cdc_reader:
        seen.append(message.row["id"])
        if len(seen) == 3:
            break
    cdc_reader.stop()
    again = LogicalReplicationReader(publication_name="test_pub", slot_name=slot(db), dsn=db.dsn)
    assert [next(again).row["id"], next(again).row["id"]] == [2, 3]
    again.stop()
