"""A server with TLS, and certificates of its own making."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from pgoutput_source.embedded import Server, find_binaries
from pgoutput_source.errors import EmbeddedError


@contextmanager
def tls_server() -> Iterator[Server]:
    """A server with TLS and a certificate of its own making; a test without openssl is skipped."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate")
    try:
        find_binaries(17)
    except EmbeddedError as error:
        pytest.skip(error.message)
    with Server(17, tcp=True) as server:
        certificate(server.data, "server")
        for name in ("server.crt", "server.key"):
            owner = server.data.stat()
            os.chown(server.data / name, owner.st_uid, owner.st_gid)
            (server.data / name).chmod(0o600)
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET ssl = on")
            connection.execute("SELECT pg_reload_conf()")
        yield server


def certificate(folder: Path, name: str) -> Path:
    """A self-signed certificate for localhost."""
    file = folder / f"{name}.crt"
    command = [
        "openssl",
        "req",
        "-new",
        "-x509",
        "-days",
        "2",
        "-nodes",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost",
    ]
    subprocess.run([*command, "-out", file, "-keyout", folder / f"{name}.key"], check=True, capture_output=True)
    return file
