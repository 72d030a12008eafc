"""A fresh database for each test, on real PostgreSQL servers."""

from __future__ import annotations

import itertools
import os
from typing import Any

import psycopg
from psycopg import sql

from pgoutput_source.embedded import MAJORS, Server

NEWEST = max(MAJORS)


SETTINGS = {"max_prepared_transactions": 10, "max_connections": 50, "track_commit_timestamp": True}


_serial = itertools.count(1)


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
