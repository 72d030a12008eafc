"""Iceberg files on a local disk that are durable when they are closed. The library does not sync them.

The catalogue names metadata, which names manifests, which name data files: a power cut must not leave a name without
its content. Object stores need nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pyiceberg.io import OutputStream
from pyiceberg.io.pyarrow import PyArrowFile, PyArrowFileIO

from pgoutput_source.files import sync


class _SyncedStream:
    """An output stream that is synced when it is closed, and its folder with it."""

    def __init__(self, stream: Any, path: Path) -> None:
        self._stream, self._path = stream, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if not self._stream.closed:
            self._stream.close()
            sync(self._path)
            sync(self._path.parent)


class _SyncedFile(PyArrowFile):
    def create(self, overwrite: bool = False) -> OutputStream:
        """A stream that is durable when it is closed."""
        stream: OutputStream = _SyncedStream(super().create(overwrite), Path(self._path))
        return stream


class SyncedFileIO(PyArrowFileIO):
    """What pyiceberg uses by default, with synced files on local file systems."""

    def new_output(self, location: str) -> PyArrowFile:
        """A file to write."""
        scheme, netloc, path = self.parse_location(location, self.properties)
        if scheme != "file":
            return super().new_output(location)
        return _SyncedFile(fs=self.fs_by_scheme(scheme, netloc), location=location, path=path, buffer_size=0)
