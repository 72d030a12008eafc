"""The server that is used when no connection is configured, kept under `.pgoutput/` in the current folder."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
from psycopg.conninfo import make_conninfo

from pgoutput_source.embedded.binaries import ROOT_PLACE, log, private_dir, server_account
from pgoutput_source.embedded.server import Server, read_password
from pgoutput_source.errors import EmbeddedError

_mutex = threading.Lock()
_started: dict[Path, Server] = {}


def connection_string(dsn: str | None, *, shop: bool = False) -> str:
    """The configured connection string or, without one, that of the embedded server, which is started if needed.

    Args:
        dsn: The configured connection string; None for none.
        shop: Whether the embedded server gets a shop that takes orders for as long as this process runs.

    Raises:
        EmbeddedError: There is no DSN, and the embedded server is not available.
    """
    if dsn is not None:
        return dsn
    dsn = default_dsn()
    if shop:
        # If the package imported it, `python -m pgoutput_source.embedded.shop` would warn that it is already loaded.
        from pgoutput_source.embedded.shop import open_shop

        open_shop(dsn)
    return dsn


def default_dsn(folder: Path | str | None = None) -> str:
    """The connection string of the embedded server that belongs to a folder. It is created and started if needed.

    If another process of the same user has started it, this one joins. The process that started the server stops it at
    exit, even if it is killed. The data stays for the next time. One line at level INFO of the logger
    `pgoutput_source.embedded` tells which server it is.

    Args:
        folder: The folder that contains `.pgoutput/`; None for the current one. If we are root and the account that
            PostgreSQL runs under can't enter the folder, the cluster is kept under /var/tmp, and the log line says so.

    Raises:
        EmbeddedError: PostgreSQL is not available or can't be started, or the folder belongs to another user.
    """
    home = Path(folder if folder is not None else Path.cwd()).resolve()
    place = _place(home)
    with _mutex:
        server = _started.get(place)
        if server is not None and server.running:
            return server.dsn()
        with _exclusive(place / "lock"):
            joined = _join(place / "data")
            if joined is not None:
                dsn, version = joined
            else:
                for unfinished in place.glob("data.new-*"):  # left by an initdb that was killed
                    shutil.rmtree(unfinished, ignore_errors=True)
                server = Server(data=place / "data")
                try:
                    server.start()
                except BaseException:
                    server.stop()
                    raise
                _started[place] = server
                dsn, version = server.dsn(), server.version
    log.info(
        "no connection is configured: using the embedded PostgreSQL %s, %s, in %s%s; set PGOUTPUT_DSN to use another",
        version,
        "already running" if joined is not None else "started now",
        place,
        "" if place.parent == home else f" (PostgreSQL's account can't enter {home})",
    )
    return dsn


def _place(home: Path) -> Path:
    account = server_account()
    try:
        if account is None or account.reaches(home):
            place = private_dir(home / ".pgoutput")
            # Keep the folder out of the project's version control.
            (place / ".gitignore").write_text("*\n")
            return place
        key = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
        return private_dir(private_dir(ROOT_PLACE) / f"kept-{key}")
    except OSError as error:
        raise EmbeddedError(
            f"the embedded server's folder can't be created in {home}: {error}",
            hint="work in a folder that you can write, or set PGOUTPUT_DSN to use another server",
        ) from error


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process: of two processes that start at once, one starts and one joins."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise EmbeddedError(
                f"{path} can't be locked: {error.strerror}",
                hint="work in a folder on a file system with locks, or set PGOUTPUT_DSN to use another server",
            ) from error
        yield
    finally:
        os.close(descriptor)


def _join(data: Path, timeout: float = 30.0) -> tuple[str, str] | None:
    """Connect to the server that runs on `data`: its DSN and version, or None if there is none."""
    pidfile = data / "postmaster.pid"
    deadline = time.monotonic() + timeout
    while True:
        try:
            lines = [line.strip() for line in pidfile.read_text().splitlines()]
            pid = int(lines[0])
        except (OSError, ValueError, IndexError):
            return None
        command = _command_of(pid)
        if command is None:
            return None  # a stale file, which PostgreSQL detects by itself
        if "postgres" not in command:
            # Another program has that process id now. PostgreSQL would think that the server is still running.
            pidfile.unlink(missing_ok=True)
            return None
        reason = "it is starting or stopping"
        if len(lines) >= 8:
            dsn = make_conninfo(
                "", host=lines[4], port=lines[3], user="postgres", password=read_password(data), dbname="postgres"
            )
            try:
                with psycopg.connect(dsn, connect_timeout=5) as connection:
                    version = connection.info.parameter_status("server_version") or ""
                return dsn, version.split()[0]
            except psycopg.OperationalError as error:
                reason = str(error).strip()
        if time.monotonic() > deadline:
            raise EmbeddedError(
                f"a server runs on {data} (process {pid}), but can't be connected to: {reason}",
                hint=f"end it (kill {pid}), or set PGOUTPUT_DSN to use another server",
            )
        time.sleep(0.1)


def _command_of(pid: int) -> str | None:
    """The command line of a process, or None if there is no such process."""
    if Path("/proc/self/cmdline").exists():
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return None
    shown = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True)
    return shown.stdout.strip() or None
