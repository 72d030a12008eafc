"""What a person at a terminal sees of the copy."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness.database import Database

pytest.importorskip("bytewax")

FLOW = """
import sys
from datetime import timedelta
import bytewax.operators as op
from bytewax.dataflow import Dataflow
from bytewax.testing import TestingSink
from pgoutput_source import PgOutputSource, run
from pgoutput_source.copy import initial

initial.CHUNK_ROWS = 100
flow = Dataflow("copy")
source = PgOutputSource(sys.argv[1], slot="s", publication="p", snapshot="only")
op.output("out", op.input("in", flow, source), TestingSink([]))
run(flow, epoch=timedelta(seconds=0.1))
"""


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_terminal_shows_a_line_that_is_gone_in_the_end(db: Database, tmp_path: Path, term: str) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY)")
        c.execute("INSERT INTO t SELECT generate_series(1, 1000)")
        c.execute("ANALYZE t")
        c.execute("CREATE PUBLICATION p FOR TABLE t")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", FLOW, db.dsn],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs, env=os.environ | {"TERM": term},
    )  # fmt: skip
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait() == 0

    lines = written.decode().replace("\r\n", "\n").split("\n")
    seen = [line.rsplit("\r\x1b[K")[-1] for line in lines]
    assert [re.sub(r"^\d\d:\d\d:\d\d |, everything.*", "", line) for line in seen[1:-1]] == [
        "slot s: public.t is copied, 1000 rows",
        "slot s: the initial copy is complete",
        "slot s: stopped",
    ], lines
    shown = r"public\.t \[#\.{9}\] 100 of 1\.0 k rows, [\d.]+( k)?/s, 0:00:\d\d left, tables 0/1\r\r\x1b\[K"
    if term == "dumb":
        assert "\x1b" not in written.decode()
    else:
        assert re.search(shown, written.decode())
