"""The gate by itself, and in real Bytewax flows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import bytewax.operators as op
import pytest
from bytewax.dataflow import Dataflow
from bytewax.errors import BytewaxRuntimeError
from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition
from bytewax.testing import run_main

from pgoutput_source.dataflow.run import gate


@pytest.fixture(autouse=True)
def _no_gate_is_left() -> Iterator[None]:
    gate.abandon()
    yield
    gate.abandon()


Log = list[tuple[Any, ...]]


class Source(FixedPartitionedSource[tuple[str, int], int]):
    """Gives out the number of its epoch, `count` times, and says in the log what it acknowledges."""

    def __init__(self, name: str, count: int, log: Log, *, empty: tuple[int, ...] = ()) -> None:
        self.name, self.count, self.log, self.empty = name, count, log, empty

    def list_parts(self) -> list[str]:
        return [self.name]

    def build_part(self, step_id: str, for_part: str, resume_state: int | None) -> SourcePart:
        return SourcePart(self)


class SourcePart(StatefulSourcePartition[tuple[str, int], int]):
    def __init__(self, source: Source) -> None:
        self.source = source
        self.epoch = 1
        self.waiting = False
        gate.source_opened(source.name)

    def _gate(self) -> None:
        if self.waiting:
            self.waiting = False
            self.source.log.append(("opens", self.source.name, self.epoch - 1))
            gate.opened(self.source.name)
            self.source.log.append(("acknowledges", self.source.name, self.epoch - 1))

    def next_batch(self) -> list[tuple[str, int]]:
        self._gate()
        if self.epoch > self.source.count:
            gate.source_finished(self.source.name)
            raise StopIteration
        return [] if self.epoch in self.source.empty else [("key", self.epoch)]

    def snapshot(self) -> int:
        self._gate()
        self.epoch += 1
        self.waiting = True
        return self.epoch

    def close(self) -> None:
        gate.source_closed(self.source.name)


class Sink(FixedPartitionedSink[int, None]):
    """Says in the log which epochs it stages and which it takes for durable."""

    def __init__(self, name: str, log: Log, fails: int = 0) -> None:
        self.name, self.log, self.fails = name, log, fails

    def list_parts(self) -> list[str]:
        return ["part"]

    def build_part(self, step_id: str, for_part: str, resume_state: None) -> SinkPart:
        return SinkPart(self)


class SinkPart(StatefulSinkPartition[int, None]):
    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.written = self.staged = self.published = 0
        gate.register(self)

    def write_batch(self, values: list[int]) -> None:
        self.written = max(values)

    def snapshot(self) -> None:
        with gate.lock:
            self.staged = self.written
            self.sink.log.append(("stages", self.sink.name, self.staged))
            gate.staged(self)

    def committed(self) -> None:
        if self.staged > self.published:
            if self.staged == self.sink.fails:
                raise OSError("disk full")
            self.published = self.staged
            self.sink.log.append(("publishes", self.sink.name, self.staged))

    def drain(self) -> None:
        self.sink.log.append(("drains", self.sink.name, self.published))

    def close(self) -> None:
        if gate.finishing():
            gate.ended(self)
        else:
            gate.unregister(self)


def run(flow: Dataflow) -> None:
    run_main(flow, epoch_interval=timedelta(0))  # type: ignore[no-untyped-call]


def pipeline(flow: Dataflow, name: str, source: Source, sink: Sink) -> None:
    op.output(f"{name}_out", op.input(f"{name}_in", flow, source), sink)


def test_every_epoch_is_published_before_it_is_acknowledged() -> None:
    log: Log = []
    flow = Dataflow("one")
    pipeline(flow, "a", Source("a", 5, log, empty=(2,)), Sink("a", log))
    run(flow)
    gate.finish()
    published = [entry[2] for entry in log if entry[0] == "publishes"]
    assert published == [1, 3, 4, 5]
    for epoch in published:
        assert log.index(("stages", "a", epoch)) < log.index(("publishes", "a", epoch))
        assert log.index(("publishes", "a", epoch)) < log.index(("acknowledges", "a", epoch))


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_gate_of_another_source_opens_only_for_epochs_that_it_proves(order: str) -> None:
    log: Log = []
    flow = Dataflow("two")
    for name in order:
        pipeline(flow, name, Source(name, 30, log, empty=(3, 4, 9) if name == "a" else (4, 5)), Sink(name, log))
    run(flow)
    opener = 0
    for what, name, epoch in log:
        if what == "opens":
            opener = epoch
        elif what == "publishes":
            assert epoch <= opener, f"{name} published epoch {epoch} on a gate that proves {opener}"
            own = [entry for entry in log[: log.index((what, name, epoch))] if entry == ("acknowledges", name, epoch)]
            assert not own, "published after its own source acknowledged"
    assert [e for w, n, e in log if (w, n) == ("publishes", "b")] == [i for i in range(1, 31) if i not in (4, 5)]


def test_a_part_behind_another_source_waits_for_the_opening_that_proves_its_epoch() -> None:
    log: Log = []
    ahead, behind = SinkPart(Sink("ahead", log)), SinkPart(Sink("behind", log))
    gate.source_opened("a")
    gate.source_opened("b")
    gate.opened("a")
    gate.opened("b")
    ahead.write_batch([2])
    ahead.snapshot()  # b has closed epoch 2, and a has not
    gate.opened("b")
    assert log[-1] == ("publishes", "ahead", 2)
    ahead.write_batch([3])
    ahead.snapshot()  # b has closed epoch 3, while a's gate for epoch 2 opens only now
    behind.write_batch([2])
    gate.opened("a")
    assert log[-1] == ("stages", "ahead", 3), "an opening for epoch 2 proves nothing about epoch 3"
    gate.opened("b")
    assert log[-1] == ("publishes", "ahead", 3)


def test_an_epoch_that_can_not_be_published_is_not_acknowledged() -> None:
    log: Log = []
    flow = Dataflow("failing")
    pipeline(flow, "a", Source("a", 5, log), Sink("a", log, fails=3))
    with pytest.raises(BytewaxRuntimeError):
        run(flow)
    assert [entry for entry in log if entry[0] == "acknowledges"] == [
        ("acknowledges", "a", 1),
        ("acknowledges", "a", 2),
    ]
    gate.finish()
    assert not [entry for entry in log if entry[0] == "drains"], "an aborted run finishes nothing"


def test_finish_publishes_what_ended_parts_still_hold_once_and_only_after_a_regular_end() -> None:
    log: Log = []
    gate.source_opened("a")
    assert gate.hosted()
    part = SinkPart(Sink("a", log))
    gate.source_finished("a")
    gate.source_closed("a")
    part.write_batch([7])
    part.snapshot()
    part.close()
    assert gate.hosted()
    assert log == [("stages", "a", 7)]
    gate.finish()
    gate.finish()
    assert log == [("stages", "a", 7), ("publishes", "a", 7), ("drains", "a", 7)]
    assert not gate.hosted()


def test_a_new_run_forgets_what_an_earlier_one_did_not_finish() -> None:
    log: Log = []
    gate.source_opened("a")
    part = SinkPart(Sink("a", log))
    gate.source_closed("a")  # and finished in the other order
    gate.source_finished("a")
    part.write_batch([7])
    part.snapshot()
    part.close()
    gate.source_opened("a")
    gate.opened("a")
    gate.source_finished("a")
    gate.source_closed("a")
    gate.finish()
    assert log == [("stages", "a", 7)]


PROGRAM = """
import os, signal, sys
from pgoutput_source import gate
class Part:
    def committed(self): print("committed")
    def drain(self): print("drained")
gate.source_opened()
part = Part()
gate.register(part)
gate.source_finished()
gate.source_closed()
gate.ended(part)
{end}
"""

ENDS = {
    "": True,
    "sys.exit()": True,
    "raise RuntimeError": False,
    "os.kill(os.getpid(), signal.SIGINT)": False,
    "gate.abandon()": False,
    "gate.source_opened('b'); gate.source_closed('b')": False,
    "gate.source_opened('b')": False,
    "os.kill(os.getpid(), signal.SIGKILL)": False,
}


@pytest.mark.parametrize("end", ENDS)
def test_the_end_of_the_program_finishes_a_run_unless_an_exception_ended_it(end: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(end=end)], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == (["committed", "drained"] if ENDS[end] else []), done.stderr
