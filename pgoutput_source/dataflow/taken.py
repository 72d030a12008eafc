"""Which tables the steps of a dataflow take from a source: noted while the flow is built, traced when it starts.

While an operator is built, the steps of the operators around it are not visible yet. So a note only names a stream, and
goes to every existing source. When a source starts, its flow is complete, and the streams are followed back to it.
"""

from __future__ import annotations

import pgoutput_source.dataflow.needs_bytewax  # noqa: F401

# isort: split
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final
from weakref import WeakKeyDictionary

from bytewax.dataflow import Stream

from pgoutput_source.changes.schema import TableName
from pgoutput_source.destinations.targets import is_pattern

Taken = tuple[str, str] | str
"""A table, as schema and name, or a pattern of tables."""

Note = tuple[list[Any], str, Callable[[], Iterable[Taken]]]
"""The steps of a flow, a stream that one of its steps takes, and what gives the tables that the step takes from it."""

_notes: Final[WeakKeyDictionary[Any, list[Note]]] = WeakKeyDictionary()


def made(source: object) -> None:
    """Note that a source exists. Steps may take tables from it from now on."""
    _notes[source] = []


def take(up: Stream[Any], tables: Callable[[], Iterable[Taken]]) -> None:
    """Note that a step takes `tables` (schema and name) from the sources upstream of `up`. Called when these start."""
    for notes in _notes.values():
        notes.append((up.flow().substeps, up.stream_id, tables))


def take_matching(up: Stream[Any], patterns: Iterable[str]) -> None:
    """Note that a step takes the tables that match. A pattern that is a plain name is that table."""
    taken: list[Taken] = [each if is_pattern(each) else TableName.parse(each) for each in patterns if each != "*"]
    if taken:
        take(up, lambda: taken)


def prefixes(up: Stream[Any]) -> set[str]:
    """The prefix of the metadata columns in `up`, as far as known before the flow is complete."""
    sources = _sources(_makers(up.flow().substeps), up.stream_id)
    return {prefix for source in sources if (prefix := getattr(source, "metadata_prefix", "_")) is not None}


def taken_from(source: object) -> tuple[set[tuple[str, str]], set[str]]:
    """The tables, as schema and name, and the patterns that steps take from a source. The flow must be complete."""
    found = set[Taken]()
    makers: dict[int, dict[str, Any]] = {}
    for steps, stream, tables in _notes[source]:
        if id(steps) not in makers:
            makers[id(steps)] = _makers(steps)
        taken = set(tables())
        if not taken <= found and any(each is source for each in _sources(makers[id(steps)], stream)):
            found |= taken
    patterns = {each for each in found if isinstance(each, str)}
    return {each for each in found if not isinstance(each, str)}, patterns


def _sources(makers: dict[str, Any], stream: str) -> Iterator[object]:
    """The sources upstream of a stream; `makers` has the steps, by the streams that they produce."""
    waiting, seen = [stream], set[str]()
    while waiting:
        step = makers.get(waiting.pop())
        if step is None or step.step_id in seen:
            continue
        if (source := getattr(step, "source", None)) is not None:
            yield source
        seen.add(step.step_id)
        waiting += _streams(step, step.ups_names)


def _makers(steps: Iterable[Any]) -> dict[str, Any]:
    return {made: step for step in _core(steps) for made in _streams(step, step.dwn_names)}


def _core(steps: Iterable[Any]) -> Iterator[Any]:
    """The core operators within steps, at any depth."""
    for step in steps:
        if getattr(step, "core", False):
            yield step
        yield from _core(step.substeps)


def _streams(step: Any, names: Iterable[str]) -> list[str]:
    """The IDs of the streams at these ports of an operator; a port has one or several."""
    ports = [getattr(step, name) for name in names]
    return [each for port in ports for each in getattr(port, "stream_ids", {}).values()] + [
        port.stream_id for port in ports if hasattr(port, "stream_id")
    ]
