"""Real PostgreSQL servers for the tests: the newest as `pg` and `db`, each of 14 to 18 as `any_pg` and `any_db`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from harness.database import NEWEST, SETTINGS, Database

from pgoutput_source.embedded import MAJORS, Server, find_binaries
from pgoutput_source.errors import EmbeddedError


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
