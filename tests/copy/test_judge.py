"""The judge, the ledger and the rules of a snapshot, in a model of a server: random rounds, replayed strictly.

The model has what makes the copy hard: a transaction is in the WAL before others see it, in any order; keys move;
values are not sent; tables are truncated; a table enters while transactions write to it; the process crashes and goes
on from its last durable state; transaction numbers pass 2^32. What is delivered is applied in the order of arrival: an
insert of a key that is there, an update or a delete of one that is not, a position that does not grow are failures.
"""

from __future__ import annotations

import copy as copying
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pgoutput_source import testing
from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.copy import judge as judging
from pgoutput_source.copy.keys import CollatedColumn, Keys
from pgoutput_source.copy.ledger import Ledger, TableCopy
from pgoutput_source.copy.visibility import Snapshot

TABLE = 1
TYPES = {"id": pa.int64(), "v": pa.int64(), "big": pa.utf8()}
KEYS = Keys((CollatedColumn("id", "bigint"),))
NEAR_2_32 = 2**32 - 12
SETTLED = 10**6


class Wrong(AssertionError):
    """What was delivered can't be what the table went through."""


@dataclass
class Change:
    op: str
    new: dict[str, Any] | None
    old: dict[str, Any] | None
    unchanged: bool
    streamed: bool


@dataclass
class Transaction:
    xid: int
    changes: list[Change] = field(default_factory=list)
    lsn: int = 0
    rows: dict[int, dict[str, Any] | None] = field(default_factory=dict)
    truncates: bool = False


class Model:
    """A table, its transactions, and its WAL."""

    def __init__(self, rng: random.Random, first_xid: int) -> None:
        self.rng = rng
        self.next_xid = first_xid
        self.rows: dict[int, dict[str, Any]] = {k: {"id": k, "v": 0, "big": f"b{k}"} for k in range(0, 40, 2)}
        self.running: list[Transaction] = []  # not yet committed
        self.unseen: list[Transaction] = []  # committed, and not yet visible
        self.wal: list[Transaction] = []
        self.lsn = 8000
        self.published = False

    def locked(self) -> set[int]:
        return {key for t in (*self.running, *self.unseen) for key in t.rows}

    def begin(self) -> None:
        self.running.append(Transaction(self.next_xid))
        self.next_xid += 1

    def change(self, transaction: Transaction) -> None:
        rng = self.rng
        others = self.locked() - transaction.rows.keys()
        key = rng.randrange(40)
        if key in others or transaction.truncates or any(t.truncates for t in (*self.running, *self.unseen)):
            return
        row = transaction.rows.get(key, self.rows.get(key))
        streamed = self.published
        if row is None:
            new = {"id": key, "v": rng.randrange(1000), "big": f"b{rng.randrange(1000)}"}
            self._did(transaction, Change("I", new, None, unchanged=False, streamed=streamed), {key: new})
        elif (kind := rng.random()) < 0.25:
            self._did(
                transaction, Change("D", dict.fromkeys(TYPES) | {"id": key}, {"id": key}, False, streamed), {key: None}
            )
        elif kind < 0.6:
            target = rng.randrange(40)
            if target in others or target == key or transaction.rows.get(target, self.rows.get(target)) is not None:
                return
            new = row | {"id": target, "v": row["v"] + 1}
            sent = Change("U", new, {"id": key}, unchanged=rng.random() < 0.5, streamed=streamed)
            self._did(transaction, sent, {key: None, target: new})
        else:
            new = row | {"v": row["v"] + 1}
            self._did(transaction, Change("U", new, None, unchanged=rng.random() < 0.5, streamed=streamed), {key: new})

    def _did(self, transaction: Transaction, change: Change, rows: dict[int, Any]) -> None:
        transaction.changes.append(change)
        transaction.rows |= rows

    def truncate(self) -> None:
        if self.running or self.unseen or not self.published:
            return
        self.begin()
        transaction = self.running[-1]
        transaction.truncates = True
        transaction.changes.append(Change("T", None, None, unchanged=False, streamed=True))
        transaction.rows = dict.fromkeys(range(40))

    def commit(self, transaction: Transaction) -> None:
        self.running.remove(transaction)
        self.lsn += 8 * self.rng.randint(1, 6)
        transaction.lsn = self.lsn
        self.lsn += 8
        self.wal.append(transaction)
        self.unseen.append(transaction)

    def show(self, transaction: Transaction) -> None:
        self.unseen.remove(transaction)
        for key, row in transaction.rows.items():
            if row is None:
                self.rows.pop(key, None)
            else:
                self.rows[key] = row

    def snapshot(self) -> Snapshot:
        running = sorted(t.xid for t in (*self.running, *self.unseen))
        return Snapshot(min(running, default=self.next_xid), self.next_xid, tuple(running), self.lsn)

    def move(self) -> None:
        rng = self.rng
        kind = rng.random()
        if kind < 0.2 and len(self.running) < 4:
            self.begin()
        elif kind < 0.65 and self.running:
            self.change(rng.choice(self.running))
        elif kind < 0.8 and self.running:
            self.commit(rng.choice(self.running))
        elif kind < 0.95 and self.unseen:
            self.show(rng.choice(self.unseen))
        elif kind > 0.985:
            self.truncate()

    def quiet(self) -> None:
        for transaction in list(self.running):
            self.commit(transaction)
        for transaction in list(self.unseen):
            self.show(transaction)


def streamed(transactions: list[Transaction]) -> ChangeBatch | None:
    """The changes of some transactions as one batch."""
    found = [(t, i, c) for t in transactions for i, c in enumerate(c for c in t.changes if c.streamed)]
    if not found:
        return None
    rows: list[Any] = []
    unchanged = {}
    for i, (_, _, c) in enumerate(found):
        new = c.new and (c.new | {"big": None} if c.unchanged else c.new)
        if c.unchanged:
            unchanged[i] = ["big"]
        rows.append((c.op, new, c.old and dict.fromkeys(TYPES) | c.old))
    made = testing.batch("public.t", rows, types=TYPES, unchanged=unchanged)
    data = made.data
    for name, values in (
        ("_xid", pa.array(np.array([t.xid % 2**32 for t, _, _ in found], np.uint32))),
        ("_commit_lsn", pa.array(np.array([t.lsn for t, _, _ in found], np.uint64))),
        ("_seq", pa.array(np.array([i for _, i, _ in found], np.uint64))),
    ):
        at = data.schema.get_field_index(name)
        data = data.set_column(at, data.schema.field(at), values)
    return made.replace(data)


class Mirror:
    """What was delivered, replayed strictly."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Any]] = {}
        self.last = (0, -1)
        self.log: list[tuple[tuple[int, int], str, Any, Any, Any]] = []

    def deliver(self, position: tuple[int, int], op: str, new: Any, old: Any, unchanged: Any) -> None:
        self.log.append((position, op, new, old, unchanged))
        if position <= self.last:
            raise Wrong(f"{position} after {self.last}")
        self.last = position
        if op == "T":
            self.rows.clear()
            return
        known: dict[str, Any] = {}
        if op in "UD":
            key = old["id"] if old and old["id"] is not None else new["id"]
            if key not in self.rows:
                raise Wrong(f"{op} of {key}, which is not there")
            known = self.rows.pop(key)
        if op in "IUR":
            if new["id"] in self.rows:
                raise Wrong(f"{op} of {new['id']}, which is there")
            for name in unchanged or ():
                if name not in known:
                    raise Wrong(f"{op} of {new['id']}: nothing is known of {name}")
                new = new | {name: known[name]}
            self.rows[new["id"]] = new

    def batch(self, batch: ChangeBatch) -> None:
        for row in batch.data.to_pylist():
            new = {name: row[name] for name in TYPES}
            self.deliver((row["_commit_lsn"], row["_seq"]), row["_op"], new, row["_before"], row["_unchanged"])


def run_round(seed: int, first_xid: int = 1000) -> None:
    rng = random.Random(seed)
    model = Model(rng, first_xid)
    for _ in range(rng.randrange(60)):
        model.move()
    model.published = True
    start = len(model.wal)
    passed = model.lsn if not model.wal else model.wal[-1].lsn + 8
    ledger = Ledger()
    ledger.register(TABLE, "public.t", model.snapshot().xmax)
    mirror, at = Mirror(), start
    durable = copying.deepcopy((ledger.state(), mirror.log, at, passed))
    model.quiet_at = rng.randint(200, 500)  # type: ignore[attr-defined]
    for turn in range(3000):
        if turn < model.quiet_at:  # type: ignore[attr-defined]
            model.move()
        else:
            model.quiet()
        if rng.random() < 0.4:
            new = at + rng.randint(0, 4)
            some = model.wal[at:new]
            at += len(some)
            batch = streamed(some)
            table = ledger.copying.get(TABLE)
            if batch is not None:
                for judged in [batch] if table is None else judging.judge(batch, table, KEYS):
                    mirror.batch(judged)
            if some:
                passed = some[-1].lsn + 8
            if at == len(model.wal):
                passed = max(passed, model.lsn)
            ledger.settle(passed)
        if rng.random() < 0.3 and (table := ledger.copying.get(TABLE)) is not None:
            read_chunk(model, ledger, table, mirror, passed, rng)
        if rng.random() < 0.1:
            now = model.snapshot()
            for table in ledger.copying.values():
                table.unproven = {x for x in table.unproven if not now.shows([x])[0]}
            durable = copying.deepcopy((ledger.state(), mirror.log, at, passed))
        if rng.random() < 0.02:
            state, log, at, passed = copying.deepcopy(durable)
            ledger, mirror = Ledger.from_state(state), Mirror()
            for entry in log:
                mirror.deliver(*entry)
        if turn > model.quiet_at and TABLE in ledger.done and at == len(model.wal):  # type: ignore[attr-defined]
            break
    else:
        raise Wrong("the copy does not end")
    if mirror.rows != model.rows:
        raise Wrong(f"{mirror.rows} is not {model.rows}")


def read_chunk(model: Model, ledger: Ledger, table: TableCopy, mirror: Mirror, passed: int, rng: random.Random) -> None:
    snapshot = model.snapshot()
    if table.read or table.refuses(snapshot):
        return
    table.unproven.clear()
    if table.partial:
        mirror.deliver(ledger.position(passed, 1), "T", None, None, None)
        table.partial = table.delivered = False
    holes = [key for key, seen in table.holes.items() if seen is None]
    if holes and table.ranges and table.ranges[-1].end is None:
        keys = {int(key[0]) for key in holes}
        table.holes |= dict.fromkeys(holes, snapshot)
    else:
        low = int(table.next_key[0]) if table.next_key else -1
        above = sorted(key for key in model.rows if key >= low)
        size = rng.randint(1, 8)
        high = above[size] if size < len(above) else None
        keys = {key for key in above if high is None or key < high}
        table.add(None if high is None else (str(high),), snapshot)
    rows = [row for key, row in sorted(model.rows.items()) if key in keys]
    lsn, seq = ledger.position(passed, len(rows))
    for i, row in enumerate(rows):
        mirror.deliver((lsn, seq + i), "R", row, None, None)
        table.delivered = True


def run_rounds(count: int, first_xid: int = NEAR_2_32) -> None:
    for seed in range(count):
        run_round(seed, first_xid)


@pytest.mark.parametrize("first_xid", [1000, NEAR_2_32])
def test_what_is_delivered_is_what_the_table_went_through(first_xid: int) -> None:
    run_rounds(150, first_xid)


def _by_position(self: Snapshot, xids: Any, commit_lsns: Any = 0) -> Any:
    return np.broadcast_to(np.asarray(commit_lsns) < self.high, np.shape(xids))


def _narrow(self: Snapshot, xids: Any) -> Any:
    return np.asarray(xids).astype(np.int64)


def _without_unproven(self: TableCopy) -> dict[str, Any]:
    return _STATE(self) | {"unproven": []}


_STATE = TableCopy.state

CONTROLS: dict[str, tuple[Any, str, Any]] = {
    "visibility by position": (Snapshot, "shows", _by_position),
    "numbers of 32 bits": (Snapshot, "full", _narrow),
    "what was dropped need not be seen": (TableCopy, "refuses", lambda self, s: s.xmin < self.registered or None),
    "no barrier": (
        TableCopy,
        "refuses",
        lambda self, s: (bool(self.unproven) and not s.shows(list(self.unproven)).all()) or None,
    ),
    "one key of two": (
        judging,
        "_old_keys",
        lambda batch, rows, keys: [judging._new_keys(batch, keys)[i] for i in rows],
    ),
    "no holes": (judging, "_dig", lambda *_: None),
    "no restart": (TableCopy, "restart", lambda self, **_: None),
    "unproven are forgotten": (TableCopy, "state", _without_unproven),
}


@pytest.mark.parametrize("rule", CONTROLS)
def test_without_a_rule_it_fails(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*CONTROLS[rule])

    with pytest.raises(Wrong):
        run_rounds(600)
