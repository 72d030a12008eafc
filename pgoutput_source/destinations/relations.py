"""Where a mirror has the rows of each relation, for a destination whose tables can't take their rows along.

    spool/relations.json    by relation, the target that has its rows

A table that is renamed keeps its relation. Under its new name it would be a mirror without the rows of before, so it is
refused until a TRUNCATE, or a new copy, says that none of them count.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

import numpy as np

from pgoutput_source.compute.metadata import TRUNCATE, operations
from pgoutput_source.destinations.base import Job, Refused
from pgoutput_source.destinations.targets import Target
from pgoutput_source.errors import SinkError
from pgoutput_source.files import explained, sync

_FILE: Final = "relations.json"


class Relations:
    """The targets of relations, as a file in a spool's folder keeps them.

    Raises:
        SinkError: The file is damaged, or the operating system refuses.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / _FILE
        self._targets: dict[str, Target] = {}
        self._saved: dict[str, Target] = {}
        with explained("can't read", self.path):
            text = self.path.read_text("utf-8") if self.path.exists() else "{}"
        try:
            self._saved = {relation: Target(*target) for relation, target in json.loads(text).items()}
        except (ValueError, TypeError, AttributeError) as e:
            raise SinkError(
                f"{self.path} is damaged",
                hint="restore it, or start afresh: a new destination, recovery folder and slot",
            ) from e
        self._targets = dict(self._saved)

    def check(self, job: Job) -> None:
        """Note where the rows of the job's relation are.

        Raises:
            Refused: They are at another target.
        """
        relation = (job.changes.schema.metadata or {}).get(b"pg.relation_id", b"0").decode()
        if relation == "0":
            return
        name = "/".join((*job.origin, relation))
        known = self._targets.get(name, job.target)
        # Also if it is refused: under its former name it lacks these changes.
        self._targets[name] = job.target
        if known != job.target and not _emptied(job):
            raise Refused.at(
                job.target,
                f"{job.target} was {known} before it was renamed, and the rows are there",
                hint=f"copy it again: run with on_table_error='park', ask for it with pgoutput-source snapshot --table "
                f"{job.target}, and start once more when the copy is complete; or leave it out with exclude=",
            )

    def save(self) -> None:
        """Make what was noted durable."""
        if self._targets == self._saved:
            return
        writing = self.path.with_suffix(".writing")
        with explained("can't write to", self.path.parent):
            writing.write_text(json.dumps(self._targets), "utf-8")
            sync(writing)
            os.replace(writing, self.path)
            sync(self.path.parent)
        self._saved = dict(self._targets)


def _emptied(job: Job) -> bool:
    return any(np.any(operations(batch) == TRUNCATE) for batch in job.changes.to_batches())
