"""The reference that the vectorised assembler is held against: one frame after the other, one row at a time.

It rests on `messages.decode` and reads like the contract: what a position is, where a row goes, what is filled, what
stays unknown, which text is kept as it was. Speed is no concern; values are checked by decoders of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pyarrow as pa

from pgoutput_source import messages as m
from pgoutput_source.changes import batches
from pgoutput_source.errors import DecodeError, ProtocolError
from pgoutput_source.protocol import wire
from pgoutput_source.types import type_of
from pgoutput_source.types.base import exact_text

# --------------------------------------------------------------------------------------------------------- values


class Misfit(Exception):
    """A value of PostgreSQL's type that the Arrow type can't hold."""


def _integer(bits: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]+", text) or not -(2 ** (bits - 1)) <= int(text) < 2 ** (bits - 1):
            raise ValueError
        return int(text)

    return read


def _numeric_10_2(text: str) -> Decimal:
    if text in ("NaN", "Infinity", "-Infinity"):
        raise Misfit
    match = re.fullmatch(r"-?([0-9]+)(?:\.([0-9]+))?", text)
    if match is None:
        raise ValueError
    whole, fraction = match[1].lstrip("0"), (match[2] or "").rstrip("0")
    if len(whole) > 8 or len(fraction) > 2:
        raise Misfit
    return Decimal(text).quantize(Decimal("0.01"))


_TIMESTAMPTZ = re.compile(
    r"([0-9]{4,6})-([0-9]{2})-([0-9]{2}) ([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]{1,6}))?\+00( BC)?"
)


def _timestamptz(text: str) -> int:
    if text in ("infinity", "-infinity"):
        raise Misfit
    us = microseconds(text)
    if not -(2**63) <= us < 2**63:
        raise Misfit
    return us


def microseconds(text: str) -> int:
    """Microseconds since 1970; Python's datetime ends with the year 9999, PostgreSQL's and Arrow's do not."""
    match = _TIMESTAMPTZ.fullmatch(text)
    if match is None:
        raise ValueError
    year, month, day, hour, minute, second = map(int, match.groups()[:6])
    year = 1 - year if match[8] else year
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    lengths = [31, 29 if leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
    if (year == 1 and match[1] == "0000") or not 1 <= month <= 12 or not 1 <= day <= lengths[month - 1]:
        raise ValueError
    if hour > 23 or minute > 59 or second > 59:
        raise ValueError
    past = year - 1
    days = past * 365 + past // 4 - past // 100 + past // 400 + sum(lengths[: month - 1]) + day - 719_163
    seconds = days * 86_400 + hour * 3600 + minute * 60 + second
    return seconds * 1_000_000 + int((match[7] or "").ljust(6, "0"))


def _float8(text: str) -> float:
    if not re.fullmatch(r"-?([0-9]+(\.[0-9]+)?(e[+-][0-9]+)?|Infinity)|NaN", text):
        raise ValueError
    return float(text)


DECODERS: dict[tuple[int, int], Callable[[str], object]] = {
    (23, -1): _integer(32),
    (20, -1): _integer(64),
    (16, -1): lambda text: {"t": True, "f": False}[text],
    (25, -1): str,
    (99999, -1): str,
    (1700, 655366): _numeric_10_2,
    (1184, -1): _timestamptz,
    (701, -1): _float8,
}
"""What turns the text of a type (OID, typmod) into a Python value. Other types are read by the type table."""


def value_of(column: m.RelationColumn, raw: bytes) -> object:
    """The value; raises Misfit if its column's Arrow type can't hold it, DecodeError if it is none of its type."""
    kind = type_of(column.type_oid)
    arrow = kind.arrow(column.typmod)
    try:
        text = raw.decode()
    except UnicodeDecodeError as e:
        if pa.types.is_string(arrow) or pa.types.is_nested(arrow):
            raise Misfit from e
        raise DecodeError(f"not a value of type {column.type_oid}", column=column.name) from e
    try:
        decode = DECODERS.get((column.type_oid, column.typmod))
        if decode is not None:
            return decode(text)
        [value] = plain(kind.decode(pa.array([raw], pa.binary()), arrow))
    except (ValueError, KeyError) as e:
        raise DecodeError(f"not a value of type {column.type_oid}", column=column.name) from e
    if value is None:
        raise Misfit
    return value


def plain(array: pa.Array) -> list[Any]:
    """An Arrow array's values as Python's, moments as the integers that they are, structs as lists."""
    if isinstance(array, pa.ExtensionArray):
        return plain(array.storage)
    if pa.types.is_timestamp(array.type):
        return list(array.cast(pa.int64()).to_pylist())
    if pa.types.is_struct(array.type):
        columns = [plain(array.field(i)) for i in range(array.type.num_fields)]
        return [[c[i] for c in columns] if valid else None for i, valid in enumerate(array.is_valid().to_pylist())]
    return list(array.to_pylist())


# ------------------------------------------------------------------------------------------------------- assembler

Version = tuple[int, str, str, str, tuple[m.RelationColumn, ...]]
Row = dict[str, Any]


def version_of(r: m.Relation) -> Version:
    """What makes two versions of a relation the same."""
    return (r.relation_id, r.namespace or "pg_catalog", r.name, r.replica_identity, r.columns)


@dataclass
class Scalar:
    """Frames in, rows out: `rows` by table version, in order of their positions."""

    rows: dict[Version, list[Row]] = field(default_factory=dict)
    messages: list[batches.Message] = field(default_factory=list)
    position: tuple[int, int] | None = None
    end_lsn: int = 0
    begin: m.Begin | None = None

    _relations: dict[int, m.Relation] = field(default_factory=dict)
    _seq: int = 0
    _lsn: int = 0

    def feed(self, frames: Sequence[bytes | memoryview]) -> None:
        """Take these frames; what came before an error stays in `rows`."""
        for data in frames:
            match wire.parse_frame(bytes(data)):
                case wire.XLogData() as frame:
                    self._message(m.decode(frame.payload), int(frame.start))
                case wire.Keepalive():
                    pass
                case _:
                    raise ProtocolError("a frame that a server does not send")

    def _message(self, message: m.AnyMessage, lsn: int) -> None:
        if isinstance(message, m.Message):
            self._logical(message)
        elif isinstance(message, m.Begin):
            if self.begin is not None or message.final_lsn < self.end_lsn or message.final_lsn == 0:
                raise ProtocolError("Begin inside a transaction, or out of order")
            if message.commit_ts + wire.PG_EPOCH_US >= 2**63:
                raise ProtocolError("a moment that Arrow can't hold")
            self.begin, self._seq, self._lsn = message, 0, 0
        elif self.begin is None:
            raise ProtocolError(f"{type(message).__name__} outside a transaction")
        elif isinstance(message, m.Commit):
            if message.commit_lsn != self.begin.final_lsn or message.end_lsn <= message.commit_lsn:
                raise ProtocolError("a Commit that is not its Begin's")
            self.begin, self.end_lsn = None, message.end_lsn
        elif isinstance(message, m.Relation):
            self._relations[message.relation_id] = message
        elif isinstance(message, m.Insert):
            self._row(lsn, "I", message.relation_id, message.new, None)
        elif isinstance(message, m.Update):
            self._row(lsn, "U", message.relation_id, message.new, message.old or message.key)
        elif isinstance(message, m.Delete):
            self._row(lsn, "D", message.relation_id, None, message.old or message.key)
        elif isinstance(message, m.Truncate):
            for relation_id in message.relation_ids:
                self._row(lsn, "T", relation_id, None, None)
        elif not isinstance(message, m.Origin | m.Type):
            raise ProtocolError(f"{type(message).__name__} is not of protocol 1")

    def _logical(self, message: m.Message) -> None:
        if not message.transactional:
            self.messages.append(batches.Message(message.lsn, message.prefix, message.content, False))
        elif self.begin is None:
            raise ProtocolError("a transactional message outside a transaction")
        else:
            when = wire.pg_datetime(self.begin.commit_ts)
            transaction = (self.begin.final_lsn, self.begin.xid, when)
            self.messages.append(batches.Message(message.lsn, message.prefix, message.content, True, *transaction))

    def _row(self, lsn: int, op: str, relation_id: int, new: m.TupleData | None, old: m.TupleData | None) -> None:
        assert self.begin is not None
        if not self._lsn <= lsn <= self.begin.final_lsn:
            raise ProtocolError("a change that is not in the order of the WAL")
        self._lsn = lsn
        relation = self._relations.get(relation_id)
        if relation is None:
            raise ProtocolError("an unknown relation")
        for data in (new, old):
            if data is not None and len(data.kinds) != len(relation.columns):
                raise ProtocolError("a row that has not its relation's columns")
        unchanged: list[str] = []
        raw: list[tuple[str, str]] = []
        values = [self._cell(c, i, new, old, unchanged, raw) for i, c in enumerate(relation.columns)]
        before = None
        if old is not None:
            before = [self._value(c, old, i, f"_before.{c.name}", raw) for i, c in enumerate(relation.columns)]
        row: Row = {
            "values": values,
            "_op": op,
            "_commit_lsn": int(self.begin.final_lsn),
            "_seq": self._seq,
            "_lsn": lsn,
            "_xid": self.begin.xid,
            "_commit_ts": self.begin.commit_ts + wire.PG_EPOCH_US,
            "_before": before,
            "_unchanged": unchanged or None,
            "_raw": raw or None,
        }
        self.rows.setdefault(version_of(relation), []).append(row)
        self.position = (int(self.begin.final_lsn), self._seq)
        self._seq += 1

    def _cell(
        self,
        column: m.RelationColumn,
        i: int,
        new: m.TupleData | None,
        old: m.TupleData | None,
        unchanged: list[str],
        raw: list[tuple[str, str]],
    ) -> object:
        row = new or old
        if row is None:
            return None
        if row.kinds[i] == ord("u"):
            if old is None or old.values[i] is None:
                unchanged.append(column.name)
                return None
            row = old
        return self._value(column, row, i, column.name, raw)

    def _value(
        self, column: m.RelationColumn, row: m.TupleData, i: int, name: str, raw: list[tuple[str, str]]
    ) -> object:
        value = row.values[i]
        if value is None:
            return None
        if row.kinds[i] == ord("b"):
            binary = type_of(column.type_oid).binary
            if binary is None:
                raise DecodeError("a value in binary of a type that is text only", column=column.name)
            try:
                value = binary.text(value)
            except ValueError as e:
                raise DecodeError(f"not a value of type {column.type_oid}", column=column.name) from e
        try:
            return value_of(column, value)
        except Misfit:
            raw.append((name, exact_text(value)))
            return None
