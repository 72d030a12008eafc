"""What a destination is: how far each table is, and one commit for what is next."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal, NamedTuple, Self, TypeAlias

import pyarrow as pa

from pgoutput_source.changes.schema import TableName
from pgoutput_source.destinations.spool import Point, Portion
from pgoutput_source.destinations.targets import Target
from pgoutput_source.errors import SinkError

Mode: TypeAlias = Literal["history", "mirror"]


class Reached(NamedTuple):
    """How far a table is at the destination.

    Attributes:
        number: That of the last part that was applied; 0 before the first.
        point: Where the last change of it stands.
        origin: The database system, database and slot from which its changes come.
    """

    number: int
    point: Point
    origin: tuple[str, ...]


class Job(NamedTuple):
    """Parts of one version of one table that come together, in order.

    `target` is their table's place at the destination, `number` and `last` are those of the last part, and `key` says
    which columns identify a row; empty in mode "history". `parts` has the number of each part and how many changes the
    parts up to it have; empty if there is one.
    """

    target: Target
    number: int
    last: Point
    key: tuple[str, ...]
    identity: str
    changes: pa.Table
    parts: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, target: Target, parts: Sequence[tuple[Portion, pa.Table]]) -> Job:
        """The job that these parts make; their schemas are equal."""
        part = parts[-1][0]
        changes = pa.concat_tables([table for _, table in parts])
        ends = itertools.accumulate(len(table) for _, table in parts)
        numbers = tuple(zip((portion.number for portion, _ in parts), ends, strict=True))
        return cls(target, part.number, part.last, part.key, part.identity, changes, numbers)

    def split(self, number: int) -> tuple[pa.Table, pa.Table]:
        """The changes of the parts up to this number, which the destination has, and those of the parts after it.

        Parts that were applied and not yet dropped from the spool come again, together with later ones.
        """
        rows = max(
            (end for part, end in self.parts or ((self.number, len(self.changes)),) if part <= number), default=0
        )
        return self.changes.slice(0, rows), self.changes.slice(rows)

    @property
    def origin(self) -> tuple[str, ...]:
        """The database system, database and slot of the changes."""
        metadata = self.changes.schema.metadata or {}
        return tuple(metadata.get(name, b"").decode() for name in (b"pg.system", b"pg.database", b"pg.slot"))


class Refused(SinkError):
    """A destination can't take the changes of one table; it may well take those of the others.

    Its type or name, a constraint, a trigger or a missing right there is the reason. Never a lost connection, a full
    disk or a lock.
    """

    target: Target

    @classmethod
    def at(cls, target: Target, message: str, *, hint: str | None = None, table: TableName | None = None) -> Self:
        """The error that says that `target` can't take changes."""
        error = cls(message, hint=hint, table=None if table is None else str(table))
        error.target = target
        return error


class Destination(ABC):
    """A store for the tables of a publication. One thread at a time calls it.

    Attributes:
        mode: "history" appends every change; "mirror" keeps the table as it is after each transaction.
        follows_renames: Whether a table of a mirror takes its rows along when its source is renamed.
    """

    mode: Mode
    follows_renames: ClassVar[bool] = False

    @abstractmethod
    def reached(self, target: Target) -> Reached | None:
        """How far a table is; None if nothing was applied to it.

        Raises:
            Refused: The table is there, and is not ours.
            SinkError: The destination can't be read, or what the table has was not made by this sink.
        """

    @abstractmethod
    def apply(self, jobs: Iterable[Job]) -> None:
        """Commit the parts whose number is larger than the one that their target has, and the last number with them.

        The last of them ends with a transaction, so a store that can commit several tables commits them all at once.
        They are read one by one. They are durable when this returns.

        Raises:
            Refused: One table's job failed, and concerns only that table. Nothing of this job is there.
            SinkError: Nothing of the job that failed is there, and it may be applied again.
        """

    def complete(self, origin: tuple[str, ...], lsn: int) -> None:  # noqa: B027 - the spool has it as well
        """Note, for readers, that everything of an origin that committed before `lsn` was applied."""

    def close(self) -> None:  # noqa: B027 - a store without connections has nothing to do
        """Let go of connections. The next call opens them again."""
