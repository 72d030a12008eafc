"""The rows of a COPY: read straight from the socket, they are those that libpq hands over."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from harness.database import Database

from pgoutput_source.copy import chunks
from pgoutput_source.copy import copy_out as module
from pgoutput_source.copy.copy_out import copy_out
from pgoutput_source.copy.initial import InitialCopy
from pgoutput_source.decode.copied import Tuples
from pgoutput_source.embedded import Server
from pgoutput_source.errors import ConnectionFailed, ServerError
from pgoutput_source.postgres.connection import Connection, connect
from pgoutput_source.settings import SourceSettings

# What looks like the beginning of a row of two columns, of its end, of the end of a COPY, or of an error.
HOSTILE = [
    b"d\0\0\0\x20\0\2",
    b"d\0\0\0\x06\0\2" + bytes(2),
    b"d\0\0\0\x07\0\2d\0\0\0\x07\0\2",
    b"c\0\0\0\4C\0\0\0\x0bCOPY 1\0Z\0\0\0\5T",
    b"Z\0\0\0\5I",
    b"E\0\0\0\x09SERROR",
    b"\xff\xff",
    b"PGCOPY\n\xff\r\n\0" + bytes(8),
]


@pytest.fixture
def connection(db: Database) -> Iterator[Connection]:
    connection = connect(db.dsn)
    yield connection
    connection.close()


def rows(connection: Connection, query: str, *, encrypted: bool, columns: int = 2) -> list[bytes]:
    """The bytes of each row."""
    found: list[bytes] = []
    buffer = module.new_buffer()
    for piece in copy_out(connection, query, columns, encrypted=encrypted, buffer=buffer):
        found += [piece.raw[a:b] for a, b in zip(piece.start.tolist(), piece.end.tolist(), strict=True)]
    return found


@pytest.mark.parametrize("piece", [100, 8 << 20])
def test_both_ways_give_the_same_rows_whatever_their_bytes_look_like(
    connection: Connection, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(piece)
    monkeypatch.setattr(module, "_PIECE", piece)
    monkeypatch.setattr(module, "_BLOCK", 3000)

    def value() -> bytes | None:
        match rng.randrange(6):
            case 0:
                return None
            case 1:
                return rng.randbytes(rng.choice([0, 1, 30, 70_000, 70_000, 3_000_000]) if rng.random() < 0.05 else 5)
            case _:
                return b"".join(rng.choices(HOSTILE, k=rng.randrange(1, 20)))

    connection.execute("CREATE TEMP TABLE t (n int GENERATED ALWAYS AS IDENTITY, a bytea, b bytea)")
    with connection.cursor() as cursor:
        cursor.executemany("INSERT INTO t (a, b) VALUES (%s, %s)", [(value(), value()) for _ in range(2000)])
    for query, columns in (
        ("SELECT a, b FROM t ORDER BY n", 2),
        ("SELECT a FROM t ORDER BY n", 1),
        ("SELECT a, b FROM t ORDER BY n LIMIT 1", 2),
        ("SELECT a, b FROM t WHERE false", 2),
        ("SELECT FROM t", 0),
    ):
        both = [
            rows(connection, f"COPY ({query}) TO STDOUT (FORMAT binary)", encrypted=encrypted, columns=columns)
            for encrypted in (False, True)
        ]
        assert both[0] == both[1]
    assert connection.execute("SELECT count(*) FROM t").fetchone() == (2000,)


@pytest.mark.parametrize("encrypted", [False, True])
def test_an_error_is_the_servers_and_leaves_the_connection_free(connection: Connection, encrypted: bool) -> None:
    failing = "COPY (SELECT 1 / (100000 - n), n FROM generate_series(1, 200000) n) TO STDOUT (FORMAT binary)"
    for query, sqlstate in (
        (failing, "22012"),
        ("COPY (SELECT nothing) TO STDOUT (FORMAT binary)", "42703"),
        ("COPY nowhere TO STDOUT (FORMAT binary)", "42P01"),
    ):
        with pytest.raises(ServerError) as error:
            rows(connection, query, encrypted=encrypted)
        assert error.value.sqlstate == sqlstate
        assert not isinstance(error.value, ConnectionFailed)
        assert connection.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.parametrize("encrypted", [False, True])
def test_notices_and_changed_settings_may_come_between(connection: Connection, encrypted: bool) -> None:
    connection.execute(
        "CREATE FUNCTION pg_temp.f(n int) RETURNS int LANGUAGE plpgsql AS $$ BEGIN"
        "  RAISE WARNING 'd%', repeat('x', 100); PERFORM set_config('application_name', n::text, false); RETURN n;"
        " END $$"
    )
    query = "COPY (SELECT pg_temp.f(n), n FROM generate_series(1, 1000) n) TO STDOUT (FORMAT binary)"
    assert len(rows(connection, query, encrypted=encrypted)) == 1000
    assert connection.execute("SHOW application_name").fetchone() == ("1000",)


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_connection_that_is_lost_in_the_midst(connection: Connection, db: Database, encrypted: bool) -> None:
    buffer = module.new_buffer()
    query = "COPY (SELECT n, repeat('x', 1000) FROM generate_series(1, 1000000) n) TO STDOUT (FORMAT binary)"
    pieces = copy_out(connection, query, 2, encrypted=encrypted, buffer=buffer)
    next(pieces)
    with db.connect() as c:
        c.execute("SELECT pg_terminate_backend(%s, 5000)", [connection.info.backend_pid])
    with pytest.raises(ConnectionFailed) as error:
        list(pieces)
    assert error.value.transient


@pytest.mark.parametrize("query", ["SELECT 1", "COPY (SELECT 1, 2) TO STDOUT"])
def test_an_answer_that_is_not_one_to_a_copy_is_an_error(connection: Connection, query: str) -> None:
    with pytest.raises(ConnectionFailed, match="not an answer to COPY"):
        rows(connection, query, encrypted=False)


@pytest.mark.parametrize("sslmode", ["require", "disable"])
def test_a_table_is_copied_with_and_without_tls(tls: Server, sslmode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[bool] = []

    def noted(*arguments: Any, encrypted: bool, buffer: bytearray) -> Iterator[Tuples]:
        ways.append(encrypted)
        return copy_out(*arguments, encrypted=encrypted, buffer=buffer)

    monkeypatch.setattr(chunks, "copy_out", noted)
    db = Database(tls)
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY)")
        c.execute("INSERT INTO t SELECT generate_series(1, 1000)")
        c.execute("CREATE PUBLICATION p FOR TABLE t")
    settings = SourceSettings(dsn=db.dsn, slot="s", publication=("p",))
    copy = InitialCopy(f"{db.dsn} sslmode={sslmode}", settings, everything=True)
    found: list[int] = []
    while copy.pending:
        for batch in copy.step(1 << 40).batches:
            found += batch.data.column("id").to_pylist()
        copy.passed(1 << 40)
    copy.close()
    db.drop()

    assert found == list(range(1, 1001))
    assert set(ways) == {sslmode == "require"}
