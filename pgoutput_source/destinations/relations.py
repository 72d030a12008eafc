"""Where a mirror has the rows of each relation, for a destination whose tables can't take their rows along.

    spool/relations.json    by relation, its last target, and whether that one has all of its rows

A table that is renamed keeps its relation. Under its new name it would be a mirror without the rows of before, so it is
refused, at each start again, until a TRUNCATE, or a new copy, says that none of them count.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from pgoutput_source.compute.metadata import TRUNCATE, operations
from pgoutput_source.destinations.base import Job, Refused
from pgoutput_source.destinations.spool import Point
from pgoutput_source.destinations.targets import Target
from pgoutput_source.errors import SinkError
from pgoutput_source.files import explained, sync

_FILE: Final = "relations.json"


class _Place(NamedTuple):
    """The last target of a relation, whether it has all rows, and where its last change stands."""

    target: Target
    whole: bool
    last: Point


class Relations:
    """The targets of relations, as a file in a spool's folder keeps them.

    Raises:
        SinkError: The file is damaged, or the operating system refuses.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / _FILE
        with explained("can't read", self.path):
            text = self.path.read_text("utf-8") if self.path.exists() else "{}"
        try:
            places = json.loads(text).items()
            self._saved = {name: _Place(Target(*target), whole, tuple(last)) for name, (target, whole, last) in places}
        except (ValueError, TypeError, AttributeError) as e:
            raise SinkError(
                f"{self.path} is damaged",
                hint="restore it, or start afresh: a new destination, recovery folder and slot",
            ) from e
        self._places = dict(self._saved)

    def check(self, job: Job) -> None:
        """Note where the rows of the job's relation are.

        Raises:
            Refused: They are at another target.
        """
        relation = (job.changes.schema.metadata or {}).get(b"pg.relation_id", b"0").decode()
        if relation == "0":
            return
        name = "/".join((*job.origin, relation))
        known = self._places.get(name, _Place(job.target, True, job.last))
        whole = _emptied(job) or (known.whole and known.target == job.target)
        # Also if it is refused: under its former name it lacks these changes. What is parked is tried again and again,
        # and says nothing of what came after it.
        if job.last >= known.last:
            self._places[name] = _Place(job.target, whole, job.last)
        if not whole:
            was = f"was {known.target} before it" if known.target != job.target else "lacks rows of before it"
            raise Refused.at(
                job.target,
                f"{job.target} {was} was renamed, and a mirror of it would lack rows",
                hint=f"copy it again: run with on_table_error='park', ask for it with pgoutput-source snapshot --table "
                f"{job.target}, and start once more when the copy is complete; or leave it out with exclude=",
            )

    def save(self) -> None:
        """Make it durable when a relation has come to another target, or has lost or got back its rows."""
        if all(place[:2] == self._saved.get(name, ())[:2] for name, place in self._places.items()):
            return
        writing = self.path.with_suffix(".writing")
        with explained("can't write to", self.path.parent):
            writing.write_text(json.dumps(self._places), "utf-8")
            sync(writing)
            os.replace(writing, self.path)
            sync(self.path.parent)
        self._saved = dict(self._places)


def _emptied(job: Job) -> bool:
    return any(np.any(operations(batch) == TRUNCATE) for batch in job.changes.to_batches())
