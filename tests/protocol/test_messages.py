"""Every message of protocols 1 to 4: the server's own bytes, everything read back, everything broken refused."""

from __future__ import annotations

import typing
from typing import Any

import pytest
from harness.streams import ENCODERS, encode, messages_of, text_tuple
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgoutput_source.errors import ProtocolError
from pgoutput_source.messages import (
    READERS,
    AnyMessage,
    BeginPrepare,
    Delete,
    Insert,
    Message,
    Origin,
    Relation,
    RelationColumn,
    StreamAbort,
    StreamCommit,
    StreamStart,
    StreamStop,
    Truncate,
    TupleData,
    Type,
    Update,
    decode,
)
from pgoutput_source.protocol.wire import Lsn

KINDS = typing.get_args(AnyMessage)
MODES = [{"in_stream": s, "parallel": p} for s in (False, True) for p in (False, True)]

COLUMNS = (
    RelationColumn(True, "id", 23, -1),
    RelationColumn(False, "name", 25, -1),
    RelationColumn(False, "big", 25, -1),
    RelationColumn(False, "n", 1700, 655366),
)

# What PostgreSQL 15 sent (the inserts and streamed messages completed by hand), and what it says; read and written.
RECORDED: list[tuple[str, AnyMessage, dict[str, bool]]] = [
    (
        "52 00004005 7075626c696300 7400 64 0004 01 696400 00000017 ffffffff 00 6e616d6500 00000019 ffffffff"
        "00 62696700 00000019 ffffffff 00 6e00 000006a4 000a0006",
        Relation(16389, "public", "t", "d", COLUMNS),
        {},
    ),
    ("52 00000405 00004203 00 7400 6e 0000", Relation(16899, "", "t", "n", (), 1029), {"in_stream": True}),
    ("59 00004070 00 696e743400", Type(16496, "", "int4"), {}),
    (
        "49 00004005 4e 0004 74 00000001 31 74 00000001 61 6e 74 00000004 312e3530",
        Insert(16389, text_tuple("1", "a", None, "1.50")),
        {},
    ),
    ("49 00000405 00004203 4e 0001 6e", Insert(16899, text_tuple(None), 1029), {"in_stream": True}),
    (
        "55 00004005 4b 0004 7400000001 31 6e 6e 6e 4e 0004 7400000001 32 7400000001 61 75 7400000004 312e3530",
        Update(
            16389,
            TupleData(b"ttut", (b"2", b"a", None, b"1.50")),
            key=text_tuple("1", None, None, None),
        ),
        {},
    ),
    (
        "55 00004005 4f 0001 7400000000 4e 0001 6200000002 0001",
        Update(16389, TupleData(b"b", (b"\0\1",)), old=text_tuple("")),
        {},
    ),
    (
        "44 00004005 4b 0004 7400000001 32 6e 6e 6e",
        Delete(16389, key=text_tuple("2", None, None, None)),
        {},
    ),
    ("54 00000002 01 00004063 00004091", Truncate((16483, 16529), cascade=True), {}),
    (
        "4d 01 00000000 0cfbb178 70667800 00000005 68656c6c6f",
        Message(True, Lsn("0/CFBB178"), "pfx", b"hello"),
        {},
    ),
    ("4f 000000ab000000cd 6f3100", Origin(Lsn("AB/CD"), "o1"), {}),
    ("53 000003f0 01", StreamStart(1008, True), {}),
    ("45", StreamStop(), {}),
    (
        "63 000003f1 00 0000000013206200 0000000013206230 000303d797e38246",
        StreamCommit(1009, Lsn("0/13206200"), Lsn("0/13206230"), 0x303D797E38246),
        {},
    ),
    ("41 000003f7 000003f8", StreamAbort(1015, 1016), {}),
    (
        "41 000003e5 000003e6 0000000008f23390 000303d79871dd66",
        StreamAbort(997, 998, Lsn("0/8F23390"), 0x303D79871DD66),
        {"parallel": True},
    ),
    (
        "62 00000000149dd760 00000000149dd858 000303d7981e84fa 00000414 673100",
        BeginPrepare(Lsn("0/149DD760"), Lsn("0/149DD858"), 0x303D7981E84FA, 1044, "g1"),
        {},
    ),
]


@pytest.mark.parametrize(("recorded", "message", "mode"), RECORDED)
def test_recorded_messages_are_read_and_written(recorded: str, message: AnyMessage, mode: dict[str, bool]) -> None:
    data = bytes.fromhex(recorded)

    assert decode(data, **mode) == message
    assert encode(message) == data


def test_every_message_has_its_reader_and_its_encoder() -> None:
    assert set(KINDS) == set(ENCODERS)
    assert sorted(READERS) == sorted(ord(tag) for tag, _ in ENCODERS.values())


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), mode=st.sampled_from(MODES))
def test_every_message_reads_back(kind: type, mode: dict[str, bool], data: st.DataObject) -> None:
    message = data.draw(messages_of(kind, **mode))

    assert decode(encode(message), **mode) == message


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(data=st.data())
def test_a_message_that_is_cut_or_followed_by_a_byte_is_refused(kind: type, data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(MODES))
    whole = encode(data.draw(messages_of(kind, **mode)))

    for broken in [*(whole[:end] for end in range(len(whole))), whole + b"\0"]:
        with pytest.raises(ProtocolError):
            decode(broken, **mode)


tagged = st.builds(lambda tag, rest: bytes([tag]) + rest, st.sampled_from(sorted(READERS)), st.binary(max_size=80))


@st.composite
def flipped(draw: st.DrawFn) -> bytes:
    """A message with a few of its bytes replaced."""
    data = bytearray(encode(draw(st.sampled_from(KINDS).flatmap(messages_of))))
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@given(st.binary(max_size=80) | tagged | flipped(), st.sampled_from(MODES))
@example(b"T" + b"\xff" * 5, MODES[0])
@example(b"I\0\0\0\1N\xff\xff", MODES[0])
@example(b"I\0\0\0\1N\0\1t\x7f\xff\xff\xff", MODES[0])
@example(b"I\0\0\0\1N\0\1t\xff\xff\xff\xff", MODES[0])
def test_any_bytes_are_a_message_that_reads_back_or_a_protocol_error(data: bytes, mode: dict[str, bool]) -> None:
    try:
        message: Any = decode(data, **mode)
    except ProtocolError:
        return

    assert encode(message) == data


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        ("", "message: expected a kind, got nothing"),
        ("3f", "message: expected one of 'BCOMRYIUDTSEcAbPpKr', got '?'"),
        ("43 01", "Commit.flags: expected no flags but 0x0, got 0x1"),
        ("49 00004005 4f", "Insert.new: expected 'N', got 'O'"),
        ("49 00004005 4e 0002 74 00000001 31 74 0000000c 31323334", "Insert.new[1]: expected 12 bytes, got 4"),
        ("49 00004005 4e 0001 78", "Insert.new[0].kind: expected one of 'ntbu', got 'x'"),
        ("44 00004005 4f 0001 75", "Delete.old[0].kind: expected one of 'ntb', got 'u'"),
        ("55 00004005 4b 0001 6e 4f", "Update.new: expected 'N', got 'O'"),
        ("52 00004005 7000 7400 78", "Relation.replica_identity: expected 'd', 'n', 'f' or 'i', got 'x'"),
        ("52 00004005 7000 7400 64 0001 02", "Relation.columns[0].flags: expected no flags but 0x1, got 0x2"),
        ("54 00000002 00 00000001", "Truncate.relation_ids: expected 8 bytes, got 4"),
        ("4500", "StreamStop: expected its end, got 1 more bytes"),
        ("4d 00 0000000000000000 70ff00", "Message.prefix: expected UTF-8, got something else"),
    ],
)
def test_an_error_names_the_field_what_was_expected_and_what_came(broken: str, error: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(bytes.fromhex(broken))

    assert str(caught.value).startswith(error)
