"""Real PostgreSQL servers for the tests: the newest as `pg` and `db`, each of 14 to 18 as `any_pg` and `any_db`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator, Iterator
from importlib.util import find_spec

import pytest
from harness.database import NEWEST, SETTINGS, Database
from harness.tls import tls_server

from pgoutput_source.embedded import MAJORS, Server, find_binaries
from pgoutput_source.errors import EmbeddedError

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has what it starts in the background ignore Ctrl-C, and so would the processes that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def tls() -> Iterator[Server]:
    """A throw-away server with TLS on a port, shared by the whole session."""
    with tls_server() as server:
        yield server


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


# Bytewax has no wheels past Python 3.12. There, and only there, what needs it is skipped.
NO_BYTEWAX = sys.version_info >= (3, 13) and find_spec("bytewax") is None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A test module that can't be imported without Bytewax is skipped where there is none."""
    report = yield
    if NO_BYTEWAX and report.failed and "bytewax" in str(report.longrepr).lower():
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 1, "Skipped: needs Bytewax")
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that starts a flow is skipped there too, before it makes anything that it would have to remove."""
    if NO_BYTEWAX and _starts_a_flow(item):
        pytest.skip("needs Bytewax")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="less than a minute, and the newest PostgreSQL alone")


# The rooms whose tests are mostly computation. The others wait for servers and processes.
QUICK = {"protocol", "types", "changes", "decode", "compute", "parquet", "operators"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    chosen = [item for item in items if _quick(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def _quick(item: pytest.Item) -> bool:
    every_major = "any_pg" in getattr(item, "fixturenames", ())
    slow = every_major or item.get_closest_marker("slow") is not None or _starts_a_flow(item)
    return not slow and (item.path.parent.name in QUICK or item.path.name == "test_staircase.py")


def _starts_a_flow(item: pytest.Item) -> bool:
    code = getattr(getattr(item, "function", None), "__code__", None)
    return code is not None and "Flow" in code.co_names


def pytest_report_header() -> str:
    try:
        newest = find_binaries(NEWEST)
    except EmbeddedError as error:
        return f"PostgreSQL: {error}"
    return f"PostgreSQL: {newest.version} from {newest.bindir}; {', '.join(map(str, MAJORS))} where a test asks for all"
