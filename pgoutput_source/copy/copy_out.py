r"""The rows of one `COPY … TO STDOUT (FORMAT binary)`, in pieces of a few megabytes.

libpq hands over one row per call, which costs as much as the server needs to read it. So a connection that is not
encrypted is read straight from its socket. libpq doesn't notice, because it buffers nothing between two commands.
Whatever does not look like the answer to a COPY is an error.

Each row is one message: `d`, four bytes of length, two bytes that count the columns, the columns. NumPy finds all
places with such bytes. Where the messages that would begin there follow each other without a gap, they are messages.
The rest is looked at one by one.

https://www.postgresql.org/docs/current/protocol-message-formats.html
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, Final

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import pq

from pgoutput_source.decode.copied import HEADER, PADDING, Tuples, without_header
from pgoutput_source.errors import ConnectionFailed
from pgoutput_source.postgres.connection import Connection
from pgoutput_source.postgres.refusals import explained, server_error

Ints = NDArray[np.int64]

_NOTHING: Final = (0, memoryview(b""))
_GETS: Final = 128  # fewer objects than make Python collect garbage
_PIECE: Final = 8 << 20  # bytes
_BLOCK: Final = 256 << 10  # bytes
_NAP: Final = 0.0002  # seconds in which the server sends a few hundred rows
_LONGEST: Final = 2**31 - 1
_READY: Final = b"Z\0\0\0\5"
_ROW: Final = ord("d")
_TRAILER: Final = b"\xff\xff"


def copy_out(
    connection: Connection, query: str, columns: int, *, encrypted: bool, buffer: bytearray
) -> Iterator[Tuples]:
    """What a COPY sends. The connection is free when all of it was read.

    Args:
        connection: In a transaction, or in autocommit mode.
        query: The COPY.
        columns: How many columns it has.
        encrypted: Whether the connection is.
        buffer: As `new_buffer` returns it. A new one for each COPY would cost more than the COPY.

    Raises:
        ServerError: The server refuses, or the connection is lost.
    """
    if encrypted:
        return _through_libpq(connection, query)
    return _from_socket(connection, query, _Answer(columns, buffer))


def new_buffer() -> bytearray:
    """Room for a piece."""
    return bytearray(_PIECE + 4 * _BLOCK)


def _through_libpq(connection: Connection, query: str) -> Iterator[Tuples]:
    pg = connection.pgconn
    with explained():
        pg.send_query(query.encode())
        while True:
            pg.flush()
            pg.consume_input()
            if not pg.is_busy():
                break
            _wait(pg.socket, select.POLLIN)
    result = pg.get_result()
    if result is None or result.status != pq.ExecStatus.COPY_OUT:
        while pg.get_result() is not None:
            pass
        raise _failure(result)
    get = partial(pg.get_copy_data, 1)
    parts: list[bytes] = []
    lengths: list[int] = []
    held, ended, first = 0, False, True
    while not ended:
        some: list[tuple[int, Any]] = []
        try:
            some.extend(islice(iter(get, _NOTHING), _GETS))
        except psycopg.OperationalError:
            ended = True  # or failed, which the result says; the last rows are in `some`
        full = len(some) == _GETS
        if some and some[-1][0] < 0:
            ended = True
            some = [item for item in some if item[0] >= 0]
        if some:
            sizes, payloads = zip(*some, strict=True)
            part = b"".join(payloads)  # at once: freeing all payloads together is cheapest
            parts.append(part)
            lengths.extend(sizes)
            held += len(part)
        if held >= _PIECE:
            yield Tuples(parts, lengths, first=first)
            parts, lengths, held, first = [], [], 0, False
        if not full and not ended:
            if not some:
                time.sleep(_NAP)
                _wait(pg.socket, select.POLLIN)
            with explained():
                pg.consume_input()
    last = None
    while (result := pg.get_result()) is not None:
        last = result
    if last is None or last.status != pq.ExecStatus.COMMAND_OK:
        raise _failure(last)
    if lengths:
        yield Tuples(parts, lengths, first=first)


def _failure(result: pq.abc.PGresult | None) -> Exception:
    error = psycopg.errors.error_from_result(result) if result is not None else psycopg.OperationalError("no answer")
    return server_error(error)


def _from_socket(connection: Connection, query: str, answer: _Answer) -> Iterator[Tuples]:
    try:
        with socket.socket(fileno=os.dup(connection.pgconn.socket)) as peer:
            _send(peer, query.encode() + b"\0")
            while not answer.ended:
                try:
                    answer.received(peer.recv_into(answer.room()))
                except BlockingIOError:
                    time.sleep(_NAP)
                    _wait(peer.fileno(), select.POLLIN)
                if answer.framed >= _PIECE:
                    yield answer.take()
    except OSError as e:
        raise _lost(str(e)) from e
    if answer.error is not None:
        raise server_error(answer.error)
    if answer.rows:
        yield answer.take()


def _send(peer: socket.socket, query: bytes) -> None:
    rest = memoryview(b"Q" + (len(query) + 4).to_bytes(4) + query)
    while rest:
        try:
            rest = rest[peer.send(rest) :]
        except BlockingIOError:
            _wait(peer.fileno(), select.POLLOUT)


def _wait(fd: int, event: int) -> None:
    # select() fails where more than a thousand files are open.
    poll = select.poll()
    poll.register(fd, event)
    poll.poll()


def _lost(why: str) -> ConnectionFailed:
    lost = ConnectionFailed(f"the connection was lost: {why}", hint="see the server's log")
    lost.transient = True
    return lost


class _Answer:
    """The messages that the server sends for one COPY.

    Attributes:
        framed: So many bytes are whole messages.
        rows: How many of these are rows, since the last `take`.
        ended: Whether the server is ready for the next command.
        error: Why the command failed.
    """

    def __init__(self, columns: int, buffer: bytearray) -> None:
        self.framed = self.rows = 0
        self.ended = False
        self.error: psycopg.Error | None = None
        self._begun = self._headed = self._complete = False
        self._buffer = buffer
        self._size = 0
        self._found: list[tuple[Ints, Ints]] = []
        self._columns = columns

    def room(self) -> memoryview:
        """Where the next bytes belong."""
        if len(self._buffer) - self._size < _BLOCK + len(PADDING):
            larger = bytearray(2 * len(self._buffer))
            larger[: self._size] = memoryview(self._buffer)[: self._size]
            self._buffer = larger
        return memoryview(self._buffer)[self._size : self._size + _BLOCK]

    def received(self, count: int) -> None:
        """Some more bytes are there."""
        if not count:
            raise _lost("the server closed it")
        self._size += count
        if self._size - self.framed >= _BLOCK or self._buffer[self._size - 6 : self._size - 1] == _READY:
            self._frame()

    def take(self) -> Tuples:
        """The rows so far."""
        start, end = (np.concatenate(part) for part in zip(*self._found, strict=True))
        found = Tuples.of(bytes(memoryview(self._buffer)[: self.framed + len(PADDING)]), start, end)
        rest = self._size - self.framed
        self._buffer[:rest] = self._buffer[self.framed : self._size]
        self._size, self.framed, self.rows, self._found = rest, 0, 0, []
        return found

    def _frame(self) -> None:
        """Find the messages in what is not framed yet."""
        begin, next_ = self._likely()
        # The last of each run of messages without a gap.
        last = np.append(np.flatnonzero(next_[:-1] != begin[1:]), len(begin) - 1)
        at = self.framed
        while True:
            i = int(np.searchsorted(begin, at))
            if i < len(begin) and begin[i] == at and self._headed:
                j = int(last[np.searchsorted(last, i)])
                self._add(begin[i : j + 1] + 5, next_[i : j + 1])
                at = int(next_[j])
                continue
            if at + 5 > self._size:
                break
            length = int.from_bytes(self._buffer[at + 1 : at + 5])
            if not 4 <= length <= _LONGEST:
                raise _lost("not an answer to COPY")
            if at + 1 + length > self._size:
                break
            self._message(self._buffer[at], at + 5, at + 1 + length)
            at += 1 + length
        self.framed = at

    def _likely(self) -> tuple[Ints, Ints]:
        """Where the bytes look like the beginning of a row, and where that would end, if it ends within the bytes."""
        low, high = self.framed, self._size - 6
        if high <= low:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        raw = np.frombuffer(self._buffer, np.uint8)
        # A row of less than 64 KB.
        found = np.flatnonzero(raw[low:high] == _ROW) + low
        found = found[self._number(">u2", found + 1) == 0]
        found = found[self._number(">u2", found + 5) == self._columns]
        next_ = found + 1 + self._number(">u2", found + 3)
        inside = (next_ >= found + 7) & (next_ <= self._size)
        return found[inside], next_[inside]

    def _number(self, kind: str, at: Ints) -> Ints:
        view = np.ndarray(len(self._buffer) - 1, kind, buffer=self._buffer, strides=(1,))
        return view[at].astype(np.int64)

    def _add(self, start: Ints, end: Ints) -> None:
        self._found.append((start, end))
        self.rows += len(start)

    def _message(self, kind: int, start: int, end: int) -> None:
        match kind:
            case 0x64 if self._begun:  # d
                if not self._headed:
                    start += without_header(bytes(self._buffer[start : min(end, start + HEADER + 2)]))
                    self._headed = True
                if self._buffer[start:end] != _TRAILER:
                    self._add(np.array([start]), np.array([end]))
            case 0x48 if self._buffer[start] == 1:  # H, in binary
                self._begun = True
            case 0x45:  # E
                self.error = _refusal(bytes(self._buffer[start:end]))
            case 0x43 if self._begun:  # C
                self._complete = True
            case 0x5A if end == self._size and (self._complete or self.error is not None):  # Z
                self.ended = True
            case 0x63 | 0x4E | 0x53 | 0x41:  # c: no more rows, N, S, A: notices and the like
                pass
            case _:
                raise _lost("not an answer to COPY")


def _refusal(fields: bytes) -> psycopg.Error:
    """The error of an ErrorResponse."""
    said: dict[int, bytes | None] = {field[0]: field[1:] for field in fields.split(b"\0") if field}
    state = (said.get(ord("C")) or b"").decode()
    try:
        kind = psycopg.errors.lookup(state)
    except KeyError:
        kind = psycopg.DatabaseError
    error = kind((said.get(ord("M")) or b"").decode(errors="replace"), info=said)
    error.sqlstate = state
    return error
