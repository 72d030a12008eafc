"""Delta tables in S3: a server that loses answers, is late or busy, and processes that are killed."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from harness.database import Database
from harness.flow import Busy, Flow, following, publish, wait_for
from harness.mirrors import keyed, unkeyed, unlike_source
from harness.object_store import ObjectStore, object_store

from pgoutput_source.changes.schema import TableName
from pgoutput_source.destinations.base import Job, Mode
from pgoutput_source.destinations.delta import DeltaDestination, DeltaTargets
from pgoutput_source.destinations.targets import Target
from pgoutput_source.embedded import Server
from pgoutput_source.errors import SinkError
from pgoutput_source.testing import batch

PLACE = "s3://lake/{schema}/{table}"


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    pytest.importorskip("moto")
    with object_store() as made:
        yield made


@pytest.fixture
def scratch(pg: Server) -> Iterator[Database]:
    made = Database(pg)
    yield made
    made.drop()


@pytest.mark.parametrize("mode", ["mirror", "history"])
def test_what_came_of_a_commit_is_read_back_when_its_answer_is_lost(store: ObjectStore, mode: Mode) -> None:
    target = Target("", f"s3://lake/faults/{mode}")
    rng, types = random.Random(7), {"id": pa.int64(), "note": pa.utf8()}
    made = DeltaDestination(mode=mode, storage_options=store.environ)
    there: dict[int, str] = {}
    before = store.fail(0.2, seed=3)
    for number in range(1, 11):
        ids = rng.sample(range(30), 6)
        changes: list[Any] = [
            ("D", {"id": i}, {"id": i}) if i in there and rng.random() < 0.4 else ("I", {"id": i, "note": str(number)})
            for i in ids
        ]
        for op, row, *_ in changes:
            if op == "D":
                del there[row["id"]]
            else:
                there[row["id"]] = row["note"]
        table = pa.Table.from_batches([batch("public.t", changes, types=types, lsn=10 * number).data])
        key = ("id",) if mode == "mirror" else ()
        made.apply([Job(target, number, (number, 0), key, "d", table)])
    assert store.fail(0) > before
    rows = store.rows(target.name)
    assert rows is not None
    if mode == "mirror":
        assert sorted(zip(*rows.select(["id", "note"]).to_pydict().values(), strict=True)) == sorted(there.items())
    else:
        assert sorted(rows.column("_commit_lsn").to_pylist()) == [10 * n + i for n in range(1, 11) for i in range(6)]


def test_a_bucket_that_is_not_there_is_named(store: ObjectStore) -> None:
    store.fail(0)
    with pytest.raises(SinkError, match=r"s3://nowhere/t: .*NoSuchBucket"):
        DeltaDestination(mode="mirror", storage_options=store.environ).reached(Target("", "s3://nowhere/t"))


@pytest.mark.slow
def test_a_mirror_in_s3_equals_its_source_after_kills(
    db: Database, scratch: Database, store: ObjectStore, tmp_path: Path
) -> None:
    rng = random.Random(1)
    settings = {"MODE": "mirror", "SPOOL": str(tmp_path / "spool"), "INTO": f"delta:{PLACE}"} | store.environ
    with Busy(db.dsn, seed=11, tables=4, largest=50) as workload:
        publish(db)
        settings |= {"EXCLUDE": unkeyed(workload), "PGOUTPUT_MAX_FRAMES": "50"}
        flow = Flow(db, tmp_path, module="harness.into_tables", **settings)
        store.fail(0.05)
        for _ in range(3):
            process = flow.start("-s", "0", *flow.recovery())
            with following(process) as lines:
                wait_for(lines, "streaming from", process)
                time.sleep(rng.uniform(0.3, 1.5))
                process.send_signal(signal.SIGKILL)
        workload.stop()
        flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
        store.fail(0)

    def read(schema: str, name: str) -> pa.Table | None:
        target = DeltaTargets(PLACE).of(TableName(schema, name))
        assert target is not None
        return store.rows(target.name)

    assert unlike_source(db, scratch, keyed(workload), read) == []
