"""`wait_for`: once it returns, what committed before the position is there, whoever reads."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from harness.database import Database
from harness.flow import Flow, following, publish, wait_for

from pgoutput_source import wait_for as wait_until
from pgoutput_source.embedded import Server
from pgoutput_source.errors import NotReached
from pgoutput_source.protocol.wire import Lsn


@pytest.fixture
def target(pg: Server) -> Any:
    made = Database(pg)
    yield made
    made.drop()


def now(source: Any) -> str:
    return str(source.execute("SELECT pg_current_wal_lsn()::text").fetchone()[0])


def test_what_committed_before_is_there(db: Database, target: Database, tmp_path: Path) -> None:
    to = target.dsn
    with db.connect() as source, target.connect() as mirror:
        source.execute("CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY)")
        source.execute("CREATE TABLE other (n int)")
        publish(db)
        flow = Flow(db, tmp_path, module="flows.replicate", PGOUTPUT_TO=target.dsn, PGOUTPUT_EXCLUDE="public.other")
        with pytest.raises(NotReached, match="nothing is known of it yet"):
            wait_until(to, now(source), timeout=0)
        process = flow.start("-s", "0", *flow.recovery())
        with following(process) as lines:
            wait_for(lines, "streaming from", process)
            wait_until(to, now(source))  # although nothing has come yet
            late = 0
            for i in range(12):
                name = "ab"[i % 2]
                source.execute(f"INSERT INTO {name} VALUES ({i})".encode())
                source.execute("INSERT INTO other VALUES (1)")  # the last commit is not one that is taken
                lsn = now(source)
                there = f"SELECT count(*) FROM {name} WHERE id = {i}".encode()
                if i > 1:
                    late += mirror.execute(there).fetchone() == (0,)
                place = (to, tmp_path / "recovery-spool")[i // 2 % 2]
                assert wait_until(place, lsn) >= Lsn(lsn)
                assert mirror.execute(there).fetchone() == (1,)
            assert late, "without waiting it was there, too: the test shows nothing"
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0, lines
        source.execute("INSERT INTO a VALUES (100)")
        with pytest.raises(NotReached, match="is not reached, it is at"):
            wait_until(tmp_path / "recovery-spool", now(source), timeout=0.2)


def test_nothing_is_reached_while_rows_are_copied(db: Database, target: Database, tmp_path: Path) -> None:
    with db.connect() as source, target.connect() as mirror:
        source.execute("CREATE TABLE a (id int PRIMARY KEY); INSERT INTO a SELECT generate_series(1, 3000)")
        publish(db)
        flow = Flow(db, tmp_path, module="flows.replicate", PGOUTPUT_TO=target.dsn)
        process = flow.start("-s", "0", *flow.recovery(), PGOUTPUT_SNAPSHOT_ROWS_PER_SECOND="1000")
        with following(process) as lines:
            wait_for(lines, "streaming from", process)
            wait_until(tmp_path / "recovery-spool", now(source))
            assert mirror.execute("SELECT count(*) FROM a").fetchone() == (3000,)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0, lines
