"""The oracle of keyed changes: a table as a list of rows, changed one by one, and random transactions on it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pgoutput_source.changes import ChangeBatch
from pgoutput_source.testing import batch

TYPES = {"id": pa.int64(), "n": pa.int64(), "note": pa.utf8()}
Row = dict[str, Any]
Change = tuple[Any, ...]


class Table:
    """Rows with a key that need only be unique at the end of a transaction, and the changes that made them.

    With identity "f" changes bring the whole old row, and keys shift within a statement; with "d" they bring the old
    key where it changed, notes that did not change may be left out, and keys are unique at every moment.
    """

    def __init__(self, seed: int, identity: str) -> None:
        self.random, self.identity = random.Random(seed), identity
        self.rows: list[Row] = []
        self.changes: list[Change] = []
        self.unchanged: dict[int, list[str]] = {}
        self.values = 0
        self.steps: list[tuple[Row | None, Row | None]] = []
        """Of each change since the last batch, the row before and after it."""

    def value(self) -> Row:
        self.values += 1
        note = self.random.choice([None, "x", f"note {self.values}"])
        # Few different numbers: rows that are equal but for their keys must not be confused.
        return {"n": self.random.choice([None, self.values % 3]), "note": note}

    def transaction(self) -> None:
        """Some statements; at the end keys are unique."""
        kinds = ["insert", "update", "delete", "move"] + ["shift", "swap", "there and back"] * (self.identity == "f")
        for _ in range(self.random.choice([1, 1, 2, 4])):
            getattr(self, f"_{self.random.choice(kinds).replace(' ', '_')}")()
        if self.random.random() < 0.02:
            self.rows.clear()
            self.changes.append(("T", None))
            self.steps.append((None, None))

    def _insert(self) -> None:
        self._add(self._free(), self.value())

    def _add(self, key: int, value: Row) -> None:
        row = {"id": key, **value}
        self.rows.append(row)
        self.changes.append(("I", dict(row)))
        self.steps.append((None, dict(row)))

    def _update(self) -> None:
        for row in self._some():
            self._change(row, self.value())

    def _delete(self) -> None:
        for row in self._some():
            self.rows.remove(row)
            old = dict(row) if self.identity == "f" else {"id": row["id"]}
            self.changes.append(("D", old, old))
            self.steps.append((dict(row), None))

    def _move(self) -> None:
        for row in self._some():
            self._change(row, {"id": self._free()} | (self.value() if self.random.random() < 0.5 else {}))

    def _shift(self) -> None:
        """UPDATE … SET id = id + 1."""
        if self.rows:
            by = self.random.choice([1, 1, -1])
            for row in self.random.sample(self.rows, len(self.rows)):
                self._change(row, {"id": row["id"] + by})

    def _swap(self) -> None:
        if len(self.rows) > 1:
            one, two = self.random.sample(self.rows, 2)
            keys = one["id"], two["id"]
            self._change(one, {"id": keys[1]} | self.random.choice([{}, self.value()]))
            self._change(two, {"id": keys[0]})

    def _there_and_back(self) -> None:
        """A row that is on another's key for a while; a new row that takes a key before its row is deleted."""
        if len(self.rows) > 1:
            one, two = self.random.sample(self.rows, 2)
            if self.random.random() < 0.5:
                key = one["id"]
                self._change(one, {"id": two["id"]})
                if self.random.random() < 0.5:
                    self._change(self.random.choice([one, two]), self.value())
                self._change(one, {"id": key})
            else:
                self._add(two["id"], self.value())
                self.rows.remove(two)
                self.changes.append(("D", dict(two), dict(two)))
                self.steps.append((dict(two), None))

    def _change(self, row: Row, to: Row) -> None:
        old = dict(row)
        row.update(to)
        new = dict(row)
        self.steps.append((old, dict(row)))
        if self.identity == "f":
            self.changes.append(("U", new, old))
            return
        if old["note"] == new["note"] and old["note"] not in (None, "x"):
            new["note"] = None
            self.unchanged[len(self.changes)] = ["note"]
        self.changes.append(("U", new, {"id": old["id"]}) if old["id"] != new["id"] else ("U", new))

    def _some(self) -> list[Row]:
        return self.random.sample(self.rows, min(len(self.rows), self.random.choice([1, 1, 3])))

    def _free(self) -> int:
        taken = {row["id"] for row in self.rows}
        return self.random.choice([key for key in range(-3, len(taken) + 6) if key not in taken])

    def batches(self, transactions: int, *, split: bool = True) -> Iterator[tuple[ChangeBatch, list[Row] | None]]:
        """Batches of the changes of transactions, and the table's rows if a transaction ends with the batch."""
        lsn = 1000
        waiting: list[ChangeBatch] = []
        for _ in range(transactions):
            self.changes.clear()
            self.unchanged.clear()
            self.transaction()
            lsn += 10
            if not self.changes:
                continue
            waiting.append(self._batch(lsn))
            if self.random.random() < 0.5:
                whole = joined(waiting)
                cut = self.random.randrange(1, len(whole)) if split and len(whole) > 1 else len(whole)
                yield whole.replace(whole.data.slice(0, cut)), None if cut < len(whole) else self.now()
                if cut < len(whole):
                    yield whole.replace(whole.data.slice(cut)), self.now()
                waiting = []
        if waiting:
            yield joined(waiting), self.now()

    def now(self) -> list[Row]:
        return sorted((dict(row) for row in self.rows), key=lambda row: row["id"])

    def _batch(self, lsn: int) -> ChangeBatch:
        made = batch("public.t", self.changes, types=TYPES, identity=self.identity, unchanged=self.unchanged, lsn=0)
        seq = made.data.column("_seq")
        lsns = pa.array([lsn] * len(made), seq.type)
        data = made.data
        for name, column in (("_commit_lsn", lsns), ("_seq", made.data.column("_lsn"))):
            index = data.schema.get_field_index(name)
            data = data.set_column(index, data.schema.field(index), column)
        return made.replace(data)


def joined(batches: list[ChangeBatch]) -> ChangeBatch:
    return batches[0].replace(pa.concat_batches([made.data for made in batches]))
