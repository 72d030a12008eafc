"""The connection that decodes: nothing but replication commands, and what happens when it is cut anywhere."""

from __future__ import annotations

import json
import re
import socket
import threading
from contextlib import suppress
from typing import Any

import pytest
from harness.database import Database
from psycopg.conninfo import make_conninfo

from pgoutput_source import PgOutputReader
from pgoutput_source.embedded import Server
from pgoutput_source.errors import PgOutputError
from pgoutput_source.postgres.connection import Connection, connect
from pgoutput_source.postgres.creation import create_publication_and_slot
from pgoutput_source.postgres.system import current_lsn
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.stream.replication import ReplicationStream
from pgoutput_source.stream.walsender import Walsender

REPLICATION_COMMANDS = r"IDENTIFY_SYSTEM|SHOW \w+|START_REPLICATION SLOT .*"


def logged(server: Server, pid: int) -> list[str]:
    """What the server's log says that a process was told to do."""
    told = r"LOG:  (?:statement|received replication command|execute [^:]*): (.*)"
    lines = server.log.read_text(errors="replace").splitlines()
    return [found[1] for line in lines if f"[{pid}]" in line and (found := re.search(told, line))]


def log_everything(conn: Connection, database: str) -> None:
    conn.execute(f"ALTER DATABASE {database} SET log_statement = 'all'".encode())
    conn.execute(f"ALTER DATABASE {database} SET log_replication_commands = on".encode())


def test_a_connection_that_decodes_is_told_nothing_but_replication_commands(any_db: Database) -> None:
    slot = f"{any_db.name}_slot"
    with connect(any_db.dsn) as conn:
        conn.execute("CREATE TABLE public.t (id int PRIMARY KEY, v numeric, w int[])")
        create_publication_and_slot(conn, slot=slot, publications=["p"])
        log_everything(conn, any_db.name)
        pids = []
        stream = ReplicationStream(any_db.dsn, slot=slot, publications=("p",), binary="auto", reconnect_seconds=20)
        with stream:
            stream.start(Lsn(0))
            for generation in range(3):
                while stream.generation < generation:
                    stream.poll(timeout=0.1)
                assert stream.backend is not None
                pids.append(stream.backend.pid)
                conn.execute("INSERT INTO public.t VALUES (%s, 1.5, '{1,2}')", [generation])
                until = current_lsn(conn)
                while stream.received < until:
                    stream.poll(timeout=0.1)
                stream.acknowledge(stream.received, now=True)
                conn.execute("SELECT pg_terminate_backend(%s, 5000)", [stream.backend.pid])
        with connect(any_db.dsn, replication=True) as control:
            control.execute("SELECT 1")
            spoiled = control.info.backend_pid

    told = [logged(any_db.server, pid) for pid in pids]
    assert all("START_REPLICATION" in each[-1] for each in told), told
    assert [command for each in told for command in each if not re.fullmatch(REPLICATION_COMMANDS, command)] == []
    assert not all(re.fullmatch(REPLICATION_COMMANDS, command) for command in logged(any_db.server, spoiled))


@pytest.mark.parametrize("binary", ["off", "on", "auto"])
def test_changes_from_before_an_alter_table_are_decoded_as_they_were(any_db: Database, binary: str) -> None:
    with connect(any_db.dsn) as conn:
        assert backlog_over_ddl(any_db.dsn, f"{any_db.name}_slot", conn, binary) == WANTED


WANTED = [{"id": 1, "v": 12345, "w": "hello"}, {"id": 2, "v": "later", "x": 8}]


def backlog_over_ddl(dsn: str, slot: str, conn: Connection, binary: str) -> list[Any]:
    conn.execute("CREATE TABLE public.t (id int PRIMARY KEY, v int, w text)")
    create_publication_and_slot(conn, slot=slot, publications=["p"], tables=["public.t"])
    conn.execute("INSERT INTO public.t VALUES (1, 12345, 'hello')")
    conn.execute("ALTER TABLE public.t ALTER v TYPE text, DROP w, ADD x int DEFAULT 7")
    conn.execute("INSERT INTO public.t VALUES (2, 'later', 8)")
    with PgOutputReader(dsn, slot=slot, publication="p", until="current", binary=binary, reconnect_seconds=0) as reader:
        return [json.loads(json.dumps(change.after)) for change in reader]


def test_a_query_on_the_connection_that_decodes_spoils_old_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the two tests above: with it they would fail. It may crash the server, so it has its own."""
    identify = Walsender._identify

    def identify_and_query(self: Walsender, conn: Connection) -> None:
        identify(self, conn)
        conn.execute("SELECT * FROM pg_publication_tables")

    monkeypatch.setattr(Walsender, "_identify", identify_and_query)
    with Server(18) as server, suppress(PgOutputError), connect(server.dsn()) as conn:
        assert backlog_over_ddl(server.dsn(), "s", conn, "off") != WANTED


class CutOff:
    """TCP to a server that is cut at the nth message that clients send after they are let in, once."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.left = -1
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near = self._listener.accept()[0]
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._port))
            for pump in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pump, args=pump, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, from_client: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if from_client and data[:1] == b"Q":
                    self.left -= 1
                    if self.left == 0:
                        break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.close()


def test_a_connection_that_is_cut_anywhere_in_its_opening_is_opened_again() -> None:
    with Server(tcp=True) as server, connect(server.dsn()) as conn:
        conn.execute("CREATE TABLE public.t (id int PRIMARY KEY)")
        create_publication_and_slot(conn, slot="s", publications=["p"])
        proxy = CutOff(int(server.port))
        dsn = make_conninfo(server.dsn(), host="127.0.0.1", port=proxy.port, sslmode="disable")
        commands = 0
        with ReplicationStream(dsn, slot="s", publications=("p",), binary="auto", reconnect_seconds=30) as stream:
            stream.start(Lsn(0))
            while proxy.left <= 0:  # until there is no command left to be cut at
                commands += 1
                generation, proxy.left = stream.generation, commands
                assert stream.backend is not None
                conn.execute("SELECT pg_terminate_backend(%s, 5000)", [stream.backend.pid])
                conn.execute("INSERT INTO public.t VALUES (%s)", [commands])
                until = current_lsn(conn)
                while stream.generation == generation or stream.received < until:
                    stream.poll(timeout=0.1)
        proxy.close()

    assert commands > 8  # all those of `Walsender`, on both its connections
