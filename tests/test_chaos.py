"""Short runs of the long kill loop, which hold; and some with a mistake in them, which must not."""

from __future__ import annotations

import random
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import chaos
from harness.faults import PLACES

from pgoutput_source.embedded import MAJORS, Server


@pytest.mark.slow
def test_one_run_lives_through_every_fault_of_the_server_and_of_the_network(tmp_path: Path) -> None:
    report = chaos.Report()
    with Server(max(MAJORS), tcp=True) as server:
        flow = chaos.Chaos(server, tmp_path / "flow", random.Random(4), report, mistake="", millions=False)
        with chaos.Writing(flow.dsn, 4, filtered=True) as writing:
            flow.create_slots()
            writing.thread.start()
            (process,) = flow.start(1, "-s", "1", **flow.connection(wal_sender_timeout="3s"))
            try:
                until_said(flow, "streaming from", 1)
                for count, fault in enumerate(["terminate", "cut", "freeze", "restart"], 1):
                    time.sleep(0.5)
                    flow.disturb(fault, [process])
                    until_said(flow, "connected again", count)
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0, flow.said(1)
            finally:
                process.kill()
                process.wait()
            writing.stop()
            flow.finish(writing)
        flow.close()

    assert report.held, str(report)
    assert report.changes > 100


def until_said(flow: chaos.Chaos, text: str, times: int) -> None:
    deadline = time.monotonic() + 60
    while flow.said(1).count(text) < times:
        assert time.monotonic() < deadline, flow.said(1)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["mirror", "history"])
def test_kills_while_all_tables_go_into_another_database(to: str) -> None:
    report = chaos.run(4, 7, max(MAJORS), to=to)  # of one process and of two

    assert report.held, str(report)
    assert report.kills == 4


@pytest.mark.slow
def test_ten_kills_among_other_faults_lose_and_repeat_nothing() -> None:
    report = chaos.run(10, 5, max(MAJORS))

    assert report.held, str(report)
    assert report.kills == 10
    assert report.changes > 1_000


@pytest.mark.slow
def test_kills_without_recovery_lose_nothing() -> None:
    report = chaos.run(4, 6, max(MAJORS), recovery=False)

    assert report.held, str(report)
    assert report.kills == 4
    assert report.changes > 1_000


@pytest.mark.slow
def test_the_loop_would_see_what_comes_twice() -> None:
    report = chaos.run(20, 1, max(MAJORS), mistake="forget")

    assert report.repeated, str(report)


@pytest.mark.slow
def test_the_loop_would_see_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    # A kill must come between the acknowledgement and the files, which at random moments takes many.
    near = ("after staging", "acknowledged")
    monkeypatch.setattr(chaos, "PLACES", {place: PLACES[place] for place in near})
    reports = (chaos.run(20, seed, max(MAJORS), mistake="acknowledge early", recovery=False) for seed in (2, 3, 4))

    assert any(report.lost for report in reports)
