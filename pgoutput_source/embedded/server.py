"""One PostgreSQL server of our own: created, started, stopped, and never left behind.

A server runs in its own session, so that Ctrl-C in a terminal stops the program and not the database under it. A small
watchdog process reads from a pipe that we hold open. When we die, for whatever reason, the pipe closes: the watchdog
then stops the server and removes a temporary cluster. Connections need a random password (SCRAM). They use a Unix
socket in a folder that only the server's account can enter, or a free port of 127.0.0.1.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from psycopg.conninfo import make_conninfo

from pgoutput_source.embedded.binaries import Account, Binaries, find_binaries, server_account
from pgoutput_source.errors import EmbeddedError

Setting = str | int | float | bool
How = Literal["fast", "immediate", "kill"]

_SIGNALS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT, "kill": signal.SIGKILL}

# A Unix socket's path must fit into 104 bytes on macOS and 108 on Linux, including the socket's own name.
_LONGEST_SOCKET_DIR = 80

# It reads lines: "pid N" names the server to watch (0: none), "bye" is an orderly end, end of file means that we died.
# The process id may have been reused since, so only a process that postmaster.pid names is ever signalled. A server
# that has just started may not have written that file yet.
_WATCHDOG = """
import os, shutil, signal, sys, time
pidfile, doomed, how = sys.argv[1], sys.argv[2], int(sys.argv[3])
signal.signal(signal.SIGINT, signal.SIG_IGN)
pid = 0
for line in sys.stdin:
    if line == "bye\\n":
        os._exit(0)
    pid = int(line.split()[1])
def exists():
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
def named():
    try:
        with open(pidfile) as file:
            return int(file.readline()) == pid
    except (OSError, ValueError):
        return False
def wait(seconds, condition):
    end = time.monotonic() + seconds
    while condition() and time.monotonic() < end:
        time.sleep(0.02)
if pid:
    wait(3, lambda: exists() and not named())
    for number, seconds in ((how, 20), (signal.SIGQUIT, 10), (signal.SIGKILL, 5)):
        if exists() and named():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                break
            wait(seconds, lambda: exists() and named())
if doomed:
    shutil.rmtree(doomed, ignore_errors=True)
"""


class Server:
    """An embedded PostgreSQL, ready for logical replication; use it as a context manager, or `start()` and `stop()`.

    >>> import psycopg
    >>> with Server() as server, psycopg.connect(server.dsn()) as connection:
    ...     connection.execute("SHOW wal_level").fetchone()
    ('logical',)

    Without `data` the cluster is temporary: it is deleted at the end and does not sync to disk, so it survives the
    death of any process, but not of the machine. With `data` it is kept, and is as durable as any PostgreSQL.

    Args:
        major: PostgreSQL's major version; None for the newest.
        data: Folder of a cluster to keep, created on first use. The password is in `<data>.password` beside it,
            readable by us alone, and the server's log in `<data>.log`.
        tcp: Listen on a free port of 127.0.0.1 instead of on a Unix socket.
        settings: Server settings by name. They override ours (`wal_level=logical` …).

    Attributes:
        version: The server's version, such as "18.6".
        major: Its major version.
        host, port, password: How to connect as the superuser `postgres`.
        log: The file that the server logs to.

    Raises:
        EmbeddedError: The programs are not available, or the server doesn't start.
    """

    def __init__(
        self,
        major: int | None = None,
        *,
        data: Path | str | None = None,
        tcp: bool = False,
        settings: Mapping[str, Setting] | None = None,
    ) -> None:
        self._build(find_binaries(major), data, tcp, settings)

    def _build(
        self, binaries: Binaries, data: Path | str | None, tcp: bool, settings: Mapping[str, Setting] | None
    ) -> None:
        self.binaries = binaries
        self.version = binaries.version
        self.major = binaries.major
        self.throw_away = data is None
        self.tcp = tcp
        self._owner = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._account: Account | None = server_account()
        # /tmp, not $TMPDIR: macOS' is too long for a socket's path, and root's may be closed to the account.
        self._base = Path(tempfile.mkdtemp(prefix="pgoutput-", dir="/tmp"))
        self.data = self._base / "data" if data is None else Path(data).absolute()
        self.log = self.data.with_name(self.data.name + ".log")
        if tcp:
            self.host, self.port = "127.0.0.1", _free_port()
        else:
            # In a kept cluster's own folder the socket's address survives a restart, and so does the DSN.
            # In a connection string a comma always separates hosts; it can't be escaped.
            near = (
                not self.throw_away and len(os.fsencode(self.data)) <= _LONGEST_SOCKET_DIR and "," not in str(self.data)
            )
            self.host, self.port = str(self.data if near else self._base), 5432
        self.password = ""
        self.settings: dict[str, Setting] = {
            "wal_level": "logical",
            "max_wal_senders": 20,
            "max_replication_slots": 20,
            "logging_collector": False,
            "jit": False,
            "shared_buffers": "64MB",
            "cluster_name": "pgoutput-source",
        }
        if self.throw_away:
            # Not synchronous_commit=off: decoding reads flushed WAL only, so commits would show up late.
            self.settings |= {"fsync": False, "full_page_writes": False}
        self.settings |= settings or {}
        self._watchdog = self._watch()
        atexit.register(self.stop)
        if self._account is not None:
            self._account.chown(self._base)

    # ------------------------------------------------------------------ the life of a server

    def start(self, timeout: float = 60.0) -> Self:
        """Create the cluster if there is none yet, start the server, and wait until it accepts connections.

        Args:
            timeout: Seconds to wait, including the time in which a crashed server replays its WAL.

        Raises:
            EmbeddedError: It did not start; the message ends with the last lines of its log.
        """
        if self.running:
            return self
        self._prepare()
        deadline = time.monotonic() + timeout
        while True:
            said = self._try_start(deadline)
            if said is None:
                return self
            # After a kill -9 the old server's children need a moment to notice; a free port may be taken meanwhile.
            passing = "pre-existing shared memory block" in said
            if self.tcp and "Address already in use" in said:
                passing, self.port = True, _free_port()
            if not passing or time.monotonic() > deadline:
                raise EmbeddedError(
                    f"PostgreSQL {self.version} on {self.data} did not start:\n{said}",
                    hint=f"its log is {self.log}" if not self.throw_away else "see the lines of its log above",
                )
            time.sleep(0.1)

    @property
    def running(self) -> bool:
        """Whether the server's process exists."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the postmaster, or 0."""
        return self._process.pid if self._process is not None and self.running else 0

    def halt(self, how: How = "fast", timeout: float = 15.0) -> None:
        """Stop the server and keep its data, so that `start()` brings it back with the same DSN.

        Args:
            how: "fast" ends sessions cleanly, and waits for replication clients that still read; "immediate" is
                PostgreSQL's emergency stop, after which the next start replays the WAL; "kill" is kill -9.
            timeout: Seconds until a "fast" stop becomes "immediate". A replication client that has stopped reading
                would block it for ever.
        """
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(_SIGNALS[how])
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.send_signal(signal.SIGQUIT)
                self._process.wait(timeout)
        self._process = None
        self._tell("pid 0")

    def stop(self) -> None:
        """Stop the server for good, and delete a temporary cluster. Safe to call twice."""
        if os.getpid() != self._owner:
            return  # a forked child that ends must not take its parent's server with it
        self.halt("immediate" if self.throw_away else "fast")
        shutil.rmtree(self._base, ignore_errors=True)
        if self._watchdog is not None:
            self._tell("bye")
            if self._watchdog.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._watchdog.stdin.close()
            self._watchdog.wait()
            self._watchdog = None
        atexit.unregister(self.stop)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ------------------------------------------------------------------ using it

    def dsn(self, dbname: str = "postgres", **options: str) -> str:
        """A libpq connection string for the superuser, password and all.

        Args:
            dbname: The database.
            options: More libpq connection options. They override ours (`user`, `password` …).
        """
        ours: dict[str, Any] = {
            "host": self.host,
            "port": self.port,
            "user": "postgres",
            "password": self.password,
            "dbname": dbname,
        }
        return make_conninfo("", **(ours | options))

    def run(
        self,
        tool: str,
        *arguments: object,
        check: bool = True,
        input: str | None = None,
        timeout: float | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run one of PostgreSQL's own programs (psql, pgbench, pg_basebackup …) against this server.

        Args:
            tool: The program's name.
            arguments: Its arguments. The environment tells it where the server is, and the password.
            check: Raise if it fails.
            input: Text for its standard input.
            timeout: Seconds until it is killed and `subprocess.TimeoutExpired` is raised.

        Raises:
            EmbeddedError: It failed (the message has its output), or there is no such program.
        """
        options = self._as_account()
        options["env"] |= self.environment()
        program = self.binaries.bindir / tool
        try:
            done = subprocess.run(
                [str(program), *map(str, arguments)],
                text=True,
                capture_output=True,
                timeout=timeout,
                **({"stdin": subprocess.DEVNULL} if input is None else {"input": input}),
                **options,
            )
        except FileNotFoundError as error:
            raise EmbeddedError(
                f"there is no {tool} in {self.binaries.bindir}", hint="set PG_BINDIR to a full installation"
            ) from error
        if check and done.returncode:
            raise EmbeddedError(f"{tool} ended with code {done.returncode}:\n{done.stdout}{done.stderr}".rstrip())
        return done

    def environment(self) -> dict[str, str]:
        """Libpq's environment variables for this server: PGHOST, PGPORT, PGUSER, PGDATABASE and PGPASSWORD."""
        return {
            "PGHOST": self.host,
            "PGPORT": str(self.port),
            "PGUSER": "postgres",
            "PGDATABASE": "postgres",
            "PGPASSWORD": self.password,
        }

    def standby(self, slot: str = "standby", settings: Mapping[str, Setting] | None = None) -> Server:
        """A physical standby of this server: a copy, not yet started. Use it as a context manager.

        Args:
            slot: The physical replication slot that is created for it here.
            settings: Its server settings. They override this server's. Whatever else `sync_replication_slots` needs
                (PostgreSQL 17 and later) is already set.
        """
        other = Server.__new__(Server)
        ours = self.settings | {"hot_standby_feedback": True}
        other._build(self.binaries, None, self.tcp, ours | dict(settings or {}))
        other.password = self.password
        try:
            # pg_basebackup of 17 and newer writes the dbname of -d into primary_conninfo, for slot synchronisation.
            other.run(
                "pg_basebackup", "-D", other.data, "-X", "stream", "-c", "fast", "-C", "-S", slot, "-R", "--no-sync",
                "-d", self.dsn(),
            )  # fmt: skip
        except BaseException:
            other.stop()
            raise
        return other

    def promote(self) -> None:
        """Promote this standby, and wait until it is a primary."""
        self.run("pg_ctl", "-D", self.data, "-w", "promote")

    # ------------------------------------------------------------------ inside

    def _watch(self) -> subprocess.Popen[str] | None:
        how = signal.SIGQUIT if self.throw_away else signal.SIGINT
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCHDOG, self.data / "postmaster.pid", self._base, str(int(how))],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def _tell(self, line: str) -> None:
        if self._watchdog is None or self._watchdog.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):  # it was killed
            self._watchdog.stdin.write(line + "\n")
            self._watchdog.stdin.flush()

    def _as_account(self) -> dict[str, Any]:
        env = self.binaries.environment()
        options: dict[str, Any] = {"cwd": "/", "env": env}
        if self._account is not None:
            env["HOME"] = str(self._base)
            options |= {"user": self._account.uid, "group": self._account.gid, "extra_groups": []}
        return options

    def _prepare(self) -> None:
        marker = self.data / "PG_VERSION"
        if marker.exists():
            have = marker.read_text().strip()
            if have != str(self.major):
                raise EmbeddedError(
                    f"{self.data} is a cluster of PostgreSQL {have}, but the programs here are {self.version}",
                    hint=f"set PG_BINDIR to a PostgreSQL {have}, or move the folder away to start with an empty one",
                )
            if not self.password:
                self.password = read_password(self.data)
            return
        self.password = secrets.token_urlsafe(18)
        self.data.parent.mkdir(parents=True, exist_ok=True)
        secret = self._base / "password"
        _write_private(secret, self.password)
        # Created under another name and then renamed: an interrupted initdb leaves nothing that looks like a cluster.
        fresh = Path(tempfile.mkdtemp(prefix=f"{self.data.name}.new-", dir=self.data.parent))
        try:
            if self._account is not None:
                self._account.chown(secret)
                self._account.chown(fresh)
            self.run(
                "initdb", "-D", fresh, "-U", "postgres", "-E", "UTF8", "--locale=C", "--auth=scram-sha-256",
                f"--pwfile={secret}", *(["--no-sync"] if self.throw_away else []),
            )  # fmt: skip
            if not self.throw_away:
                _write_private(_password_file(self.data), self.password)
            fresh.rename(self.data)
        finally:
            secret.unlink(missing_ok=True)
            shutil.rmtree(fresh, ignore_errors=True)

    def _try_start(self, deadline: float) -> str | None:
        """Try to start once. None if the server is ready, otherwise the last lines of its log."""
        ours: dict[str, Setting] = {
            "port": self.port,
            "listen_addresses": self.host if self.tcp else "",
            "unix_socket_directories": "" if self.tcp else self.host,
            "unix_socket_permissions": "0700",
        }
        command = [str(self.binaries.bindir / "postgres"), "-D", str(self.data)]
        for name, value in (self.settings | ours).items():
            command += ["-c", f"{name}={_setting(value)}"]
        with _open_log(self.log) as log:
            log.seek(0, os.SEEK_END)
            before = log.tell()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **self._as_account()
            )
        self._tell(f"pid {self._process.pid}")
        while self._process.poll() is None:
            if self._ready():
                return None
            if time.monotonic() > deadline:
                self.halt("immediate")
                return "it was not ready in time\n" + _tail(self.log, before)
            time.sleep(0.01)
        self.halt()
        return _tail(self.log, before)

    def _ready(self) -> bool:
        # Line 1 is the process id, line 8 the state.
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0].strip() == str(self.pid) and lines[7].strip() in ("ready", "standby")


def read_password(data: Path) -> str:
    """The superuser's password of a kept cluster."""
    try:
        return _password_file(data).read_text().strip()
    except OSError as error:
        raise EmbeddedError(
            f"the password of {data} can't be read: {error}",
            hint="run as the user who created it, or move the folder away to start with an empty one",
        ) from error


def _password_file(data: Path) -> Path:
    return data.with_name(data.name + ".password")


def _setting(value: Setting) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _write_private(path: Path, text: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o600), "w") as file:
        file.write(text + "\n")


def _open_log(path: Path) -> IO[bytes]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o600), "ab")


def _tail(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - 4000))
        return file.read().decode(errors="replace").rstrip()
