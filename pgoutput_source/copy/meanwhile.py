"""Tells whether a chunk that was read ahead shows what was dropped since it began to be read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pgoutput_source.copy.keys import Key, Keys
from pgoutput_source.copy.visibility import Snapshot

_MOST_KEYS: Final = 50_000


class Meanwhile:
    """What was dropped of a table's changes since a chunk of it began to be read ahead.

    Args:
        unproven: The transactions of which something was dropped before.
    """

    def __init__(self, unproven: Iterable[int]) -> None:
        self._unproven = list(unproven)
        self._keys: list[Key] = []
        self._xids: list[NDArray[Any]] = []
        self._commit_lsns: list[NDArray[Any]] = []

    def dropped(self, keys: Sequence[Key], xids: NDArray[Any], commit_lsns: NDArray[Any]) -> None:
        """Changes of unread keys were dropped."""
        if len(self._keys) <= _MOST_KEYS:
            self._keys += keys
            self._xids.append(xids)
            self._commit_lsns.append(commit_lsns)

    def shown(self, snapshot: Snapshot, upper: Key | None, keys: Keys) -> bool:
        """Whether a chunk that was read under this snapshot shows all that was dropped of it.

        Args:
            snapshot: That of the chunk.
            upper: The end of the chunk, exclusive; None is the end of all keys.
            keys: Compares the table's keys.
        """
        if len(self._keys) > _MOST_KEYS or not snapshot.shows(self._unproven).all():
            return False
        if not self._keys:
            return True
        hidden = np.flatnonzero(~snapshot.shows(np.concatenate(self._xids), np.concatenate(self._commit_lsns)))
        if not len(hidden) or upper is None:
            return not len(hidden)
        # What is dropped beyond the chunk is for the next ones.
        return bool(keys.places([self._keys[i] for i in hidden.tolist()], [upper]).all())
