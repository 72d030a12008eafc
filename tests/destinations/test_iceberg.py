"""Histories in Apache Iceberg: a slot that keeps everything is the oracle; pyiceberg and DuckDB read them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from harness.database import Database
from harness.flow import Busy, Flow, failure, following, publish, wait_for
from harness.store_mirrors import differ_in_store
from harness.type_cases import CASES, PINNED, drawn
from harness.waiting import until
from pyiceberg.catalog import Catalog, load_catalog

from pgoutput_source import IcebergSink, peek
from pgoutput_source.destinations.base import Job, Refused
from pgoutput_source.destinations.iceberg import IcebergDestination
from pgoutput_source.destinations.targets import Target
from pgoutput_source.errors import ConfigurationError, SinkError
from pgoutput_source.testing import batch

CUT = {"PGOUTPUT_MAX_FRAMES": "7"}  # and an epoch for each poll


def properties(folder: Path) -> dict[str, str]:
    """A catalogue in SQLite, and a warehouse beside it."""
    return {"type": "sql", "uri": f"sqlite:///{folder}/catalogue.db", "warehouse": f"file://{folder}/warehouse"}


@contextlib.contextmanager
def catalogue(folder: Path) -> Iterator[Catalog]:
    with contextlib.closing(load_catalog("default", **properties(folder))) as catalog:
        yield catalog


def into(db: Database, folder: Path, **environ: str) -> Flow:
    (folder / "warehouse").mkdir(exist_ok=True)
    options = json.dumps({"catalog": properties(folder)})
    settings = {
        "MODE": "history",
        "SPOOL": str(folder / "spool"),
        "INTO": "iceberg:{schema}.{table}",
        "OPTIONS": options,
        "MAX_AGE": "0",
    }
    return Flow(db, folder, module="harness.into_tables", **(settings | environ))


def read(folder: Path, name: str = "t", schema: str = "public") -> pa.Table | None:
    """A table as pyiceberg reads it, in the order of its changes; None if it is not there."""
    with catalogue(folder) as catalog:
        if not catalog.table_exists((schema, name)):
            return None
        table = catalog.load_table((schema, name))
        rows = table.scan().to_arrow().sort_by([("_commit_lsn", "ascending"), ("_seq", "ascending")])
        files = [task.file.file_path.removeprefix("file://") for task in table.scan().plan_files()]
    # Another engine finds as many rows in the files.
    found = duckdb.connect().execute(
        "SELECT count(*), count(DISTINCT (_commit_lsn, _seq)) FROM read_parquet(?)", [files]
    )
    assert found.fetchall() == [(len(rows), len(rows))]
    return rows


def keep_everything(db: Database) -> None:
    """A slot that no flow reads."""
    with db.connect() as c:
        c.execute("SELECT pg_create_logical_replication_slot('all', 'pgoutput')")


def differ(db: Database, folder: Path, tables: list[tuple[str, str]]) -> list[str]:
    """What the histories have that the slot `all` has not, and the reverse, by position and operation."""
    expected: dict[tuple[str, str], Counter[Any]] = {table: Counter() for table in tables}
    for changes in peek(db.dsn, slot="all", publication="cdc").batches:
        expected[changes.schema.full_name].update(_changes(pa.Table.from_batches([changes.data])))
    wrong = []
    for name, rows in expected.items():
        table = read(folder, name[1], name[0])
        found = Counter() if table is None else Counter(_changes(table))
        if found != rows:
            more, less = list((found - rows).items()), list((rows - found).items())
            wrong.append(f"{name}: {len(more)} more {more[:2]}, {len(less)} less {less[:2]}")
    return wrong


def _changes(table: pa.Table) -> list[tuple[Any, ...]]:
    return list(zip(*(table[name].to_pylist() for name in ("_commit_lsn", "_seq", "_op", "_xid")), strict=True))


def made(changes: list[Any], number: int = 1, lsn: int = 1000, **options: Any) -> Job:
    changed = batch("public.t", changes, lsn=lsn, **options)
    return Job(Target("public", "t"), number, (number, 0), (), "d", pa.Table.from_batches([changed.data]))


def to(folder: Path) -> IcebergDestination:
    (folder / "warehouse").mkdir(exist_ok=True)
    return IcebergDestination(properties(folder), mode="history")


def test_every_type_comes_back_as_the_text_that_the_server_wrote(db: Database, tmp_path: Path) -> None:
    cases = [case for case in CASES if case.since <= db.server.major]
    values = {f"c{i}": drawn(case) for i, case in enumerate(cases)}
    kinds = {name: case.sql for name, case in zip(values, cases, strict=True)}
    given = [
        {name: texts[row] for name, texts in values.items() if row < len(texts)}
        for row in range(max(map(len, values.values())))
    ]
    casts = ", ".join(f"(v->>'{name}')::{kind}" for name, kind in kinds.items())
    with db.connect(options=PINNED) as c:
        columns = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        c.execute(f"CREATE TABLE public.t (id int PRIMARY KEY, {columns})".encode())
        publish(db)
        c.execute(
            f"INSERT INTO public.t SELECT n, {casts} FROM json_array_elements(%s) WITH ORDINALITY AS u(v, n)".encode(),
            [json.dumps(given)],
        )
        changes = peek(db.dsn, slot="cdc", publication="cdc").of("public.t")[0]
        with contextlib.closing(to(tmp_path)) as destination:
            table = pa.Table.from_batches([changes.data])
            destination.apply([Job(Target("public", "t"), 1, (1, 0), (), "d", table)])
    assert differ_in_store(db, lambda schema, name: read(tmp_path, name, schema), [("public", "t")]) == []


def test_a_history_follows_alter_table(db: Database, tmp_path: Path) -> None:
    shapes = [
        "INSERT INTO t VALUES (1, 'a', 1), (2, 'b', 2)",
        'ALTER TABLE t ADD COLUMN "a.b" int DEFAULT 7; UPDATE t SET id = 3 WHERE id = 1',
        "ALTER TABLE t RENAME note TO n; ALTER TABLE t RENAME amount TO note; ALTER TABLE t RENAME n TO amount;"
        " INSERT INTO t VALUES (4, 'd', 4)",
        "ALTER TABLE t ALTER note TYPE bigint; INSERT INTO t VALUES (5, 'e', 50000000000)",
        "ALTER TABLE t DROP COLUMN amount; DELETE FROM t WHERE id = 2",
        "ALTER TABLE t ADD COLUMN amount date; ALTER TABLE t ALTER note TYPE text;"
        " INSERT INTO t VALUES (6, 'f', 6, 'infinity')",
        "DROP TABLE t; CREATE TABLE t (id text PRIMARY KEY, r int4range); INSERT INTO t VALUES ('x', '[1,3)')",
    ]
    with db.connect() as c, contextlib.closing(to(tmp_path)) as destination:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, note text, amount int)")
        publish(db)
        number = 0
        for shape in shapes:
            c.execute(shape.encode())
            changes = peek(db.dsn, slot="cdc", publication="cdc")
            c.execute("SELECT pg_replication_slot_advance('cdc', pg_current_wal_lsn())")
            for part in changes.of("public.t"):
                number += 1
                table = pa.Table.from_batches([part.data])
                destination.apply([Job(Target("public", "t"), number, (number, 0), (), "d", table)])
    found = read(tmp_path)
    assert found is not None
    span = {"lower": 1, "upper": 3, "lower_inc": True, "upper_inc": False, "empty": False}
    names = ["_op", "id__2", "id", "amount__2", "amount", "note__2", "note", "a.b", "r"]
    assert [list(row.values()) for row in found.select(names).to_pylist() if row["_op"] != "T"] == [
        ["I", 1, None, "a", None, 1, None, None, None],
        ["I", 2, None, "b", None, 2, None, None, None],
        ["U", 3, None, "a", None, 1, None, 7, None],
        ["I", 4, None, "d", None, 4, None, 7, None],
        ["I", 5, None, "e", None, 50000000000, None, 7, None],
        ["D", 2, None, None, None, None, None, None, None],
        ["I", 6, None, None, None, None, "f", 6, None],
        ["I", None, "x", None, None, None, None, None, span],
    ]
    assert dict(found["_before"].to_pylist()[2]) == {"id": "1"}


@pytest.mark.slow
def test_kill_9_while_parts_are_spooled_and_applied(db: Database, tmp_path: Path) -> None:
    """Half of the deaths come from outside, half within a commit or shortly after."""
    rng = random.Random(os.environ.get("SEED", "1"))
    publish(db)
    keep_everything(db)  # before the first change: both slots have the same ones
    with Busy(db.dsn, seed=rng.randrange(1000), tables=3, largest=100) as workload:
        flow = into(db, tmp_path)
        for death in range(int(os.environ.get("DEATHS", "6"))):
            environ = CUT | {"MAX_AGE": rng.choice(["0", "0.5"])}
            if death % 2:
                environ["KILL_WITHIN"] = str(rng.uniform(0, 0.4))
            process = flow.start("-s", rng.choice(["0", "1"]), *flow.recovery(), **environ)
            with following(process) as lines:
                wait_for(lines, "streaming from", process)
                if death % 2:
                    assert process.wait(60) == -signal.SIGKILL, lines
                else:
                    time.sleep(rng.uniform(0, 1.5))
                    process.send_signal(signal.SIGKILL)
        workload.stop()
        flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current", TWICE="1")
    assert differ(db, tmp_path, [(t.name.namespace, t.name.name) for t in workload.tables]) == []


def test_a_lost_spool_is_an_error(db: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY)")
        publish(db)
        keep_everything(db)
        c.execute("INSERT INTO t SELECT generate_series(1, 100)")
    flow = into(db, tmp_path, MAX_AGE="60")
    spool = tmp_path / "spool"
    process = flow.start("-s", "0", *flow.recovery())
    with following(process) as lines:
        until(lambda: list(spool.glob("*.committed")), lines)
        time.sleep(0.5)  # the state of a later epoch lists it
        process.send_signal(signal.SIGKILL)
    for file in spool.glob("*.committed"):
        file.rename(file.with_suffix(".away"))
    said, code = failure(flow, *flow.recovery())
    assert code != 0
    assert "neither staged nor published" in said
    for file in spool.glob("*.away"):
        file.rename(file.with_suffix(".committed"))
    flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
    assert differ(db, tmp_path, [("public", "t")]) == []


def test_publishers_of_the_same_part_at_once_append_it_once(tmp_path: Path) -> None:
    """The control: the library's own retries append it twice."""
    for retried in (False, True):
        folder = tmp_path / str(retried)
        folder.mkdir()
        with contextlib.closing(to(folder)) as destination:
            destination.apply([made([("I", {"id": 1})])])
        if retried:
            with catalogue(folder) as catalog, catalog.load_table(("public", "t")).transaction() as transaction:
                transaction.set_properties({"commit.retry.num-retries": "4"})
        ready = threading.Barrier(3)
        errors: list[BaseException] = []

        def publisher(folder: Path = folder, ready: threading.Barrier = ready, errors: list[Any] = errors) -> None:
            try:
                with contextlib.closing(to(folder)) as destination:
                    load = destination._load

                    def loaded(*arguments: Any) -> Any:
                        table = load(*arguments)
                        if not ready.broken:
                            with contextlib.suppress(threading.BrokenBarrierError):
                                ready.wait(2)
                                ready.abort()  # all have read the number
                        return table

                    destination._load = loaded  # type: ignore[method-assign, assignment]
                    destination.apply([made([("I", {"id": 2})], 2, lsn=2000)])
            except BaseException as e:
                errors.append(e)

        threads = [threading.Thread(target=publisher) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with catalogue(folder) as catalog:
            ids = catalog.load_table(("public", "t")).scan().to_arrow()["id"].to_pylist()
        if retried:
            assert ids.count(2) > 1
        else:
            assert errors == []
            assert sorted(ids) == [1, 2]


def test_what_can_not_be_taken_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError) as e:
        IcebergSink(catalog="prod", mode="mirror", spool=tmp_path)
    assert "merged on read" in str(e.value.hint)
    with contextlib.closing(to(tmp_path)) as destination:
        with catalogue(tmp_path) as catalog:
            catalog.create_namespace("public")
            catalog.create_table(("public", "t"), pa.schema([("id", pa.int64())]))
        with pytest.raises(Refused, match="was not made by this package"):
            destination.reached(Target("public", "t"))
        with pytest.raises(Refused, match="was not made by this package"):
            destination.apply([made([("I", {"id": 1})])])
        with pytest.raises(Refused, match="has no namespace"):
            destination.reached(Target("", "t"))
    nowhere = IcebergDestination({"type": "rest", "uri": "http://localhost:1"}, mode="history")
    with pytest.raises(SinkError, match="Iceberg"):
        nowhere.reached(Target("public", "t"))
    monkeypatch.setitem(__import__("sys").modules, "pyiceberg.catalog", None)
    with pytest.raises(ConfigurationError) as e:
        to(tmp_path)
    assert "pgoutput-source[iceberg]" in str(e.value.hint)


def test_files_are_synced_before_the_catalogue_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    fsync = os.fsync

    def noted(handle: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    with contextlib.closing(to(tmp_path)) as destination:
        destination.apply([made([("I", {"id": 1})])])
        destination.apply([made([("I", {"id": 2})], 2, lsn=2000)])
    files = {str(path) for path in (tmp_path / "warehouse").rglob("*") if path.is_file()}
    assert {Path(file).suffix for file in files} == {".parquet", ".avro", ".json"}
    assert files <= synced
