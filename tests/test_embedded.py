"""Embedded servers: made, used, stopped and never left behind, whoever dies."""

from __future__ import annotations

from conftest import Database

TABLE = """
    CREATE TABLE t (id int PRIMARY KEY, v text);
    CREATE PUBLICATION p FOR TABLE t;
"""


def test_every_major_decodes_through_pgoutput(any_db: Database) -> None:
    connection = any_db.connect()
    connection.execute(TABLE)
    slot = f"s_{any_db.name}"
    connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])
    connection.execute("INSERT INTO t VALUES (1, 'a'), (2, 'b'); UPDATE t SET v = 'c' WHERE id = 1; DELETE FROM t")
    rows = connection.execute(
        "SELECT data FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL,"
        " 'proto_version', '1', 'publication_names', 'p')",
        [slot],
    ).fetchall()
    assert b"".join(bytes(data)[:1] for (data,) in rows) == b"BRIIUDDC"
    assert connection.info.server_version // 10000 == any_db.server.major
