"""A server whose history is another one than that of the recovery folder: restored from a backup, and gone on since."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.database import NEWEST, Database
from harness.flow import Flow, confirmed, failure, publish
from harness.resync import run
from harness.slots import ids, insert

from pgoutput_source.embedded import Server
from pgoutput_source.errors import StateError
from pgoutput_source.protocol.wire import PG_EPOCH_US, Lsn
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream.history import History


@pytest.fixture
def restorable() -> Iterator[Server]:
    with Server(NEWEST) as server:
        yield server


def copy(server: Server, source: Path, target: Path) -> None:
    """The cluster of a server that is stopped, with its owner and modes."""
    subprocess.run(["rm", "-rf", target], check=True)
    subprocess.run(["cp", "-a", source, target], check=True)


@pytest.mark.parametrize("streaming", ["off", "on"])
def test_a_restored_backup_is_refused_however_far_it_has_gone_on(
    restorable: Server, tmp_path: Path, streaming: str
) -> None:
    server, backup = restorable, restorable.data.with_name("backup")
    db = Database(server)
    publish(db)
    with db.connect() as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
        connection.execute("CREATE TABLE unpublished (id int)")
        connection.execute("ALTER SYSTEM SET logical_decoding_work_mem = '64kB'")
    flow = Flow(db, tmp_path, PGOUTPUT_STREAMING=streaming)
    arguments = flow.recovery()
    insert(db, 1, 100)
    flow.run("-s", "0", *arguments, PGOUTPUT_UNTIL="current")
    db.close()
    server.halt("fast")
    copy(server, server.data, backup)
    server.start()
    insert(db, 101, 2000)
    flow.run("-s", "0", *arguments, PGOUTPUT_UNTIL="current")
    published = ids(flow)
    db.close()
    server.halt("fast")
    copy(server, backup, server.data)
    server.start()
    before = confirmed(db)

    said, code = failure(flow, *arguments)
    assert (code, "StateError" in said, "restored from a backup" in said) == (1, True, True), said
    assert "start afresh" in said
    assert confirmed(db) == before
    code, said = run(flow, "--recovery", str(tmp_path / "recovery"), "--yes")
    assert (code, "StateError" in said) == (1, True)

    with db.connect() as connection:
        connection.execute("INSERT INTO unpublished SELECT generate_series(1, 100000)")
    insert(db, 5001, 9000)
    said, code = failure(flow, *arguments)
    assert (code, "StateError" in said, "does not have it" in said) == (1, True, True), said
    assert "start afresh" in said
    assert confirmed(db) == before
    assert ids(flow) == published


def frame(message: bytes) -> bytes:
    return b"w" + bytes(24) + message


def test_the_last_transaction_must_come_again_if_the_slot_is_before_it() -> None:
    settings = SourceSettings.of(dsn="", slot="s", publication=("b", "a"))
    state = {"commit_lsn": 1000, "xid": 7, "commit_ts": 5 + PG_EPOCH_US, "streamed": ["a", "b", "any"]}

    def begin(lsn: int, xid: int, ts: int = 5) -> bytes:
        return frame(b"B" + struct.pack(">QqI", lsn, ts, xid))

    def commit(lsn: int, xid: int, ts: int = 5) -> bytes:
        return frame(b"c" + struct.pack(">IBQQq", xid, 0, lsn, lsn + 8, ts))

    rng = random.Random(1)
    for kind in (begin, commit):
        before = [kind(lsn, rng.randrange(100)) for lsn in range(100, 1000, 100)]
        for others, sent in (([kind(1000, 8)], 900), ([kind(1000, 7, 6)], 900), ([kind(1001, 7)], 900), ([], 1001)):
            history = History(settings, state)
            history.connected(Lsn(1000))
            history.look(before, Lsn(900))
            assert history.pending
            with pytest.raises(StateError, match="transaction 7 at 0/3E8"):
                history.look(others, Lsn(sent))
        history = History(settings, state)
        history.connected(Lsn(100))
        history.look([*before, kind(1000, 7), kind(2000, 9)], Lsn(3000))
        assert not history.pending
    for other in (None, state | {"streamed": ["a", "any"]}, state | {"commit_lsn": None}, {"commit_lsn": 1000}):
        history = History(settings, other)
        history.connected(Lsn(100))
        assert not history.pending
    history = History(settings, state)
    history.connected(Lsn(1001))
    assert not history.pending
    assert history.state() == {"xid": 7, "commit_ts": 5 + PG_EPOCH_US, "streamed": ["a", "b", "any"]}
