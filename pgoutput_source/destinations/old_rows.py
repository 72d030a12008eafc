"""`_before` for stores whose tables outlive the struct that it is: a map of texts, which never changes its type."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.changes.schema import MetadataNames
from pgoutput_source.types.written import written


def old_rows(batch: pa.RecordBatch) -> pa.Array:
    """`_before` as the texts of the columns that were sent, by name; those of misfits included."""
    names = MetadataNames.of(batch.schema)
    before = batch.column(names.before)
    kind = pa.map_(pa.utf8(), pa.utf8())
    if before.null_count == len(before) or not before.type.num_fields:
        return pa.nulls(len(batch), kind)
    there = np.flatnonzero(before.is_valid().to_numpy(zero_copy_only=False))
    raw = batch.column(names.raw).take(pa.array(there))
    rows = pa.RecordBatch.from_struct_array(before.take(pa.array(there)))
    whole = (batch.schema.metadata or {}).get(b"pg.identity") == b"f"
    sent, texts = [], []
    for name, column in zip(rows.schema.names, rows.columns, strict=True):
        text = written(column, (batch.schema.field(name).metadata or {}).get(b"pg.type", b"").decode())
        if raw.null_count < len(raw) and text.null_count:
            text = pc.coalesce(text, pc.map_lookup(raw, pa.scalar(names.old + name), "first").cast(text.type))
        if whole or text.null_count < len(text):  # without FULL only the key is sent, which is never NULL
            sent.append(name)
            texts.append(text)
    # From columns to rows: cell (row, column) is at column * rows + row.
    order = np.arange(len(texts) * len(there)).reshape(len(texts), len(there)).T.ravel()
    items = pa.concat_arrays(texts).take(pa.array(order)).cast(pa.utf8())
    keys = pa.array(sent, pa.utf8()).take(pa.array(np.tile(np.arange(len(texts)), len(there))))
    maps = pa.MapArray.from_arrays(pa.array(np.arange(len(there) + 1) * len(texts), pa.int32()), keys, items)
    at = np.full(len(batch), -1)
    at[there] = np.arange(len(there))
    return maps.take(pa.array(at, mask=at < 0))
