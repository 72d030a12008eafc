"""What a connection rests on is set whatever environment, service, role and database say, or nothing is read."""

from __future__ import annotations

import decimal
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import psycopg
import pytest
from harness.database import Database
from harness.proxy import Proxy
from harness.startup import pooler
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgoutput_source import PgOutputReader
from pgoutput_source.embedded import Server
from pgoutput_source.errors import NotConfigured, PgOutputError, PublicationError
from pgoutput_source.postgres import connection
from pgoutput_source.postgres.connection import PINNED, VERIFIED, connect
from pgoutput_source.postgres.creation import create_publication_and_slot
from pgoutput_source.stream.walsender import Walsender

HOSTILE = {
    "DateStyle": "German",
    "TimeZone": "Asia/Kolkata",
    "IntervalStyle": "sql_standard",
    "extra_float_digits": "-10",
    "bytea_output": "escape",
    "lc_monetary": "POSIX",
    "search_path": "hostile",
    "quote_all_identifiers": "on",
    "standard_conforming_strings": "off",
    "client_min_messages": "error",
    "statement_timeout": "1h",
    "lock_timeout": "1h",
    "idle_in_transaction_session_timeout": "1h",
    "idle_session_timeout": "1h",
    "default_transaction_read_only": "on",
}
"""A legal value other than ours, for each setting that is pinned."""

Given = Callable[[Database, pytest.MonkeyPatch, Path], "dict[str, str]"]
"""Puts the hostile settings in a place, and gives what changes in the DSN."""


def _alter(db: Database, of: str) -> None:
    with connect(db.dsn) as conn:
        for name, value in HOSTILE.items():
            conn.execute(sql.SQL("ALTER {} SET {} = {}").format(sql.SQL(of), sql.Identifier(name), sql.Literal(value)))


def _role(db: Database, *_: Any) -> dict[str, str]:
    _alter(db, f"ROLE {db.name}")
    return {}


def _database(db: Database, *_: Any) -> dict[str, str]:
    _alter(db, f"DATABASE {db.name}")
    return {}


def _role_in_database(db: Database, *_: Any) -> dict[str, str]:
    _alter(db, f"ROLE {db.name} IN DATABASE {db.name}")
    return {}


def _options() -> str:
    return " ".join(f"-c {name}={value}" for name, value in HOSTILE.items())


def _dsn(*_: Any) -> dict[str, str]:
    return {"options": _options(), "client_encoding": "LATIN1"}


def _variables(db: Database, patch: pytest.MonkeyPatch, _: Path) -> dict[str, str]:
    for name, value in {
        "PGTZ": HOSTILE["TimeZone"],
        "PGDATESTYLE": HOSTILE["DateStyle"],
        "PGGEQO": "off",
        "PGCLIENTENCODING": "LATIN1",
        "PGOPTIONS": _options().replace("-c ", "--"),
    }.items():
        patch.setenv(name, value)
    return {}


def _service(db: Database, patch: pytest.MonkeyPatch, folder: Path) -> dict[str, str]:
    (folder / "services").write_text(f"[hostile]\noptions={_options()}\nclient_encoding=LATIN1\nconnect_timeout=7\n")
    patch.setenv("PGSERVICEFILE", str(folder / "services"))
    return {"service": "hostile"}


PLACES: list[Given] = [_role, _database, _role_in_database, _dsn, _variables, _service]


@pytest.fixture
def role(db: Database) -> Iterator[str]:
    """The DSN of a superuser whom this test may configure."""
    with db.connect() as conn:
        conn.execute(f"CREATE ROLE {db.name} SUPERUSER LOGIN PASSWORD 'x'".encode())
        yield make_conninfo(db.dsn, user=db.name, password="x")
        conn.execute(f"DROP OWNED BY {db.name}; DROP ROLE {db.name}".encode())


TABLE = """
CREATE TABLE public.t (id int PRIMARY KEY, at timestamptz, day date, span interval, ratio float8, bytes bytea,
    price money, words text, "Select" numeric)
"""
INSERT = rb"""
INSERT INTO public.t VALUES (1, '2026-02-03 04:05:06+00', '2026-02-03', '-1 day 02:03:04', 0.1::float8 + 0.2,
    '\x005cff', 12.5, E'na\u00efve \u2603 \\ ''', 1.50)
"""


def values(dsn: str, slot: str, **options: Any) -> dict[str, Any]:
    with PgOutputReader(dsn, slot=slot, publication="p", until="current", **options) as reader:
        (after,) = [change.after for change in reader]
    assert after is not None
    return after


@pytest.mark.parametrize("given", PLACES, ids=lambda place: place.__name__.strip("_"))
def test_settings_from_anywhere_do_not_shape_values(
    db: Database, role: str, given: Given, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with connect(db.dsn) as conn:
        conn.execute(TABLE)
        create_publication_and_slot(conn, slot=f"{db.name}_s", publications=["p"])
        conn.execute(INSERT)
        oracle = conn.execute(
            "SELECT extract(epoch FROM at)::bigint, ratio, bytes, price::numeric FROM public.t"
        ).fetchone()
    dsn = make_conninfo(role, **given(db, monkeypatch, tmp_path))
    with psycopg.connect(dsn) as plain:
        shown: dict[str, str] = dict(plain.execute("SELECT name, setting FROM pg_settings").fetchall())
    assert all(shown[name].replace(" ", "").upper() != ours.upper() for name, ours in PINNED.items()), "not hostile"

    with connect(dsn) as beside, connect(dsn, replication=True, beside=beside) as walsender:
        for conn in (beside, walsender):
            found = {name: conn.execute(f"SHOW {name}".encode()).fetchone() for name in PINNED}
            assert {name: str(row[0]).replace(" ", "").strip('"') for name, row in found.items() if row} == PINNED
            assert conn.info.encoding == "utf-8"
        create_publication_and_slot(beside, slot=f"{db.name}_other", publications=["q"])  # a role may be read only
    after = values(dsn, f"{db.name}_s")

    assert oracle is not None
    assert (int(after["at"].timestamp()), after["ratio"], after["bytes"]) == oracle[:3]
    assert after["day"] == date(2026, 2, 3)
    assert after["words"] == "naïve ☃ \\ '"
    assert after["Select"] == decimal.Decimal("1.50")
    assert str(after["price"]).strip("$") == str(oracle[3])


@pytest.mark.parametrize("replication", [False, True])
def test_a_connection_that_has_not_the_settings_is_refused(
    db: Database, role: str, replication: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if something in between had dropped one. The control of the test above: what it sets is asked for."""
    for name, value in HOSTILE.items():
        monkeypatch.setattr(connection, "PINNED", PINNED | {name: value})
        if name in ("TimeZone", "DateStyle"):  # an environment variable would win, so they are set once more
            with connect(role, replication=replication) as conn:
                row = conn.execute(f"SHOW {name}".encode()).fetchone()
            assert row is not None
            assert row[0].replace(" ", "") == VERIFIED[name]
        elif name in VERIFIED:
            with pytest.raises(NotConfigured, match=name) as caught:
                connect(role, replication=replication)
            assert "pooler" in (caught.value.hint or "")


# -- a warning that must be heard ------------------------------------------------------------------------------------


def missed(db: Database, dsn: str) -> list[Any]:
    """What a reader gives of a row that is older than its publication, and therefore not sent."""
    with connect(db.dsn) as conn:
        conn.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
        conn.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [f"{db.name}_s"])
        conn.execute("INSERT INTO public.t VALUES (1)")
        conn.execute("CREATE PUBLICATION p FOR TABLE public.t")
    with PgOutputReader(dsn, slot=f"{db.name}_s", publication="p", until="current") as reader:
        return [change.after for change in reader]


@pytest.mark.parametrize("given", PLACES, ids=lambda place: place.__name__.strip("_"))
def test_a_publication_that_is_missing_where_changes_are_is_an_error_for_a_silent_role(
    db: Database, role: str, given: Given, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dsn = make_conninfo(role, **given(db, monkeypatch, tmp_path))
    with pytest.raises(PublicationError, match='"p"'):
        missed(db, dsn)


def test_a_silent_role_would_miss_it(db: Database, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the pinned setting the server says nothing, and the row is lost without a word."""
    for name in ("PINNED", "VERIFIED"):
        settings = dict(getattr(connection, name))
        del settings["client_min_messages"]
        monkeypatch.setattr(connection, name, settings)
    _role(db)
    assert missed(db, role) == []


# -- what stands in between ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tcp() -> Iterator[Server]:
    """A server that listens on a port."""
    with Server(tcp=True) as server:
        with connect(server.dsn()) as conn:
            conn.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
            create_publication_and_slot(conn, slot="s", publications=["p"])
            conn.execute("INSERT INTO public.t VALUES (1)")
        yield server


def through(server: Server, proxy: Proxy) -> str:
    return make_conninfo(server.dsn(), host="127.0.0.1", port=proxy.port, sslmode="disable", gssencmode="disable")


@pytest.mark.parametrize(
    ("ignores", "refuses"),
    [
        ((), ["options"]),
        ((), ["replication"]),
        (["options"], []),
        (["options"], ["replication"]),
        (["replication"], []),
        (["options", "replication"], []),
    ],
    ids=str,
)
def test_a_pooler_is_named_as_the_reason(tcp: Server, ignores: list[str], refuses: list[str]) -> None:
    with Proxy(lambda: tcp.port, pooler(ignores=ignores, refuses=refuses)) as proxy:
        with pytest.raises(PgOutputError) as caught:
            values(through(tcp, proxy), "s")
        assert isinstance(caught.value, NotConfigured)
        assert "connection pooler" in (caught.value.hint or "")


def test_a_pooler_that_keeps_all_parameters_does_no_harm(tcp: Server) -> None:
    with Proxy(lambda: tcp.port, pooler()) as proxy:
        assert values(through(tcp, proxy), "s") == {"id": 1}


def test_a_balancer_before_two_servers_is_named_as_the_reason(tcp: Server) -> None:
    with Server(tcp=True) as other, connect(other.dsn()) as conn:
        conn.execute(sql.SQL("ALTER ROLE postgres PASSWORD {}").format(sql.Literal(tcp.password)))
        for has_slot in (False, True):
            if has_slot:
                create_publication_and_slot(conn, slot="s", publications=["p"])
            ports = iter([tcp.port, other.port])
            with Proxy(lambda ports=ports: next(ports)) as proxy, pytest.raises(NotConfigured) as caught:  # type: ignore[misc]
                Walsender(through(tcp, proxy), slot="s", publications=["p"], options={"proto_version": "1"})
            assert "load balancer" in (caught.value.hint or "")
