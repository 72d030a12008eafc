"""Every table in its folder of Parquet files: the source's tables are the oracle."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness.database import Database
from harness.faults import FOLDER_PLACES, slow_fsyncs
from harness.flow import Busy, Flow, failure, following, publish, wait_for
from harness.workload import Workload, differences, replayed, tables

from pgoutput_source import ChangeBatch, ChangeSet, ParquetSink, current, read
from pgoutput_source.changes.schema import TableName
from pgoutput_source.destinations import parquet
from pgoutput_source.destinations.base import Job
from pgoutput_source.destinations.parquet import ParquetDestination
from pgoutput_source.destinations.targets import FolderTargets, Target
from pgoutput_source.errors import ConfigurationError, SinkError
from pgoutput_source.parquet.folder import INDEX, published_files
from pgoutput_source.parquet.writer import Codec
from pgoutput_source.sinks.tables import TableSink
from pgoutput_source.testing import batch


def into(db: Database, folder: Path, **environ: str) -> Flow:
    return Flow(db, folder, module="harness.into_folders", **environ)


def together(flow: Flow) -> Path:
    """All published files in one folder, as a sink of a single folder would have them."""
    folder = flow.folder / "together"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, file in enumerate(sorted(flow.out.glob("*/*/*.parquet"), key=lambda file: file.name)):
        (folder / f"{number:08d}.parquet").symlink_to(file)
    return folder


def wrong(flow: Flow, workload: Workload) -> list[str]:
    """What the folders lack, or have twice, and what their indexes say otherwise."""
    found, count = replayed(together(flow))
    indexed = sum(read(folder).count_rows() for folder in flow.out.glob("*/*") if (folder / INDEX).exists())
    return differences(found, tables(workload)) + ([] if indexed == count else [f"{indexed} of {count} rows are read"])


def test_folders_of_all_tables_hold_what_the_tables_hold(db: Database, tmp_path: Path) -> None:
    with Workload(db.dsn, seed=4, tables=8, largest=300) as workload:
        publish(db)
        flow = into(db, tmp_path, PGOUTPUT_UNTIL="current", MAX_ROWS="400")
        for max_age in ("0", "60"):
            workload.run(1_500)
            flow.run("-s", "0", *flow.recovery(), MAX_AGE=max_age)
            assert wrong(flow, workload) == []
        assert not list((flow.out / "_spool").glob("*.committed"))
        keyed = next(t for t in workload.tables if t.keyed and (flow.out / t.name.namespace / t.name.name).exists())
        folder = flow.out / keyed.name.namespace / keyed.name.name
        rows = (
            duckdb.connect()
            .execute(f"SELECT count(*) FROM read_parquet('{folder}/*.parquet', union_by_name = true)")
            .fetchall()
        )
        assert rows == [(read(folder).count_rows(),)]
        assert current(folder, key=keyed.key).num_rows == tables(workload)[str(keyed.name)].total()
        assert max(pq.read_metadata(file).num_rows for file in published_files(folder)) > 10


@pytest.mark.slow
def test_kill_9_loses_nothing_and_doubles_nothing(db: Database, tmp_path: Path) -> None:
    rng = random.Random(7)
    publish(db)
    flow = into(db, tmp_path, PGOUTPUT_MAX_FRAMES="50", MAX_ROWS="500")
    with Busy(db.dsn, seed=7, tables=6, largest=300) as workload:
        for place in ["", "", *FOLDER_PLACES]:
            environ = {"MAX_AGE": rng.choice(["0", "0.5"])}
            environ |= {"KILL_AT": f"{place}:{rng.randint(1, 9)}"} if place else {}
            environ |= slow_fsyncs(tmp_path, 0.2) if rng.random() < 0.3 else {}
            process = flow.start("-s", rng.choice(["0", "1"]), *flow.recovery(), **environ)
            with following(process) as lines:
                if place:
                    assert process.wait(60) == -signal.SIGKILL, "".join(lines)
                    continue
                if rng.random() < 0.8:
                    wait_for(lines, "streaming from", process)
                time.sleep(rng.uniform(0, 1.5))
                process.send_signal(signal.SIGKILL)
        workload.stop()
        flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
        assert wrong(flow, workload) == []


def test_a_lost_spool_is_an_error(db: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY)")
        publish(db)
        c.execute("INSERT INTO t SELECT generate_series(1, 100)")
    flow = into(db, tmp_path, MAX_AGE="60")
    spool = flow.out / "_spool"
    process = flow.start("-s", "0", *flow.recovery())
    with following(process) as lines:
        wait_for(lines, "streaming from", process)
        deadline = time.monotonic() + 20
        while not list(spool.glob("*.committed")):
            assert time.monotonic() < deadline, lines
            time.sleep(0.05)
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
    assert sorted(read(flow.out / "public/t").to_table()["id"].to_pylist()) == list(range(1, 101))


def test_folders_of_others_are_refused(db: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        c.execute('CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE "T%1/_" (id int PRIMARY KEY)')
        publish(db)
        c.execute("SELECT pg_create_logical_replication_slot('other', 'pgoutput')")
        c.execute('INSERT INTO t VALUES (1); INSERT INTO "T%1/_" VALUES (1)')
        flow = into(db, tmp_path, PGOUTPUT_UNTIL="current")
        flow.run("-s", "0", *flow.recovery())
        assert {folder.name for folder in (flow.out / "public").iterdir()} == {"t", "T%251%2F_"}

        said, code = failure(flow, PGOUTPUT_SLOT="other")
        assert code != 0
        assert "holds changes of database" in said
        assert "slot 'cdc'" in said

    with pytest.raises(SinkError, match="belongs to a sink of many tables"):
        ParquetSink(flow.out / "public" / "t").build_part("out", "parquet", None)


def test_what_can_not_be_a_target(tmp_path: Path) -> None:
    two = FolderTargets("{table}")
    two.of(TableName("a", "t"))
    with pytest.raises(SinkError, match="have the same target t"):
        two.of(TableName("b", "t"))
    with pytest.raises(ConfigurationError, match="tables= is for a sink of many tables"):
        ParquetSink(tmp_path / "t", tables=["public.*"])
    with pytest.raises(ConfigurationError, match="shema"):
        ParquetSink(tmp_path / "{shema}/{table}")


def test_more_tables_than_descriptors(db: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        publish(db)
        each = "DO $$ BEGIN FOR i IN 1..300 LOOP EXECUTE format('{}', i); END LOOP; END $$"
        c.execute(each.format("CREATE TABLE t%s (id serial PRIMARY KEY)").encode())
        flow = into(db, tmp_path, PGOUTPUT_UNTIL="current", OPEN_FILES="256", MAX_AGE="60")
        for rows in (1, 2):
            c.execute(each.format("INSERT INTO t%s DEFAULT VALUES").encode())
            flow.run("-s", "0", *flow.recovery())
            assert [read(flow.out / f"public/t{i}").count_rows() for i in range(1, 301)] == 300 * [rows]


def test_names_that_differ_by_case_where_the_file_system_folds_them() -> None:
    folded = FolderTargets("{schema}/{table}", folded=True)
    folded.of(TableName("public", "Straße"))
    with pytest.raises(SinkError, match="have the same target"):
        folded.of(TableName("public", "STRASSE"))
    apart = FolderTargets("{schema}/{table}")
    assert apart.of(TableName("public", "A")) != apart.of(TableName("public", "a"))


def destination(root: Path, **options: Any) -> ParquetDestination:
    return ParquetDestination(root, codec=Codec.of("zstd", 1), **({"max_rows": 10, "max_bytes": 1 << 20} | options))


def job(number: int, ids: list[int], *, table: str = "t") -> Job:
    changes = batch(f"public.{table}", [("I", {"id": i}) for i in ids], lsn=number * 100).data
    return Job(Target("", table), number, (number * 100 + len(ids) - 1, 0), (), "d", pa.Table.from_batches([changes]))


def test_what_is_applied_twice_is_there_once(tmp_path: Path) -> None:
    first, second = job(1, [1, 2]), job(2, [3])
    for made in (destination(tmp_path), destination(tmp_path)):
        for _ in range(2):
            made.apply([first])
            made.apply([first, second])
        made.close()
    again = Job(*second[:5], pa.concat_tables([first.changes, second.changes, job(3, [4]).changes]))
    again = again._replace(number=3, last=(300, 0), parts=((1, 2), (2, 3), (3, 4)))
    made = destination(tmp_path)
    made.apply([again])
    assert read(tmp_path / "t").to_table()["id"].to_pylist() == [1, 2, 3, 4]

    (tmp_path / "t" / INDEX).unlink()
    assert made.reached(first.target) == destination(tmp_path).reached(first.target)
    made.apply([again])
    made.close()
    assert read(tmp_path / "t").count_rows() == 4


def test_partitions_of_a_commit_that_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every rename in turn: what is there is not written again, and what is missing comes."""
    rng = random.Random(5)
    parts = []
    for number in range(1, 9):
        rows = [("I", {"id": 10 * number + i, "to": rng.choice(["a", "b=", None, ""])}) for i in range(4)]
        parts.append(batch("public.t", rows, lsn=100 * number).data)
    ids = sorted(i for part in parts for i in part["id"].to_pylist())

    def jobs(count: int, per_job: int) -> list[Job]:
        made = []
        for begin in range(0, count, per_job):
            some = parts[begin : min(count, begin + per_job)]
            ends = [(begin + i + 1, 4 * (i + 1)) for i in range(len(some))]
            number = ends[-1][0]
            job = Job(Target("", "t"), number, (100 * number + 3, 0), (), "d", pa.Table.from_batches(some), tuple(ends))
            made.append(job)
        return made

    rename = os.rename
    for cut in range(7):
        root = tmp_path / str(cut)
        left = iter(range(cut))

        def renamed(source: Path, target: Path, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise OSError("cut off")
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr("os.rename", renamed)
            made = destination(root, partition_by="to", max_rows=1_000)
            with pytest.raises(SinkError, match="cut off"):
                made.apply(jobs(6, 2))
            made.close()
        assert len(published_files(root / "t")) == cut
        if cut == 1:
            other = destination(root, partition_by="day")
            with pytest.raises(SinkError, match=r"has partition to=.* of a commit that was cut off"):
                other.apply(jobs(8, 8))
            other.close()
        again = destination(root, partition_by="to", max_rows=[3, 8, 1_000][cut % 3])
        again.apply(jobs(8, 8))
        again.close()
        assert sorted(read(root / "t").to_table()["id"].to_pylist()) == ids, cut
        assert again.reached(Target("", "t")) == destination(root).reached(Target("", "t"))
    query = f"SELECT id, \"to\" FROM read_parquet('{root}/t/*/*.parquet', hive_partitioning = true) ORDER BY id"
    expected = {row["id"]: row["to"] for part in parts for row in part.select(["id", "to"]).to_pylist()}
    assert dict(duckdb.connect().execute(query).fetchall()) == expected


def test_days_are_folders(db: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE k (id int PRIMARY KEY, day date)")
        publish(db)
        c.execute("INSERT INTO t SELECT generate_series(1, 100); UPDATE t SET id = -id; DELETE FROM t WHERE id > -50")
        flow = into(db, tmp_path, PGOUTPUT_UNTIL="current", PARTITION_BY="day", EXCLUDE="*.k")
        flow.run("-s", "0", *flow.recovery())
        (day,) = (flow.out / "public/t").glob("day=*")
        assert day.name.removeprefix("day=") in {str(each["_commit_ts"].date()) for each in history(flow, "t")}
        assert sorted(current(flow.out / "public/t", key="id")["id"].to_pylist()) == list(range(-100, -49))
        c.execute("INSERT INTO k VALUES (1, now())")
        said, code = failure(flow, *flow.recovery(), EXCLUDE="")
        assert code != 0
        assert "there is a column called 'day'" in said
        c.execute("INSERT INTO t VALUES (1)")
        flow.run("-s", "0", *flow.recovery(), EXCLUDE="", ON_TABLE_ERROR="park")
        assert 1 in current(flow.out / "public/t", key="id")["id"].to_pylist()
        assert not list((flow.out / "public/k").glob("*/*.parquet"))
        flow.run("-s", "0", *flow.recovery(), EXCLUDE="", PARTITION_BY="id")  # what is parked can be taken now
        assert [file.parent.name for file in (flow.out / "public/k").glob("*/*.parquet")] == ["id=1"]


def history(flow: Flow, table: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read(flow.out / "public" / table).to_table().to_pylist()
    return rows


def test_retention_deletes_old_files_and_nothing_comes_twice(tmp_path: Path) -> None:
    def ids() -> list[int]:
        return sorted(read(tmp_path / "t").to_table()["id"].to_pylist())

    sink = ParquetSink(tmp_path / "{table}", retention=timedelta(days=1))._tables
    assert sink is not None
    keeps = sink.destination
    keeps.apply([job(1, [1]), job(2, [2])])
    keeps.close()
    assert ids() == [1, 2]
    made = destination(tmp_path, retention=timedelta(microseconds=1), partition_by="id")
    made.apply([job(3, [3])])
    made.apply([job(4, [4, 5])])
    made.apply([job(4, [4, 5])])
    made.close()
    assert ids() == [5]  # of two files of a job only the newest stays
    again = destination(tmp_path)
    again.apply([job(number, [number]) for number in (1, 2, 3)])
    again.apply([job(5, [6])])
    again.close()
    assert ids() == [5, 6]


def test_control_without_numbers_rows_are_there_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_missing", lambda job, reached: job)
    made = destination(tmp_path)
    made.apply([job(1, [1, 2])])
    made.apply([job(1, [1, 2])._replace(number=2)])
    made.close()
    assert read(tmp_path / "t").count_rows() == 4


def test_a_destination_ahead_of_the_state_is_an_error(tmp_path: Path) -> None:
    def changes(*lsns: int) -> list[ChangeSet | ChangeBatch]:
        return [ChangeSet((batch("public.t", [("I", {"id": lsn})], lsn=lsn),)) for lsn in lsns]

    def tables() -> TableSink:
        made = ParquetSink(tmp_path / "{schema}/{table}")._tables
        assert made is not None
        return made

    sink = tables()
    sink.stage("a-1", changes(100, 200))
    sink.publish("a-1")
    sink.drain()
    sink.close()
    again = tables()
    again.stage("a-2", changes(100, 200, 300))  # without a state they come again
    again.publish("a-2")
    again.drain()
    again.close()
    assert read(tmp_path / "public/t").to_table()["id"].to_pylist() == [100, 200, 300]
    behind = tables()
    behind._resumed = True
    with pytest.raises(SinkError, match=r"public/t in .* is ahead"):
        behind.stage("b-1", changes(200))
    behind.close()


def test_a_second_writer_is_noticed(tmp_path: Path) -> None:
    ours, theirs = destination(tmp_path), destination(tmp_path)
    ours.apply([job(1, [1])])
    theirs.apply([job(2, [2])])
    with pytest.raises(SinkError, match="somebody else writes to t"):
        ours.apply([job(2, [3])._replace(last=(500, 0))])
    ours.close()
    theirs.close()
