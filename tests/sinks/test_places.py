"""Where sinks write: what is a place, and the file systems, limits, clocks and children that get in the way."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import bytewax.operators as op
import pytest
from bytewax.dataflow import Dataflow
from bytewax.testing import TestingSource

import pgoutput_source.operators as cdc
from pgoutput_source import IpcSink, JsonLinesSink, ParquetSink, current, read, run
from pgoutput_source.dataflow.run import gate
from pgoutput_source.errors import ConfigurationError, SinkError
from pgoutput_source.testing import batch


def parquet(place: str | Path) -> ParquetSink:
    return ParquetSink(place, max_age=timedelta(0))


SINKS: list[Callable[[str | Path], Any]] = [parquet, IpcSink, JsonLinesSink]
ROW = batch("public.t", [("I", {"id": 1})])


@pytest.fixture(autouse=True)
def _no_gate_is_left() -> Iterator[None]:
    gate.abandon()
    yield
    gate.abandon()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize(
    "place", ["s3://lake/t", "gs://lake/t", "HTTPS://host/t", "file://host/t", Path("s3://lake/t"), ""]
)
@pytest.mark.parametrize("use", [*SINKS, read, lambda place: current(place, key="id")])
def test_what_is_no_local_path_is_refused_where_it_is_written(here: Path, use: Any, place: str | Path) -> None:
    with pytest.raises(ConfigurationError):
        use(place)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "place", ["~/t", "run:7/t", "a,b/t", "100%/t", "s3/t", "file:/t", "file://localhost{}/with%20space"]
)
@pytest.mark.parametrize("sink", SINKS)
def test_any_other_name_is_a_path(here: Path, sink: Any, place: str) -> None:
    place = place.format(here)
    meant = here / "home/t" if place[0] == "~" else here / "with space" if "localhost" in place else here / place
    flow = Dataflow("f")
    cdc.output("out", op.input("in", flow, TestingSource([ROW, ROW])), sink(place))
    run(flow, epoch=timedelta(0))
    assert list(meant.glob("*.*")) if meant.is_dir() else meant.read_text().count("\n") == 2
    if sink is parquet:
        assert {row["id"] for row in read(place).to_table().to_pylist()} == {1}
        assert current(place, key="id").num_rows == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(SinkError, match="without locks") as raised:
        ParquetSink(tmp_path).build_part("f.out", "parquet", None)
    assert "NFS" in str(raised.value)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (60, int(sys.argv[2])))
from pgoutput_source import ParquetSink
from pgoutput_source.errors import SinkError
try:
    parts = [ParquetSink(f"{sys.argv[1]}/{i}").build_part("f.out", "parquet", None) for i in range(100)]
    print(len(parts))
except SinkError as e:
    print(e)
"""


def test_a_soft_limit_of_open_files_is_raised_and_a_hard_one_named(tmp_path: Path) -> None:
    def said(hard: int) -> str:
        command = [sys.executable, "-c", LIMITED, str(tmp_path / str(hard)), str(hard)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert said(4096) == "100\n"
    assert "Too many open files" in said(60)
    assert "ulimit" in said(60)


@dataclass
class Clock:
    """What time it is: by `time.monotonic`, and by `time.time`, which may be set."""

    now: float = 1000.0
    wall: float = time.time()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.time", lambda: clock.wall)
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    return clock


@pytest.mark.parametrize("step", [-86_400, 86_400])
def test_a_row_waits_for_max_age_whatever_the_clock_says(tmp_path: Path, clock: Clock, step: int) -> None:
    gate.source_opened("slot")
    sink = ParquetSink(tmp_path, max_age=timedelta(seconds=60))
    part = sink.build_part("f.out", "parquet", None)
    part.write_batch([ROW])
    state = part.snapshot()
    gate.opened("slot")
    clock.wall += step
    clock.now += 59
    part.snapshot()
    gate.opened("slot")
    assert not list(tmp_path.glob("*.parquet"))
    clock.now += 2
    part.snapshot()
    gate.opened("slot")
    assert len(list(tmp_path.glob("*.parquet"))) == 1
    part.close()
    assert state["parts"]


def test_what_was_staged_before_the_clock_was_set_back_waits_no_longer_than_max_age(
    tmp_path: Path, clock: Clock
) -> None:
    gate.source_opened("slot")
    sink = ParquetSink(tmp_path, max_age=timedelta(seconds=60))
    part = sink.build_part("f.out", "parquet", None)
    part.write_batch([ROW])
    state = part.snapshot()
    gate.opened("slot")
    gate.source_closed("slot")
    part.close()
    clock.wall -= 86_400
    gate.source_opened("slot")
    part = sink.build_part("f.out", "parquet", state)
    clock.now += 61
    part.snapshot()
    gate.opened("slot")
    assert len(list(tmp_path.glob("*.parquet"))) == 1
    part.close()


def test_a_child_does_not_keep_the_folder_beyond_its_parent(tmp_path: Path) -> None:
    part = ParquetSink(tmp_path).build_part("f.out", "parquet", None)
    child = os.fork()
    if not child:
        time.sleep(30)
        os._exit(0)
    try:
        with pytest.raises(SinkError, match="in use by process"):
            ParquetSink(tmp_path).build_part("f.out", "parquet", None)
        part.close()
        deadline = time.monotonic() + 20
        while True:
            try:
                ParquetSink(tmp_path).build_part("f.out", "parquet", None).close()
                break
            except SinkError:  # the child has only just begun
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
