"""Tables of a publication in Apache Iceberg, as history: one commit for a table's shape, its rows and their number.

What is known of a table is in its properties, which each commit sets together with the data: they stay when snapshots
expire, and a commit on a table that has changed meanwhile is refused.
https://py.iceberg.apache.org/api/
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Final

import pyarrow as pa

from pgoutput_source.changes.schema import MetadataNames
from pgoutput_source.compute.metadata import own_columns
from pgoutput_source.destinations.alterations import Alterations, StoredColumn, alterations, aside
from pgoutput_source.destinations.base import Destination, Job, Mode, Reached, Refused
from pgoutput_source.destinations.delta_types import Misfits, stored_type
from pgoutput_source.destinations.old_rows import old_rows
from pgoutput_source.destinations.targets import Target
from pgoutput_source.errors import ConfigurationError, SinkError
from pgoutput_source.types.written import written

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.table import Table, Transaction

logger = logging.getLogger(__name__)

_OURS: Final = "pgoutput."
_TEXTS: Final = pa.map_(pa.utf8(), pa.utf8())
_METADATA: Final = MetadataNames(
    op=pa.utf8(),
    commit_lsn=pa.int64(),  # an LSN stays below 2⁶³
    seq=pa.int64(),
    lsn=pa.int64(),
    xid=pa.int64(),
    commit_ts=pa.timestamp("us", "UTC"),
    before=_TEXTS,
    unchanged=pa.list_(pa.utf8()),
    raw=_TEXTS,
)
"""The types of the metadata columns."""

_PROPERTIES: Final = {
    # The library would repeat an append on top of a commit of somebody else, who may have made the same one.
    "commit.retry.num-retries": "0",
    "commit.manifest-merge.enabled": "true",
    "write.metadata.delete-after-commit.enabled": "true",
    "write.metadata.previous-versions-max": "20",
}
_TRIES: Final = 10


class IcebergDestination(Destination):
    """Tables in Apache Iceberg; see `IcebergSink`."""

    def __init__(self, catalog: str | Mapping[str, str], *, mode: Mode) -> None:
        if mode != "history":
            raise ConfigurationError(
                f"Iceberg tables can't be kept in mode {mode!r}",
                hint="pyiceberg writes no deletes that are merged on read, and its public calls can't replace rows in "
                "one commit. Use mode='history'; or DeltaSink, DuckDBSink or PostgresSink for a mirror",
            )
        self.mode = mode
        self.catalog = catalog
        self._iceberg = _library("pyiceberg.catalog")
        self._errors = _library("pyiceberg.exceptions")
        self._opened: Catalog | None = None

    def __repr__(self) -> str:
        return "Iceberg"

    def close(self) -> None:
        """Close the catalogue."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def reached(self, target: Target) -> Reached | None:
        """How far a table is. A catalogue of its own: the other one's thread may be busy."""
        with self._explained(target), contextlib.closing(self._open()) as catalog:
            table = self._load(catalog, target)
            if table is None:
                return None
            said = table.properties
            point = (int(said[_OURS + "commit_lsn"]), int(said[_OURS + "seq"]))
            return Reached(int(said[_OURS + "number"]), point, tuple(json.loads(said[_OURS + "origin"])))

    def apply(self, jobs: Iterable[Job]) -> None:
        """Each job in a commit of its own."""
        for job in jobs:
            with self._explained(job.target):
                self._apply(job)

    # -- one job ----------------------------------------------------------------------------------------------------

    def _apply(self, job: Job) -> None:
        if self._opened is None:
            self._opened = self._open()
        for pause in range(_TRIES):
            # Loaded each time: the number and the data are committed on top of what was read here.
            table = self._load(self._opened, job.target)
            number = 0 if table is None else int(table.properties[_OURS + "number"])
            if number >= job.number:
                return
            _, changes = job.split(number)
            try:
                self._commit(self._opened, table, job, changes)
                return
            except (self._errors.CommitFailedException, self._errors.TableAlreadyExistsError) as e:
                logger.info("%s: %s: %s; looking again", self, job.target, e)
                time.sleep(0.05 * 1.5**pause)
        raise SinkError(
            f"{self}: {job.target}: others commit all the time",
            hint="let them commit less often, and start again",
        )

    def _commit(self, catalog: Catalog, table: Table | None, job: Job, changes: pa.Table) -> None:
        rows, columns = _rows(job, changes)
        relation = (changes.schema.metadata or {}).get(b"pg.relation_id", b"0").decode()
        fresh = {"commit_lsn": job.last[0], "seq": job.last[1], "number": job.number, "relation": relation}
        said = {_OURS + name: str(value) for name, value in fresh.items()}
        said[_OURS + "columns"] = json.dumps(columns)
        if table is None:
            catalog.create_namespace_if_not_exists((job.target.namespace,))
            made = {"origin": json.dumps(job.origin), "mode": self.mode, "number": "0", "commit_lsn": "0", "seq": "0"}
            properties = _PROPERTIES | said | {_OURS + name: value for name, value in made.items()}
            table = catalog.create_table(tuple(job.target), rows.schema, properties=properties)
            logger.info("%s: %s created", self, job.target)
        known = [StoredColumn(*column) for column in json.loads(table.properties[_OURS + "columns"])]
        recreated = relation != table.properties[_OURS + "relation"]
        names = [field.name for field in table.schema().fields]
        own = [name for name in names if name not in MetadataNames.of(changes.schema)]
        with table.transaction() as transaction:
            if columns != known or recreated:
                self._evolve(transaction, alterations(known, columns, own, recreated=recreated), names, rows.schema)
            transaction.append(rows)
            transaction.set_properties(said)

    def _evolve(self, transaction: Transaction, steps: Alterations, names: list[str], schema: pa.Schema) -> None:
        """Alter the table; a type that Iceberg can't make of another one is a new column, and the old one stays."""
        renamed = dict(steps.renamed)
        was = {name: before for before, name in renamed.items()}
        taken = {*names, *schema.names}
        for old, new in steps.retyped:
            if not _promotes(old.type, new.type):
                renamed[was.get(new.name, new.name)] = other = aside(new.name, taken)
                taken.add(other)
        if renamed:
            with transaction.update_schema() as update:
                for before in renamed:
                    update.rename_column((before,), f"pgoutput {before}")
            with transaction.update_schema() as update:
                for before, name in renamed.items():
                    update.rename_column((f"pgoutput {before}",), name)
        with transaction.update_schema() as update:
            update.union_by_name(schema)  # adds columns and promotes types

    # -- the catalogue ----------------------------------------------------------------------------------------------

    def _open(self) -> Catalog:
        synced = {"py-io-impl": "pgoutput_source.destinations.iceberg_io.SyncedFileIO"}
        if not isinstance(self.catalog, str):
            given = {**synced, **self.catalog}
            catalog: Catalog = self._iceberg.load_catalog(given.pop("name", "default"), **given)
            return catalog
        catalog = self._iceberg.load_catalog(self.catalog)
        if "py-io-impl" in catalog.properties:
            return catalog
        catalog.close()
        catalog = self._iceberg.load_catalog(self.catalog, **synced)
        return catalog

    def _load(self, catalog: Catalog, target: Target) -> Table | None:
        if not target.namespace:
            raise Refused.at(target, f"{target} has no namespace", hint="write into='{schema}.{table}'")
        try:
            table = catalog.load_table(tuple(target))
        except self._errors.NoSuchTableError:
            return None
        if _OURS + "number" not in table.properties:
            raise Refused.at(
                target,
                f"{target} is in the Iceberg catalogue already, and was not made by this package",
                hint="drop or rename it, or choose another target",
            )
        return table

    @contextlib.contextmanager
    def _explained(self, target: Target) -> Iterator[None]:
        """The library's errors as ours."""
        try:
            yield
        except SinkError:
            raise
        except (ValueError, TypeError, pa.ArrowException) as e:
            hint = f"alter {target} there so that it takes the changes, or exclude the table"
            raise Refused.at(target, f"{self}: {target}: {_said(e)}", hint=hint) from e
        except Exception as e:
            raise SinkError(
                f"{self}: {target}: {_said(e)}",
                hint="nothing of what failed is there, and it stays in the spool: repair the cause, and start again",
            ) from e


def _rows(job: Job, changes: pa.Table) -> tuple[pa.Table, list[StoredColumn]]:
    """The changes as rows of the table, and the table's own columns."""
    schema = changes.schema
    names, own = MetadataNames.of(schema), own_columns(schema)
    kinds = {name: _kept(schema.field(name).type) for name in own}
    fields = [pa.field(name, kind) for name, kind in (*kinds.items(), *zip(names, _METADATA, strict=True))]
    batches = []
    for batch in changes.to_batches():
        misfits = Misfits()
        arrays = []
        for name in own:
            pg_type = (schema.field(name).metadata or {}).get(b"pg.type", b"").decode()
            column = batch.column(name)
            if _lists_structs(column.type):
                column = written(column, pg_type)
            arrays.append(misfits.stored(column, pg_type, name).cast(kinds[name]))
        arrays += [batch.column(name).cast(kind) for name, kind in zip(names[:6], _METADATA[:6], strict=True)]
        arrays += [old_rows(batch), batch.column(names.unchanged), misfits.added_to(batch.column(names.raw))]
        batches.append(pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields)))
    columns = [StoredColumn.of(schema.field(name), str(kinds[name])) for name in own]
    return pa.Table.from_batches(batches, pa.schema(fields)), columns


def _kept(kind: pa.DataType) -> pa.DataType:
    """The Arrow type of a column in Iceberg, which has no integers of 16 bits."""
    if _lists_structs(kind):
        return pa.utf8()
    kind = stored_type(kind)
    return pa.int32() if pa.types.is_int16(kind) or pa.types.is_int8(kind) else kind


def _lists_structs(kind: pa.DataType) -> bool:
    """Whether there is a list of structs in it: pyiceberg writes and reads an empty list where it is null."""
    if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type):
        return True
    return pa.types.is_nested(kind) and any(_lists_structs(kind.field(i).type) for i in range(kind.num_fields))


def _promotes(old: str, new: str) -> bool:
    """Whether Iceberg can make a column of this type one of another.

    https://iceberg.apache.org/spec/#schema-evolution
    """
    if old == new or (old, new) in (("int32", "int64"), ("float", "double")):
        return True
    if not old.startswith("decimal128") or not new.startswith("decimal128"):
        return False
    (digits, scale), (more, same) = (
        json.loads(text.removeprefix("decimal128").replace("(", "[").replace(")", "]")) for text in (old, new)
    )
    return bool(scale == same and more >= digits)


def _said(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ConfigurationError(
            "IcebergSink needs the package pyiceberg", hint="pip install 'pgoutput-source[iceberg]'"
        ) from e
