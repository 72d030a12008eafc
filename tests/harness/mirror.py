"""What was delivered, replayed strictly in the order of arrival."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from harness.database import Database
from harness.waiting import PATIENCE
from pgoutput_source.changes.batches import ChangeSet
from pgoutput_source.changes.schema import Column
from pgoutput_source.changes.values import to_python
from pgoutput_source.stream.session import SlotSession


def _values(array: pa.Array, column: Column) -> list[Any]:
    """Values that are equal to themselves, which the Decimal NaN is not."""
    return [str(value) if isinstance(value, Decimal) else value for value in to_python(array, column)]


class Wrong(AssertionError):
    """What was delivered can't be what the table went through."""


@dataclass
class Mirror:
    """What was delivered, in the order of arrival, and the rows that it leaves."""

    key: tuple[str, ...]
    tables: dict[str, dict[Any, dict[str, Any]]] = field(default_factory=dict)
    relations: dict[str, int] = field(default_factory=dict)
    last: tuple[int, int] = (0, -1)
    changes: int = 0
    read: int = 0
    truncates: int = 0

    def of(self, table: str) -> dict[Any, dict[str, Any]]:
        """The rows of a table."""
        return self.tables.setdefault(table, {})

    @property
    def rows(self) -> dict[Any, dict[str, Any]]:
        """Those of `t`."""
        return self.of("public.t")

    def take(self, changes: ChangeSet) -> None:
        for batch in changes.batches:
            columns = batch.schema.columns
            relation = batch.schema.relation_id
            if self.relations.setdefault(batch.table, relation) != relation:
                # Nothing but the first truncate of the new table may stand between the two.
                if batch.data.column("_op")[0].as_py() != "T":
                    raise Wrong(f"{batch.table}: a change of the new table while there are rows of the old one")
                self.relations[batch.table] = relation
            before = batch.data.column("_before")
            new = zip(*(_values(batch.data.column(c.name), c) for c in columns), strict=True)
            old = zip(*(_values(pc.struct_field(before, c.name), c) for c in columns), strict=True)
            names = [column.name for column in columns]
            metadata = batch.data.select(["_op", "_commit_lsn", "_seq", "_unchanged", "_raw"]).to_pylist()
            for row, values, was, known in zip(metadata, new, old, before.is_valid().to_pylist(), strict=True):
                raw = dict(row["_raw"] or ())
                self._one(
                    self.of(batch.table),
                    row,
                    {n: raw.get(n, v) for n, v in zip(names, values, strict=True)},
                    {n: raw.get(f"_before.{n}", v) for n, v in zip(names, was, strict=True)} if known else None,
                )

    def _one(
        self, rows: dict[Any, dict[str, Any]], row: dict[str, Any], new: dict[str, Any], old: dict[str, Any] | None
    ) -> None:
        position, op = (row["_commit_lsn"], row["_seq"]), row["_op"]
        if position <= self.last:
            raise Wrong(f"{position} after {self.last}")
        self.last = position
        self.changes += 1
        self.read += op == "R"
        if op == "T":
            self.truncates += 1
            rows.clear()
            return
        key = tuple(new[name] for name in self.key)
        known: dict[str, Any] = {}
        if op in "UD":
            was = tuple(old[name] for name in self.key) if old else key
            if was not in rows:
                raise Wrong(f"{op} of {was}, which is not there")
            known = rows.pop(was)
        if op in "IUR":
            if key in rows:
                raise Wrong(f"{op} of {key}, which is there")
            for name in row["_unchanged"] or ():
                if name not in known:
                    raise Wrong(f"{op} of {key}: nothing is known of {name}")
                new[name] = known[name]
            rows[key] = new


def catch_up(session: SlotSession, db: Database, take: Callable[[ChangeSet], object]) -> None:
    """Take what comes until all that is written now was delivered and no table is being copied."""
    with db.connect() as c:
        c.execute("CREATE TABLE IF NOT EXISTS other (x int)")  # flushes what was committed asynchronously
        row = c.execute("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn").fetchone()
    assert row is not None
    deadline = time.monotonic() + PATIENCE
    while session.safe_lsn < row[0] or session.copying or session.in_transaction:
        assert time.monotonic() < deadline, (session.safe_lsn, row, session.snapshot())
        take(session.next(0.1))


def finish(session: SlotSession, db: Database, mirror: Mirror) -> None:
    """Catch up, into a mirror."""
    catch_up(session, db, mirror.take)
