"""Streams made to measure: encoders of every message, and strategies for messages and for whole legal streams.

`encode` is the mirror of `messages.decode`. `messages_of` draws any one message. `streams` draws what a server could
send over protocol 1, values as text or in binary: relations that come, change and are renamed, transactions of all
sizes, every shape of change.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from harness.scalar import microseconds
from pgoutput_source import messages as m
from pgoutput_source.protocol.wire import PG_EPOCH_US, Keepalive, Lsn, XLogData

# ------------------------------------------------------------------------------------------------------- encoders


def _string(text: str) -> bytes:
    return text.encode() + b"\0"


def _xid(xid: int | None) -> bytes:
    return b"" if xid is None else struct.pack(">I", xid)


def encode_tuple(row: m.TupleData) -> bytes:
    parts = [struct.pack(">H", len(row.kinds))]
    for kind, value in zip(row.kinds, row.values, strict=True):
        parts.append(bytes([kind]))
        if value is not None:
            parts.append(struct.pack(">i", len(value)) + value)
    return b"".join(parts)


def _optional(letter: bytes, row: m.TupleData | None) -> bytes:
    return b"" if row is None else letter + encode_tuple(row)


def _relation(r: m.Relation) -> bytes:
    columns = (bytes([c.key]) + _string(c.name) + struct.pack(">Ii", c.type_oid, c.typmod) for c in r.columns)
    head = _xid(r.xid) + struct.pack(">I", r.relation_id) + _string(r.namespace) + _string(r.name)
    return head + r.replica_identity.encode() + struct.pack(">H", len(r.columns)) + b"".join(columns)


def _prepared(p: m.BeginPrepare | m.Prepare | m.StreamPrepare) -> bytes:
    return struct.pack(">QQqI", p.prepare_lsn, p.end_lsn, p.prepare_ts, p.xid) + _string(p.gid)


ENCODERS: dict[type, tuple[bytes, Callable[[Any], bytes]]] = {
    m.Begin: (b"B", lambda b: struct.pack(">QqI", b.final_lsn, b.commit_ts, b.xid)),
    m.Commit: (b"C", lambda c: struct.pack(">BQQq", 0, c.commit_lsn, c.end_lsn, c.commit_ts)),
    m.Origin: (b"O", lambda o: struct.pack(">Q", o.commit_lsn) + _string(o.name)),
    m.Message: (
        b"M",
        lambda x: (
            _xid(x.xid)
            + struct.pack(">BQ", x.transactional, x.lsn)
            + _string(x.prefix)
            + struct.pack(">i", len(x.content))
            + x.content
        ),
    ),
    m.Relation: (b"R", _relation),
    m.Type: (b"Y", lambda t: _xid(t.xid) + struct.pack(">I", t.type_oid) + _string(t.namespace) + _string(t.name)),
    m.Insert: (b"I", lambda i: _xid(i.xid) + struct.pack(">I", i.relation_id) + b"N" + encode_tuple(i.new)),
    m.Update: (
        b"U",
        lambda u: (
            _xid(u.xid)
            + struct.pack(">I", u.relation_id)
            + _optional(b"K", u.key)
            + _optional(b"O", u.old)
            + b"N"
            + encode_tuple(u.new)
        ),
    ),
    m.Delete: (
        b"D",
        lambda d: _xid(d.xid) + struct.pack(">I", d.relation_id) + _optional(b"K", d.key) + _optional(b"O", d.old),
    ),
    m.Truncate: (
        b"T",
        lambda t: (
            _xid(t.xid)
            + struct.pack(">IB", len(t.relation_ids), t.cascade | t.restart_identity << 1)
            + struct.pack(f">{len(t.relation_ids)}I", *t.relation_ids)
        ),
    ),
    m.StreamStart: (b"S", lambda s: struct.pack(">IB", s.xid, s.first)),
    m.StreamStop: (b"E", lambda s: b""),
    m.StreamCommit: (b"c", lambda c: struct.pack(">IBQQq", c.xid, 0, c.commit_lsn, c.end_lsn, c.commit_ts)),
    m.StreamAbort: (
        b"A",
        lambda a: (
            struct.pack(">II", a.xid, a.subxid)
            + (b"" if a.abort_lsn is None else struct.pack(">Qq", a.abort_lsn, a.abort_ts))
        ),
    ),
    m.BeginPrepare: (b"b", _prepared),
    m.Prepare: (b"P", lambda p: b"\0" + _prepared(p)),
    m.StreamPrepare: (b"p", lambda p: b"\0" + _prepared(p)),
    m.CommitPrepared: (
        b"K",
        lambda c: struct.pack(">BQQqI", 0, c.commit_lsn, c.end_lsn, c.commit_ts, c.xid) + _string(c.gid),
    ),
    m.RollbackPrepared: (
        b"r",
        lambda r: (
            struct.pack(">BQQqqI", 0, r.prepare_end_lsn, r.rollback_end_lsn, r.prepare_ts, r.rollback_ts, r.xid)
            + _string(r.gid)
        ),
    ),
}


def encode(message: m.AnyMessage) -> bytes:
    """The bytes that `messages.decode` reads back to `message`."""
    tag, write = ENCODERS[type(message)]
    return tag + write(message)


def frame(message: m.AnyMessage, lsn: int = 0) -> bytes:
    """The message in the envelope in which a server sends it; `lsn` is 0 for Relation and Type."""
    return XLogData(Lsn(lsn), Lsn(lsn), 700_000_000_000_000, encode(message)).encode()


def text_tuple(*values: str | None) -> m.TupleData:
    """A row of text values and NULLs."""
    kinds = bytes(ord("n") if v is None else ord("t") for v in values)
    return m.TupleData(kinds, tuple(None if v is None else v.encode() for v in values))


# ----------------------------------------------------------------------------------------------- any one message

_uint32 = st.integers(0, 2**32 - 1)
_int64 = st.integers(-(2**63), 2**63 - 1)
_lsns = st.integers(0, 2**64 - 1).map(Lsn)
_names = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=8)


def _tuples(kinds: str) -> st.SearchStrategy[m.TupleData]:
    cell = st.sampled_from(kinds).flatmap(
        lambda kind: st.tuples(st.just(ord(kind)), st.binary(max_size=6) if kind in "tb" else st.none())
    )
    cells = st.lists(cell, max_size=5)
    return cells.map(lambda cs: m.TupleData(bytes(kind for kind, _ in cs), tuple(value for _, value in cs)))


def messages_of(kind: type, *, in_stream: bool = False, parallel: bool = False) -> st.SearchStrategy[Any]:
    """Any message of one class."""
    xid = {"xid": _uint32 if in_stream else st.none()}
    new, old = _tuples("ntbu"), _tuples("ntb")
    columns = st.builds(m.RelationColumn, st.booleans(), _names, _uint32, st.integers(-(2**31), 2**31 - 1))
    prepared = (_lsns, _lsns, _int64, _uint32, _names)
    if kind is m.Delete:
        return st.builds(m.Delete, _uint32, key=old, **xid) | st.builds(m.Delete, _uint32, old=old, **xid)
    if kind is m.Update:
        which = st.sampled_from([{}, {"key": old}, {"old": old}])
        return which.flatmap(lambda it: st.builds(m.Update, _uint32, new, **it, **xid))
    if kind is m.StreamAbort:
        return st.builds(m.StreamAbort, _uint32, _uint32, *((_lsns, _int64) if parallel else ()))
    fields: dict[type, st.SearchStrategy[Any]] = {
        m.Begin: st.builds(m.Begin, _lsns, _int64, _uint32),
        m.Commit: st.builds(m.Commit, _lsns, _lsns, _int64),
        m.Origin: st.builds(m.Origin, _lsns, _names),
        m.Message: st.builds(m.Message, st.booleans(), _lsns, _names, st.binary(max_size=20), **xid),
        m.Relation: st.builds(
            m.Relation,
            _uint32,
            _names,
            _names,
            st.sampled_from("dnfi"),
            st.lists(columns, max_size=4).map(tuple),
            **xid,
        ),
        m.Type: st.builds(m.Type, _uint32, _names, _names, **xid),
        m.Insert: st.builds(m.Insert, _uint32, new, **xid),
        m.Truncate: st.builds(
            m.Truncate, st.lists(_uint32, max_size=4).map(tuple), st.booleans(), st.booleans(), **xid
        ),
        m.StreamStart: st.builds(m.StreamStart, _uint32, st.booleans()),
        m.StreamStop: st.just(m.StreamStop()),
        m.StreamCommit: st.builds(m.StreamCommit, _uint32, _lsns, _lsns, _int64),
        m.BeginPrepare: st.builds(m.BeginPrepare, *prepared),
        m.Prepare: st.builds(m.Prepare, *prepared),
        m.StreamPrepare: st.builds(m.StreamPrepare, *prepared),
        m.CommitPrepared: st.builds(m.CommitPrepared, *prepared),
        m.RollbackPrepared: st.builds(m.RollbackPrepared, _lsns, _lsns, _int64, _int64, _uint32, _names),
    }
    return fields[kind]


# ---------------------------------------------------------------------------------------------------- whole streams

NUMERIC_10_2 = 655366
UNKNOWN_TYPE = 99999

_WORDS = ("", "a", "ab   ", "NULL", "naïve ☃", "x" * 300, "\\x00", '{"a": 1}', "\n", "𝒳")


def _numeric(r: random.Random) -> str:
    return r.choice(["0.00", "-0.01", "99999999.99", "-99999999.99", "NaN", f"{r.randint(-(10**6), 10**6) / 100:.2f}"])


def _timestamptz(r: random.Random) -> str:
    fraction = r.choice(["", ".5", ".678901", f".{r.randint(1, 999999):06}"])
    usual = (
        f"20{r.randint(10, 40)}-{r.randint(1, 12):02}-{r.randint(1, 28):02} {r.randint(0, 23):02}:00:59{fraction}+00"
    )
    odd = [
        "infinity",
        "-infinity",
        "294276-12-31 23:59:59.999999+00",
        "0044-03-15 00:00:00+00 BC",
        "0001-01-01 00:00:00+00",
    ]
    return r.choice(odd) if r.random() < 0.15 else usual


def _float8(r: random.Random) -> str:
    return r.choice(["NaN", "Infinity", "-Infinity", "-0", "5e-324", "1e+15", "0.1", repr(r.gauss(0, 1e6))])


TEXTS: dict[tuple[int, int], Callable[[random.Random], str]] = {
    (23, -1): lambda r: str(r.choice([0, -(2**31), 2**31 - 1, r.randint(-99999, 99999)])),
    (20, -1): lambda r: str(r.choice([0, -(2**63), 2**63 - 1, r.getrandbits(40)])),
    (25, -1): lambda r: r.choice(_WORDS),
    (16, -1): lambda r: r.choice("tf"),
    (1700, NUMERIC_10_2): _numeric,
    (1184, -1): _timestamptz,
    (701, -1): _float8,
    (UNKNOWN_TYPE, -1): lambda r: r.choice(_WORDS),
}
"""For a column's type (OID, typmod) what makes the text of a value."""


def _numeric_binary(text: str) -> bytes:
    if text == "NaN":
        return struct.pack(">hhHH", 0, 0, 0xC000, 0)
    whole, _, fraction = text.lstrip("-").partition(".")
    places = whole.rjust(-(-len(whole) // 4) * 4, "0") + fraction.ljust(-(-len(fraction) // 4) * 4, "0")
    digits = [int(places[i : i + 4]) for i in range(0, len(places), 4)]
    weight = -(-len(whole) // 4) - 1
    while digits and digits[0] == 0:
        digits, weight = digits[1:], weight - 1
    while digits and digits[-1] == 0:
        digits.pop()
    sign = 0x4000 if text.startswith("-") else 0
    return struct.pack(f">hhHH{len(digits)}H", len(digits), weight if digits else 0, sign, len(fraction), *digits)


def _timestamptz_binary(text: str) -> bytes:
    infinities = {"infinity": 2**63 - 1, "-infinity": -(2**63)}
    return struct.pack(">q", infinities[text] if text in infinities else microseconds(text) - PG_EPOCH_US)


BINARY: dict[int, Callable[[str], bytes]] = {
    23: lambda text: struct.pack(">i", int(text)),
    20: lambda text: struct.pack(">q", int(text)),
    25: str.encode,
    16: lambda text: b"\1" if text == "t" else b"\0",
    1700: _numeric_binary,
    1184: _timestamptz_binary,
    701: lambda text: struct.pack(">d", float(text)),
}
"""For a type's OID what makes the same value in binary. The unknown type has no send function."""


@dataclass
class _Table:
    relation: m.Relation
    sent: m.Relation | None = None
    """The version that the client knows."""
    earlier: m.Relation | None = None
    """The version before the last change."""


@dataclass
class StreamWriter:
    """Writes one legal stream of protocol 1, frame by frame; the same seed writes the same stream."""

    seed: int
    frames: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.lsn = self.random.choice([0x16B3748, 0xFFFF_FF00, 0x12_3456_7890])
        self.next_relation_id = 16384
        self.binary = self.random.choice([0, 0, 1, 0.5])  # how many of the values that can be are in binary
        self.tables = [self._create() for _ in range(self.random.randint(1, 4))]

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    # ------------------------------------------------------------------------------------------------- tables

    def _create(self) -> _Table:
        self.next_relation_id += self.random.choice([1, 3, 70_000])
        kinds = self.random.choices(list(TEXTS), k=self.random.choice([0, 1, 2, 3, 4, 5, 8]))
        identity = self.random.choice("ddddffin")
        columns = tuple(
            m.RelationColumn(identity in "di" and (i == 0 or self.chance(0.2)), f"c{i}", oid, typmod)
            for i, (oid, typmod) in enumerate(kinds)
        )
        if identity in "di" and self.chance(0.1):  # no primary key: inserts only
            columns = tuple(m.RelationColumn(False, c.name, c.type_oid, c.typmod) for c in columns)
        if identity == "f":
            columns = tuple(m.RelationColumn(True, c.name, c.type_oid, c.typmod) for c in columns)
        namespace = self.random.choice(["public", "public", "Größe", ""])
        return _Table(m.Relation(self.next_relation_id, namespace, f"t{self.next_relation_id}", identity, columns))

    def _alter(self, table: _Table) -> None:
        """Another version of the table; or the very one that it had before, which is a version that comes back."""
        r = table.relation
        columns = list(r.columns)
        change = self.random.choice(["add", "drop", "rename column", "type", "rename", "move", "identity", "back"])
        name, namespace, identity = r.name, r.namespace, r.replica_identity
        droppable = [c for c in columns if identity == "f" or not c.key]
        if change == "add":
            oid, typmod = self.random.choice(list(TEXTS))
            columns.append(m.RelationColumn(identity == "f", f"a{self.random.randint(0, 10**6)}", oid, typmod))
        elif change == "drop" and droppable:
            columns.remove(self.random.choice(droppable))
        elif change == "rename column" and columns:
            c = columns[-1]
            columns[-1] = m.RelationColumn(c.key, f"r{self.random.randint(0, 10**6)}", c.type_oid, c.typmod)
        elif change == "type" and columns:
            c = columns[-1]
            columns[-1] = m.RelationColumn(c.key, c.name, *self.random.choice(list(TEXTS)))
        elif change == "rename":
            name += self.random.choice(["_old", "_new"])
        elif change == "move":
            namespace += "x"
        elif change == "identity":
            identity = "f"
            columns = [m.RelationColumn(True, c.name, c.type_oid, c.typmod) for c in columns]
        changed = m.Relation(r.relation_id, namespace, name, identity, tuple(columns))
        if change == "back":
            changed = table.earlier or changed
        table.earlier, table.relation = r, changed

    def _announce(self, table: _Table) -> None:
        if table.sent == table.relation and not self.chance(0.05):
            return
        for c in table.relation.columns:
            if c.type_oid == UNKNOWN_TYPE:
                self.frames.append(frame(m.Type(UNKNOWN_TYPE, "public", "mood")))
        self.frames.append(frame(table.relation))
        table.sent = table.relation

    # --------------------------------------------------------------------------------------------------- rows

    def _row(self, columns: tuple[m.RelationColumn, ...], *, unchanged: float = 0.0) -> m.TupleData:
        kinds, values = bytearray(), []
        for c in columns:
            kind = "u" if self.chance(unchanged) else "n" if not c.key and self.chance(0.15) else "t"
            if kind != "t":
                value = None
            elif c.type_oid in BINARY and self.chance(self.binary):
                kind, value = "b", BINARY[c.type_oid](TEXTS[c.type_oid, c.typmod](self.random))
            else:
                value = TEXTS[c.type_oid, c.typmod](self.random).encode()
            kinds.append(ord(kind))
            values.append(value)
        return m.TupleData(bytes(kinds), tuple(values))

    def _key(self, columns: tuple[m.RelationColumn, ...]) -> m.TupleData:
        row = self._row(columns)
        kinds = bytes(kind if c.key else ord("n") for kind, c in zip(row.kinds, columns, strict=True))
        return m.TupleData(kinds, tuple(v if c.key else None for v, c in zip(row.values, columns, strict=True)))

    def _old_row(self, columns: tuple[m.RelationColumn, ...]) -> m.TupleData:
        # With identity FULL every column is flagged, and every column may be NULL.
        return self._row(tuple(m.RelationColumn(False, c.name, c.type_oid, c.typmod) for c in columns))

    def _change(self, table: _Table) -> m.Insert | m.Update | m.Delete:
        r = table.relation
        full = r.replica_identity == "f"
        keyed = r.replica_identity in "di" and any(c.key for c in r.columns)
        op = self.random.choice("IIUUD") if full or keyed else "I"
        unchanged = self.random.choice([0, 0, 0.2, 0.6])
        if op == "I":
            # An update that moves a row into a row filter comes as an insert, 'u' and all.
            return m.Insert(r.relation_id, self._row(r.columns, unchanged=0.3 if keyed and self.chance(0.05) else 0))
        if op == "D" and full:
            return m.Delete(r.relation_id, old=self._old_row(r.columns))
        if op == "D":
            return m.Delete(r.relation_id, key=self._key(r.columns))
        if full:
            old = self._old_row(r.columns)
            new = self._row(r.columns, unchanged=unchanged)
            # A NULL is never TOASTed: what the old row has as NULL can't be unchanged in the new one.
            kinds = bytes(
                ord("n") if k == ord("u") and o == ord("n") else k for k, o in zip(new.kinds, old.kinds, strict=True)
            )
            return m.Update(r.relation_id, m.TupleData(kinds, new.values), old=old)
        key = self._key(r.columns) if self.chance(0.5) else None
        return m.Update(r.relation_id, self._row(r.columns, unchanged=unchanged), key=key)

    # ------------------------------------------------------------------------------------------- transactions

    def _keepalive(self) -> None:
        if self.chance(0.05):
            self.frames.append(Keepalive(Lsn(self.lsn), 700_000_000_000_000, self.chance(0.5)).encode())

    def transaction(self) -> None:
        """One transaction, with what may stand around it."""
        self._keepalive()
        if self.chance(0.1):
            self.frames.append(frame(m.Message(False, Lsn(self.lsn), "note", b"between"), self.lsn))
        if self.chance(0.05):
            self.tables.append(self._create())
        changes = self.random.choice([0, 1, 1, 1, 1, 1, 2, 3, self.random.randint(4, 30)])
        # Another transaction may have been written while this one ran, so its first record can lie far back.
        at = self.lsn - self.random.choice([0, 0, 100, 5000])
        final_lsn = self.lsn + changes * 64 + self.random.choice([0, 8, 512])
        end_lsn = final_lsn + self.random.choice([8, 48, 240])
        commit_ts = 700_000_000_000_000 + self.random.randint(-(10**12), 10**12)
        xid = self.random.choice([700 + len(self.frames), 2**32 - 1, 3])
        origin = self.chance(0.05)
        self.frames.append(frame(m.Begin(Lsn(final_lsn), commit_ts, xid), 0 if origin else at))
        if origin:
            self.frames.append(frame(m.Origin(Lsn(77), "elsewhere"), at))
        table = self.random.choice(self.tables)
        for _ in range(changes):
            self._keepalive()
            if self.chance(0.25):
                table = self.random.choice(self.tables)
            if self.chance(0.04):
                self._alter(table)
            if self.chance(0.04):
                self.frames.append(frame(m.Message(True, Lsn(at), "", b"\x00within"), at))
            if self.chance(0.06):
                chosen = self.random.sample(self.tables, min(len(self.tables), self.random.randint(1, 3)))
                for each in chosen:
                    self._announce(each)
                ids = tuple(each.relation.relation_id for each in chosen)
                self.frames.append(frame(m.Truncate(ids, self.chance(0.3), self.chance(0.3)), at))
            else:
                self._announce(table)
                self.frames.append(frame(self._change(table), at))
            # A multi-insert logs many rows as one record: they share its LSN.
            at += self.random.choice([0, 0, 40, 64])
        self.frames.append(frame(m.Commit(Lsn(final_lsn), Lsn(end_lsn), commit_ts), end_lsn))
        self.lsn = end_lsn


def stream(seed: int, transactions: int) -> list[bytes]:
    """A legal stream of so many transactions."""
    writer = StreamWriter(seed)
    for _ in range(transactions):
        writer.transaction()
    return writer.frames


def streams(max_transactions: int = 12) -> st.SearchStrategy[list[bytes]]:
    """Whole legal streams of protocol 1, as lists of frames."""
    return st.builds(stream, st.integers(0, 2**63), st.integers(1, max_transactions))
