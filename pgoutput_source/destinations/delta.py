"""Tables of a publication in Delta Lake: one Delta table each, in a folder or in an object store.

What is known of a table is in its log, in the commits that bring its rows: application transactions hold the number of
the last part, the position of its last change and the relation, the schema's fields hold the columns at the source, and
the configuration says whose table it is.
https://github.com/delta-io/delta/blob/master/PROTOCOL.md
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, Final
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.changes.schema import MetadataNames, TableName
from pgoutput_source.compute.net_effect import Standing
from pgoutput_source.compute.net_rows import NetRows, net_rows
from pgoutput_source.destinations.base import Destination, Job, Mode, Reached, Refused
from pgoutput_source.destinations.delta_rows import GONE, Cast, History, Mirror, Plan, key_is_plain, streamed
from pgoutput_source.destinations.targets import FolderTargets, Target
from pgoutput_source.errors import ConfigurationError, SinkError
from pgoutput_source.files import folder_name, local_path, sync

logger = logging.getLogger(__name__)

_NUMBER, _LSN, _SEQ, _RELATION = "pgoutput/number", "pgoutput/lsn", "pgoutput/seq", "pgoutput/relation"
_STORE: Final = re.compile(r"(s3a?|gs|az|adl|abfss?|azure)://")
_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m|\u21b3")  # in the library's messages
_HANDLES: Final = 64  # tables whose state stays in memory
_TRIES: Final = 20
_SMALL: Final = 32 << 20  # bytes; smaller files are worth to be compacted
_MANY: Final = 32  # small files
_EVERY: Final = 20  # commits, to count the files
_CHECKPOINT: Final = 100  # commits


class DeltaTargets(FolderTargets):
    """Folders for Delta tables. The library can't read a path with a percent sign in it, so a tilde is the escape.

    >>> DeltaTargets("lake/{schema}/{table}").of(TableName("public", "in/out~")).name
    'lake/public/in~2Fout~7E'
    """

    def __init__(self, template: str, *, tables: Iterable[str] = ("*",), exclude: Iterable[str] = ()) -> None:
        if "%" in template:
            raise ConfigurationError(
                f"{template!r} has a percent sign in it, and Delta Lake can't read such a path",
                hint="choose another folder",
            )
        super().__init__(template, tables=tables, exclude=exclude, folded=True)

    def _target(self, table: TableName) -> Target:
        schema, name = (folder_name(part).replace("~", "~7E").replace("%", "~") for part in table)
        return Target("", self.template.format(schema=schema, table=name))


class DeltaDestination(Destination):
    """Tables in Delta Lake; see `DeltaSink`."""

    def __init__(
        self,
        *,
        mode: Mode,
        storage_options: Mapping[str, str] | None = None,
        optimize: bool = True,
        keep: timedelta = timedelta(days=7),
    ) -> None:
        self.mode, self.optimize, self.keep = mode, optimize, keep
        self.options = dict(storage_options or {}) or None
        self._delta = _library()
        self._handles: OrderedDict[Target, Any] = OrderedDict()
        self._commits: dict[Target, int] = {}
        self._standing: dict[Target, Standing | None] = {}

    def __repr__(self) -> str:
        return "Delta Lake"

    def close(self) -> None:
        """Forget the tables' states."""
        self._handles.clear()

    def reached(self, target: Target) -> Reached | None:
        """How far a table is."""
        with self._explained(target):
            table = self._load(target)
            if table is None:
                return None
            said = table.metadata().configuration
            point = (table.transaction_version(_LSN) or 0, table.transaction_version(_SEQ) or 0)
            number = table.transaction_version(_NUMBER) or 0
        if not number:
            point = (0, -1)
        return Reached(number, point, tuple(json.loads(said["pgoutput.origin"])))

    def apply(self, jobs: Iterable[Job]) -> None:
        """Each job in a commit of its own."""
        self._standing = {}
        touched: dict[Target, None] = {}
        for job in jobs:
            with self._explained(job.target):
                self._apply(job)
            touched[job.target] = None
        for target in touched:
            self._maintain(target)

    # -- tables -----------------------------------------------------------------------------------------------------

    def _load(self, target: Target) -> Any:
        """A new handle of a table; None if there is no table."""
        uri = _uri(target)
        try:
            table = self._delta.DeltaTable(uri, storage_options=self.options)
        except self._delta.exceptions.TableNotFoundError:
            return None  # is_deltatable() would keep Python's lock while the store answers
        features = table.protocol()
        if "deletionVectors" in (features.reader_features or ()):
            raise Refused.at(
                target,
                f"{target} has deletion vectors, with which a merge may go wrong",
                hint="choose another target, or rewrite the table without delta.enableDeletionVectors",
            )
        said = table.metadata().configuration
        if "pgoutput.origin" not in said:
            raise Refused.at(
                target,
                f"{target} is there already, and was not made by this package",
                hint="move it away, or choose another target",
            )
        if (mode := said["pgoutput.mode"]) != self.mode:
            raise SinkError(
                f"{target} holds a {mode}, and this is mode {self.mode!r}",
                hint="choose another target, or delete it",
            )
        return table

    def _table(self, job: Job, schema: pa.Schema) -> Any:
        """The table of a job, as it is now; it is created if it is not there."""
        table = self._handles.pop(job.target, None)
        if table is None:
            table = self._load(job.target) or self._create(job, schema)
            self._sync(job.target, table, max(table.version() - _TRIES, -1))
        else:
            table.update_incremental()
        self._handles[job.target] = table
        while len(self._handles) > _HANDLES:
            self._handles.popitem(last=False)
        names = MetadataNames.of(job.changes.schema)
        said = table.metadata().configuration
        for what, is_now in (("origin", json.dumps(job.origin)), ("prefix", names.prefix)):
            if said[f"pgoutput.{what}"] != is_now:
                raise SinkError(
                    f"{job.target} was made with {what} {said[f'pgoutput.{what}']}, and this is {is_now}",
                    hint="choose another target, or delete it",
                )
        return table

    def _create(self, job: Job, schema: pa.Schema) -> Any:
        names = MetadataNames.of(job.changes.schema)
        table = str((job.changes.schema.metadata or {}).get(b"pg.table", b"").decode())
        said = {"origin": json.dumps(job.origin), "mode": self.mode, "prefix": names.prefix, "table": table}
        folder = _folder(job.target)
        missing = [] if folder is None else [above for above in (folder, *folder.parents) if not above.exists()]
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._delta.DeltaTable.create(
            _uri(job.target),
            schema,
            mode="ignore",  # another process may have been quicker; whose it is then is looked at below
            description=f"{table}: written by pgoutput_source in mode {self.mode!r}",
            configuration={f"pgoutput.{name}": value for name, value in said.items()},
            raise_if_key_not_exists=False,
            storage_options=self.options,
        )
        logger.info("%s: %s created", self, job.target)
        for above in missing:
            sync(above.parent)
        return self._load(job.target)

    # -- one job ----------------------------------------------------------------------------------------------------

    def _apply(self, job: Job) -> None:
        schema, target = job.changes.schema, job.target
        rows = History(schema, target) if self.mode == "history" else Mirror(schema, job.key, target)
        seen: int | None = None
        standing: Standing | None = None
        for pause in range(_TRIES):
            table = self._table(job, rows.schema)
            number = table.transaction_version(_NUMBER) or 0
            if number != seen:
                seen, (done, changes) = number, job.split(number)
                standing = self._standing.get(job.target)
                if isinstance(rows, Mirror) and job.identity == "f" and len(done):
                    _, standing = _net(done, job, standing)
                if isinstance(rows, Mirror) and len(changes):
                    net, standing = _net(changes, job, standing)
            if number >= job.number:
                break
            version = table.version()
            try:
                if isinstance(rows, History):
                    self._append(table, job, rows, changes)
                else:
                    self._merge(table, job, rows, net)
                if (table.transaction_version(_NUMBER) or 0) < job.number:
                    # A merge that changes nothing writes no commit, and the number must be there.
                    self._write(table, job, _fields(table).empty_table(), mode="append")
            except self._delta.exceptions.CommitFailedError as e:
                # Somebody else has committed: OPTIMIZE, or another publisher of the same parts.
                logger.info("%s: %s: %s; looking again", self, job.target, e)
                time.sleep(0.02 * 1.3**pause)
                continue
            self._sync(job.target, table, version)
            self._commits[job.target] = self._commits.get(job.target, 0) + 1
            break
        else:
            raise SinkError(
                f"{job.target}: others commit all the time",
                hint="run OPTIMIZE and the like less often, and start again",
            )
        self._standing[job.target] = standing

    def _append(self, table: Any, job: Job, rows: History, changes: pa.Table) -> None:
        there = _fields(table)
        names = rows.names_in(there)
        if aside := {name: column for name, column in names.items() if name != column and column not in there.names}:
            logger.warning(
                "%s: %s changed the type of %s: its values are in %s from now on",
                self, job.target, ", ".join(aside), ", ".join(aside.values()),
            )  # fmt: skip
        self._write(table, job, rows.table(changes, names, there), mode="append", schema_mode="merge")

    def _merge(self, table: Any, job: Job, rows: Mirror, net: NetRows) -> None:
        there = _fields(table)
        if table.transaction_version(_RELATION) not in (None, _relation(job)):
            logger.warning("%s: %s was recreated: the rows of the previous table are gone", self, job.target)
            puts = rows.puts(net, None, None)
            self._write(table, job, puts, mode="overwrite", schema_mode="overwrite")
            return
        if net.emptied:
            plan = rows.plan(there, lambda *_: True)
            puts = plan.widened(rows.puts(net, None, None))
            self._write(table, job, puts, mode="overwrite", schema_mode="overwrite")
            return
        plan = rows.plan(there, lambda name, cast: _casts(table, name, cast))
        sources = rows.sources(net)
        old = None if sources is None else _found(table, plan, rows, sources, rows.unsent(net))
        puts, gone = plan.widened(rows.puts(net, sources, old)), rows.gone(net)
        if plan.changes or not key_is_plain(rows.key_fields, puts, gone):
            if plan.changes:
                logger.warning("%s: %s changes its shape: %s; its files are rewritten", self, job.target, plan.said)
            with streamed(lambda: plan.kept(_scan(table, plan.needs), rows, puts, gone), puts, plan.schema) as reader:
                self._write(table, job, reader, mode="overwrite", schema_mode="overwrite")
            return
        if not len(puts) and not len(gone):
            return
        same = " AND ".join(f"t.{_q(name)} = s.{_q(name)}" for name in job.key)
        sets = {_q(name): f"s.{_q(name)}" for name in puts.schema.names}
        (
            table.merge(
                plan.source(puts, gone), same, source_alias="s", target_alias="t",
                streamed_exec=False,  # otherwise the keys' range does not prune files
                commit_properties=self._properties(job), post_commithook_properties=self._hooks(),
            )
            .when_matched_delete(f"s.{_q(GONE)}")
            .when_matched_update(sets, f"NOT s.{_q(GONE)}")
            .when_not_matched_insert(sets, f"NOT s.{_q(GONE)}")
            .execute()
        )  # fmt: skip

    def _write(self, table: Any, job: Job, data: Any, **options: Any) -> None:
        self._delta.write_deltalake(
            table,
            data,
            commit_properties=self._properties(job),
            post_commithook_properties=self._hooks(),
            **options,
        )

    def _properties(self, job: Job) -> Any:
        known = {_NUMBER: job.number, _LSN: job.last[0], _SEQ: job.last[1], _RELATION: _relation(job)}
        return self._delta.CommitProperties(
            app_transactions=[self._delta.Transaction(name, value) for name, value in known.items()]
        )

    def _hooks(self) -> Any:
        return self._delta.PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)

    # -- files ------------------------------------------------------------------------------------------------------

    def _sync(self, target: Target, table: Any, version: int) -> None:
        """Make the commits after a version durable. The library does not, and a store needs nothing."""
        folder = _folder(target)
        if folder is None:
            return
        log = folder / "_delta_log"
        for number in range(version + 1, table.version() + 1):
            entry = log / f"{number:020}.json"
            with contextlib.suppress(FileNotFoundError):  # cleaned, behind a checkpoint
                for line in entry.read_text("utf-8").splitlines():
                    added = json.loads(line).get("add")
                    if added is not None:
                        with contextlib.suppress(FileNotFoundError):  # replaced and vacuumed
                            sync(folder / unquote(added["path"]))
                sync(entry)
        sync(log)
        sync(folder)

    def _maintain(self, target: Target) -> None:
        """Checkpoint, compact and vacuum when that is due. What fails is tried again later: no row depends on it."""
        commits, table = self._commits.get(target, 0), self._handles.get(target)
        if table is None or not commits or commits % _EVERY:
            return
        try:
            if self.optimize and self._small(table) >= _MANY:
                table.optimize.compact(post_commithook_properties=self._hooks())
                table.update_incremental()
                self._sync(target, table, table.version() - 1)
            if commits % _CHECKPOINT == 0:
                table.create_checkpoint()
                if (folder := _folder(target)) is not None:
                    for file in (folder / "_delta_log").glob("*checkpoint*"):
                        sync(file)
                table.cleanup_metadata()
                if self.optimize:
                    table.vacuum(
                        retention_hours=int(self.keep.total_seconds() // 3600),
                        dry_run=False,
                        enforce_retention_duration=False,
                        full=self.keep >= timedelta(days=1),  # what a killed commit left is as old, then
                        post_commithook_properties=self._hooks(),
                    )
        except Exception as e:
            logger.warning("%s: %s could not be optimized, which is tried again later: %s", self, target, e)
            self._handles.pop(target, None)

    def _small(self, table: Any) -> int:
        sizes = pa.table(table.get_add_actions(flatten=True)).column("size_bytes")
        return int(pc.sum(pc.less(sizes, _SMALL)).as_py() or 0)

    @contextlib.contextmanager
    def _explained(self, target: Target) -> Iterator[None]:
        """The library's errors as ours. The table's state is read again afterwards."""
        try:
            yield
        except BaseException as e:
            self._handles.pop(target, None)
            # A panic of the library is no Exception.
            if isinstance(e, SinkError) or not (isinstance(e, Exception) or type(e).__name__ == "PanicException"):
                raise
            what = " ".join(_COLOURS.sub("", str(e)).split())[:600] or type(e).__name__
            if isinstance(e, (self._delta.exceptions.SchemaMismatchError, pa.ArrowException, NotImplementedError)):
                raise Refused.at(
                    target, f"{self}: {target}: {what}", hint="Delta Lake can't take it: exclude the table, or alter it"
                ) from e
            raise SinkError(
                f"{self}: {target}: {what}",
                hint="nothing of what failed is there, and it stays in the spool: repair the cause, and start again",
            ) from e


def _folder(target: Target) -> Path | None:
    """The folder of a table; None if it is in an object store."""
    return None if _STORE.match(target.name) else local_path(target.name).absolute()


def _uri(target: Target) -> str:
    folder = _folder(target)
    return quote(target.name, safe="/:@") if folder is None else folder.as_uri()


def _library() -> ModuleType:
    try:
        return importlib.import_module("deltalake")
    except ImportError as e:
        raise ConfigurationError(
            "Delta Lake needs the package deltalake", hint="pip install pgoutput-source[delta]"
        ) from e


def _net(changes: pa.Table, job: Job, standing: Standing | None) -> tuple[NetRows, Standing | None]:
    return net_rows(_one(changes), job.key, whole=job.identity == "f", standing=standing)


def _one(changes: pa.Table) -> pa.RecordBatch:
    batches = changes.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=changes.schema)


def _fields(table: Any) -> pa.Schema:
    return pa.schema(table.schema().to_arrow())


def _relation(job: Job) -> int:
    return int((job.changes.schema.metadata or {}).get(b"pg.relation_id", b"0"))


def _scan(table: Any, columns: list[str], predicate: str | None = None) -> Iterator[pa.RecordBatch]:
    kinds = _fields(table)
    schema = pa.schema([kinds.field(name) for name in columns])
    for batch in pa.RecordBatchReader.from_stream(table.scan(columns=columns, predicate=predicate)):
        # The engine may give views of strings.
        yield pa.RecordBatch.from_arrays([batch.column(f.name).cast(f.type) for f in schema], schema=schema)


def _found(table: Any, plan: Plan, rows: Mirror, keys: pa.Table, unsent: set[str]) -> pa.Table | None:
    """Rows of the table as they are, of these keys."""
    if plan.changes:
        return plan.matching(_scan(table, plan.needs), rows, keys)
    first = rows.key_fields[0]
    least, most = pc.min_max(keys.column(first.name)).as_py().values() if pa.types.is_integer(first.type) else (0, None)
    predicate = None if most is None else f"{_q(first.name)} BETWEEN {least} AND {most}"
    columns = [name for name in plan.needs if name in {*(f.name for f in rows.key_fields), *unsent, *rows.ours}]
    return plan.matching(_scan(table, columns, predicate), rows, keys)


def _casts(table: Any, name: str, cast: Cast) -> bool:
    """Whether all values of a column can be cast."""
    try:
        for batch in _scan(table, [name]):
            cast(batch.column(0))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        return False
    return True


def _q(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
