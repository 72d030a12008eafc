"""Changes in the compact notation of the conformance cases, and the frames of a slot without a walsender.

    +t{1,a}         an insert                       ~t[K 1]{2,a}    an update with its old key
    ~t{1,b}         an update                       ~t[O 1,a]{1,b}  an update with its whole old row
    -t[K 1]         a delete: the key is known      -t[O 1,a]       a delete: the whole row is known
    T(a,b cascade)  a truncate                      M(prefix:text)  a logical decoding message

Transactions stand apart by ` | `. A value is its text; `null` is NULL, `''` the empty string, `u` one that PostgreSQL
did not send; a long text is its first letter and its length. Tables of the schema public stand without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import psycopg

from pgoutput_source.changes import ChangeBatch, ChangeSet
from pgoutput_source.protocol.wire import Lsn, XLogData

PEEK = "SELECT lsn - '0/0'::pg_lsn, data FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL, VARIADIC %s::text[])"


def peeked(
    connection: psycopg.Connection[Any], slot: str = "s", publications: str = "p", **options: str
) -> list[bytes]:
    """What the slot holds, in the envelope in which a walsender sends it."""
    every = {"proto_version": "1", "publication_names": publications, "messages": "true"} | options
    pairs = [text for option in every.items() for text in option]
    with psycopg.Cursor(connection) as cursor:
        rows = cursor.execute(PEEK, [slot, pairs], binary=True).fetchall()
    return [XLogData(Lsn(int(lsn)), Lsn(int(lsn)), 0, data).encode() for lsn, data in rows]


def rendered(sets: Sequence[ChangeSet], *, names: bool = False) -> str:
    """All changes in the order of the WAL. `names` writes `column:value`.

    AssertionError: a position comes twice, a number is left out, or their order is not that of the WAL.
    """
    expected: tuple[int, int] = (-1, -1)
    for at in positions(sets):
        assert at == (expected if at[0] == expected[0] else (at[0], 0))
        expected = at[0], at[1] + 1
    changes: list[tuple[tuple[int, int, float], str]] = []
    truncated: dict[tuple[int, int], list[str]] = {}
    for each in sets:
        for batch in each.batches:
            changes += _batch(batch, truncated, names)
        for t in each.truncates:
            words = ["cascade"] * t.cascade + ["restart"] * t.restart_identity
            changes.append(
                ((t.position.commit_lsn, t.lsn, t.position.seq), f"T({' '.join([_list(t.tables), *words])})")
            )
            # Each of its tables has a row of its own.
            for seq, table in enumerate(t.tables, t.position.seq):
                assert truncated.pop((t.position.commit_lsn, seq)) == [table]
        for m in each.messages:
            text = m.content.hex() if 0 in m.content else m.content.decode()
            committed = m.lsn if m.commit_lsn is None else m.commit_lsn
            changes.append(((committed, m.lsn, -1.0), f"M{'' if m.transactional else '!'}({m.prefix}:{text})"))
    assert not truncated
    changes.sort(key=lambda change: change[0])
    seqs = [(lsn, seq) for (lsn, _, seq), _ in changes if seq >= 0]
    assert seqs == sorted(seqs)
    transactions: dict[int, list[str]] = {}
    for (commit_lsn, _, _), text in changes:
        transactions.setdefault(commit_lsn, []).append(text)
    return " | ".join(" ".join(texts) for texts in transactions.values())


def positions(sets: Iterable[ChangeSet]) -> list[tuple[int, int]]:
    """The positions of all changes, in order."""
    found = []
    for each in sets:
        for batch in each.batches:
            lsns, seqs = batch.data["_commit_lsn"].to_pylist(), batch.data["_seq"].to_pylist()
            found += list(zip(lsns, seqs, strict=True))
    return sorted(found)


def _batch(
    batch: ChangeBatch, truncated: dict[tuple[int, int], list[str]], names: bool
) -> Iterable[tuple[tuple[int, int, float], str]]:
    schema = batch.schema
    columns = [c.name for c in schema.columns]
    full = schema.replica_identity == "f"
    table = schema.name if schema.namespace == "public" else schema.table

    def values(row: dict[str, Any], of: Sequence[str], unchanged: Sequence[str] = ()) -> str:
        texts = ["u" if c in unchanged else _value(row[c]) for c in of]
        return ",".join(f"{c}:{t}" for c, t in zip(of, texts, strict=True)) if names else ",".join(texts)

    for row in batch.data.to_pylist():
        key = (row["_commit_lsn"], row["_lsn"], row["_seq"])
        before = row["_before"]
        old = ""
        if before is not None:
            old = f"[O {values(before, columns)}]" if full else f"[K {values(before, schema.key)}]"
            if not full:
                assert all(before[c] is None for c in columns if c not in schema.key)
        match row["_op"]:
            case "I":
                yield key, f"+{table}{{{values(row, columns)}}}"
            case "U":
                yield key, f"~{table}{old}{{{values(row, columns, row['_unchanged'] or ())}}}"
            case "D":
                yield key, f"-{table}{old}"
            case "T":
                assert all(row[c] is None for c in columns)
                truncated[row["_commit_lsn"], row["_seq"]] = [batch.table]


def _list(tables: Iterable[str]) -> str:
    return ",".join(t.removeprefix("public.") for t in tables)


def _value(value: Any) -> str:
    text = "null" if value is None else str(value)
    return f"{text[0]}×{len(text)}" if len(text) > 50 else text or "''"
