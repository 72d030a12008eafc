"""The sink that an address names, such as ``postgresql://localhost/reporting``; `SCHEMES` has the schemes."""

from __future__ import annotations

import pgoutput_source.dataflow.needs_bytewax  # noqa: F401

# isort: split
import importlib
import inspect
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition

from pgoutput_source.dataflow.run import recovery_folder
from pgoutput_source.destinations.replication import Replication
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.sinks.base import State
from pgoutput_source.sinks.tables import Item


def sink_of(replication: Replication, *, spool: Path | None = None) -> FixedPartitionedSink[Any, Any]:
    """The sink of a replication. Nothing is opened yet.

    Args:
        replication: What to replicate, and where to.
        spool: The folder for what waits, if the replication names none.

    Raises:
        ConfigurationError: What the destination needs is not installed, or it does not have an option.

    Example:
        >>> sink_of(Replication(to="postgresql://localhost/reporting"), spool=Path("spool"))
        PostgresSink('{schema}.{table}', mode='mirror')
        >>> sink_of(Replication(to="parquet:out/{schema}/{table}"), spool=Path("spool"))
        ParquetSink('out/{schema}/{table}')
    """
    scheme, address = replication.kind, replication.address
    sink: Callable[..., FixedPartitionedSink[Any, Any]] = getattr(
        importlib.import_module(f"pgoutput_source.sinks.{scheme.module}"), scheme.sink
    )
    given: dict[str, Any] = {
        "spool": replication.spool or spool or Path("spool"),
        "tables": replication.tables,
        "exclude": replication.exclude,
    }
    if len(scheme.modes) > 1:
        given["mode"] = replication.mode
    if replication.max_age is not None:
        given["max_age"] = timedelta(seconds=replication.max_age)
    if replication.into is not None:
        given["into"] = replication.into
    if replication.key:
        given["key"] = replication.key
    if replication.schema_policy:
        given["schema_policy"] = replication.schema_policy
    takes = list(inspect.signature(sink).parameters)[1:]
    for name in (*given, *replication.options):
        if name not in takes:
            own = [each for each in takes if each not in Replication.model_fields]
            raise ConfigurationError(
                f"{name}: {scheme.sink} has no such option",
                hint=f"the options of this destination are {', '.join(own)}" if own else "leave it out",
            )
    return sink(address, **{**given, **replication.options})


def spool_beside(recovery: Path | None) -> Path:
    """The default folder for what waits, beside a recovery folder."""
    return Path("spool") if recovery is None else recovery.with_name(f"{recovery.name}-spool")


class ReplicationSink(FixedPartitionedSink[Item, State]):
    """The sink of a replication that is read from the environment when the flow starts, never at import.

    Args:
        replication: Gives the replication; called once.
    """

    def __init__(self, replication: Callable[[], Replication]) -> None:
        self._replication = replication
        self._lock = threading.Lock()
        self._made: FixedPartitionedSink[Any, Any] | None = None

    def _sink(self) -> FixedPartitionedSink[Any, Any]:
        with self._lock:
            if self._made is None:
                self._made = sink_of(self._replication(), spool=spool_beside(recovery_folder()))
            return self._made

    def list_parts(self) -> list[str]:
        """The part of the sink."""
        return self._sink().list_parts()

    def part_fn(self, item_key: str) -> int:
        """Every key goes to the single partition."""
        return 0

    def build_part(self, step_id: str, for_part: str, resume_state: State | None) -> StatefulSinkPartition[Item, State]:
        """The part of the sink."""
        part: StatefulSinkPartition[Item, State] = self._sink().build_part(step_id, for_part, resume_state)
        return part
