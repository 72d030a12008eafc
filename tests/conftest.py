"""Real PostgreSQL servers for the tests: the newest as `pg` and `db`, each of 14 to 18 as `any_pg` and `any_db`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

from pgoutput_source.embedded import MAJORS, Server, find_binaries
from pgoutput_source.errors import EmbeddedError

NEWEST = max(MAJORS)
SETTINGS = {"max_prepared_transactions": 10, "max_connections": 50, "track_commit_timestamp": True}

_serial = itertools.count(1)


def _server(major: int) -> Iterator[Server]:
    try:
        find_binaries(major)
    except EmbeddedError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"PostgreSQL {major} can't be had: {error.message}")
    with Server(major, settings=SETTINGS) as server:
        yield server


@pytest.fixture(scope="session")
def pg() -> Iterator[Server]:
    """A throw-away server of the newest major, shared by the whole session: leave it running and as it was."""
    yield from _server(NEWEST)


@pytest.fixture(scope="session", params=MAJORS, ids=[f"pg{major}" for major in MAJORS])
def any_pg(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A throw-away server of each major in turn; pytest orders the tests so that one of them runs at a time."""
    yield from _server(request.param)


class Database:
    """A fresh database of one test: `dsn`, `name`, `server`, and `connect()`."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.name = f"test_{os.getpid()}_{next(_serial)}"
        self._connections: list[psycopg.Connection[Any]] = []
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(self.name)))

    @property
    def dsn(self) -> str:
        """The connection string of this database, as the superuser."""
        return self.server.dsn(self.name)

    def connect(self, **options: Any) -> psycopg.Connection[Any]:
        """A new connection in autocommit mode, closed at the end of the test."""
        connection = psycopg.connect(self.dsn, **({"autocommit": True} | options))
        self._connections.append(connection)
        return connection

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections:
            connection.close()

    def drop(self) -> None:
        """Drop the database with its slots, prepared transactions and sessions."""
        self.close()
        self.server.start()
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            prepared = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
            for (gid,) in connection.execute(prepared).fetchall():
                connection.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))
        with psycopg.connect(self.server.dsn(), autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s", [self.name]
            )
            connection.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s", [self.name]
            )
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(self.name)))


@pytest.fixture
def db(pg: Server) -> Iterator[Database]:
    """A fresh database on the newest PostgreSQL, dropped afterwards with all its slots."""
    database = Database(pg)
    yield database
    database.drop()


@pytest.fixture
def any_db(any_pg: Server) -> Iterator[Database]:
    """A fresh database on each major of PostgreSQL in turn, dropped afterwards with all its slots."""
    database = Database(any_pg)
    yield database
    database.drop()


def pytest_report_header() -> str:
    try:
        newest = find_binaries(NEWEST)
    except EmbeddedError as error:
        return f"PostgreSQL: {error}"
    return f"PostgreSQL: {newest.version} from {newest.bindir}; {', '.join(map(str, MAJORS))} where a test asks for all"
