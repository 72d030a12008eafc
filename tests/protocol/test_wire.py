"""The envelope: what it reads it writes, and broken bytes end in ProtocolError."""

from __future__ import annotations

import datetime
import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgoutput_source.errors import ProtocolError
from pgoutput_source.protocol.wire import (
    Cursor,
    Keepalive,
    Lsn,
    StandbyStatus,
    XLogData,
    parse_frame,
    pg_datetime,
    pg_now,
)

lsns = st.integers(0, 2**64 - 1).map(Lsn)
moments = st.integers(-(2**63), 2**63 - 1)

# Bytes that a server sent, and what they say; read and written.
RECORDED = [
    (
        "6b 00000000076badc0 000303d784c7edef 00",
        Keepalive(Lsn("0/76BADC0"), 0x000303D784C7EDEF, False),
    ),
    (
        "72 00000000076badc0 0000000000000000 0000000000000000 000303d784c7ee61 00",
        StandbyStatus(Lsn("0/76BADC0"), Lsn(0), Lsn(0), 0x000303D784C7EE61),
    ),
    (
        "77 0000000013206200 0000000013206200 000303d797e38246 45",
        XLogData(Lsn("0/13206200"), Lsn("0/13206200"), 0x000303D797E38246, b"E"),
    ),
]


@pytest.mark.parametrize(
    ("recorded", "frame"), RECORDED, ids=lambda x: type(x).__name__ if not isinstance(x, str) else ""
)
def test_recorded_frames_are_read_and_written(recorded: str, frame: XLogData | Keepalive | StandbyStatus) -> None:
    data = bytes.fromhex(recorded)

    assert parse_frame(data) == frame
    assert frame.encode() == data


@given(
    st.builds(XLogData, lsns, lsns, moments, st.binary(max_size=30))
    | st.builds(Keepalive, lsns, moments, st.booleans())
    | st.builds(StandbyStatus, lsns, lsns, lsns, moments, st.booleans())
)
def test_every_frame_reads_back(frame: XLogData | Keepalive | StandbyStatus) -> None:
    assert parse_frame(frame.encode()) == frame


@given(
    st.binary(max_size=40)
    | st.sampled_from([b"w", b"k", b"r"]).flatmap(lambda k: st.binary(max_size=40).map(k.__add__))
)
@example(b"")
@example(b"w" + bytes(23))
@example(b"k" + bytes(18))
def test_any_bytes_are_a_frame_or_a_protocol_error(data: bytes) -> None:
    sizes = {b"w": range(25, 1000), b"k": range(18, 19), b"r": range(34, 35)}
    legal = len(data) in sizes.get(data[:1], ())

    if legal:
        parse_frame(data)
    else:
        with pytest.raises(ProtocolError):
            parse_frame(data)


@given(lsns)
def test_an_lsn_survives_its_text_and_a_pickle(lsn: Lsn) -> None:
    assert Lsn(str(lsn)) == lsn
    assert Lsn(f"{lsn}".lower()) == lsn
    assert pickle.loads(pickle.dumps(lsn)) == lsn
    assert type(pickle.loads(pickle.dumps(lsn))) is Lsn


@pytest.mark.parametrize(
    "text", ["", "/", "0", "0/", "/0", "0/G", "+1/0", "1_0/0", "0/ 1", "0/0/0", "123456789/0", "-1/0", "0x1/0"]
)
def test_what_is_no_lsn_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an LSN"):
        Lsn(text)


@pytest.mark.parametrize("number", [-1, 2**64])
def test_an_lsn_has_64_bits(number: int) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        Lsn(number)


def test_lsns_align_as_text_and_format_as_numbers() -> None:
    assert f"{Lsn('1/A'):>6}|{Lsn('1/A'):d}|{Lsn('1/A')!s}" == "   1/A|4294967306|1/A"


def test_the_clock_counts_from_2000() -> None:
    now = datetime.datetime.now(datetime.UTC)

    assert abs(pg_datetime(pg_now()) - now) < datetime.timedelta(minutes=1)
    assert pg_datetime(-1) == datetime.datetime(1999, 12, 31, 23, 59, 59, 999_999, datetime.UTC)


@given(moments)
@example(2**63 - 1)  # PostgreSQL's infinity
@example(-(2**63))
def test_a_moment_is_a_datetime_or_a_protocol_error(moment: int) -> None:
    try:
        found = pg_datetime(moment)
    except ProtocolError:
        found = None

    years_1_to_9999 = -63_082_281_600_000_000 <= moment < 252_455_616_000_000_000
    assert (found is not None) == years_1_to_9999


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (lambda c: c.take(-1, "X.y"), "X.y: expected -1 bytes, got 2"),
        (lambda c: c.uint32("X.y"), "X.y: expected 4 bytes, got 2"),
        (lambda c: c.letter("KN", "X.y"), "X.y: expected 'K' or 'N', got 'ÿ'"),
        (lambda c: c.letter("KON", "X.y"), "X.y: expected 'K', 'O' or 'N', got 'ÿ'"),
        (lambda c: c.flags(1, "X.y"), "X.y: expected no flags but 0x1, got 0xff"),
        (lambda c: c.string("X.y"), "X.y: expected UTF-8, got something else"),
        (lambda c: Cursor(b"ab").string("X.y"), "X.y: expected a zero byte at the end"),
        (lambda c: c.end("X"), "X: expected its end, got 2 more bytes"),
    ],
)
def test_a_broken_field_is_named_with_what_was_expected_and_what_came(read: object, error: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        read(Cursor(b"\xff\0"))  # type: ignore[operator]

    assert str(caught.value).startswith(error)
