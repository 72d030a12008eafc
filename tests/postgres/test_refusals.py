"""Why there is no connection, told by who said it and when: a cut is a loss wherever it comes, a refusal is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.database import Database
from harness.proxy import Alter, Cut, Proxy
from harness.tls import certificate
from psycopg.conninfo import make_conninfo

from pgoutput_source.embedded import Server
from pgoutput_source.errors import ConnectionFailed, ServerError
from pgoutput_source.postgres.connection import connect
from pgoutput_source.postgres.creation import create_publication_and_slot
from pgoutput_source.postgres.refusals import passing
from pgoutput_source.postgres.system import current_lsn
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.stream.replication import ReplicationStream

MISLEADING = "password.ssl-certificate.timeout.invalid"
"""A host's name, which libpq repeats in each of its texts: no word of it says anything."""


def at(server: Server, port: int, **options: str) -> str:
    return make_conninfo(
        server.dsn(), host=MISLEADING, hostaddr="127.0.0.1", port=port, gssencmode="disable", **options
    )


class Cutting:
    """Counts the bytes of a connection by direction, and cuts it after so many of one."""

    def __init__(self, after: int, *, from_client: bool = False, reset: bool = False) -> None:
        self.passed = {True: 0, False: 0}
        self.after, self.from_client, self.reset = after, from_client, reset

    def __call__(self, from_client: bool, data: bytes) -> bytes:
        room = self.after - self.passed[from_client]
        self.passed[from_client] += len(data)
        if from_client == self.from_client and room <= len(data):
            raise Cut(data[:room], reset=self.reset)
        return data


@pytest.mark.parametrize("from_client", [False, True], ids=["by the server", "by the client"])
@pytest.mark.parametrize("sslmode", ["disable", "prefer", "require"])
def test_a_connection_that_is_cut_anywhere_in_its_making_is_lost(tls: Server, sslmode: str, from_client: bool) -> None:
    uncut = Cutting(1 << 30)
    with Proxy(lambda: tls.port, lambda: uncut) as proxy:
        connect(at(tls, proxy.port, sslmode=sslmode)).close()
    total = uncut.passed[from_client]
    points = sorted({0, 1, 2, 5, 8, 9, *range(10, total - 300, max(1, total // 20))})
    for number, after in enumerate(points):
        cutting = Cutting(after, from_client=from_client, reset=bool(number % 2))
        with Proxy(lambda: tls.port, lambda each=cutting: each) as proxy, pytest.raises(ConnectionFailed) as caught:  # type: ignore[misc]
            connect(at(tls, proxy.port, sslmode=sslmode, connect_timeout="5"))
        assert passing(caught.value), (after, str(caught.value))
        assert caught.value.hint


def test_a_refusal_is_no_loss(tls: Server, tmp_path: Path) -> None:
    """The control of the test above: with these, trying again would not help."""
    other = certificate(tmp_path, "other")
    for options, hint in (
        ({"sslmode": "require", "password": "wrong"}, "check user name and password"),
        ({"sslmode": "disable", "user": "nobody"}, "check user name and password"),
        ({"sslmode": "require", "dbname": "nowhere"}, "name an existing database"),
        ({"sslmode": "verify-ca", "sslrootcert": str(other)}, "check sslmode, sslrootcert"),
        ({"sslmode": "verify-full", "sslrootcert": str(tls.data / "server.crt")}, "check sslmode, sslrootcert"),
        ({"sslmode": "verify-ca", "sslrootcert": "/nowhere"}, "check sslmode, sslrootcert"),
        ({"options": "-c no_such_setting=1"}, "check options"),
    ):
        with pytest.raises(ServerError) as caught:
            connect(at(tls, tls.port, **options))
        assert not passing(caught.value), (options, str(caught.value))
        assert hint in (caught.value.hint or ""), (options, str(caught.value))


def test_a_server_that_is_cut_off_behind_tls_is_waited_for(tls: Server) -> None:
    """Each new connection is cut at another place: before TLS, within its handshake, and while logging in."""
    db = Database(tls)
    with connect(db.dsn) as conn:
        conn.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
        create_publication_and_slot(conn, slot=db.name, publications=["p"])
        places: list[Cutting] = []

        def begin() -> Alter:
            return places.pop() if places else lambda _, data: data

        with Proxy(lambda: tls.port, begin) as proxy:
            dsn = at(tls, proxy.port, dbname=db.name, sslmode="prefer")
            with ReplicationStream(dsn, slot=db.name, publications=("p",), reconnect_seconds=30) as stream:
                stream.start(Lsn(0))
                places += [Cutting(after, reset=bool(after % 2)) for after in (0, 1, 7, 800, 1801)]
                assert stream.backend is not None
                conn.execute("SELECT pg_terminate_backend(%s, 5000)", [stream.backend.pid])
                conn.execute("INSERT INTO public.t VALUES (1)")
                until = current_lsn(conn)
                while stream.received < until:
                    stream.poll(timeout=0.1)
                assert stream.generation == 1
        assert places == []
    db.drop()
