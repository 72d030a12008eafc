"""Changes as PostgreSQL sent them, in Arrow, to be decoded some other time.

A record batch of raw changes has a row for each change of one version of one table: its position, and the bytes of its
message. The schema's metadata hold the messages that it rests on: the version's Relation, and the Type messages of its
columns. So the batch says by itself all that the stream said of it.

https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Protocol

import numpy as np
import pyarrow as pa

from pgoutput_source.changes.batches import ChangeBatch, Truncate, UndecodedBatch
from pgoutput_source.changes.schema import Position, TableSchema
from pgoutput_source.decode.columns import decode
from pgoutput_source.decode.frames import Frames
from pgoutput_source.decode.relations import Relations, TableVersion
from pgoutput_source.decode.transactions import Rows
from pgoutput_source.errors import DecodeError
from pgoutput_source.protocol import messages
from pgoutput_source.protocol.wire import PG_EPOCH_US, Lsn, XLogData

FIELDS: Final = (
    pa.field("commit_lsn", pa.uint64(), nullable=False),
    pa.field("seq", pa.uint64(), nullable=False),
    pa.field("lsn", pa.uint64(), nullable=False),
    pa.field("xid", pa.uint32(), nullable=False),
    pa.field("commit_ts", pa.timestamp("us", "UTC"), nullable=False),
    pa.field("message", pa.binary(), nullable=False),
)

ALREADY: Final = DecodeError("changes of this table are parked already")
"""The error of changes that may well be decodable, and have to wait for others of their table."""


class Parked(Protocol):
    """The tables whose changes are parked."""

    def __contains__(self, schema: TableSchema) -> bool:
        """Whether changes of this version of a table have to be parked."""
        ...

    def add(self, batch: UndecodedBatch) -> None:
        """From these changes on the table is parked."""
        ...


def raw_of(f: Frames, rows: Rows, version: TableVersion, types: Sequence[bytes]) -> pa.RecordBatch:
    """Rows of one table version as raw changes; `types` are the Type messages that its columns need."""
    schema = version.schema
    at = rows.frame
    arrays = [
        pa.array(rows.commit_lsn),
        pa.array(rows.seq),
        pa.array(f.integers(">u8", f.start[at] + 1)),
        pa.array(rows.xid),
        pa.array(rows.commit_ts + PG_EPOCH_US).view(pa.timestamp("us", "UTC")),
        f.slices(f.payload[at], f.end[at] - f.payload[at], None),
    ]
    metadata = {
        "pg.table": schema.table,
        "pg.namespace": schema.namespace,
        "pg.name": schema.name,
        "pg.relation_id": str(schema.relation_id),
        **{f"pg.{name}": value for name, value in schema.origin},
        "raw.relation": b64encode(version.announced).decode(),
        "raw.types": json.dumps([b64encode(message).decode() for message in types]),
        "raw.xid": "" if version.xid is None else str(version.xid),
    }
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(FIELDS, metadata=metadata))


def decode_raw(raw: pa.RecordBatch, relations: Relations, *, on_misfit: str) -> ChangeBatch:
    """The batch that the stream would have given for these changes, had it been decoded as it is now.

    Args:
        raw: Raw changes.
        relations: Takes note of the Relation and Type messages.
        on_misfit: As in `columns.decode`.

    Raises:
        ProtocolError: The bytes are no messages.
        SchemaChanged: See `Relations.announce`.
    """
    said = {key.decode(): value.decode() for key, value in raw.schema.metadata.items()}
    for text in json.loads(said["raw.types"]):
        message = b64decode(text)
        kind = messages.decode(message)
        assert isinstance(kind, messages.Type)
        relations.name_type(kind, message)
    announced = b64decode(said["raw.relation"])
    relation = messages.decode(announced)
    assert isinstance(relation, messages.Relation)
    relations.expect({relation.relation_id})
    # The catalogue may have told another name than the message.
    named = replace(relation, namespace=said["pg.namespace"], name=said["pg.name"])
    relations.announce(named, int(said["raw.xid"]) if said["raw.xid"] else None, announced)
    frames = [
        XLogData(Lsn(lsn), Lsn(lsn), 0, message).encode()
        for lsn, message in zip(raw.column("lsn").to_pylist(), raw.column("message").to_pylist(), strict=True)
    ]
    rows = Rows(
        np.arange(len(frames)),
        raw.column("commit_lsn").to_numpy(),
        raw.column("seq").to_numpy(),
        raw.column("xid").to_numpy(),
        raw.column("commit_ts").view(pa.int64()).to_numpy() - PG_EPOCH_US,
    )
    return decode(Frames(frames), rows, relations.current(relation.relation_id), on_misfit=on_misfit)


def truncates_of(raw: pa.RecordBatch) -> list[Truncate]:
    """What the TRUNCATEs among raw changes were, for this table alone."""
    found = []
    table = raw.schema.metadata[b"pg.table"].decode()
    for row, message in enumerate(raw.column("message").to_pylist()):
        if message[:1] == b"T":
            truncate = messages.decode(message)
            assert isinstance(truncate, messages.Truncate)
            commit_lsn, seq, lsn = (raw.column(name)[row].as_py() for name in ("commit_lsn", "seq", "lsn"))
            at = Position(Lsn(commit_lsn), seq)
            found.append(Truncate(at, Lsn(lsn), (table,), truncate.cascade, truncate.restart_identity))
    return found
