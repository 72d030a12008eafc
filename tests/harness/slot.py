"""A slot beside SQL, for cases that are told as statements."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from harness.database import Database
from harness.notation import peeked
from pgoutput_source.changes import ChangeSet
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.postgres.definitions import Definitions

T = "CREATE TABLE t (id int PRIMARY KEY, v text)\n"


ALL = "CREATE PUBLICATION p FOR ALL TABLES"


def run(connection: psycopg.Connection[Any], script: str) -> None:
    """Statements, one a line; those behind a `!` must be refused with 55000."""
    for line in filter(None, map(str.strip, script.splitlines())):
        if line.startswith("!"):
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
                connection.execute(line[1:].encode())
        else:
            connection.execute(line.encode())


class Slot:
    """A slot `s` behind what was prepared, and what comes out of it."""

    def __init__(self, database: Database, before: str = T, publish: str = ALL) -> None:
        self.database = database
        self.connection = database.connect()
        run(self.connection, before)
        run(self.connection, publish)
        self.connection.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        self.assembler = self.fresh()

    def fresh(self) -> Assembler:
        return Assembler(look_up=Definitions(self.database.dsn))

    def run(self, script: str) -> None:
        run(self.connection, script)

    def frames(self, **options: str) -> list[bytes]:
        return peeked(self.connection, **options)

    def sets(self, **options: str) -> list[ChangeSet]:
        """What is in the slot, cut in two feeds so that something is carried over."""
        frames = self.frames(**options)
        half = len(frames) // 2
        return [self.assembler.feed(frames[:half]), self.assembler.feed(frames[half:])]
