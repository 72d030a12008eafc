"""`python -m pgoutput_source replay`: what is parked, and the request that has it delivered.

A flow with on_table_error="park" keeps the changes of a table that it can't decode. Mend the cause, ask for a replay
with this command, and start the flow again. It delivers the parked changes first, in order and each once, and then
resumes. What still can't be decoded stays parked. This command writes the request and nothing else, and may run while
the flow does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pgoutput_source.changes.schema import Position, TableName
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.stream.parked_files import ParkedFile, parked_files
from pgoutput_source.stream.replay_request import request


def run(folder: Path, tables: Sequence[str], *, only_list: bool) -> int:
    """Print what is parked, and unless it is only listed ask for the replay; the exit status is 0.

    Args:
        folder: The flow's `park_folder`.
        tables: Which tables, as schema and name; none stands for all.
        only_list: Whether to ask for nothing.

    Raises:
        ConfigurationError: There is nothing like it.
        StateError: The folder can't be used.
    """
    wanted = {str(TableName.parse(table)) for table in tables}
    slots = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    parked = {slot: _parked(slot) for slot in slots}
    there = {name for found in parked.values() for name in found}
    if not there:
        raise ConfigurationError(f"nothing is parked in {folder}", hint="give the flow's park_folder")
    if missing := sorted(wanted - there):
        raise ConfigurationError(
            f"{', '.join(missing)}: not parked in {folder}", hint=f"parked tables: {', '.join(sorted(there))}"
        )
    for slot, found in parked.items():
        chosen = {name: files for name, files in found.items() if not wanted or name in wanted}
        for name, files in chosen.items():
            count = sum(file.changes for file in files)
            size = sum(file.path.stat().st_size for file in files)
            first, last = (str(Position(Lsn(at[0]), at[1])) for at in (files[0].first, files[-1].last))
            print(f"slot {slot.name}: {name} is parked, {count:,d} changes from {first} to {last}, {size:,d} bytes")
            print(f"  reason: {files[0].reason}")
        if chosen and not only_list:
            request(slot, sorted(wanted) or None)
            print(f"slot {slot.name}: the flow replays them when it is started again")
    return 0


def _parked(slot: Path) -> dict[str, list[ParkedFile]]:
    """The files of each table, by the name that it had."""
    found: dict[str, list[ParkedFile]] = {}
    for file in parked_files(slot):
        found.setdefault(file.name, []).append(file)
    return found
