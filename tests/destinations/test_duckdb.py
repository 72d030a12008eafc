"""Tables in a DuckDB file: the source's tables are the oracle, read by the server."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from harness.database import Database
from harness.flow import Busy, Flow, failure, following, publish, wait_for
from harness.mirrors import keyed, unkeyed
from harness.store_mirrors import differ_in_store
from harness.type_cases import CASES, PINNED, drawn, plain
from harness.workload import Workload

from pgoutput_source import peek
from pgoutput_source.destinations.base import Job, Mode, Refused
from pgoutput_source.destinations.duckdb import DuckDBDestination
from pgoutput_source.destinations.duckdb_types import held, quoted
from pgoutput_source.destinations.targets import Target
from pgoutput_source.errors import ConfigurationError, SinkError
from pgoutput_source.testing import batch

CUT = {"PGOUTPUT_MAX_FRAMES": "7"}  # and an epoch for each poll


def into(db: Database, folder: Path, **environ: str) -> Flow:
    settings = {"MODE": "mirror", "SPOOL": str(folder / "spool"), "INTO": f"duckdb:{folder}/shop.duckdb"} | environ
    return Flow(db, folder, module="harness.into_tables", **settings)


def read(path: Path, query: str) -> pa.Table | None:
    """What a query gives; None if a table is not there."""
    with duckdb.connect(str(path), read_only=True) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        try:
            return connection.sql(query).to_arrow_table()
        except duckdb.CatalogException:
            return None


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(path), read_only=True) as connection:
        return connection.execute(query).fetchall()


def differ(db: Database, path: Path, tables: list[tuple[str, str]]) -> list[str]:
    return differ_in_store(db, lambda *name: read(path, f"FROM {'.'.join(map(quoted, name))}"), tables)


class Fed:
    """A destination that takes what a slot has, without a dataflow."""

    def __init__(self, db: Database, path: Path, mode: Mode = "mirror") -> None:
        self.db, self.path, self.mode, self.numbers = db, path, mode, itertools.count(1)

    def feed(self) -> None:
        """Apply what is new."""
        found = peek(self.db.dsn, slot="cdc", publication="cdc")
        with self.db.connect() as c:
            c.execute("SELECT pg_replication_slot_advance('cdc', pg_current_wal_lsn())")
        jobs = []
        for changes in found.batches:
            schema, number = changes.schema, next(self.numbers)
            key = schema.key if self.mode == "mirror" else ()
            data = pa.Table.from_batches([changes.data])
            jobs.append(Job(Target(*schema.full_name), number, (number, 0), key, schema.replica_identity, data))
        to(self.path, self.mode).apply(jobs)


@pytest.mark.parametrize("twice", ["", "1"])
def test_a_mirror_equals_its_source(db: Database, tmp_path: Path, twice: str) -> None:
    """Also if everything is applied twice."""
    with Workload(db.dsn, seed=3, tables=8, largest=300) as workload:
        publish(db)
        flow = into(db, tmp_path, EXCLUDE=unkeyed(workload), TWICE=twice)
        for _ in range(2):
            workload.run(700)
            flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
            assert differ(db, tmp_path / "shop.duckdb", keyed(workload)) == []


@pytest.mark.slow
def test_kill_9_while_parts_are_spooled_and_applied(db: Database, tmp_path: Path) -> None:
    """Half of the deaths come from outside, half within a transaction of the file or shortly after."""
    rng = random.Random(os.environ.get("SEED", "1"))
    with Busy(db.dsn, seed=rng.randrange(1000), tables=6, largest=200) as workload:
        publish(db)
        flow = into(db, tmp_path, EXCLUDE=unkeyed(workload))
        for death in range(int(os.environ.get("DEATHS", "10"))):
            environ = CUT | {"MAX_AGE": rng.choice(["0", "0.5"])}
            if death % 2:
                environ["KILL_WITHIN"] = str(rng.uniform(0, 0.15))
            process = flow.start("-s", rng.choice(["0", "1"]), *flow.recovery(), **environ)
            with following(process) as lines:
                wait_for(lines, "streaming from", process)
                if death % 2:
                    assert process.wait(60) == -signal.SIGKILL, lines
                else:
                    time.sleep(rng.uniform(0, 1.0))
                    process.send_signal(signal.SIGKILL)
        workload.stop()
        flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
    assert differ(db, tmp_path / "shop.duckdb", keyed(workload)) == []


def test_readers_of_the_copy_see_whole_transactions(db: Database, tmp_path: Path) -> None:
    shift = "UPDATE t SET id = id + 1; UPDATE f SET id = id + 1; UPDATE t SET n = n + id"
    copy = tmp_path / "copies" / "shop.duckdb"
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY DEFERRABLE, n int); CREATE TABLE f (LIKE t INCLUDING ALL)")
        c.execute("ALTER TABLE t REPLICA IDENTITY FULL; ALTER TABLE f REPLICA IDENTITY FULL")
        publish(db)
        for name in "tf":
            c.execute(f"INSERT INTO {name} SELECT i, 0 FROM generate_series(1, 20) AS i".encode())
        options = f'{{"publish_copy": "{copy}"}}'
        flow = into(db, tmp_path, KEY='{"public.t": "id", "public.f": "id"}', OPTIONS=options, **CUT)
        process = flow.start("-s", "0", *flow.recovery())
        with following(process) as lines:
            wait_for(lines, "streaming from", process)
            seen = set()
            for _ in range(8):
                c.execute(shift.encode())
                time.sleep(0.05)
                deadline = time.monotonic() + 2
                while time.monotonic() < deadline and (
                    not copy.exists() or differ(db, copy, [("public", "t"), ("public", "f")]) != []
                ):
                    if copy.exists() and read(copy, "FROM public.f") is not None:
                        query = "SELECT min(id), max(id), count(*) FROM (FROM public.t UNION ALL FROM public.f)"
                        seen |= set(rows(copy, query))
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0, lines
        for path in (copy, tmp_path / "shop.duckdb"):
            assert differ(db, path, [("public", "t"), ("public", "f")]) == []
    assert seen
    assert {(high - low, count) for low, high, count in seen} == {(19, 40)}


def test_a_lost_spool_is_an_error(db: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY)")
        publish(db)
        c.execute("INSERT INTO t SELECT generate_series(1, 100)")
    flow = into(db, tmp_path, MAX_AGE="60")
    process = flow.start("-s", "0", *flow.recovery())
    with following(process) as lines:
        wait_for(lines, "streaming from", process)
        deadline = time.monotonic() + 20
        while not list((tmp_path / "spool").glob("*.committed")):
            assert time.monotonic() < deadline, lines
            time.sleep(0.05)
        time.sleep(0.5)  # the state of a later epoch lists it
        process.send_signal(signal.SIGKILL)
    for file in (tmp_path / "spool").glob("*.committed"):
        file.rename(file.with_suffix(".away"))
    said, code = failure(flow, *flow.recovery())
    assert code != 0
    assert "neither staged nor published" in said
    for file in (tmp_path / "spool").glob("*.away"):
        file.rename(file.with_suffix(".committed"))
    flow.run("-s", "0", *flow.recovery(), PGOUTPUT_UNTIL="current")
    assert differ(db, tmp_path / "shop.duckdb", [("public", "t")]) == []


SHAPES = [
    "INSERT INTO t VALUES (1, 'a', 1), (2, 'b', 2)",
    "ALTER TABLE t ADD COLUMN plain int; ALTER TABLE t ADD COLUMN filled text DEFAULT 'x';"
    " ALTER TABLE t ADD at date DEFAULT 'infinity'; DELETE FROM t WHERE id = 1",
    "INSERT INTO t VALUES (3, 'c', 3, 3, 'y')",
    "ALTER TABLE t RENAME note TO n; ALTER TABLE t RENAME amount TO note; ALTER TABLE t RENAME n TO amount;"
    " ALTER TABLE t RENAME at TO until; UPDATE t SET note = 20 WHERE id = 2",
    "ALTER TABLE t ALTER note TYPE bigint; UPDATE t SET note = note * 10000000000",
    "ALTER TABLE t DROP COLUMN plain; UPDATE t SET amount = amount WHERE id = 2",
    "ALTER TABLE t ADD COLUMN plain timestamptz; UPDATE t SET plain = now()",
    "ALTER TABLE t ALTER plain TYPE text USING 'was ' || plain; UPDATE t SET amount = amount",
    "ALTER TABLE t ADD f float8; UPDATE t SET f = id; ALTER TABLE t ALTER f TYPE text; INSERT INTO t VALUES (5, 'e')",
    "UPDATE t SET f = f",
    "UPDATE t SET id = id + 10; DELETE FROM t WHERE id = 12",
    "TRUNCATE t; INSERT INTO t (id, amount) VALUES (7, 'seven')",
    "DROP TABLE t; CREATE TABLE t (id text PRIMARY KEY, other int[]); INSERT INTO t VALUES ('x', '{1,NULL}')",
]


def test_a_mirror_follows_alter_table(db: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, note text, amount int)")
        publish(db)
        fed = Fed(db, tmp_path / "shop.duckdb")
        for shape in SHAPES:
            c.execute(shape.encode())
            fed.feed()
            assert differ(db, tmp_path / "shop.duckdb", [("public", "t")]) == [], shape
    assert rows(tmp_path / "shop.duckdb", "SELECT count(*) FROM public.t WHERE _unchanged IS NOT NULL") == [(0,)]


def test_values_that_can_not_be_cast_are_unknown(db: Database, tmp_path: Path) -> None:
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, n text, f float8)")
        publish(db)
        fed = Fed(db, tmp_path / "shop.duckdb")
        c.execute("INSERT INTO t VALUES (1, 'abc', 1.5)")
        fed.feed()
        c.execute(
            "ALTER TABLE t ALTER n TYPE int USING length(n); ALTER TABLE t ALTER f TYPE int;"
            " INSERT INTO t VALUES (2, 2)"
        )
        fed.feed()
    found = rows(tmp_path / "shop.duckdb", "SELECT id, n, n__2, f, f__2, _unchanged FROM public.t ORDER BY id")
    assert found == [(1, None, "abc", None, 1.5, ["n", "f"]), (2, 2, None, None, None, None)]


def test_history_has_every_change(db: Database, tmp_path: Path) -> None:
    last = "294247-01-10 04:00:54.775807"
    with db.connect() as c:
        c.execute("CREATE TABLE t (id int PRIMARY KEY, day date)")
        c.execute("CREATE TABLE f (n numeric, at timestamp); ALTER TABLE f REPLICA IDENTITY FULL")
        publish(db)
        fed = Fed(db, tmp_path / "shop.duckdb", "history")
        c.execute("INSERT INTO t VALUES (1, 'infinity'), (2, '0044-03-15 BC')")
        c.execute("UPDATE t SET id = 3 WHERE id = 1; DELETE FROM t WHERE id = 2; TRUNCATE t")
        c.execute(f"INSERT INTO f VALUES ('NaN', NULL), (1.50, '{last}'); UPDATE f SET n = 2 WHERE n = 1.5".encode())
        fed.feed()
        c.execute("ALTER TABLE t ALTER id TYPE text; ALTER TABLE t RENAME day TO d; INSERT INTO t VALUES ('x', NULL)")
        fed.feed()
    path = tmp_path / "shop.duckdb"
    query = "SELECT _op, id, d::varchar, _raw['d'], _before['id'] FROM public.t ORDER BY _commit_lsn, _seq"
    assert rows(path, query) == [
        ("I", "1", None, "infinity", None),
        ("I", "2", "0044-03-15 (BC)", None, None),
        ("U", "3", None, "infinity", "1"),
        ("D", "2", None, None, "2"),
        ("T", None, None, None, None),
        ("I", "x", None, None, None),
    ]
    query = "SELECT _op, n, _raw['at'], _before['n'], _before['at'] FROM public.f ORDER BY _commit_lsn, _seq"
    assert rows(path, query) == [
        ("I", "NaN", None, None, None),
        ("I", "1.50", last, None, None),
        ("U", "2", last, "1.50", last),
    ]


KEYS = {
    "numeric": ("1.0", "1.00", "2"),
    "float8": ("-0", "0", "NaN"),
    "date": ("infinity", "-infinity", "2024-01-01"),
    "char(5)": ("a", "b", "c"),
    "interval": ("1 mon", "30 days", "1 day"),
    "int[]": ("{1}", "{2}", "{{1}}"),
}


def test_keys_are_equal_where_the_server_says_so(db: Database, tmp_path: Path) -> None:
    """Whatever their cells and misfits: a key that is written otherwise and one that DuckDB can't hold."""
    with db.connect() as c:
        for i, kind in enumerate(KEYS):
            c.execute(f"CREATE TABLE k{i} (k {kind} PRIMARY KEY, n int, big text)".encode())
            c.execute(f"ALTER TABLE k{i} ALTER big SET STORAGE EXTERNAL".encode())
        publish(db)
        fed = Fed(db, tmp_path / "shop.duckdb")
        for step in range(3):
            for i, (a, b, other) in enumerate(KEYS.values()):
                if step == 0:
                    c.execute(f"INSERT INTO k{i} VALUES ('{a}', 1, repeat('x', 9000)), ('{other}', 2, 'y')".encode())
                elif step == 1:
                    c.execute(f"UPDATE k{i} SET k = '{b}', n = 3 WHERE n = 1".encode())
                else:
                    c.execute(f"DELETE FROM k{i} WHERE k = '{other}'; UPDATE k{i} SET n = 4".encode())
            fed.feed()
            assert differ(db, tmp_path / "shop.duckdb", [("public", f"k{i}") for i in range(len(KEYS))]) == []


def made(table: str, changes: list[Any], number: int = 1, key: str = "id", **options: Any) -> Job:
    changed = batch(table, changes, key=key, **options)
    name = changed.schema.full_name
    keys = (key,) if options.get("identity") != "f" else ()
    return Job(Target(*name), number, (number, 0), keys, "d", pa.Table.from_batches([changed.data]))


def to(path: Path, mode: Mode = "mirror", **options: Any) -> DuckDBDestination:
    return DuckDBDestination(path, mode=mode, patience=timedelta(seconds=0.3), **options)


def test_control_applied_twice_without_numbers_a_mirror_is_wrong(tmp_path: Path) -> None:
    """Upserts are not idempotent: the row that an unsent value is taken from is gone the second time."""
    note = "x" * 50

    types = {"id": pa.int64(), "note": pa.utf8()}
    inserted = [("I", {"id": 1, "note": note})]
    moved = [("U", {"id": 2, "note": None}, {"id": 1})]

    def applied(numbers: list[int]) -> list[Any]:
        path = tmp_path / f"{numbers}.duckdb"
        to(path).apply([made("public.t", inserted, numbers[0], types=types)])
        for number in numbers[1:]:
            to(path).apply([made("public.t", moved, number, types=types, unchanged={0: ["note"]})])
        return rows(path, "SELECT id, note, _unchanged FROM public.t")

    assert applied([1, 2, 2]) == [(2, note, None)]
    assert applied([1, 2, 3]) != [(2, note, None)]


def test_asking_how_far_a_table_is_while_it_is_applied(tmp_path: Path) -> None:
    destination, done = to(tmp_path / "shop.duckdb"), threading.Event()
    errors: list[SinkError] = []

    def ask() -> None:
        while not done.is_set():
            try:
                destination.reached(Target("public", "t"))
            except SinkError as e:
                errors.append(e)
                return

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(1, 30):
        destination.apply([made("public.t", [("I", {"id": number})], number)])
    done.set()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_failing_table_leaves_all_tables_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "shop.duckdb"
    to(path).apply([made("a.t", [("I", {"id": 1})])])

    def jobs() -> Any:
        yield made("a.t", [("I", {"id": 2})], 2)
        yield made("b.t", [("I", {"id": 2})])
        raise SinkError("the spool is gone")

    with pytest.raises(SinkError, match="the spool is gone"):
        to(path).apply(jobs())
    assert rows(path, "SELECT id FROM a.t") == [(1,)]
    reached = to(path).reached(Target("a", "t"))
    assert reached is not None
    assert reached.number == 1
    assert to(path).reached(Target("b", "t")) is None


def refused(tmp_path: Path, name: str) -> Path:
    path = tmp_path / f"{name}.duckdb"
    if name == "text":
        path.write_text("not a database" * 1000)
    elif name == "folder":
        path.mkdir()
    else:
        to(path).apply([made("public.t", [("I", {"id": 1})])])
    if name == "newer":
        content = bytearray(path.read_bytes())
        content[12:20] = (10_000).to_bytes(8, "little")  # the storage version, after a checksum and "DUCK"
        checksum = 5381
        for (word,) in struct.iter_unpack("<Q", content[8:4096]):
            checksum ^= word * 0xBF58476D1CE4E5B9 & 2**64 - 1
        content[:8] = checksum.to_bytes(8, "little")
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "said", "hint"),
    [
        ("text", "not a valid DuckDB database", "choose another path"),
        ("folder", "directory", "repair the cause"),
        ("newer", "version number", "upgrade duckdb"),
    ],
)
def test_what_is_no_file_for_us_is_refused(tmp_path: Path, name: str, said: str, hint: str) -> None:
    path = refused(tmp_path, name)
    for first in (True, False):
        with pytest.raises(SinkError) as e:
            to(path).reached(Target("public", "t")) if first else to(path).apply([])
        assert said in str(e.value)
        assert str(path) in str(e.value)
        assert hint in str(e.value.hint)


def test_tables_of_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "shop.duckdb"
    to(path).apply([made("public.t", [("I", {"id": 1})])])
    with pytest.raises(SinkError, match="holds a mirror"):
        to(path, "history").reached(Target("public", "t"))
    with duckdb.connect(str(path)) as connection:
        connection.execute('CREATE TABLE public."Mine" (id INTEGER)')
    with pytest.raises(SinkError, match="was not made by this package"):
        to(path).reached(Target("public", "mine"))
    with pytest.raises(SinkError, match="does not tell upper and lower case apart"):
        to(path).apply([made("public.u", [("I", {"id": 1, "a": 1, "A": 2})])])
    with duckdb.connect(str(path)) as connection:
        connection.execute("ALTER TABLE public.t DROP id; ALTER TABLE public.t ADD id DATE")
    with pytest.raises(Refused, match=r"public\.t: ") as e:
        to(path).apply([made("public.u", [("I", {"id": 1})]), made("public.t", [("I", {"id": 2})], 2)])
    assert e.value.target == Target("public", "t")
    assert to(path).reached(Target("public", "u")) is None
    with pytest.raises(SinkError, match="does not tell upper and lower case apart"):
        to(path, "history").apply([made("public.u", [("I", {"id": 1, "_OP": 1})])])


def test_a_full_disk_is_one_error_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "shop.duckdb"
    to(path).apply([made("public.t", [("I", {"id": 1, "note": "x"})])])
    code = f"""
import resource, sys
sys.path.insert(0, "tests/destinations")
from test_duckdb import *
big = made("public.t", [("I", {{"id": i, "note": str(random.random()) * 200}}) for i in range(2, 3000)], 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    to(Path({str(path)!r})).apply([big])
except SinkError as e:
    print(e, e.hint)
else:
    print("nothing failed")
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
"""
    environ = os.environ | {"PYTHONPATH": "tests"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=False)
    assert "make room" in done.stdout, done
    assert rows(path, "SELECT id FROM public.t") == [(1,)]
    to(path).apply([made("public.t", [("I", {"id": i, "note": "y" * 2000}) for i in range(2, 3000)], 2)])
    assert rows(path, "SELECT count(*) FROM public.t") == [(2999,)]


def test_a_reader_holds_the_sink_up_and_then_is_named(tmp_path: Path) -> None:
    path = tmp_path / "shop.duckdb"
    to(path).apply([made("public.t", [("I", {"id": 1})])])
    code = f"import duckdb, sys; c = duckdb.connect({str(path)!r}, read_only=True); print(flush=True); sys.stdin.read()"
    reader = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert reader.stdout is not None
    assert reader.stdin is not None
    reader.stdout.readline()
    job = made("public.t", [("I", {"id": 2})], 2)
    with pytest.raises(SinkError, match="lock") as e:
        to(path).apply([job])
    assert str(reader.pid) in str(e.value)
    assert "publish_copy" in str(e.value.hint)
    threading.Timer(0.3, reader.stdin.close).start()
    DuckDBDestination(path, mode="mirror").apply([job])
    reader.wait()
    reader.stdout.close()
    assert rows(path, "SELECT id FROM public.t ORDER BY id") == [(1,), (2,)]


def test_a_file_named_like_a_schema(tmp_path: Path) -> None:
    for name in ("public", "pgoutput"):
        path = tmp_path / f"{name}.duckdb"
        to(path).apply([made("public.t", [("I", {"id": 1, "note": "x"})])])
        to(path).apply([made("public.t", [("U", {"id": 2, "note": "y"}, {"id": 1})], 2)])
        assert rows(path, f"SELECT id FROM {name}.public.t") == [(2,)]


def test_every_type_comes_back_as_it_was(db: Database, tmp_path: Path) -> None:
    """As the cells of the batch, and with `_raw` as the server's text."""
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
    changes = peek(db.dsn, slot="cdc", publication="cdc").of("public.t")[0].data
    modes: list[tuple[Mode, tuple[str, ...]]] = [("mirror", ("id",)), ("history", ())]
    for mode, key in modes:
        path = tmp_path / f"{mode}.duckdb"
        to(path, mode).apply([Job(Target("public", "t"), 1, (1, 0), key, "d", pa.Table.from_batches([changes]))])
        found = read(path, "FROM public.t ORDER BY id")
        assert found is not None
        for name, kind in kinds.items():
            column = pa.concat_arrays(found[name].chunks).cast(changes[name].type)
            assert repr(plain(column)) == repr(plain(held(changes)[name])), f"{name}: {kind}"
    assert differ(db, tmp_path / "mirror.duckdb", [("public", "t")]) == []


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(ConfigurationError) as e:
        to(tmp_path / "shop.duckdb")
    assert "pgoutput-source[duckdb]" in str(e.value.hint)
