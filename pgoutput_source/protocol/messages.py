"""Every message of pgoutput, protocol 1 to 4, one class each with the function that reads it beneath.

In comes the payload of one XLogData frame, out goes one frozen object whose fields bear the manual's names. Strings are
text, positions are `Lsn`, moments stay microseconds since 2000-01-01 UTC, and the values of a row stay the exact bytes
that PostgreSQL sent. Not here: what a relation id means, which order of messages is legal (`decode.assembler`), and any
meaning of values (`types`). This is the readable decoder; `decode.columns` reads the same bytes column by column.

Each class lists its layout in the manual's words. The first byte names the message, and `READERS` is the table of it.
Broken bytes raise `ProtocolError`, which names the field, and nothing else is ever raised.

https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from pgoutput_source.errors import ProtocolError
from pgoutput_source.protocol.wire import Cursor, Lsn

PROTOCOLS: Final = {"off": 1, "on": 2, "parallel": 4}
"""The protocol version that each value of the option `streaming` needs."""


class Mode(NamedTuple):
    """What the bytes of a message do not tell: where it stands, and the options that the stream was started with.

    Between a StreamStart and its StreamStop (`in_stream`) each message says which transaction it belongs to. With
    the option streaming 'parallel' a StreamAbort is longer.
    """

    in_stream: bool = False
    parallel: bool = False


# --------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True, slots=True)
class TupleData:
    """A row, as far as PostgreSQL sent it: of each column its letter in `kinds` and its bytes in `values`.

    - Int16: the number of columns. Then for each column:
    - Byte1: 'n' NULL, 'u' an unchanged TOASTed value that is not sent, 't' text, 'b' binary (the type's send function).
    - Int32: the length of the value (for 't' and 'b'). Byte*n*: the value.

    The value of 'n' and 'u' is None in `values`, so look at `kinds` before calling it a NULL. In a `key`, 'n' stands
    for every column that is no part of it. One row may mix 't' and 'b': a type without a send function is always text.
    """

    kinds: bytes
    values: tuple[bytes | None, ...]


_SENT: Final = b"tb"


def _tuple(c: Cursor, what: str, kinds: bytes) -> TupleData:
    found = bytearray()
    values: list[bytes | None] = []
    for i in range(c.uint16(f"{what}.columns")):
        kind = c.uint8(f"{what}[{i}].kind")
        if kind not in kinds:
            raise ProtocolError(f"{what}[{i}].kind: expected one of {kinds.decode()!r}, got {chr(kind)!r}")
        found.append(kind)
        values.append(c.take(c.int32(f"{what}[{i}].length"), f"{what}[{i}]") if kind in _SENT else None)
    return TupleData(bytes(found), tuple(values))


def _new(c: Cursor, what: str) -> TupleData:
    # 'u' can stand in an Insert too: when an update moves a row into a publication's row filter, PostgreSQL sends it
    # as an Insert, and copies only the replica identity's TOASTed values out of the old row.
    return _tuple(c, what, b"ntbu")


def _old(c: Cursor, what: str) -> TupleData:
    # The server detoasts what it logs of an old row. A 'u' here would make a lost value look like a NULL.
    return _tuple(c, what, b"ntb")


def _xid(c: Cursor, mode: Mode, what: str) -> int | None:
    """Int32: xid of the (sub)transaction, present only in streamed transactions."""
    return c.uint32(what) if mode.in_stream else None


# ------------------------------------------------------------------------------------------------- transactions


@dataclass(frozen=True, slots=True)
class Begin:
    """Byte1('B'). A transaction begins; what follows up to its `Commit` belongs to it.

    - Int64: the final LSN of the transaction (the start of its commit record: `Commit.commit_lsn`).
    - Int64: commit timestamp. Not monotonic: a replication origin sets it as it likes.
    - Int32: xid of the transaction.
    """

    final_lsn: Lsn
    commit_ts: int
    xid: int


def _begin(c: Cursor, _: Mode) -> Begin:
    return Begin(c.lsn("Begin.final_lsn"), c.int64("Begin.commit_ts"), c.uint32("Begin.xid"))


@dataclass(frozen=True, slots=True)
class Commit:
    """Byte1('C'). The transaction is complete.

    - Int8: flags; currently unused, must be 0.
    - Int64: the LSN of the commit. Int64: the end LSN of the transaction: acknowledging it forgets the transaction.
    - Int64: commit timestamp.
    """

    commit_lsn: Lsn
    end_lsn: Lsn
    commit_ts: int


def _commit(c: Cursor, _: Mode) -> Commit:
    c.flags(0, "Commit.flags")
    return Commit(c.lsn("Commit.commit_lsn"), c.lsn("Commit.end_lsn"), c.int64("Commit.commit_ts"))


@dataclass(frozen=True, slots=True)
class Origin:
    """Byte1('O'). The transaction was replicated to this server from elsewhere.

    - Int64: the LSN of the commit on the origin server. String: name of the origin.
    """

    commit_lsn: Lsn
    name: str


def _origin(c: Cursor, _: Mode) -> Origin:
    return Origin(c.lsn("Origin.commit_lsn"), c.string("Origin.name"))


@dataclass(frozen=True, slots=True)
class Message:
    """Byte1('M'). A logical decoding message, written with ``pg_logical_emit_message()``. PostgreSQL 14 and newer.

    This is the message on the wire. `changes.Message` is what users receive, with its transaction's commit.

    - Int32: xid of the transaction (only in streamed transactions).
    - Int8: flags; 0, or 1 if the message is transactional.
    - Int64: the LSN of the message. String: the prefix.
    - Int32: the length of the content. Byte*n*: the content.
    """

    transactional: bool
    lsn: Lsn
    prefix: str
    content: bytes
    xid: int | None = None


def _message(c: Cursor, mode: Mode) -> Message:
    xid = _xid(c, mode, "Message.xid")
    transactional = bool(c.flags(1, "Message.flags"))
    lsn, prefix = c.lsn("Message.lsn"), c.string("Message.prefix")
    content = c.take(c.int32("Message.length"), "Message.content")
    return Message(transactional, lsn, prefix, content, xid)


# ------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True, slots=True)
class RelationColumn:
    """A column of a `Relation`.

    - Int8: flags; 0, or 1 if the column is part of the replica identity (with identity 'f' each one is).
    - String: name. Int32: OID of the type. Int32: type modifier (`atttypmod`), -1 for none.
    """

    key: bool
    name: str
    type_oid: int
    typmod: int


@dataclass(frozen=True, slots=True)
class Relation:
    """Byte1('R'). What a relation id means from here on. It comes again whenever it may have changed, or for no reason.

    - Int32: xid of the transaction (only in streamed transactions).
    - Int32: OID of the relation. String: namespace (empty for pg_catalog). String: name.
    - Int8: replica identity (`relreplident`): 'd' default, 'n' nothing, 'f' full, 'i' index.
    - Int16: number of columns. Then each column: see `RelationColumn`.
    """

    relation_id: int
    namespace: str
    name: str
    replica_identity: str
    columns: tuple[RelationColumn, ...]
    xid: int | None = None


def _relation(c: Cursor, mode: Mode) -> Relation:
    return Relation(
        xid=_xid(c, mode, "Relation.xid"),
        relation_id=c.uint32("Relation.relation_id"),
        namespace=c.string("Relation.namespace"),
        name=c.string("Relation.name"),
        replica_identity=c.letter("dnfi", "Relation.replica_identity"),
        columns=tuple(_column(c, f"Relation.columns[{i}]") for i in range(c.uint16("Relation.columns"))),
    )


def _column(c: Cursor, what: str) -> RelationColumn:
    return RelationColumn(
        key=bool(c.flags(1, f"{what}.flags")),
        name=c.string(f"{what}.name"),
        type_oid=c.uint32(f"{what}.type_oid"),
        typmod=c.int32(f"{what}.typmod"),
    )


@dataclass(frozen=True, slots=True)
class Type:
    """Byte1('Y'). The name of a type that is not built in; it comes before the `Relation` that uses it.

    - Int32: xid of the transaction (only in streamed transactions).
    - Int32: OID of the type. String: namespace (empty for pg_catalog). String: name.

    For a domain it is the domain's OID with the name of its base type.
    """

    type_oid: int
    namespace: str
    name: str
    xid: int | None = None


def _type(c: Cursor, mode: Mode) -> Type:
    xid = _xid(c, mode, "Type.xid")
    return Type(c.uint32("Type.type_oid"), c.string("Type.namespace"), c.string("Type.name"), xid)


# ------------------------------------------------------------------------------------------------------ changes


@dataclass(frozen=True, slots=True)
class Insert:
    """Byte1('I'). A new row.

    - Int32: xid of the transaction (only in streamed transactions). Int32: OID of the relation.
    - Byte1('N'): the following TupleData is the new row.
    """

    relation_id: int
    new: TupleData
    xid: int | None = None


def _insert(c: Cursor, mode: Mode) -> Insert:
    xid, relation_id = _xid(c, mode, "Insert.xid"), c.uint32("Insert.relation_id")
    c.letter("N", "Insert.new")
    return Insert(relation_id, _new(c, "Insert.new"), xid)


@dataclass(frozen=True, slots=True)
class Update:
    """Byte1('U'). A row changed.

    - Int32: xid of the transaction (only in streamed transactions). Int32: OID of the relation.
    - Byte1('K'): the following TupleData is the old key. Sent if the change touched a column of the replica identity's
      index, or if one of these is TOASTed.
    - Byte1('O'): the following TupleData is the old row. Sent if the replica identity is FULL.
      There is one of these two, or none.
    - Byte1('N'): the following TupleData is the new row.
    """

    relation_id: int
    new: TupleData
    key: TupleData | None = None
    old: TupleData | None = None
    xid: int | None = None


def _update(c: Cursor, mode: Mode) -> Update:
    xid, relation_id = _xid(c, mode, "Update.xid"), c.uint32("Update.relation_id")
    key = old = None
    kind = c.letter("KON", "Update.kind")
    if kind == "K":
        key = _old(c, "Update.key")
    elif kind == "O":
        old = _old(c, "Update.old")
    if kind != "N":
        c.letter("N", "Update.new")
    return Update(relation_id, _new(c, "Update.new"), key, old, xid)


@dataclass(frozen=True, slots=True)
class Delete:
    """Byte1('D'). A row is gone.

    - Int32: xid of the transaction (only in streamed transactions). Int32: OID of the relation.
    - Byte1('K'): the following TupleData is the old key. Sent if the replica identity is an index.
    - Byte1('O'): the following TupleData is the old row. Sent if the replica identity is FULL.
      There is exactly one of these two.
    """

    relation_id: int
    key: TupleData | None = None
    old: TupleData | None = None
    xid: int | None = None


def _delete(c: Cursor, mode: Mode) -> Delete:
    xid, relation_id = _xid(c, mode, "Delete.xid"), c.uint32("Delete.relation_id")
    if c.letter("KO", "Delete.kind") == "K":
        return Delete(relation_id, key=_old(c, "Delete.key"), xid=xid)
    return Delete(relation_id, old=_old(c, "Delete.old"), xid=xid)


@dataclass(frozen=True, slots=True)
class Truncate:
    """Byte1('T'). Tables were emptied by one statement. PostgreSQL 11 and newer.

    This is the message on the wire. `changes.Truncate` is what users receive, with its position and tables' names.

    - Int32: xid of the transaction (only in streamed transactions). Int32: number of relations.
    - Int8: option bits: 1 for CASCADE, 2 for RESTART IDENTITY.
    - Int32: OID of the relation, for each one.
    """

    relation_ids: tuple[int, ...]
    cascade: bool = False
    restart_identity: bool = False
    xid: int | None = None


def _truncate(c: Cursor, mode: Mode) -> Truncate:
    xid = _xid(c, mode, "Truncate.xid")
    count = c.uint32("Truncate.relations")
    options = c.flags(3, "Truncate.options")
    ids = Cursor(c.take(4 * count, "Truncate.relation_ids"))
    relation_ids = tuple(ids.uint32("Truncate.relation_ids") for _ in range(count))
    return Truncate(relation_ids, bool(options & 1), bool(options & 2), xid)


# --------------------------------------------------------------------------- streamed transactions, protocol 2


@dataclass(frozen=True, slots=True)
class StreamStart:
    """Byte1('S'). A piece of a transaction that is still in progress follows. Protocol 2.

    - Int32: xid of the (top-level) transaction. Int8: 1 if this is its first piece, else 0.
    """

    xid: int
    first: bool


def _stream_start(c: Cursor, _: Mode) -> StreamStart:
    return StreamStart(c.uint32("StreamStart.xid"), bool(c.flags(1, "StreamStart.first")))


@dataclass(frozen=True, slots=True)
class StreamStop:
    """Byte1('E'). The piece that a `StreamStart` opened ends. Protocol 2."""


def _stream_stop(_c: Cursor, _: Mode) -> StreamStop:
    return StreamStop()


@dataclass(frozen=True, slots=True)
class StreamCommit:
    """Byte1('c'). A streamed transaction is committed. Protocol 2.

    - Int32: xid of the transaction. Int8: flags; currently unused, must be 0.
    - Int64: the LSN of the commit. Int64: the end LSN of the transaction. Int64: commit timestamp.
    """

    xid: int
    commit_lsn: Lsn
    end_lsn: Lsn
    commit_ts: int


def _stream_commit(c: Cursor, _: Mode) -> StreamCommit:
    xid = c.uint32("StreamCommit.xid")
    c.flags(0, "StreamCommit.flags")
    lsns = c.lsn("StreamCommit.commit_lsn"), c.lsn("StreamCommit.end_lsn")
    return StreamCommit(xid, *lsns, c.int64("StreamCommit.commit_ts"))


@dataclass(frozen=True, slots=True)
class StreamAbort:
    """Byte1('A'). A streamed transaction or one of its subtransactions was rolled back. Protocol 2.

    - Int32: xid of the transaction. Int32: xid of the subtransaction; the same for the whole transaction.
    - Int64: the LSN of the abort. Int64: abort timestamp. Both only with streaming 'parallel', protocol 4.
    """

    xid: int
    subxid: int
    abort_lsn: Lsn | None = None
    abort_ts: int | None = None


def _stream_abort(c: Cursor, mode: Mode) -> StreamAbort:
    xids = c.uint32("StreamAbort.xid"), c.uint32("StreamAbort.subxid")
    if not mode.parallel:
        return StreamAbort(*xids)
    return StreamAbort(*xids, c.lsn("StreamAbort.abort_lsn"), c.int64("StreamAbort.abort_ts"))


# -------------------------------------------------------------------------- prepared transactions, protocol 3


@dataclass(frozen=True, slots=True)
class BeginPrepare:
    """Byte1('b'). A transaction begins that ends with a `Prepare`. Protocol 3.

    - Int64: the LSN of the prepare. Int64: the end LSN of the prepared transaction. Int64: prepare timestamp.
    - Int32: xid of the transaction. String: the user-defined GID.
    """

    prepare_lsn: Lsn
    end_lsn: Lsn
    prepare_ts: int
    xid: int
    gid: str


def _begin_prepare(c: Cursor, _: Mode) -> BeginPrepare:
    return BeginPrepare(*_prepared(c, "BeginPrepare"))


@dataclass(frozen=True, slots=True)
class Prepare:
    """Byte1('P'). The transaction is prepared; whether it ever commits is not known yet. Protocol 3.

    - Int8: flags; currently unused, must be 0. Then the fields of `BeginPrepare`.
    """

    prepare_lsn: Lsn
    end_lsn: Lsn
    prepare_ts: int
    xid: int
    gid: str


def _prepare(c: Cursor, _: Mode) -> Prepare:
    c.flags(0, "Prepare.flags")
    return Prepare(*_prepared(c, "Prepare"))


@dataclass(frozen=True, slots=True)
class StreamPrepare:
    """Byte1('p'). A streamed transaction is prepared. Protocol 3.

    - Int8: flags; currently unused, must be 0. Then the fields of `BeginPrepare`.
    """

    prepare_lsn: Lsn
    end_lsn: Lsn
    prepare_ts: int
    xid: int
    gid: str


def _stream_prepare(c: Cursor, _: Mode) -> StreamPrepare:
    c.flags(0, "StreamPrepare.flags")
    return StreamPrepare(*_prepared(c, "StreamPrepare"))


def _prepared(c: Cursor, what: str) -> tuple[Lsn, Lsn, int, int, str]:
    lsns = c.lsn(f"{what}.prepare_lsn"), c.lsn(f"{what}.end_lsn")
    return *lsns, c.int64(f"{what}.prepare_ts"), c.uint32(f"{what}.xid"), c.string(f"{what}.gid")


@dataclass(frozen=True, slots=True)
class CommitPrepared:
    """Byte1('K'). A prepared transaction is committed. Protocol 3. (In an `Update` or `Delete`, 'K' names the old key.)

    - Int8: flags; currently unused, must be 0.
    - Int64: the LSN of the commit. Int64: the end LSN of the commit. Int64: commit timestamp.
    - Int32: xid of the transaction. String: the user-defined GID.
    """

    commit_lsn: Lsn
    end_lsn: Lsn
    commit_ts: int
    xid: int
    gid: str


def _commit_prepared(c: Cursor, _: Mode) -> CommitPrepared:
    c.flags(0, "CommitPrepared.flags")
    lsns = c.lsn("CommitPrepared.commit_lsn"), c.lsn("CommitPrepared.end_lsn")
    commit_ts, xid = c.int64("CommitPrepared.commit_ts"), c.uint32("CommitPrepared.xid")
    return CommitPrepared(*lsns, commit_ts, xid, c.string("CommitPrepared.gid"))


@dataclass(frozen=True, slots=True)
class RollbackPrepared:
    """Byte1('r'). A prepared transaction is rolled back. Protocol 3.

    - Int8: flags; currently unused, must be 0.
    - Int64: the end LSN of the prepared transaction. Int64: the end LSN of the rollback.
    - Int64: prepare timestamp. Int64: rollback timestamp.
    - Int32: xid of the transaction. String: the user-defined GID.
    """

    prepare_end_lsn: Lsn
    rollback_end_lsn: Lsn
    prepare_ts: int
    rollback_ts: int
    xid: int
    gid: str


def _rollback_prepared(c: Cursor, _: Mode) -> RollbackPrepared:
    c.flags(0, "RollbackPrepared.flags")
    lsns = c.lsn("RollbackPrepared.prepare_end_lsn"), c.lsn("RollbackPrepared.rollback_end_lsn")
    moments = c.int64("RollbackPrepared.prepare_ts"), c.int64("RollbackPrepared.rollback_ts")
    return RollbackPrepared(*lsns, *moments, c.uint32("RollbackPrepared.xid"), c.string("RollbackPrepared.gid"))


# ---------------------------------------------------------------------------------------------------- the table

AnyMessage = (
    Begin
    | Commit
    | Origin
    | Message
    | Relation
    | Type
    | Insert
    | Update
    | Delete
    | Truncate
    | StreamStart
    | StreamStop
    | StreamCommit
    | StreamAbort
    | BeginPrepare
    | Prepare
    | StreamPrepare
    | CommitPrepared
    | RollbackPrepared
)

Reader = Callable[[Cursor, Mode], AnyMessage]

READERS: Final[dict[int, Reader]] = {
    ord("B"): _begin,
    ord("C"): _commit,
    ord("O"): _origin,
    ord("M"): _message,
    ord("R"): _relation,
    ord("Y"): _type,
    ord("I"): _insert,
    ord("U"): _update,
    ord("D"): _delete,
    ord("T"): _truncate,
    ord("S"): _stream_start,
    ord("E"): _stream_stop,
    ord("c"): _stream_commit,
    ord("A"): _stream_abort,
    ord("b"): _begin_prepare,
    ord("P"): _prepare,
    ord("p"): _stream_prepare,
    ord("K"): _commit_prepared,
    ord("r"): _rollback_prepared,
}
"""For the first byte of a message, what reads the rest of it."""


def decode(data: bytes, *, in_stream: bool = False, parallel: bool = False) -> AnyMessage:
    """The message in `data`, the payload of one XLogData frame.

    >>> decode(bytes.fromhex("49 00004005 4e 0002 74 00000001 31 6e"))
    Insert(relation_id=16389, new=TupleData(kinds=b'tn', values=(b'1', None)), xid=None)

    Args:
        data: All of the payload, and nothing but it.
        in_stream: The message stands between a StreamStart and its StreamStop, so it names its transaction.
        parallel: The stream was started with streaming 'parallel'.

    Raises:
        ProtocolError: The bytes are no message: unknown, too short, too long, or with a field that can't be.
    """
    if not data:
        raise ProtocolError("message: expected a kind, got nothing")
    reader = READERS.get(data[0])
    if reader is None:
        raise ProtocolError(f"message: expected one of {bytes(READERS).decode()!r}, got {chr(data[0])!r}")
    c = Cursor(data, 1)
    message = reader(c, Mode(in_stream, parallel))
    c.end(type(message).__name__)
    return message
