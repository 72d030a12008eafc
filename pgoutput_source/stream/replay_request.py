"""A request that parked changes are replayed, which the next start of the flow takes up.

    folder/slot/replay.json

It has a token, by which a flow knows that it has replayed it, although a crash came before the request was deleted.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pgoutput_source.errors import StateError
from pgoutput_source.files import explained, sync
from pgoutput_source.stream.parked_files import WRITING

_NAME: Final = "replay.json"


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """What is asked for; `tables` is None for all of them."""

    token: str
    tables: list[str] | None

    @classmethod
    def read(cls, folder: Path) -> ReplayRequest | None:
        """The request in the folder of a slot, if there is one.

        Raises:
            StateError: It can't be read.
        """
        path = folder / _NAME
        with explained("can't read", path, StateError):
            if not path.exists():
                return None
            try:
                said = json.loads(path.read_text())
            except ValueError as e:
                raise StateError(f"{path} is not a request: {e}", hint="delete it, and ask for the replay again") from e
        return cls(said["token"], said["tables"])

    @staticmethod
    def delete(folder: Path, token: str) -> None:
        """Delete the request with this token, if it is there.

        Raises:
            StateError: It can't be deleted.
        """
        there = ReplayRequest.read(folder)
        if there is not None and there.token == token:
            with explained("can't delete", folder / _NAME, StateError):
                (folder / _NAME).unlink()


def request(folder: Path, tables: Sequence[str] | None) -> None:
    """Ask for a replay of the parked changes in the folder of a slot; None stands for all tables.

    Raises:
        StateError: The folder can't be written.
    """
    path = folder / _NAME
    with explained("can't write", path, StateError):
        writing = path.with_suffix(WRITING)
        with writing.open("w") as file:
            json.dump({"token": secrets.token_hex(8), "tables": None if tables is None else list(tables)}, file)
            file.flush()
            os.fsync(file.fileno())
        writing.rename(path)
        sync(folder)
