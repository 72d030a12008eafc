"""Files on a local file system: the paths that users give, durability, locks, and errors of the operating system."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from pgoutput_source.errors import ConfigurationError, PgOutputError, SinkError

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_STORE: Final = re.compile(
    r"(s3[an]?|gs|gcs|az|adl|abfss?|wasbs?|hdfs|https?|s?ftp|memory):/"
)  # what Path leaves of it
_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


def local_path(place: str | os.PathLike[str]) -> Path:
    """The path that a user means: ``~`` is a home directory, and a ``file://`` URL stands for its path.

    Raises:
        ConfigurationError: It is another URL, or not a path.

    Example:
        >>> local_path("out/run:7"), local_path("file:///data/the%20shop")
        (PosixPath('out/run:7'), PosixPath('/data/the shop'))
        >>> local_path("s3://lake/orders")
        Traceback (most recent call last):
        pgoutput_source.errors.ConfigurationError: 's3://lake/orders' is not on a local file system
        hint: give a path, and copy the published files, which never change, with the store's own tool
    """
    text = os.fspath(place)
    if text.lower().startswith("file://"):
        url = urlsplit(text)
        if url.netloc in ("", "localhost"):
            text = unquote(url.path)
    if _URL.match(text) or _STORE.match(text):
        raise ConfigurationError(
            f"{text!r} is not on a local file system",
            hint="give a path, and copy the published files, which never change, with the store's own tool",
        )
    if not text or "\0" in text:
        raise ConfigurationError(f"{text!r} is not a path", hint="give the path of a folder or file")
    try:
        return Path(text).expanduser()
    except RuntimeError as e:
        raise ConfigurationError(f"{text!r} has no home directory: {e}", hint="write the path out") from e


@contextlib.contextmanager
def explained(what: str, path: Path, error: type[PgOutputError] = SinkError) -> Iterator[None]:
    """Turn the operating system's errors into an `error` that says what could not be done with `path`."""
    try:
        yield
    except OSError as e:
        hint = (
            "nothing of it was published or acknowledged: make room, or repair the folder's permissions or the disk, "
            "and start again"
        )
        if e.errno in (errno.EMFILE, errno.ENFILE):
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            hint = (
                f"each table needs a few files, and this process may open {most}: raise the limit (ulimit -Hn, or "
                "LimitNOFILE of a systemd unit), or write fewer tables per process"
            )
        raise error(f"{what} {path}: {e.strerror or e}", hint=hint) from e


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def no_locks(error: OSError, path: Path) -> SinkError | None:
    """The error for a file system without locks, if that is what `error` says."""
    if error.errno not in _NO_LOCKS:
        return None
    return SinkError(
        f"{path} is on a file system without locks: {error.strerror}",
        hint="a lock keeps two sinks from writing to one folder. Mount the file system with locks (NFS: with lockd, or "
        "version 4; FUSE: see its options), or write to another one",
    )


def need_file(descriptor: int) -> None:
    """Raise this process's soft limit of open files to the hard limit once a descriptor comes near it.

    The soft limit is 1024 on most systems, for programs that call select(). A flow with a sink for each of a thousand
    tables needs more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and descriptor > soft // 3 and soft != hard:
        most = 1 << 20 if hard == resource.RLIM_INFINITY else hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


_ENCODED: Final = re.compile(r"""^[_.]|[\x00-\x1f\x7f/\\:*?"<>|%=\[\]{}]""")


def folder_name(text: str) -> str:
    """A text as the name of a folder: percent-encoded where a path, a glob pattern or a partition would be meant.

    >>> folder_name("_in/out=50%")
    '%5Fin%2Fout%3D50%25'
    """
    return _ENCODED.sub(lambda match: f"%{ord(match[0]):02X}", text)


def folds_case(folder: Path) -> bool:
    """Whether names in a folder that differ only in upper and lower case are the same."""
    with explained("can't write to", folder), tempfile.NamedTemporaryFile(prefix="_Case", dir=folder) as file:
        return Path(file.name).with_name(Path(file.name).name.swapcase()).exists()
