"""Which tables the steps of a dataflow take from a source: noted as the flow is built, checked as it starts."""

from __future__ import annotations

import pgoutput_source.dataflow.needs_bytewax  # noqa: F401

# isort: split
from collections.abc import Iterable, Iterator
from typing import Any

from bytewax.dataflow import Stream

from pgoutput_source.dataflow.source import PgOutputSource


def take(up: Stream[Any], table: tuple[str, str]) -> None:
    """Note that a step takes `table`, as schema and name, from the sources that `up` comes from."""
    makers = {stream: step for step in _core(up.flow().substeps) for stream in _streams(step, step.dwn_names)}
    waiting, seen = [up.stream_id], set[str]()
    while waiting:
        step = makers.get(waiting.pop())
        if step is None or step.step_id in seen:
            continue
        seen.add(step.step_id)
        source = getattr(step, "source", None)
        if isinstance(source, PgOutputSource):
            source.tables.add(table)
        waiting += _streams(step, step.ups_names)


def _core(steps: Iterable[Any]) -> Iterator[Any]:
    """The operators that others are made of."""
    for step in steps:
        if getattr(step, "core", False):
            yield step
        yield from _core(step.substeps)


def _streams(step: Any, names: Iterable[str]) -> list[str]:
    """The IDs of the streams at some ports of an operator; a port has one or several."""
    ports = [getattr(step, name) for name in names]
    return [each for port in ports for each in getattr(port, "stream_ids", {}).values()] + [
        port.stream_id for port in ports if hasattr(port, "stream_id")
    ]
