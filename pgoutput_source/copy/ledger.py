"""Records what was copied: for each table the ranges of its key, and the snapshot under which each was read.

A table is read in ascending order of its key, so its ledger is short, however large the table is:

    settled | read under S₁ | read under S₂ | … | unread

The bound between two ranges belongs to the upper one. A range is *settled* once the stream has passed everything that
its snapshot may show. From then on every change of it is delivered. Adjacent settled ranges merge into one, and a table
that is completely settled is just "done".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from pgoutput_source.copy.keys import CollatedColumn, Key
from pgoutput_source.copy.meanwhile import Meanwhile
from pgoutput_source.copy.visibility import Snapshot
from pgoutput_source.errors import StateError, check_version

STATE_VERSION: Final = 1

MOST_UNSETTLED: Final = 64
"""How many chunks of a table may wait for the stream to pass them. Beyond that the copy waits."""

MOST_HOLES: Final = 1000
"""How many keys of a table may wait to be read again. Beyond that the table is copied again from the start."""

Signature: TypeAlias = tuple[tuple[int, str, int, int], ...]
"""The columns of a version of a table: attribute number, name, type OID and typmod of each."""


@dataclass(slots=True)
class Range:
    """All keys from the end of the previous range up to `end`, exclusive; None is the end of all keys.

    `snapshot` is None once it is settled.
    """

    end: Key | None
    snapshot: Snapshot | None


@dataclass(slots=True)
class TableCopy:
    """How far the copy of one table is.

    Attributes:
        relation_id: The table's OID.
        name: Schema and table, as in batches.
        registered: No earlier transaction may be running when the first chunk is read. The transactions that ran when
            the table entered the copy are only partly streamed.
        ranges: What was read, ascending.
        holes: Single keys to read again, and the snapshot under which each was read; None if still unread.
        unproven: 32-bit xids of transactions with changes that were dropped because they were unread. The next snapshot
            must show these transactions.
        delivered: Whether anything was delivered since the table was last empty downstream.
        partial: Whether part of an unfinished read was delivered. It can only be repeated, after a truncate.
        key: The columns of the key by which it is read; empty if it is read as a whole, or not begun.
        columns: The columns of the version that was last read.
        wait: No chunk is read until the stream has passed this position.
        gone: Whether the table was found to be dropped or no longer published.
        rows: How many rows were read.
        restarts: How often the copy began again.
        meanwhile: What was dropped while the chunk at `next_key` is read ahead; None if it is not, or can't be used.
            It is not part of the state.
    """

    relation_id: int
    name: str = ""
    registered: int = 0
    ranges: list[Range] = field(default_factory=list)
    holes: dict[Key, Snapshot | None] = field(default_factory=dict)
    unproven: set[int] = field(default_factory=set)
    delivered: bool = False
    partial: bool = False
    key: tuple[CollatedColumn, ...] = ()
    columns: Signature = ()
    wait: int = 0
    gone: bool = False
    rows: int = 0
    restarts: int = 0
    meanwhile: Meanwhile | None = None

    @property
    def begun(self) -> bool:
        """Whether any of it was read."""
        return bool(self.ranges)

    @property
    def read(self) -> bool:
        """Whether all of it was read."""
        return bool(self.ranges) and self.ranges[-1].end is None and None not in self.holes.values()

    @property
    def done(self) -> bool:
        """Whether everything is settled, so that every change is delivered."""
        return self.read and not self.holes and self.ranges[0].end is None and self.ranges[0].snapshot is None

    @property
    def next_key(self) -> Key | None:
        """The first key of the next chunk; None is the beginning of all keys."""
        return self.ranges[-1].end if self.ranges else None

    @property
    def unsettled(self) -> int:
        """How many ranges and holes wait for the stream to pass them."""
        return sum(r.snapshot is not None for r in self.ranges) + sum(s is not None for s in self.holes.values())

    @property
    def bounds(self) -> list[Key]:
        """The bounds between the ranges, and to what is unread."""
        return [r.end for r in self.ranges if r.end is not None]

    def snapshots(self) -> Iterator[Snapshot]:
        """The snapshots of everything that is not settled."""
        for snapshot in (*(r.snapshot for r in self.ranges), *self.holes.values()):
            if snapshot is not None:
                yield snapshot

    def refuses(self, snapshot: Snapshot) -> str | None:
        """Why this snapshot can't be used for reading; None if it can.

        What is read must contain the changes that were dropped because they were unread. A transaction becomes visible
        a moment after its WAL record, so a new snapshot may not yet show what was already streamed.
        """
        if snapshot.xmin < self.registered:
            return "a transaction from before the table entered the copy is still running"
        if self.unproven and not snapshot.shows(list(self.unproven)).all():
            return "a transaction was already streamed, but is not visible yet"
        return None

    def add(self, end: Key | None, snapshot: Snapshot) -> None:
        """Note that the chunk from `next_key` to `end` was read."""
        self.ranges.append(Range(end, snapshot))

    def settle(self, passed: int) -> None:
        """Settle what the stream has passed: it has delivered every transaction that committed before `passed`."""
        for part in self.ranges:
            if part.snapshot is not None and part.snapshot.high <= passed:
                part.snapshot = None
        while len(self.ranges) > 1 and self.ranges[0].snapshot is None and self.ranges[1].snapshot is None:
            del self.ranges[0]
        for key in [k for k, s in self.holes.items() if s is not None and s.high <= passed]:
            del self.holes[key]

    def restart(self, *, partial: bool = False) -> None:
        """Count the whole table as unread. With `partial`, a truncate must be delivered first."""
        self.ranges, self.holes, self.partial, self.meanwhile = [], {}, partial, None
        self.key, self.rows = (), 0
        self.restarts += 1

    def state(self) -> dict[str, Any]:
        """The copy as builtins, for `from_state`."""
        return {
            "name": self.name,
            "registered": self.registered,
            "ranges": [[_listed(r.end), r.snapshot and r.snapshot.state()] for r in self.ranges],
            "holes": [[list(key), s and s.state()] for key, s in self.holes.items()],
            "unproven": sorted(self.unproven),
            "delivered": self.delivered,
            "partial": self.partial,
            "key": [[c.name, c.type_name, c.collation] for c in self.key],
            "columns": [list(column) for column in self.columns],
            "wait": self.wait,
            "gone": self.gone,
            "rows": self.rows,
            "restarts": self.restarts,
        }

    @classmethod
    def from_state(cls, relation_id: int, state: Mapping[str, Any]) -> TableCopy:
        """The copy that `state` described."""
        return cls(
            relation_id,
            name=state["name"],
            registered=state["registered"],
            ranges=[Range(None if e is None else tuple(e), s and Snapshot.from_state(s)) for e, s in state["ranges"]],
            holes={tuple(key): s and Snapshot.from_state(s) for key, s in state["holes"]},
            unproven=set(state["unproven"]),
            delivered=state["delivered"],
            partial=state["partial"],
            key=tuple(CollatedColumn(*column) for column in state["key"]),
            columns=tuple((n, name, oid, typmod) for n, name, oid, typmod in state["columns"]),
            wait=state["wait"],
            gone=state["gone"],
            rows=state["rows"],
            restarts=state["restarts"],
        )


class Ledger:
    """The copies of all tables of a slot, and the position of the last row that they delivered.

    Attributes:
        all: Whether every published table enters the copy, or only requested ones.
        copying: The copies that are not done, by relation.
        done: The relations whose copies are done.
        filled: The table names under which anything was delivered. A recreated table has another relation but the same
            name, so the table downstream must be emptied before the new one is copied.
        last: The position of the last row, or (0, -1).
    """

    def __init__(self) -> None:
        self.copying: dict[int, TableCopy] = {}
        self.all = False
        self.done: set[int] = set()
        self.filled: set[str] = set()
        self.last: tuple[int, int] = (0, -1)

    def __bool__(self) -> bool:
        return self.all or bool(self.copying) or bool(self.done)

    def knows(self, relation_id: int) -> bool:
        """Whether the table was registered."""
        return relation_id in self.copying or relation_id in self.done

    def register(self, relation_id: int, name: str, registered: int) -> TableCopy:
        """Add a table to the copy, for the first time or again."""
        self.done.discard(relation_id)
        copy = self.copying[relation_id] = TableCopy(relation_id, registered=registered)
        self.rename(copy, name)
        return copy

    def begin(self) -> None:
        """Copy every published table from its start. Each is emptied downstream first."""
        self.all = True
        self.copying, self.done = {}, set()

    def rename(self, copy: TableCopy, name: str) -> None:
        """Change the name of a table. Under the new name it is copied from the start."""
        if copy.begun:
            copy.restart()
        copy.name = name
        copy.partial = copy.delivered = name in self.filled

    def filling(self, copy: TableCopy) -> None:
        """Note that something of the table is delivered."""
        copy.delivered = True
        self.filled.add(copy.name)

    def settle(self, passed: int) -> list[TableCopy]:
        """Settle what the stream has passed, and return the tables that are done by it.

        The stream has delivered everything that committed before `passed`.
        """
        for copy in self.copying.values():
            copy.settle(passed)
        finished = [copy for copy in self.copying.values() if copy.done]
        for copy in finished:
            del self.copying[copy.relation_id]
            self.done.add(copy.relation_id)
            self.filled.add(copy.name)
        return finished

    def forget(self, relation_ids: Iterable[int]) -> None:
        """Remove tables that are gone or no longer published."""
        for relation_id in relation_ids:
            self.copying.pop(relation_id, None)
            self.done.discard(relation_id)

    @property
    def reach(self) -> int:
        """The WAL position up to which delivered rows may show changes that the stream has not delivered."""
        return max([self.last[0], *(s.high - 1 for copy in self.copying.values() for s in copy.snapshots())])

    def behind(self, safe: int) -> bool:
        """Whether the stream, after a reconnect, has not yet reached the position of the last row."""
        return -(-safe // 8) * 8 - 1 < self.last[0]

    def position(self, safe: int, rows: int) -> tuple[int, int]:
        """The position of the first of `rows` new rows, between the delivered changes and the next ones.

        Args:
            safe: Everything that committed before it was delivered, and nothing else.
            rows: How many rows there are. Their positions count up from the first.
        """
        # WAL records begin at multiples of 8, so no streamed change has the position one byte before.
        lsn = -(-safe // 8) * 8 - 1
        assert lsn >= self.last[0], "later rows have later positions"
        first = (lsn, self.last[1] + 1 if lsn == self.last[0] else 0)
        if rows:
            self.last = (lsn, first[1] + rows - 1)
        return first

    def state(self) -> dict[str, Any]:
        """The ledger as builtins, for the resume state. Its size per table is bounded, however large the table is."""
        tables: dict[str, Any] = {str(r): "done" for r in sorted(self.done)}
        tables |= {str(r): copy.state() for r, copy in sorted(self.copying.items())}
        return {
            "v": STATE_VERSION,
            "all": self.all,
            "last": list(self.last),
            "filled": sorted(self.filled),
            "tables": tables,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Ledger:
        """The ledger that `state` described.

        Raises:
            StateError: It is of another version, or corrupt.
        """
        check_version(state, STATE_VERSION, "the initial copy")
        ledger = cls()
        try:
            ledger.all = bool(state["all"])
            ledger.last = (int(state["last"][0]), int(state["last"][1]))
            ledger.filled = set(state["filled"])
            for name, table in state["tables"].items():
                if table == "done":
                    ledger.done.add(int(name))
                else:
                    ledger.copying[int(name)] = TableCopy.from_state(int(name), table)
        except (KeyError, TypeError, ValueError, IndexError) as e:
            raise StateError("the ledger of the initial copy is corrupt", hint="start afresh") from e
        return ledger


def reach(state: Mapping[str, Any] | None) -> int:
    """`Ledger.reach` of a state; 0 if there is none."""
    return Ledger.from_state(state).reach if state else 0


def _listed(key: Key | None) -> list[str] | None:
    return None if key is None else list(key)
