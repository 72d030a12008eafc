"""A session is cut anywhere, resumed from its state, and delivers each change once, whatever brings the frames."""

from __future__ import annotations

import random
from contextlib import closing

import pytest
from harness.database import Database
from harness.proxy import Alter, Cut, Proxy
from psycopg.conninfo import make_conninfo

from pgoutput_source.changes.batches import ChangeSet
from pgoutput_source.embedded import Server
from pgoutput_source.errors import ConnectionFailed
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.settings import SourceSettings
from pgoutput_source.stream.peeked import PeekedFrames
from pgoutput_source.stream.session import SlotSession
from pgoutput_source.stream.start import State

ROWS = 400


def prepared(db: Database, streaming: str = "off") -> SourceSettings:
    settings = SourceSettings.of(
        dsn=db.dsn,
        slot=f"{db.name}_s",
        publication="p",
        create=True,
        max_frames=17,
        streaming=streaming,
        max_bytes=4096,
    )
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        SlotSession(db.dsn, settings).close()
        rng, at = random.Random(3), 0
        while at < ROWS:
            count = min(ROWS - at, rng.choice([1, 1, 3, 150]))
            c.execute(
                "INSERT INTO t SELECT i, repeat('x', 50) FROM generate_series(%s::int, %s) i", [at, at + count - 1]
            )
            at += count
    return settings


def ids(changes: ChangeSet) -> list[int]:
    return [i for batch in changes.batches for i in batch.data.column("id").to_pylist()]


@pytest.mark.parametrize("streaming", ["off", "on"])
@pytest.mark.parametrize("acknowledging", [False, True])
def test_a_session_resumes_at_the_exact_change(db: Database, streaming: str, acknowledging: bool) -> None:
    db.connect().execute(f"ALTER DATABASE {db.name} SET logical_decoding_work_mem = '64kB'")
    settings = prepared(db, streaming)
    rng = random.Random(5)
    got: list[int] = []
    state: State | None = None
    cuts_inside = 0
    while len(got) < ROWS:
        with closing(SlotSession(db.dsn, settings, state)) as session:
            stop = min(ROWS, len(got) + rng.randrange(1, 60))
            while len(got) < stop:
                got += ids(session.next(0.2))
            cuts_inside += session.in_transaction
            before, state = session.safe_lsn, session.snapshot()
            assert state["lsn"] == before
            if acknowledging:
                session.acknowledge(Lsn(state["lsn"]))
    assert got == list(range(ROWS))
    assert cuts_inside


def test_without_its_state_a_session_repeats_what_was_not_acknowledged(db: Database) -> None:
    settings = prepared(db)
    for _ in range(2):
        with closing(SlotSession(db.dsn, settings)) as session:
            assert ids(session.next(2))[:1] == [0]


def test_frames_of_sql_are_the_same_changes_and_end(db: Database) -> None:
    settings = prepared(db).model_copy(update={"until": "current"})
    with closing(
        SlotSession(db.dsn, settings, frames=lambda dsn, s, start: PeekedFrames(dsn, s, timeline=1, limit=10_000))
    ) as session:
        peeked = []
        while not session.ended:
            peeked += ids(session.next())
        session.acknowledge(session.safe_lsn)  # consumes nothing
    with closing(SlotSession(db.dsn, settings)) as session:
        streamed = []
        while not session.ended:
            streamed += ids(session.next(0.2))

    assert peeked == streamed == list(range(ROWS))


def test_a_look_at_the_catalogue_waits_for_the_server_as_the_stream_does(tls: Server) -> None:
    """The stream goes on while no new connection can be made; then one brings a type that nobody knows yet."""
    away = 0

    def begin() -> Alter:
        nonlocal away
        away -= 1

        def alter(_: bool, data: bytes) -> bytes:
            if left >= 0:
                raise Cut
            return data

        left = away
        return alter

    db = Database(tls)
    with db.connect() as c, Proxy(lambda: tls.port, begin) as proxy:
        c.execute("CREATE TYPE mood AS ENUM ('sad', 'glad'); CREATE TABLE t (id int PRIMARY KEY, m mood)")
        for patience in (20.0, 0.0):
            dsn = make_conninfo(db.dsn, port=proxy.port, sslmode="disable")
            settings = SourceSettings.of(
                dsn=dsn,
                slot=f"{db.name}_{patience:.0f}",
                publication="p",
                create=True,
                reconnect_seconds=patience,
            )
            with closing(SlotSession(dsn, settings)) as session:
                c.execute("INSERT INTO t VALUES (%s, 'glad')", [int(patience)])
                away = 4
                if patience:
                    changes = ChangeSet(())
                    while not changes.batches:
                        changes = session.next(1)
                    assert changes.batches[0].data["m"].to_pylist() == ["glad"]
                    assert away < 1
                else:
                    with pytest.raises(ConnectionFailed):
                        [session.next(1) for _ in range(10)]  # the first may bring the Begin alone
                away = 0
    db.drop()
