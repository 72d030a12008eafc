"""Databases that are not in UTF-8: what the server converts, and what nobody can, because SQL_ASCII means any bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from harness.database import Database
from psycopg import sql

from pgoutput_source import PgOutputReader, peek
from pgoutput_source.embedded import Server
from pgoutput_source.errors import DecodeError


class Encoded(Database):
    """A database in an encoding of its own."""

    def __init__(self, server: Server, encoding: str) -> None:
        super().__init__(server)
        self.encoding = encoding
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(self.name)))
            connection.execute(
                sql.SQL("CREATE DATABASE {} ENCODING {} LOCALE 'C' TEMPLATE template0").format(
                    sql.Identifier(self.name), sql.Literal(encoding)
                )
            )

    def filled(self, setup: str, *rows: bytes) -> psycopg.Connection[Any]:
        """A table `t` with these rows in the slot `s`; the bytes go to the server as they stand here."""
        connection = self.connect(client_encoding=self.encoding if self.encoding == "SQL_ASCII" else "UTF8")
        connection.execute(setup.encode())
        connection.execute("CREATE PUBLICATION p FOR ALL TABLES")
        connection.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        for row in rows:
            connection.execute(b"INSERT INTO t VALUES (" + row + b")")
        return connection

    def events(self, **options: Any) -> list[Any]:
        with PgOutputReader(self.dsn, slot="s", publication="p", until="current", **options) as reader:
            return [event.after for event in reader]


@pytest.fixture
def encoded(any_pg: Server, request: pytest.FixtureRequest) -> Iterator[Encoded]:
    database = Encoded(any_pg, request.param)
    yield database
    for connection in database._connections:
        connection.close()
    with psycopg.connect(any_pg.dsn(), autocommit=True) as connection:
        connection.execute("SELECT pg_drop_replication_slot('s')")
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(database.name)))


TABLE = "CREATE TABLE t (id int PRIMARY KEY, v text, c varchar(9), j json, a text[], m numeric)"


@pytest.mark.parametrize("encoded", ["LATIN1"], indirect=True)
def test_case_135_what_the_server_can_convert_is_utf8(encoded: Encoded) -> None:
    encoded.filled(
        TABLE.replace(" v ", ' "Größe" ') + '; CREATE TABLE "tä" (id int)',
        "1, 'ä', 'ÿ', '\"é\"', '{ü,\"ö ,\"}', 1.5".encode(),
    )
    expected = {"id": 1, "Größe": "ä", "c": "ÿ", "j": '"é"', "a": ["ü", "ö ,"], "m": "1.5"}

    for binary in ("off", "auto"):
        (row,) = peek(encoded.dsn, slot="s", publication="p", binary=binary).table("public.t").to_pylist()
        assert {name: row[name] for name in expected} == expected
        assert row["_raw"] is None
        (after,) = encoded.events(binary=binary)
        assert after == {**expected, "j": "é", "m": after["m"]}
        assert str(after["m"]) == "1.5"


@pytest.mark.parametrize("encoded", ["SQL_ASCII"], indirect=True)
def test_case_134_bytes_that_are_not_utf8_are_kept_as_they_are(encoded: Encoded) -> None:
    """The cell is null and the bytes are in `_raw`, in the escape format of bytea: the server reads them back."""
    connection = encoded.filled(
        TABLE,
        b"1, 'plain', 'x', '1', '{a}', 1",
        "2, 'ä\\', 'ü', '\"ö\"', '{é}', 2".encode(),
        rb"""3, E'h\xe4 \\ \xff\n', E'\xe4', E'"\xe4"', ARRAY[E'\xe4\\', 'b'], 3""",
    )
    for binary in ("off", "auto"):
        table = peek(encoded.dsn, slot="s", publication="p", binary=binary).table("public.t")
        rows = table.select(["id", "v", "c", "j", "a", "_raw"]).to_pylist()
        assert rows[:2] == [
            {"id": 1, "v": "plain", "c": "x", "j": "1", "a": ["a"], "_raw": None},
            {"id": 2, "v": "ä\\", "c": "ü", "j": '"ö"', "a": ["é"], "_raw": None},
        ]
        raw = dict(rows[2].pop("_raw"))
        assert rows[2] == {"id": 3, "v": None, "c": None, "j": None, "a": None}
        assert list(raw) == ["v", "c", "j", "a"]
        for name, text in raw.items():
            same = f"SELECT decode(%s, 'escape') = convert_to({name}::text, 'SQL_ASCII') FROM t WHERE id = 3"
            assert connection.execute(same.encode(), [text]).fetchone() == (True,), (name, text)

    # In an event it can't be taken for a text: it is bytes, and PostgreSQL's text of bytes in JSON.
    with PgOutputReader(encoded.dsn, slot="s", publication="p", until="current") as reader:
        *_, event = reader
    assert event.after is not None
    assert (event.after["v"], event.after["c"]) == (b"h\xe4 \\ \xff\n", b"\xe4")
    assert event.model_dump(mode="json")["after"]["c"] == "\\xe4"


@pytest.mark.parametrize("encoded", ["SQL_ASCII"], indirect=True)
def test_with_errors_for_misfits_such_bytes_stop_the_run_and_say_where(encoded: Encoded) -> None:
    encoded.filled(TABLE, rb"1, E'\xe4', NULL, NULL, NULL, NULL")

    with pytest.raises(DecodeError) as caught:
        encoded.events(on_misfit="error")
    assert (caught.value.table, caught.value.column, caught.value.type_name) == ("public.t", "v", "text")
    assert caught.value.lsn
    assert "string can't hold" in str(caught.value)
