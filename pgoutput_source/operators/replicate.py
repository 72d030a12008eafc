"""`cdc.replicate`: every table of a source to the destination that an address names."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from bytewax import operators as op
from bytewax.dataflow import Stream, operator

from pgoutput_source.changes.batches import ChangeBatch, ChangeSet, UndecodedBatch
from pgoutput_source.changes.schema import TableName
from pgoutput_source.compute.metadata import own_columns
from pgoutput_source.dataflow.taken import take
from pgoutput_source.destinations.replication import Replication
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.operators.outputs import output
from pgoutput_source.operators.projections import Kept, nulls, reshaper
from pgoutput_source.sinks.addresses import ReplicationSink


@operator
def replicate(step_id: str, up: Stream[ChangeSet], replication: Replication | None = None) -> None:
    """Write every table to the destination of a replication, exactly once with recovery (``-r``).

    Args:
        step_id: Unique name of the step; the sink's state is kept under it.
        up: The output of `PgOutputSource`.
        replication: What to replicate, and where to; None for what the environment and the file in `PGOUTPUT_CONFIG`
            say when the flow starts, see `Replication.from_env`.

    Raises:
        ConfigurationError: When the flow starts: an option is unknown or invalid, or a table with columns to hide will
            never come. Once changes come: a column to hide is not there, or is part of the key.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from pgoutput_source import PgOutputSource
        >>> flow = Dataflow("replica")
        >>> changes = op.input("postgres", flow, PgOutputSource.from_env())
        >>> replicate("replica", changes, Replication(to="postgresql://localhost/reporting", exclude=["*.log_*"]))
    """
    read = functools.cache(Replication.from_env if replication is None else lambda: replication)
    take(up, lambda: read().hidden)
    shown = op.map("hide", up, _hider(read))
    output("out", shown, ReplicationSink(read))


def _hider(read: Callable[[], Replication]) -> Callable[[ChangeSet], ChangeSet]:
    """Masks columns and leaves columns out."""

    @functools.cache
    def hidden() -> dict[TableName, Callable[[ChangeBatch], ChangeBatch]]:
        return {table: _hides(*columns) for table, columns in read().hidden.items()}

    def hide(changes: ChangeSet) -> ChangeSet:
        if not hidden():
            return changes
        batches = []
        for batch in changes.batches:
            how = hidden().get(batch.schema.full_name)
            batches.append(batch if how is None or isinstance(batch, UndecodedBatch) else how(batch))
        return dataclasses.replace(changes, batches=tuple(batches))

    return hide


def _hides(masked: tuple[str, ...], left_out: tuple[str, ...]) -> Callable[[ChangeBatch], ChangeBatch]:
    mask = reshaper({name: Kept(name, nulls, raw=False) for name in masked}, others=True)
    few: dict[tuple[str, ...], Callable[[ChangeBatch], ChangeBatch]] = {}

    def hide(batch: ChangeBatch) -> ChangeBatch:
        names = tuple(own_columns(batch.data.schema))
        for name in (*masked, *left_out):
            if name not in names:
                raise ConfigurationError(
                    f"column {name!r} is to be hidden, and there is no such column",
                    table=batch.table,
                    hint=f"it has {', '.join(names)}",
                )
            if name in batch.schema.key:
                raise ConfigurationError(
                    f"column {name!r} is to be hidden, and is part of the key",
                    table=batch.table,
                    hint="leave it as it is",
                )
        if masked:
            batch = mask(batch)
        if left_out:
            if names not in few:
                few[names] = reshaper({name: Kept(name) for name in names if name not in left_out}, others=False)
            batch = few[names](batch)
        return batch

    return hide
