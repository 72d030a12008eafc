"""A DuckDB file that others read between our commits: opened, locked, copied; and DuckDB's errors as ours.

One process may have the file open to write, or many to read: DuckDB locks it.
https://duckdb.org/docs/stable/connect/concurrency
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final

from pgoutput_source.destinations.base import Refused
from pgoutput_source.destinations.targets import Target
from pgoutput_source.errors import ConfigurationError, SinkError
from pgoutput_source.files import explained, local_path, sync

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_LOCKED: Final = "Could not set lock"
_HINTS: Final = (
    (_LOCKED, "another process has it open: let readers close it, or give them a copy with publish_copy="),
    ("not a valid DuckDB database file", "choose another path: nothing was written to this one"),
    ("version number", "a newer DuckDB wrote it: pip install --upgrade duckdb, or choose another path"),
    ("newer version", "a newer DuckDB wrote it: pip install --upgrade duckdb, or choose another path"),
    ("Permission denied", "this process needs to read and write the file, and to create files beside it"),
    ("read-only", "this process needs to read and write the file, and to create files beside it"),
    ("No space left", "nothing of it was published or acknowledged: make room, and start again"),
    ("File too large", "nothing of it was published or acknowledged: make room, and start again"),
    ("Could not write", "nothing of it was published or acknowledged: repair the disk, and start again"),
)
_HINT: Final = "nothing of what failed is there, and it stays in the spool: repair the cause, and start again"
_PAUSE: Final = 0.02  # seconds


class DuckDBFile:
    """A path to a DuckDB file, which is created when it is first opened.

    Raises:
        ConfigurationError: DuckDB is not installed, or the path is none.
    """

    def __init__(self, path: str | os.PathLike[str], patience: timedelta) -> None:
        self.path = local_path(path).absolute()
        self.patience = patience.total_seconds()
        self._duckdb = _library()
        # DuckDB refuses a file that another thread of this process is just letting go of.
        self._door = threading.Lock()

    def __str__(self) -> str:
        return str(self.path)

    @contextlib.contextmanager
    def opened(self) -> Iterator[DuckDBPyConnection]:
        """A connection; the file is free again at the end.

        Raises:
            SinkError: Others have it for too long, it can't be opened, or something in the block failed.
        """
        created = not self.path.exists()
        with explained("can't create", self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            connection = self._connect()
            try:
                if created:
                    sync(self.path.parent)
                connection.execute("SET TimeZone = 'UTC'")
                yield connection
            finally:
                with self._door:
                    connection.close()
        except self._duckdb.Error as e:
            said = str(e).strip().splitlines()[0]
            hint = next((hint for words, hint in _HINTS if words in str(e)), _HINT)
            raise SinkError(f"DuckDB file {self}: {said}", hint=hint) from e

    @contextlib.contextmanager
    def refusing(self, target: Target) -> Iterator[None]:
        """DuckDB's errors that are about a table's values and names, as `Refused`."""
        duckdb = self._duckdb
        try:
            yield
        except (duckdb.ProgrammingError, duckdb.DataError, duckdb.NotSupportedError, duckdb.IntegrityError) as e:
            said = str(e).strip().splitlines()[0]
            hint = f"alter {target} there so that it takes the changes, or exclude the table"
            raise Refused.at(target, f"DuckDB file {self}: {target}: {said}", hint=hint) from e

    def copy_to(self, path: Path, connection: DuckDBPyConnection) -> None:
        """Replace `path` with a copy of what is committed. Who has the previous copy open keeps that one.

        The connection is open meanwhile, which keeps other processes from writing.

        Raises:
            SinkError: It can't be written; the previous copy is as it was.
        """
        connection.execute("CHECKPOINT")  # all that is committed is in the file then, and nothing beside it
        new = path.with_name(f".{path.name}.writing")
        with explained("can't write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path, new)
            sync(new)
            new.replace(path)
            sync(path.parent)

    def _connect(self) -> DuckDBPyConnection:
        deadline = time.monotonic() + self.patience
        while True:
            try:
                with self._door:
                    connection: DuckDBPyConnection = self._duckdb.connect(str(self.path))
                return connection
            except self._duckdb.IOException as e:
                if _LOCKED not in str(e) or time.monotonic() > deadline:
                    raise
            time.sleep(_PAUSE)


def _library() -> ModuleType:
    try:
        return importlib.import_module("duckdb")
    except ImportError as e:
        raise ConfigurationError(
            "DuckDBSink needs the package duckdb", hint="pip install 'pgoutput-source[duckdb]'"
        ) from e
