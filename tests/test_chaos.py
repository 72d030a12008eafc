"""A short run of the long kill loop, which holds; and one with a mistake in it, which must not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import chaos

from pgoutput_source.embedded import MAJORS


@pytest.mark.slow
def test_ten_kills_among_other_faults_lose_and_repeat_nothing() -> None:
    report = chaos.run(10, 5, max(MAJORS), durable=False)

    assert report.kills == 10
    assert report.changes > 1_000
    assert report.held, report


@pytest.mark.slow
def test_the_loop_would_see_what_comes_twice() -> None:
    report = chaos.run(4, 3, max(MAJORS), mistake="forget", durable=False)

    assert report.repeated, report
