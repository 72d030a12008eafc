"""How operators write Arrow tables into a recovery store: as bytes within builtins."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from pgoutput_source.errors import StateError

AFRESH: Final = "start afresh with a new recovery folder, or another step name"
"""The hint when a state can't be used any more."""


def pack(table: pa.Table | None) -> bytes | None:
    """A table as an Arrow IPC stream: immutable, and no larger than its rows."""
    if table is None or not table.num_rows:
        return None
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def unpack(packed: bytes | None) -> pa.Table | None:
    """The table that `pack` wrote.

    Raises:
        StateError: These bytes are not a table.
    """
    if packed is None:
        return None
    try:
        return pa.ipc.open_stream(packed).read_all()
    except (pa.ArrowException, OSError) as e:
        raise StateError(
            f"the kept state can't be read: {e}", hint="the recovery folder is damaged: start afresh with a new one"
        ) from e
