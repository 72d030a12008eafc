"""The history of one table in a folder of Parquet files, mapped to the table's current columns.

A table is a relation, not a name. Files from before a table was recreated, or from when another table had its name,
belong to a different table. A column is an attribute number within its relation, not a name. A renamed column keeps its
values, and a column that takes another's name does not get them. For each current column, the files of an earlier
version either have it, or it had one value in all their rows, or its values are unknown.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pgoutput_source.changes.schema import MetadataNames
from pgoutput_source.compute.metadata import Bools, Ints, own_columns, renamed
from pgoutput_source.compute.versions import Past, column_in, relation_of
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.parquet.folder import Asked, may_be, table_of
from pgoutput_source.parquet.read import common_type, is_number, schemas_of
from pgoutput_source.types.casts import Cast, cast_of

logger = logging.getLogger(__name__)

OLD: Final = "old\0"
"""The prefix of columns of old rows. It has a zero byte, so no column of a table has such a name."""


@dataclass(frozen=True, slots=True)
class VersionFiles:
    """Successive files of one version of the table.

    Attributes:
        data: The files.
        rows: How many changes are in them.
        schema: Their schema.
        past: What these files know about each current column, by its name.
    """

    data: ds.FileSystemDataset
    rows: int
    schema: pa.Schema
    past: dict[str, Past]

    @property
    def whole(self) -> bool:
        """Whether old rows have all columns."""
        return (self.schema.metadata or {}).get(b"pg.identity") == b"f"

    @property
    def metadata(self) -> MetadataNames:
        """The names of the metadata columns in the files."""
        return MetadataNames.of(self.schema)

    @property
    def current(self) -> dict[str, str]:
        """The current names of columns by their names in the files."""
        return {past.name: name for name, past in self.past.items() if past.name is not None}


class TableHistory:
    """All changes of a table in a folder, in the order of the files.

    `schema` is that of the newest version, without columns that the table no longer has. `metadata` has the names of
    its metadata columns, which are used for all files.
    """

    def __init__(self, folder: Path, table: str | None) -> None:
        files = _of_relation(_of_table(folder, table), folder)
        newest = list(files.values())[-1]
        self.schema, self.metadata = newest, MetadataNames.of(newest)
        self.runs: list[VersionFiles] = []
        for schema, group in _runs(files):
            data = ds.dataset([str(file) for file in group], schema=schema, format="parquet")
            past = {name: column_in(schema, newest.field(name)) for name in own_columns(newest)}
            self.runs.append(VersionFiles(data, data.count_rows(), schema, past))
        self._starts = np.cumsum([0, *(run.rows for run in self.runs)])
        self._say_what_is_unknown(table_of(newest) or str(folder))

    def columns(self, names: Sequence[str], olds: Sequence[str] = (), keys: Sequence[str] = ()) -> pa.Table:
        """Columns of all changes.

        Columns of old rows are prefixed with `OLD`; the column `OLD` tells whether there is an old row. An unknown
        value is null. `keys` count as known whatever their type was, and get a type that holds the values of all
        versions.
        """
        kinds = {name: self._key_type(name) for name in keys}
        return pa.concat_tables([_read(run, self.schema, names, olds, kinds) for run in self.runs])

    def take(self, places: Ints, names: Sequence[str], olds: Sequence[str] = ()) -> pa.Table:
        """Columns of the changes at these places, in this order."""
        of = np.searchsorted(self._starts, places, "right") - 1
        order = np.argsort(of, kind="stable")
        parts = []
        for i, run in enumerate(self.runs):
            inside = pa.array(places[order][of[order] == i] - self._starts[i])
            if len(inside) or not i:
                parts.append(_read(run, self.schema, names, olds, {}, inside))
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return pa.concat_tables(parts).take(pa.array(back))

    def known(self, name: str) -> Bools:
        """For each change, whether its file knows the value of a column."""
        return np.repeat([run.past[name].known for run in self.runs], [run.rows for run in self.runs])

    def whole(self) -> Bools:
        """For each change, whether an old row would have all columns."""
        return np.repeat([run.whole for run in self.runs], [run.rows for run in self.runs])

    def keeps_identity(self, name: str) -> bool:
        """Whether values of a key identify the same rows, whatever type it has had."""
        fields = [run.schema.field(past.name) for run in self.runs if (past := run.past[name]).name is not None]
        if all(is_number(field.type) or _pg_type(field) == b"numeric" for field in fields):
            return True
        return all(
            run.past[name].known or run.past[name].name is None or _cast(run, self.schema, name) is not None
            for run in self.runs
        )

    def _key_type(self, name: str) -> pa.DataType:
        now = self.schema.field(name).type
        kinds = [
            run.schema.field(past.name).type if _cast(run, self.schema, name) is None else now
            for run in self.runs
            if (past := run.past[name]).name is not None
        ]
        kind = common_type(kinds) if kinds else pa.null()
        if kind is None:
            raise ConfigurationError(
                f"the types that key {name} has had don't go together: {', '.join(map(str, dict.fromkeys(kinds)))}",
                column=name,
                hint="read() gives all changes; or move the files of earlier versions to another folder",
            )
        return kind

    def _say_what_is_unknown(self, table: str) -> None:
        reasons: dict[str, str] = {}
        for run in self.runs:
            for name, past in run.past.items():
                if not past.known:
                    reasons[name] = past.reason
        for name, reason in reasons.items():
            logger.warning(
                "%s: column %s %s: its value is unknown in rows that have not been sent since (_unchanged)",
                table, name, reason,
            )  # fmt: skip


def _pg_type(field: pa.Field) -> bytes | None:
    found: bytes | None = (field.metadata or {}).get(b"pg.type")
    return found


def _of_table(folder: Path, table: str | None) -> tuple[str, dict[Path, pa.Schema]]:
    """The requested table, and all files of the folder."""
    files = schemas_of(folder)
    tables = {table_of(schema) for schema in files.values()}
    tables -= {old for old in tables if any(new != old and may_be(new, old) for new in tables)}
    if not tables or (table is not None and not any(map(Asked(table).of, files.values()))):
        raise ConfigurationError(
            f"there are no changes of {table or 'any table'} in {folder}",
            hint=f"it has changes of {', '.join(sorted(tables))}" if tables else "it has no published files (yet)",
        )
    if table is None and len(tables) > 1:
        raise ConfigurationError(
            f"{folder} has changes of several tables", hint=f"pass table=, one of {', '.join(sorted(tables))}"
        )
    return table if table is not None else tables.pop(), files


def _of_relation(asked: tuple[str, dict[Path, pa.Schema]], folder: Path) -> dict[Path, pa.Schema]:
    """The files of the relation that has the table's name in the newest file."""
    table, files = asked
    asked_for = Asked(table)
    named = [file for file, schema in files.items() if asked_for.of(schema)]
    relation = relation_of(files[named[-1]])
    if relation is None:
        return {file: files[file] for file in named}
    found = {f: s for f, s in files.items() if relation_of(s) == relation and (relation.told or asked_for.of(s))}
    others = [file for file in named if file not in found]
    if others:
        logger.warning(
            "%s: %d files were written for another table that was called %s before: their rows are left out",
            folder, len(others), table,
        )  # fmt: skip
    return found


def _runs(files: Mapping[Path, pa.Schema]) -> Iterator[tuple[pa.Schema, list[Path]]]:
    group: list[Path] = []
    last: pa.Schema | None = None
    for file, schema in files.items():
        if last is not None and not schema.equals(last, check_metadata=True):
            yield last, group
            group = []
        group.append(file)
        last = schema
    if last is not None:
        yield last, group


def _read(
    run: VersionFiles,
    newest: pa.Schema,
    names: Sequence[str],
    olds: Sequence[str],
    kinds: Mapping[str, pa.DataType],
    places: pa.Array | None = None,
) -> pa.Table:
    expressions: dict[str, pc.Expression] = {}
    metadata, was = MetadataNames.of(newest), run.metadata
    casts = {name: cast for name in kinds if (cast := _cast(run, newest, name)) is not None}
    for name in names:
        expressions[name] = _expression(run, newest, name, kinds.get(name))
        if name in casts:
            expressions[name] = pc.field(run.past[name].name)
    if olds:
        there = was.before in run.schema.names
        expressions[OLD] = pc.field(was.before).is_valid() if there else pc.scalar(False)
    for name in olds:
        past = run.past[name]
        kind = kinds.get(name, newest.field(name).type)
        here = past.name is not None and was.before in run.schema.names and _has(run.schema, past.name)
        if here and (past.known or name in kinds):
            cell = pc.field(was.before, past.name)
            expressions[OLD + name] = cell if name in casts else cell.cast(kind)
        else:
            value = past.value if past.name is None and name not in kinds else None
            expressions[OLD + name] = pc.scalar(pa.scalar(None, kind) if value is None else value)
    scanner = run.data.scanner(columns=expressions)
    table = scanner.to_table() if places is None else scanner.take(places)
    for name, cast in casts.items():
        for column in {name, OLD + name} & set(table.column_names):
            index = table.schema.get_field_index(column)
            chunks = [cast(chunk).cast(kinds[name]) for chunk in table.column(column).chunks if chunk.type != pa.null()]
            table = table.set_column(index, column, pa.chunked_array(chunks, kinds[name]))
    if was != metadata or any(old != new for old, new in run.current.items()):
        for name in {metadata.unchanged, metadata.raw} & set(names):
            index = table.schema.get_field_index(name)
            column = renamed(table.column(name), run.current, old=was.old, now=metadata.old)
            table = table.set_column(index, name, column)
    return table


def _cast(run: VersionFiles, newest: pa.Schema, name: str) -> Cast | None:
    """What makes a key of the newest type of one whose type has changed since, if it is known."""
    past = run.past[name]
    if past.known or past.name is None:
        return None
    return cast_of(run.schema.field(past.name), newest.field(name))


def _has(schema: pa.Schema, name: str) -> bool:
    return bool(schema.field(MetadataNames.of(schema).before).type.get_field_index(name) >= 0)


def _expression(run: VersionFiles, newest: pa.Schema, name: str, kind: pa.DataType | None) -> pc.Expression:
    target = newest.field(name).type if kind is None else kind
    past = run.past.get(name)
    if past is None:  # a metadata column
        named = dict(zip(MetadataNames.of(newest), run.metadata, strict=True))[name]
        return pc.field(named) if named in run.schema.names else pc.scalar(pa.scalar(None, target))
    if past.name is not None and (past.known or kind is not None):
        here = run.schema.field(past.name).type
        return pc.field(past.name) if here == target else pc.field(past.name).cast(target)
    return pc.scalar(pa.scalar(None, target) if past.value is None else past.value)
