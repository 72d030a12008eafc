"""`metadata_prefix`: columns that are called like the metadata columns, and equal results under any prefix."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import bytewax.operators as op
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from bytewax.dataflow import Dataflow, Stream
from bytewax.testing import TestingSink, TestingSource
from harness.database import Database
from harness.one_table import Workload, ordered, run_flow

import pgoutput_source.operators as cdc
from pgoutput_source import (
    ChangeBatch,
    ChangeSet,
    IpcSink,
    JsonLinesSink,
    ParquetSink,
    PgOutputReader,
    PgOutputSource,
    current,
    peek,
    read,
    run,
)
from pgoutput_source.changes.schema import MetadataNames
from pgoutput_source.compute.metadata import renamed
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.postgres.published import remarks
from pgoutput_source.settings import SourceSettings
from pgoutput_source.testing import batch

OURS = MetadataNames.with_prefix("_")
CDC = MetadataNames.with_prefix("cdc_")

# -- a table whose columns are called like ours ---------------------------------------------------------------------

LIKE_OURS = """
CREATE TABLE t (
    id int, _seq int, _op text, _before date, _raw text, _unchanged text, _commit_lsn int, _lsn text,
    "_before._before" date, PRIMARY KEY (id, _seq)
);
ALTER TABLE t ALTER _unchanged SET STORAGE EXTERNAL;
ALTER TABLE t REPLICA IDENTITY {};
CREATE PUBLICATION p FOR TABLE t;
SELECT pg_create_logical_replication_slot('s', 'pgoutput');
"""
OWN = ("id", "_seq", "_op", "_before", "_raw", "_unchanged", "_commit_lsn", "_lsn", "_before._before")
PAID = "_op = 'paid'"


def changed(db: Database, identity: str, seed: int) -> None:
    """A history of the table: keys that move, large values that stay, dates that no Arrow date can hold."""
    made, connection = random.Random(seed), db.connect()
    for statement in LIKE_OURS.format(identity).split(";"):
        connection.execute(statement.encode())
    for n in range(40):
        some = f"WHERE id % 5 = {made.randrange(5)}"
        day = made.choice(["'infinity'", "'-infinity'", "'2024-02-29'", "NULL"])
        statements = [
            f"INSERT INTO t VALUES ({n}, 0, '{made.choice(['new', 'paid'])}', {day}, 'r{n}', repeat('{n % 10}', 4000), "
            f"{n}, NULL, {day})",
            f"UPDATE t SET _op = '{made.choice(['new', 'paid'])}', _commit_lsn = _commit_lsn + 1 {some}",
            f"UPDATE t SET _before = {day}, \"_before._before\" = 'infinity' {some}",
            f"UPDATE t SET _seq = _seq + {made.choice([1, -1])} {some}",
            f"DELETE FROM t {some} AND _commit_lsn % 4 = 0",
        ]
        connection.execute("BEGIN")
        for statement in made.sample(statements, made.randrange(1, 4)):
            connection.execute(statement.encode())
        connection.execute("COMMIT")
    connection.execute("INSERT INTO t SELECT 100 + n, 0, 'paid' FROM generate_series(1, 3) AS n")


def texts(rows: Sequence[dict[str, Any]], names: MetadataNames) -> Counter[str]:
    """Rows as PostgreSQL writes their values."""
    found: Counter[str] = Counter()
    for row in rows:
        odd = dict(row[names.raw] or ())
        values = [odd.get(name, row[name]) for name in OWN]
        found[repr([None if v is None else str(v) for v in values])] += 1
    return found


def in_order(table: pa.Table) -> list[str]:
    ordered_table = table.sort_by([(CDC.commit_lsn, "ascending"), (CDC.seq, "ascending")])
    return [repr(row) for row in ordered_table.to_pylist()]


def expected(db: Database) -> Counter[str]:
    columns = ", ".join(f'"{name}"::text' for name in OWN)
    return Counter(repr(list(row)) for row in db.connect().execute(f"SELECT {columns} FROM t".encode()))


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
def test_a_table_whose_columns_are_called_like_ours_goes_the_whole_way(
    db: Database, tmp_path: Path, identity: str
) -> None:
    changed(db, identity, seed=len(identity))
    want, whole = expected(db), identity == "FULL"
    key = ["id", "_seq"]
    seen = peek(db.dsn, slot="s", publication="p", metadata_prefix="cdc_")
    flow = Dataflow("t")
    source = PgOutputSource(db.dsn, slot="s", publication="p", until="current", metadata_prefix="cdc_", max_frames=100)
    rows = cdc.table("t", op.input("in", flow, source), "public.t")
    cdc.output("history", rows, ParquetSink(tmp_path / "history", max_rows=100))
    cdc.output("ipc", rows, IpcSink(tmp_path / "ipc"))
    cdc.output("lines", rows, JsonLinesSink(tmp_path / "lines.jsonl"))
    cdc.output("latest", cdc.latest("l", rows, key=key if whole else None), ParquetSink(tmp_path / "latest"))
    plain = cdc.select("plain", rows, "id", "_seq", "_op", "_commit_lsn")
    groups = cdc.aggregate("groups", plain, by="_op", count=True, sum="_commit_lsn")
    cdc.output("sums", groups, ParquetSink(tmp_path / "sums"))
    windows: list[pa.RecordBatch] = []
    of_window = cdc.window("w", plain, every=timedelta(days=1), by="_op", count=True, sum="_commit_lsn", ops="IU")
    op.output("windows", of_window, TestingSink(windows))
    crossed: dict[str, list[ChangeBatch]] = {"entered": [], "left": []}
    for name, step in (("entered", cdc.entered), ("left", cdc.left)):
        op.output(name, step(f"paid_{name}", plain, pc.field("_op") == "paid"), TestingSink(crossed[name]))
    some: list[ChangeBatch] = []
    op.output("some", cdc.filter("f", cdc.updates("u", rows), pc.field("_op") == "paid"), TestingSink(some))
    run(flow, epoch=timedelta(milliseconds=300))

    history = read(tmp_path / "history").to_table()
    assert history.column_names == [*OWN, *CDC]
    assert history.num_rows == len(seen)
    peeked = pa.concat_tables([pa.Table.from_batches([b.data]) for b in seen])
    assert in_order(history) == in_order(peeked)
    assert texts(current(tmp_path / "history", key=key).to_pylist(), CDC) == want
    assert texts(current(tmp_path / "latest", key=key).to_pylist(), CDC) == want
    streams = [pa.ipc.open_stream(file.read_bytes()) for file in (tmp_path / "ipc").glob("*.arrows")]
    assert in_order(pa.concat_tables([stream.read_all() for stream in streams])) == in_order(peeked)
    assert texts(list(of_lines(tmp_path / "lines.jsonl")), CDC) == want

    connection = db.connect()
    query = "SELECT _op, count(*), sum(_commit_lsn) FROM t GROUP BY 1 ORDER BY 1"
    groups_now = current(tmp_path / "sums", key="_op").select(["_op", "count", "_commit_lsn_sum"])
    assert ordered(tuple(row.values()) for row in groups_now.to_pylist()) == ordered(connection.execute(query))
    entered, left = (sum(map(len, crossed[name])) for name in ("entered", "left"))
    assert (entered - left,) == connection.execute(f"SELECT count(*) FROM t WHERE {PAID}".encode()).fetchone()
    assert entered > left > 0
    ops = history[CDC.op].cast(pa.utf8())
    written = history.filter(pc.is_in(ops, pa.array(["I", "U"])))
    assert sum(pa.Table.from_batches(windows)["count"].to_pylist()) == len(written)
    paid = history.filter(pc.and_(pc.equal(ops, "U"), pc.equal(history["_op"], "paid")))
    assert sum(map(len, some)) == len(paid) > 0

    events = {(e.op, e.position): e for e in seen.events()}
    assert len(events) == len(seen)
    assert {tuple(e.row) for e in events.values() if e.op == "I"} == {OWN}
    assert {str(e.row["_before"]) for e in events.values() if e.op == "I"} >= {"infinity", "-infinity", "2024-02-29"}
    with PgOutputReader(db.dsn, slot="s", publication="p", until="current", metadata_prefix="cdc_") as reader:
        assert [event.op for event in reader] == []


def of_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The rows that the lines leave."""
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for line in map(json.loads, file.read_text().splitlines()):
        key, old = (line["id"], line["_seq"]), line.get("cdc_before") or {}
        if line["cdc_op"] == "D":
            del rows[key]
            continue
        was = (old.get("id", key[0]), old.get("_seq", key[1]))
        known = rows.pop(was, {})
        rows[key] = {name: line.get(name, known.get(name)) for name in OWN} | {CDC.raw: line.get("cdc_raw")}
        for name in set(line.get("cdc_unchanged", ())):
            if name in (known.get(CDC.raw) or {}):
                rows[key][CDC.raw] = {**(rows[key][CDC.raw] or {}), name: known[CDC.raw][name]}
    yield from rows.values()


def test_the_error_and_check_name_the_option(db: Database) -> None:
    connection = db.connect()
    for statement in LIKE_OURS.format("DEFAULT").split(";"):
        connection.execute(statement.encode())
    connection.execute("INSERT INTO t VALUES (1, 1)")
    with pytest.raises(
        ConfigurationError, match=r"'_seq' has the name of a metadata column[\s\S]*metadata_prefix=\"cdc_"
    ):
        peek(db.dsn, slot="s", publication="p").table("public.t")
    settings = SourceSettings(dsn=db.dsn, slot="s", publication=("p",))
    said = [f"{remark.text} {remark.hint}" for remark in remarks(connection, settings)]
    assert any("_seq" in text and "metadata_prefix" in text for text in said)
    other = SourceSettings(dsn=db.dsn, slot="s", publication=("p",), metadata_prefix="cdc_")
    assert not any("metadata" in remark.text for remark in remarks(connection, other))
    for wrong in ("", "1_", "a b", "é_", "x" * 33):
        with pytest.raises(ConfigurationError, match="metadata_prefix"):
            SourceSettings(slot="s", publication=("p",), metadata_prefix=wrong)
    env = {"PGOUTPUT_SLOT": "s", "PGOUTPUT_PUBLICATION": "p", "PGOUTPUT_METADATA_PREFIX": "cdc_"}
    assert SourceSettings.from_env(env).metadata_prefix == "cdc_"


# -- any prefix gives the same ----------------------------------------------------------------------------------------


def under(data: pa.RecordBatch, names: MetadataNames) -> pa.RecordBatch:
    """A batch with other names of its metadata columns."""
    was = MetadataNames.of(data.schema)
    index = data.schema.get_field_index(was.raw)
    if index >= 0:
        own = {name: name for name in data.schema.names}
        raw = renamed(pa.chunked_array([data.column(index)]), own, old=was.old, now=names.old).combine_chunks()
        data = data.set_column(index, data.schema.field(index), raw)
    to = dict(zip(was, names, strict=True))
    metadata = {k: v for k, v in (data.schema.metadata or {}).items() if k != b"pg.metadata_prefix"}
    return data.rename_columns([to.get(name, name) for name in data.schema.names]).replace_schema_metadata(
        {**metadata, **names.said} or None
    )


def batch_under(made: ChangeBatch, names: MetadataNames) -> ChangeBatch:
    return ChangeBatch(dataclasses.replace(made.schema, metadata_prefix=names.prefix), under(made.data, names))


Step = Callable[[Stream[ChangeBatch]], Stream[Any]]
PAID_NOW = pc.field("status") == "paid"
STEPS: dict[str, Step] = {
    "select": lambda up: cdc.select("s", up, "id", "part", "note", "day"),
    "rename": lambda up: cdc.rename("s", up, {"note": "remark", "day": "date"}),
    "mask": lambda up: cdc.mask("s", up, "note", "day"),
    "map": lambda up: cdc.map_batches("s", up, lambda data: data.replace_schema_metadata(None)),
    "updates": lambda up: cdc.updates("s", up),
    "filter": lambda up: cdc.filter("s", up, PAID_NOW),
    "entered": lambda up: cdc.entered("s", up, PAID_NOW),
    "left": lambda up: cdc.left("s", up, PAID_NOW),
    "latest": lambda up: cdc.latest("s", up, key=["id", "part"]),
    "aggregate": lambda up: cdc.aggregate("s", up, by="status", count=True, sum="amount", max="score"),
    "window": lambda up: cdc.window("s", up, every=timedelta(milliseconds=20), by="status", count=True, sum="amount"),
}


STATEFUL = ("entered", "left", "latest", "aggregate")


def through(step: Step, batches: Sequence[Any], recovery: Path | None = None) -> list[Any]:
    flow, out = Dataflow("test"), list[Any]()
    op.output("out", step(op.input("in", flow, TestingSource(batches))), TestingSink(out))
    run_flow(flow, recovery=recovery)
    return out


def shown(results: Sequence[Any]) -> list[str]:
    """The results under the default prefix; as text, in which NaN is equal to itself."""
    data = [result.data if isinstance(result, ChangeBatch) else result for result in results]
    back = [under(pa.record_batch(each), OURS) for each in data]
    return [f"{each.schema.to_string(show_schema_metadata=True)} {each.to_pylist()}" for each in back]


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
def test_results_under_any_prefix_are_those_under_the_default_one(db: Database, tmp_path: Path, identity: str) -> None:
    workload = Workload(db.connect(), "w", 5, identity)
    plain, prefixed = Assembler(), Assembler(metadata_prefix="cdc_")
    sets: list[tuple[ChangeSet, ChangeSet]] = []
    for n in range(9):
        for _ in range(3):
            workload.transaction(4)
        if n % 3 == 0:
            workload.connection.execute("UPDATE t SET day = 'infinity' WHERE id % 3 = 1")
        frames = workload.frames()
        sets.append((plain.feed(frames), prefixed.feed(frames)))
    ours = [b for s, _ in sets for b in s if len(b)]
    theirs = [b for _, s in sets for b in s if len(b)]

    assert shown(theirs) == shown(ours)
    assert all(b.data.schema.names[-9:] == list(CDC) for b in theirs)
    events = [[repr(event) for each in sets for event in each[side].events()] for side in (0, 1)]
    assert events[0] == events[1]
    assert any(b.data[OURS.raw].null_count < len(b) for b in ours)
    half = len(ours) // 2
    for name, step in STEPS.items():
        want = shown(through(step, ours))
        assert want, name
        assert shown(through(step, theirs)) == want, name
        if name in STATEFUL:
            # The prefix may change while a step keeps state.
            mixed = [*ours[:half], TestingSource.EOF(), *theirs[half:]]
            parts = [each for _ in range(2) for each in through(step, mixed, tmp_path / name)]
            assert shown(parts) == want, name

    folders = {"ours": ours, "theirs": theirs, "mixed": [*ours[:half], *theirs[half:]]}
    for folder, batches in folders.items():
        (tmp_path / folder).mkdir()
        for number, each in enumerate(batches):
            pq.write_table(pa.table(each), tmp_path / folder / f"{number:04}.parquet")
    rows = {name: current(tmp_path / name, key=["id", "part"]) for name in folders}
    history = {name: read(tmp_path / name).to_table() for name in folders}
    assert rows["ours"].num_rows
    assert rows["ours"].column_names[-8:] == [n for n in OURS if n != OURS.before]
    for name in ("theirs", "mixed"):
        assert rows[name].column_names[-8:] == [n for n in CDC if n != CDC.before]
        assert bare(rows[name]) == bare(rows["ours"])
        assert bare(history[name]) == bare(history["ours"])


def bare(table: pa.Table) -> list[str]:
    return shown([table.combine_chunks().to_batches()[0].replace_schema_metadata(MetadataNames.of(table.schema).said)])


def test_a_batch_whose_schema_lost_its_metadata_keeps_its_prefix() -> None:
    made = batch("public.t", [("I", {"id": 1, "_op": "x"}), ("U", {"id": 1, "_op": "y"})], metadata_prefix="cdc_")
    bare = made.replace(made.data.replace_schema_metadata(None))
    assert MetadataNames.of(bare.data.schema) == CDC
    assert bare.last == made.last
    assert [event.after for event in bare.events()] == [{"id": 1, "_op": "x"}, {"id": 1, "_op": "y"}]
    assert b"pg.metadata_prefix" not in batch("public.t", [("I", {"id": 1})]).data.schema.metadata
