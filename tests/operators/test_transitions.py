"""`cdc.entered` and `cdc.left` against rows that are changed one by one, and against a trigger in PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bytewax.operators as op
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from bytewax.dataflow import Dataflow
from bytewax.testing import TestingSink, TestingSource
from harness.database import Database
from harness.one_table import Workload, ordered, refused, run_flow
from harness.replay import Row, Table

import pgoutput_source.operators as cdc
from pgoutput_source.changes import ChangeBatch
from pgoutput_source.decode.assembler import Assembler
from pgoutput_source.errors import ConfigurationError, DecodeError, StateError
from pgoutput_source.testing import batch

WHERE = (pc.field("note") != "x") & (pc.field("id") > 2)


def satisfies(row: Row | None) -> bool:
    return row is not None and row["note"] is not None and row["note"] != "x" and row["id"] > 2


def run(items: Sequence[Any], where: pc.Expression = WHERE, recovery: Path | None = None) -> list[list[Any]]:
    """What `entered` and `left` give."""
    outs: list[list[Any]] = [[], []]
    flow = Dataflow("test")
    up = op.input("in", flow, TestingSource(items))
    for step, out, name in zip((cdc.entered, cdc.left), outs, ("entered", "left"), strict=True):
        op.output(f"{name}_out", step(name, up, where), TestingSink(out))
    run_flow(flow, recovery=recovery)
    return outs


def positions(batches: Sequence[ChangeBatch]) -> list[tuple[int, int]]:
    return [(row["_commit_lsn"], row["_seq"]) for made in batches for row in made.data.to_pylist() if row["_op"] != "T"]


@pytest.mark.parametrize("identity", ["f", "d"])
@pytest.mark.parametrize("seed", range(6))
def test_each_row_enters_and_leaves_when_it_does_over_crashes(tmp_path: Path, identity: str, seed: int) -> None:
    table = Table(seed, identity)
    batches = [made for made, _ in table.batches(60)]
    changes = [(r["_commit_lsn"], r["_seq"]) for made in batches for r in made.data.to_pylist()]
    assert len(changes) == len(table.steps)
    steps = list(zip(changes, table.steps, strict=True))
    wanted = [
        [at for at, (old, new) in steps if satisfies(new) and not satisfies(old)],
        [at for at, (old, new) in steps if satisfies(old) and not satisfies(new)],
    ]
    assert sum(map(len, wanted)) > 1
    found: list[list[Any]] = [[], []]
    third = len(batches) // 3
    for end in (third, 2 * third, len(batches)):
        crash = [TestingSource.ABORT()] if end < len(batches) else []
        for all_of, more in zip(found, run([*batches[:end], *crash], recovery=tmp_path / "r"), strict=True):
            all_of += more
    assert [positions(made) for made in found] == wanted


LOG = """
CREATE TABLE log (way text, id int, part int);
CREATE FUNCTION log() RETURNS trigger LANGUAGE plpgsql AS $$ DECLARE
    is_ bool := TG_OP <> 'DELETE' AND coalesce(NEW.amount > 0 AND NEW.region < 3, false);
    was bool := TG_OP <> 'INSERT' AND coalesce(OLD.amount > 0 AND OLD.region < 3, false);
BEGIN
    IF is_ AND NOT was THEN INSERT INTO log VALUES ('entered', NEW.id, NEW.part); END IF;
    IF was AND NOT is_ THEN
        IF TG_OP = 'DELETE' THEN INSERT INTO log VALUES ('left', OLD.id, OLD.part);
        ELSE INSERT INTO log VALUES ('left', NEW.id, NEW.part); END IF;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER log AFTER INSERT OR UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION log();
"""


@pytest.mark.parametrize("identity", ["DEFAULT", "FULL"])
def test_it_is_what_a_trigger_in_postgresql_sees(any_db: Database, identity: str) -> None:
    connection = any_db.connect()
    workload = Workload(connection, "cdc", 3, identity)
    connection.execute(LOG)
    for _ in range(60):
        workload.transaction(workload.random.choice([1, 3, 10]))
    batches = [b for changes in workload.feed(Assembler(), workload.frames()) for b in changes.of("public.t")]
    where = (pc.field("amount") > pa.scalar(0, pa.decimal128(12, 2))) & (pc.field("region") < 3)
    for way, found in zip(("entered", "left"), run(batches, where), strict=True):
        rows = [(r["id"], r["part"]) for made in found for r in made.data.to_pylist() if r["_op"] != "T"]
        wanted = connection.execute("SELECT id, part FROM log WHERE way = %s", [way]).fetchall()
        assert len(wanted) > 5
        assert ordered(rows) == ordered(wanted)


def ops(batches: Sequence[ChangeBatch]) -> str:
    return "".join(row for made in batches for row in made.data["_op"].to_pylist())


def test_rows_that_were_never_seen_a_truncate_and_what_a_snapshot_reads() -> None:
    types = {"id": pa.int64(), "n": pa.int64()}
    where = pc.field("n") > 0
    seen = batch(
        "public.t", [("U", {"id": 1, "n": 1}), ("U", {"id": 1, "n": 2}), ("D", {"id": 2}, {"id": 2})], types=types
    )
    assert [ops(made) for made in run([seen], where)] == ["U", ""]
    full = batch("public.t", [("U", {"id": 1, "n": 1}, {"id": 1, "n": 9})], types=types, identity="f")
    assert [ops(made) for made in run([full], where)] == ["", ""]
    emptied = batch("public.t", [("R", {"id": 1, "n": 1}), ("T", None), ("I", {"id": 1, "n": 1})], types=types)
    assert [ops(made) for made in run([emptied], where)] == ["RI", "T"]


def test_what_can_not_be_right_is_refused() -> None:
    insert = batch("public.t", [("I", {"id": 1, "note": "y"})])
    refused(ConfigurationError, lambda: run([insert], pc.field("nothing") == 1))
    refused(ConfigurationError, lambda: run([insert], pc.field("note") == 1))
    refused(ConfigurationError, lambda: run([insert, batch("public.u", [("I", {"id": 1, "note": "y"})])]))
    unknown = batch("public.t", [("U", {"id": 1, "note": None})], types={"id": pa.int64(), "note": pa.utf8()},
                    unchanged={0: ["note"]})  # fmt: skip
    refused(StateError, lambda: run([unknown]))
    field = insert.data.schema.field("_raw")
    odd = insert.data.drop_columns(["_raw"]).append_column(field, pa.array([[("note", "odd")]], field.type))
    refused(DecodeError, lambda: run([insert.replace(odd)]))
