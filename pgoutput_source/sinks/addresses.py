"""Where a destination is named by a text: ``postgresql://localhost/reporting``. A scheme is a row of a table."""

from __future__ import annotations

import pgoutput_source.dataflow.needs_bytewax  # noqa: F401

# isort: split
import importlib
import inspect
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition

from pgoutput_source.dataflow.run import recovery_folder
from pgoutput_source.destinations.replication import Replication
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.sinks.base import State
from pgoutput_source.sinks.tables import Item, TableSink


class Scheme(NamedTuple):
    """A kind of destination.

    Attributes:
        module: The module of its sink, in `sinks`.
        sink: The sink's class. Its first argument is the address.
        example: An address.
        whole: Whether the scheme is part of the address that the sink takes.
    """

    module: str
    sink: str
    example: str
    whole: bool = False


SCHEMES: Final[dict[str, Scheme]] = {
    "postgresql": Scheme("postgres", "PostgresSink", "postgresql://localhost/reporting", whole=True),
    "postgres": Scheme("postgres", "PostgresSink", "postgres://localhost/reporting", whole=True),
}
"""The destinations that an address can name."""


def sink_of(replication: Replication, *, spool: Path | None = None) -> TableSink:
    """The sink of a replication. Nothing is opened yet.

    Args:
        replication: What to replicate, and where to.
        spool: The folder for what waits, if the replication names none.

    Raises:
        ConfigurationError: The address can't be read, what the destination needs is not installed, or it does not have
            an option.

    Example:
        >>> sink_of(Replication(to="postgresql://localhost/reporting"), spool=Path("spool"))
        PostgresSink('{schema}.{table}', mode='mirror')
        >>> sink_of(Replication(to="excel:shop.xlsx"), spool=Path("spool"))
        Traceback (most recent call last):
        pgoutput_source.errors.ConfigurationError: to: there is no destination 'excel'
        hint: write an address such as ...
    """
    scheme = SCHEMES.get(replication.scheme)
    if scheme is None:
        raise ConfigurationError(
            f"to: there is no destination {replication.scheme!r}"
            if replication.scheme
            else "to: the address does not say what kind of destination it is",
            hint=f"write an address such as {', '.join(each.example for each in SCHEMES.values())}",
        )
    sink: Callable[..., TableSink] = getattr(
        importlib.import_module(f"pgoutput_source.sinks.{scheme.module}"), scheme.sink
    )
    address = replication.to if scheme.whole else replication.to.partition(":")[2]
    if not address:
        raise ConfigurationError(f"to: {replication.to!r} names no place", hint=f"for example {scheme.example}")
    given: dict[str, Any] = {
        "mode": replication.mode,
        "spool": replication.spool or spool or Path("spool"),
        "tables": replication.tables,
        "exclude": replication.exclude,
        "max_age": timedelta(seconds=replication.max_age),
    }
    if replication.into is not None:
        given["into"] = replication.into
    if replication.key:
        given["key"] = replication.key
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
        self._made: TableSink | None = None

    def _sink(self) -> TableSink:
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
