"""The replication stream on real servers: what it hands out, what it acknowledges, and what it survives."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from harness.database import Database
from harness.waiting import PATIENCE, until
from psycopg.conninfo import make_conninfo

from pgoutput_source.embedded import Server
from pgoutput_source.errors import (
    ConnectionFailed,
    NotConfigured,
    PgOutputError,
    ProtocolError,
    PublicationError,
    ServerError,
    SlotAhead,
    SlotInUse,
    SlotLost,
    SlotMismatch,
    SlotNotFound,
    StateError,
)
from pgoutput_source.postgres.connection import connect
from pgoutput_source.postgres.creation import create_publication_and_slot
from pgoutput_source.postgres.slots import SlotState, slot_state
from pgoutput_source.postgres.system import current_lsn
from pgoutput_source.protocol.wire import XLOG_DATA_HEADER, Lsn, StandbyStatus, pg_now
from pgoutput_source.stream.feedback import Feedback
from pgoutput_source.stream.replication import ReplicationStream
from pgoutput_source.stream.walsender import Walsender

CREATE_TABLE = "CREATE TABLE IF NOT EXISTS public.t (id int PRIMARY KEY, v text)"


class Source:
    """A database with a table, a publication of it and a slot; and streams of it, closed at the end of the test."""

    def __init__(self, dsn: str, name: str) -> None:
        self.dsn = dsn
        self.slot = f"{name}_slot"
        self.conn = connect(dsn)
        self.conn.execute(CREATE_TABLE)
        self.streams: list[ReplicationStream] = []

    def create(self) -> Source:
        create_publication_and_slot(self.conn, slot=self.slot, publications=["p", 'We,"Ird'], tables=["public.t"])
        return self

    def stream(self, dsn: str | None = None, *, start: bool = True, **options: Any) -> ReplicationStream:
        given: dict[str, Any] = {"slot": self.slot, "publications": ("p", 'We,"Ird'), "reconnect_seconds": 20}
        stream = ReplicationStream(dsn or self.dsn, **given | options)
        self.streams.append(stream)
        if start:
            stream.start(Lsn(0))
        return stream

    def state(self) -> SlotState:
        state = slot_state(self.conn, self.slot)
        assert state is not None
        return state

    def insert(self, first: int, last: int, width: int = 10) -> None:
        """One transaction."""
        self.conn.execute(
            f"INSERT INTO public.t SELECT i, repeat('x', {width}) FROM generate_series({first}, {last}) i".encode()
        )

    def close(self) -> None:
        for stream in self.streams:
            stream.close()
        self.conn.close()


@pytest.fixture
def source(db: Database) -> Iterator[Source]:
    """On the newest PostgreSQL that the session shares."""
    source = Source(db.dsn, db.name).create()
    yield source
    source.close()


@pytest.fixture
def any_source(any_db: Database) -> Iterator[Source]:
    """On each major in turn."""
    source = Source(any_db.dsn, any_db.name).create()
    yield source
    source.close()


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    """A server of this file's own, to be stopped and started."""
    with Server(settings={"max_slot_wal_keep_size": "32MB", "max_wal_senders": 3}) as server:
        yield server


@pytest.fixture
def own_source(own: Server, request: pytest.FixtureRequest) -> Iterator[Source]:
    source = Source(own.dsn(), "own").create()
    source.conn.execute("TRUNCATE public.t")
    source.conn.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [source.slot])
    yield source
    source.close()
    own.start()
    with connect(own.dsn()) as conn:
        until(lambda: not slot_state(conn, source.slot).active)  # type: ignore[union-attr]
        conn.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")


def read(stream: ReplicationStream, end: Lsn, seconds: float = PATIENCE, **limits: Any) -> list[bytes]:
    """Payloads without their header, until the server has sent everything up to a position."""
    payloads: list[bytes] = []
    deadline = time.monotonic() + seconds
    while stream.received < end:
        assert time.monotonic() < deadline, f"{stream.received} instead of {end}"
        payloads += [bytes(frame[XLOG_DATA_HEADER:]) for frame in stream.poll(**{"timeout": 0.2} | limits)]
    return payloads


def ids(payloads: list[bytes]) -> list[int]:
    """The first column of each row that was inserted, as text."""
    rows = [payload for payload in payloads if payload[:1] == b"I"]
    return [int(row[13 : 13 + int.from_bytes(row[9:13], "big")]) for row in rows]


def tags(payloads: list[bytes]) -> str:
    return b"".join(payload[:1] for payload in payloads).decode()


# -- what is handed out ---------------------------------------------------------------------------------------------


def test_frames_are_what_the_slot_holds(any_source: Source) -> None:
    source = any_source
    source.insert(1, 3000, width=300)
    source.conn.execute("UPDATE public.t SET v = 'y' WHERE id < 10")
    source.conn.execute("SELECT pg_logical_emit_message(true, 'a', 'b'), pg_logical_emit_message(false, 'c', 'd')")
    source.conn.execute("DELETE FROM public.t WHERE id = 3000; TRUNCATE public.t")
    for i in range(200):
        source.insert(i, i)
    held = source.conn.execute(
        "SELECT data FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL, 'proto_version', '1',"
        " 'publication_names', 'p,\"We,\"\"Ird\"', 'messages', 'true')",
        [source.slot],
    ).fetchall()
    end = current_lsn(source.conn)

    for limits in ({}, {"max_frames": 7}, {"max_bytes": 1}, {"timeout": 0.0}):
        stream = source.stream()
        assert read(stream, end, **limits) == [row[0] for row in held]
        stream.close(graceful=True)


def test_a_poll_keeps_its_limits_and_the_rest_stays_with_the_server(source: Source) -> None:
    source.insert(1, 200_000, width=100)
    stream = source.stream()

    def stalled() -> bool:
        """Whether the server has filled what lies between it and us."""
        query = (
            "SELECT wait_event FROM pg_stat_activity WHERE backend_type = 'walsender' AND datname = current_database()"
        )
        return source.conn.execute(query).fetchone() == ("WalSenderWriteData",)

    several = stream.poll(max_frames=1000, timeout=20)
    until(stalled)
    bounded = stream.poll(max_bytes=20_000, timeout=20)
    until(stalled)
    rest = read(stream, current_lsn(source.conn))

    assert 0 < len(several) <= 1000
    assert 20_000 <= sum(map(len, bounded)) < 50_000
    frames = [bytes(frame[XLOG_DATA_HEADER:]) for frame in several + bounded] + rest
    assert ids(frames) == list(range(1, 200_001))


def test_a_poll_without_data_takes_its_timeout(source: Source) -> None:
    stream = source.stream()
    read(stream, current_lsn(source.conn))

    def took(timeout: float) -> float:
        begun = time.monotonic()
        assert stream.poll(timeout=timeout) == []
        return time.monotonic() - begun

    # A busy machine may take longer, but not each time.
    assert min(took(0.0) for _ in range(5)) < 0.1
    times = [took(0.4) for _ in range(3)]
    assert all(time > 0.3 for time in times)
    assert min(times) < 0.8


def test_bytes_of_a_database_without_an_encoding_come_as_they_are(db: Database) -> None:
    name = f"{db.name}_ascii"
    with db.connect() as conn:
        conn.execute(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0".encode())
        source = Source(db.server.dsn(name), name).create()
        try:
            with connect(source.dsn) as ascii_conn:
                ascii_conn.execute("SET client_encoding = 'SQL_ASCII'")
                ascii_conn.execute(rb"INSERT INTO public.t VALUES (1, E'\xe4\xff')")
            payloads = read(source.stream(), current_lsn(source.conn))
        finally:
            for stream in source.streams:
                stream.close()
            until(lambda: not source.state().active)
            source.close()
            conn.execute("SELECT pg_drop_replication_slot(%s)", [source.slot])
            conn.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())

    assert payloads[2].endswith(b"\x00\x00\x00\x02\xe4\xff")


# -- what is acknowledged -------------------------------------------------------------------------------------------


def test_only_what_was_received_can_be_acknowledged(source: Source) -> None:
    source.insert(1, 10)
    stream = source.stream()
    read(stream, current_lsn(source.conn))
    received = stream.received

    with pytest.raises(ProtocolError, match="can't be acknowledged"):
        stream.acknowledge(Lsn(received + 1))
    stream.acknowledge(received)
    stream.acknowledge(Lsn(received - 100))
    assert stream.acknowledged == received


def test_a_commit_is_received_once_its_frame_is_handed_out(source: Source) -> None:
    source.insert(1, 5)
    source.insert(6, 6, width=15)  # a row's frame is as long as a commit's for some width
    stream = source.stream()
    ends: list[tuple[Lsn, Lsn]] = []
    while len(ends) < 2:
        for frame in stream.poll(max_frames=1, timeout=20):
            if frame[XLOG_DATA_HEADER] == ord("C"):
                end = Lsn(int.from_bytes(frame[XLOG_DATA_HEADER + 10 : XLOG_DATA_HEADER + 18], "big"))
                ends.append((end, stream._feedback._committed))

    assert [end for end, _ in ends] == [received for _, received in ends]


@pytest.mark.parametrize("proto_version", [1, 2])
def test_a_graceful_end_moved_the_slot(source: Source, proto_version: int) -> None:
    source.insert(1, 10)
    stream = source.stream(proto_version=proto_version)
    payloads = read(stream, current_lsn(source.conn))
    source.insert(11, 20_000, width=1000)  # a backlog that nobody reads
    stream.acknowledge(stream.received)
    stream.close(graceful=True)

    assert tags(payloads) == "BR" + "I" * 10 + "C"
    assert source.state().confirmed_flush_lsn == stream.acknowledged
    assert read(source.stream(), current_lsn(source.conn))[:1] != payloads[:1]


def test_an_acknowledgement_arrives_within_seconds_or_now(source: Source) -> None:
    stream = source.stream(status_interval=60.0)  # what is late is later than this test waits
    for now in (True, False):
        source.conn.execute("DELETE FROM public.t")
        source.insert(1, 10)
        read(stream, current_lsn(source.conn))
        stream.acknowledge(stream.received, now=now)

        def arrived(now: bool = now) -> bool:
            if not now:
                stream.poll(timeout=0.05)
            return source.state().confirmed_flush_lsn == stream.acknowledged

        until(arrived, seconds=10)


def test_without_an_acknowledgement_the_slot_stays(source: Source) -> None:
    before = source.state().confirmed_flush_lsn
    source.insert(1, 10)
    stream = source.stream(status_interval=0.1)
    first = read(stream, current_lsn(source.conn))
    time.sleep(0.5)
    stream.close(graceful=True)

    assert source.state().confirmed_flush_lsn == before
    assert read(source.stream(), current_lsn(source.conn)) == first


def test_the_current_position_is_reached_while_nothing_is_published(any_source: Source) -> None:
    source = any_source
    source.conn.execute("CREATE TABLE public.unpublished (v text)")
    source.conn.execute("SET synchronous_commit = off")
    stream = source.stream()
    for length in (0, 10, 1000, 7000):
        source.conn.execute("INSERT INTO public.unpublished VALUES (repeat('x', %s))", [length])
        assert tags(read(stream, current_lsn(source.conn), seconds=20)).strip("BC") == ""
    source.conn.execute("SELECT pg_switch_wal()")
    read(stream, current_lsn(source.conn), seconds=20)  # the next keepalive by itself would come after 30
    stream.acknowledge(stream.sent, now=True)

    until(lambda: source.state().confirmed_flush_lsn == stream.sent)


def test_a_position_behind_a_page_header_is_one_that_no_stream_reaches(source: Source) -> None:
    def insert_lsn(message: int | None = None) -> Lsn:
        if message is not None:
            source.conn.execute("SELECT pg_logical_emit_message(false, 'x', repeat('x', %s))", [message])
        row = source.conn.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
        assert row is not None
        return Lsn(row[0])

    stream = source.stream(messages=False)
    overhead = 0
    for _ in range(50):
        before = insert_lsn()
        now = insert_lsn(max(1000, 8192 - before % 8192 - overhead))
        if now % 8192 == 24:
            break
        overhead = insert_lsn(1000) - now - 1000
    else:
        pytest.fail("no record ended with its page")
    position = current_lsn(source.conn)
    read(stream, position, seconds=20)

    assert position == now - 24
    assert stream.received < now


def test_a_position_beyond_the_servers_wal_is_refused(source: Source) -> None:
    stream = source.stream(start=False)

    with pytest.raises(StateError, match="were seen, but the server's WAL ends at"):
        stream.start(Lsn("FF/0"))
    until(lambda: not source.state().active)
    assert source.state().confirmed_flush_lsn < Lsn("FF/0")  # type: ignore[operator]


def test_a_slot_that_was_recreated_while_nobody_was_connected_is_refused(source: Source) -> None:
    source.insert(1, 10)
    stream = source.stream()
    read(stream, current_lsn(source.conn))
    stream.acknowledge(stream.received, now=True)
    acknowledged = stream.acknowledged
    until(lambda: source.state().confirmed_flush_lsn == acknowledged)
    source.conn.execute("SELECT pg_terminate_backend(%s, 5000)", [source.state().active_pid])
    source.conn.execute("SELECT pg_drop_replication_slot(%s)", [source.slot])
    source.insert(11, 20)
    source.conn.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [source.slot])
    made = source.state().confirmed_flush_lsn

    with pytest.raises(SlotAhead, match=f"was moved to {made}, past {acknowledged}") as caught:
        read(stream, current_lsn(source.conn))
    assert f"resync --slot {source.slot}" in (caught.value.hint or "")
    assert source.state().confirmed_flush_lsn == made


# -- what it survives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reporter", [True, False])
def test_a_stalled_consumer_keeps_its_connection_by_the_reporter(
    source: Source, reporter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not reporter:
        monkeypatch.setattr(ReplicationStream, "_report_if_silent", lambda self: 0.1)
    source.insert(1, 100_000, width=100)
    stream = source.stream(make_conninfo(source.dsn, options="-c wal_sender_timeout=1s"))
    payloads = [bytes(frame[XLOG_DATA_HEADER:]) for frame in stream.poll(max_frames=10, timeout=5)]
    time.sleep(3.5)
    more = read(stream, current_lsn(source.conn))

    assert stream.generation == (0 if reporter else 1)
    if reporter:
        assert ids(payloads + more) == list(range(1, 100_001))


def test_an_idle_connection_lives_longer_than_the_servers_patience(source: Source) -> None:
    stream = source.stream(make_conninfo(source.dsn, options="-c wal_sender_timeout=1s"))
    end = time.monotonic() + 3
    while time.monotonic() < end:
        stream.poll(timeout=0.5)
    source.insert(1, 1)

    assert ids(read(stream, current_lsn(source.conn))) == [1]
    assert stream.generation == 0


def test_a_terminated_walsender_is_replaced_and_nothing_is_lost(any_source: Source) -> None:
    source = any_source
    stream = source.stream()
    stop = threading.Event()
    written = 0

    def write() -> None:
        nonlocal written
        with connect(source.dsn) as conn:
            while not stop.is_set():
                conn.execute(
                    "INSERT INTO public.t SELECT i FROM generate_series(%s::int, %s) i", [written, written + 9]
                )
                written += 10

    def kill() -> None:
        source.conn.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s", [source.slot]
        )

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen: dict[int, int] = {}
        acknowledged = Lsn(0)
        open_rows: list[int] = []
        done = Lsn(0)  # of this connection: what came on an earlier one may come again
        for kills in range(1, 4):
            end = time.monotonic() + 0.5
            while time.monotonic() < end or stream.generation < kills:
                if time.monotonic() >= end and stream.generation < kills:
                    kill()
                    end = time.monotonic() + 0.3
                generation = stream.generation
                frames = [bytes(frame[XLOG_DATA_HEADER:]) for frame in stream.poll(timeout=0.1)]
                if stream.generation != generation:
                    open_rows.clear()
                    done = Lsn(0)
                for payload in frames:
                    if payload[:1] == b"I":
                        open_rows += ids([payload])
                    elif payload[:1] == b"C":
                        commit = Lsn(int.from_bytes(payload[2:10], "big"))
                        assert commit >= acknowledged, "an acknowledged transaction came again"
                        assert all(seen.setdefault(row, commit) == commit for row in open_rows)
                        open_rows.clear()
                        done = Lsn(int.from_bytes(payload[10:18], "big"))
                if kills == 2 and not acknowledged and not open_rows and done and stream._walsender is not None:
                    stream.acknowledge(done, now=True)
                    until(lambda: source.state().confirmed_flush_lsn == stream.acknowledged)
                    acknowledged = stream.acknowledged
    finally:
        stop.set()
        writer.join()
    # The commit of the rows that are still open comes with the rest.
    seen |= dict.fromkeys(open_rows + ids(read(stream, current_lsn(source.conn))), 0)

    assert sorted(seen) == list(range(written))
    assert stream.reconnects >= 3


def test_a_server_that_does_not_answer_is_left(source: Source) -> None:
    stream = source.stream(make_conninfo(source.dsn, options="-c wal_sender_timeout=1s"))
    read(stream, current_lsn(source.conn))
    pid = source.state().active_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        while stream._walsender is not None:
            stream.poll(timeout=0.1)
            assert time.monotonic() - begun < PATIENCE
        took = time.monotonic() - begun
    finally:
        os.kill(pid, signal.SIGCONT)
    source.insert(1, 1)

    assert took > 0.5
    assert ids(read(stream, current_lsn(source.conn))) == [1]
    assert stream.generation == 1


def test_a_server_stops_at_once_with_a_reader_attached(
    own: Server, own_source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    keepalives = 0
    note = Feedback.keepalive

    def count(self: Feedback, keepalive: Any, now: float) -> None:
        nonlocal keepalives
        keepalives += 1
        note(self, keepalive, now)

    monkeypatch.setattr(Feedback, "keepalive", count)
    source = own_source
    stream = source.stream()
    source.insert(1, 1000)
    first = read(stream, current_lsn(source.conn))
    keepalives = 0
    took: list[float] = []

    def halt() -> None:
        begun = time.monotonic()
        own.halt("fast")
        took.append(time.monotonic() - begun)

    stopping = threading.Thread(target=halt)
    stopping.start()
    while stopping.is_alive():
        stream.poll(timeout=0.02)
    stopping.join()
    stream.poll(timeout=0.1)
    own.start()
    with connect(own.dsn()) as conn:
        again = read(stream, current_lsn(conn))

    assert took[0] < 20  # a server that waits for its reader does so for wal_sender_timeout, 60 s
    assert keepalives < 50
    assert stream.generation == 1
    assert again[: len(first)] == first


@pytest.mark.parametrize("how", ["immediate", "kill"])
def test_a_server_that_crashes_is_waited_for(own: Server, own_source: Source, how: Any) -> None:
    source = own_source
    stream = source.stream()
    source.insert(1, 1000)
    read(stream, current_lsn(source.conn))
    stream.acknowledge(stream.received, now=True)
    own.halt(how)
    for _ in range(10):
        assert stream.poll(timeout=0.05) == []
    own.start()
    with connect(own.dsn()) as conn:
        conn.execute("INSERT INTO public.t VALUES (5000)")
        rows = ids(read(stream, current_lsn(conn)))

    assert rows[-1] == 5000
    assert stream.generation == 1


def test_a_server_that_stays_away_ends_the_stream(own: Server, own_source: Source) -> None:
    stream = own_source.stream(reconnect_seconds=1.0)
    own.halt("immediate")
    begun = time.monotonic()

    def poll_for_ever() -> None:
        while True:
            stream.poll(timeout=0.1)

    with pytest.raises(ConnectionFailed) as caught:
        poll_for_ever()
    took = time.monotonic() - begun

    assert 0.9 < took < 30  # 300 by itself
    assert caught.value.hint
    assert own.password not in str(caught.value)
    with pytest.raises(ConnectionFailed):
        stream.poll()


@pytest.mark.parametrize("headway", [False, True])
def test_a_connection_is_no_headway_and_a_new_position_is(source: Source, headway: bool) -> None:
    """Each walsender is killed once it streams: for ever if one brings something new, for the patience if none does."""
    # A connection takes less than the patience also where the machine is busy.
    patience, stop = 2.0 if headway else 1.0, threading.Event()
    stream = source.stream(reconnect_seconds=patience)
    read(stream, current_lsn(source.conn))

    def kill() -> None:
        with connect(source.dsn) as conn:
            for number in range(1_000):
                if headway:
                    conn.execute("INSERT INTO public.t VALUES (%s)", [number])
                    time.sleep(0.1)
                conn.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_replication WHERE pid IN"
                    " (SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s)",
                    [source.slot],
                )
                if stop.wait(0.02):
                    return

    killer = threading.Thread(target=kill)
    killer.start()
    begun, rows, error = time.monotonic(), list[int](), None
    try:
        while time.monotonic() - begun < (2 * patience if headway else PATIENCE):
            rows += ids([bytes(frame[XLOG_DATA_HEADER:]) for frame in stream.poll(timeout=0.02)])
    except ConnectionFailed as e:
        error = e
    took = time.monotonic() - begun
    stop.set()
    killer.join()

    assert stream.generation > 2
    if headway:
        assert error is None
        assert len(set(rows)) > 4
    else:
        assert error is not None
        assert patience <= took < 30
        assert "no connection has brought anything new" in str(error)


@pytest.mark.parametrize(
    ("where", "good", "bad"),
    [
        ("100 / n > 1", "2", "0"),
        ("substring('text', 1, n) > ''", "1", "-1"),
        ("n * 2147483647 > 0", "1", "2"),
        ("sqrt(n) > 0", "1", "-1"),
        ("(j -> 'a')::int > 0", """'{"a": 1}'""", """'{"a": "x"}'"""),
    ],
)
def test_a_row_filter_that_fails_says_where_and_its_remedy_works(
    db: Database, request: pytest.FixtureRequest, where: str, good: str, bad: str
) -> None:
    source = Source(db.dsn, db.name)
    request.addfinalizer(source.close)
    source.conn.execute("ALTER TABLE public.t ADD n int, ADD j jsonb, REPLICA IDENTITY FULL")
    create_publication_and_slot(source.conn, slot=source.slot, publications=["p"], tables=[f"public.t WHERE ({where})"])
    column = "j" if "j" in where else "n"
    for number, value in enumerate((good, bad, good), 1):
        source.conn.execute(f"INSERT INTO public.t (id, {column}) VALUES ({number}, {value})".encode())
        if number == 2:
            end = current_lsn(source.conn)
    stream = source.stream(publications=("p",))
    got: list[bytes] = []

    def poll_for_ever() -> None:
        while True:
            got.extend(bytes(frame[XLOG_DATA_HEADER:]) for frame in stream.poll(timeout=0.2))

    with pytest.raises(ServerError) as caught:
        poll_for_ever()
    stream.close()

    error = caught.value
    assert ids(got) == [1]
    assert error.lsn is not None
    assert error.lsn <= end
    assert "a row filter of the publication probably fails on a row" in (error.hint or "")
    assert f"pg_replication_slot_advance('{source.slot}', …) to a position after its commit" in (error.hint or "")
    source.conn.execute("SELECT pg_replication_slot_advance(%s, %s)", [source.slot, str(end)])
    assert ids(read(source.stream(publications=("p",)), current_lsn(source.conn))) == [3]


def test_a_slot_that_is_lost_meanwhile_is_not_tried_again(own: Server, own_source: Source) -> None:
    source = own_source
    stream = source.stream()
    read(stream, current_lsn(source.conn))

    def fill_and_poll() -> None:
        for _ in range(200):
            source.conn.execute("SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000)), pg_switch_wal()")
            source.conn.execute("CHECKPOINT")
            stream.poll(timeout=0.01)

    with pytest.raises(SlotLost) as caught:
        fill_and_poll()

    assert f"resync --slot {source.slot}" in (caught.value.hint or "")


def test_the_reporter_ends_with_its_stream(source: Source) -> None:
    def beating() -> int:
        return sum(thread.name == f"pgoutput-{source.slot}" for thread in threading.enumerate())

    stream = source.stream(status_interval=0.2)
    assert beating() == 1
    stream.close()
    assert beating() == 0
    stream = source.stream(status_interval=0.2)
    source.streams.clear()
    walsender = stream._walsender
    assert walsender is not None
    del stream
    gc.collect()
    until(lambda: beating() == 0)
    walsender.close()


# -- what is refused ------------------------------------------------------------------------------------------------


def test_a_missing_publication_ends_the_stream(any_db: Database) -> None:
    source = Source(any_db.dsn, any_db.name)
    source.conn.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [source.slot])
    source.insert(1, 1)
    source.conn.execute("CREATE PUBLICATION p FOR ALL TABLES")
    try:
        stream = source.stream(publications=("p",))
        with pytest.raises(PublicationError) as caught:
            read(stream, current_lsn(source.conn))
        with pytest.raises(PublicationError):
            stream.poll()
    finally:
        source.close()

    assert '"p"' in caught.value.message
    assert "older than the slot" in (caught.value.hint or "")


def test_a_slot_in_use_is_waited_for(source: Source, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = source.stream()

    def release() -> None:
        until(lambda: "is in use by process" in caplog.text)
        first.close()

    releasing = threading.Thread(target=release)
    releasing.start()
    second = source.stream()
    releasing.join()

    assert second.poll() == []
    assert caplog.text.count("is in use by process") == 1


def test_a_slot_that_stays_in_use_names_its_holder(source: Source) -> None:
    source.stream(make_conninfo(source.dsn, application_name="the other one"))
    begun = time.monotonic()
    with pytest.raises(SlotInUse, match=r"in use by process \d+ \(the other one, local\)") as caught:
        source.stream(slot_wait_seconds=0.5)

    assert 0.4 < time.monotonic() - begun < 30  # 60 by itself
    assert "stop the other one" in (caught.value.hint or "")
    assert str(source.state().active_pid) in str(caught.value)


Prepare = Callable[[Source], "dict[str, Any] | None"]


def _other_slot(sql: str) -> Prepare:
    def prepare(source: Source) -> None:
        source.conn.execute("SELECT pg_drop_replication_slot(%s)", [source.slot])
        source.conn.execute(sql.encode().replace(b"{slot}", source.slot.encode()))

    return prepare


def _dsn(**change: str) -> Prepare:
    return lambda source: {"dsn": make_conninfo(source.dsn, **change)}


def _slot_of_another_database(source: Source) -> dict[str, Any]:
    return {"dsn": make_conninfo(source.dsn, dbname="postgres")}


def _weak_role(source: Source) -> dict[str, Any]:
    source.conn.execute("DROP ROLE IF EXISTS weak; CREATE ROLE weak LOGIN PASSWORD 'feeble'")
    return {"dsn": make_conninfo(source.dsn, user="weak", password="feeble")}


@pytest.mark.parametrize(
    ("prepare", "kind", "says"),
    [
        (lambda _: {"slot": "missing"}, SlotNotFound, "pg_create_logical_replication_slot('missing', 'pgoutput')"),
        (_other_slot("SELECT pg_create_physical_replication_slot('{slot}')"), SlotMismatch, "physical"),
        (_slot_of_another_database, SlotMismatch, "dbname=test_"),
        (_weak_role, NotConfigured, 'ALTER ROLE "weak" REPLICATION'),
        (_dsn(password="wrong"), ConnectionFailed, "check user name and password"),
        (_dsn(dbname="nowhere"), ConnectionFailed, "name an existing database"),
        (_dsn(host="127.0.0.1", port="1"), ConnectionFailed, "is the server running"),
        (_dsn(host="/nowhere"), ConnectionFailed, "Unix socket"),
        (_dsn(host="no-such-host.invalid"), ConnectionFailed, "check the host's name"),
        (lambda _: {"proto_version": 9}, ServerError, "protocol"),
    ],
    ids=lambda value: None,
)
def test_a_stream_that_can_not_start_says_why_at_once(
    any_source: Source, prepare: Prepare, kind: type[PgOutputError], says: str
) -> None:
    options = prepare(any_source) or {}
    begun = time.monotonic()
    with pytest.raises(kind) as caught:
        any_source.stream(**options)

    password = psycopg.conninfo.conninfo_to_dict(options.get("dsn", any_source.dsn))["password"]
    assert says in str(caught.value)
    assert str(password) not in re.sub("password", "", str(caught.value))
    assert time.monotonic() - begun < 30
    assert not any(thread.name == f"pgoutput-{any_source.slot}" for thread in threading.enumerate())


def test_a_server_without_a_free_walsender_says_so(own: Server, own_source: Source) -> None:
    held = [connect(own.dsn(), replication=True) for _ in range(3)]
    try:
        with pytest.raises(NotConfigured, match="max_wal_senders"):
            own_source.stream()
    finally:
        for conn in held:
            conn.close()


def test_a_stream_is_open_between_start_and_close(source: Source) -> None:
    stream = source.stream(start=False)
    with pytest.raises(ConnectionFailed, match="not open"):
        stream.poll()
    with stream:
        stream.start(Lsn(0))
        assert stream.poll() == []
    stream.close()
    with pytest.raises(ConnectionFailed, match="not open"):
        stream.poll()


def test_a_walsender_streams_from_a_slot_once_and_then_ends(source: Source) -> None:
    walsender = Walsender(source.dsn, slot=source.slot, publications=("p",), options={"proto_version": "1"})
    source.insert(1, 1)
    lsn = current_lsn(source.conn)
    walsender.send(StandbyStatus(lsn, lsn, lsn, pg_now()))
    assert walsender.finish(time.monotonic() + 20)
    walsender.close()

    assert source.state().confirmed_flush_lsn == lsn
