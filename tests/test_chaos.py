"""A short run of the long kill loop, which holds; and runs with a mistake in them, which must not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import chaos

from pgoutput_source.embedded import MAJORS


@pytest.mark.slow
def test_ten_kills_among_other_faults_lose_and_repeat_nothing() -> None:
    report = chaos.run(10, 5, max(MAJORS))

    assert report.kills == 10
    assert report.changes > 1_000
    assert report.held, report


@pytest.mark.slow
def test_kills_without_recovery_lose_nothing() -> None:
    report = chaos.run(6, 6, max(MAJORS), recovery=False)

    assert report.kills == 6
    assert report.changes > 1_000
    assert report.held, report


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["acknowledge early", "publish early", "forget"])
def test_a_mistake_would_be_seen(mistake: str) -> None:
    report = chaos.run(30, 1, max(MAJORS), mistake=mistake)

    assert not report.held, report
