"""The command, as a process."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout

from harness.flow import Flow
from pgoutput_source import cli


def run(flow: Flow, *arguments: str) -> tuple[int, str]:
    """`resync` of the flow's slot: its exit code, and what it says."""
    named = [f"--{name}={flow.environ['PGOUTPUT_' + name.upper()]}" for name in ("dsn", "slot", "publication")]
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = cli.main(["resync", *named, *arguments])
    return code, said.getvalue()
