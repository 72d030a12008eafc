"""Rows as a Delta table holds them, and how a table gets from the shape it has to that of new rows."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.changes.schema import MetadataNames, attnum_of, missing_of
from pgoutput_source.compute.keys import KeyColumns
from pgoutput_source.compute.metadata import Bools, Ints, own_columns, renamed
from pgoutput_source.compute.net_rows import NetRows
from pgoutput_source.compute.versions import column_in
from pgoutput_source.destinations.base import Refused
from pgoutput_source.destinations.delta_types import Misfits, beyond, fits, stored, stored_type, with_texts
from pgoutput_source.destinations.targets import Target
from pgoutput_source.types.keys import cells_tell
from pgoutput_source.types.written import written

GONE: Final = "pgoutput gone"
"""A column of what is merged: whether the key has no row any more."""

Cast = Callable[[pa.Array], pa.Array]
Casts = Callable[[str, Cast], bool]
"""Whether all values of the table's column can be cast."""

_TEXTS: Final = pa.map_(pa.utf8(), pa.utf8())
_NAMES: Final = pa.list_(pa.utf8())


def _pg_type(column: pa.Field) -> str:
    return str((column.metadata or {}).get(b"pg.type", b"").decode())


def _own_fields(schema: pa.Schema, target: Target) -> list[pa.Field]:
    """The table's own columns with Delta's types, and what is known of them at the source."""
    own = [schema.field(name) for name in own_columns(schema)]
    folded: dict[str, str] = {}
    for column in own:
        other = folded.setdefault(column.name.casefold(), column.name)
        if other != column.name:
            table = (schema.metadata or {}).get(b"pg.table", b"").decode()
            raise Refused.at(
                target,
                f"columns {other!r} and {column.name!r} of {table} differ only by case, which Delta Lake can't tell",
                hint="rename one of them, or leave the table out with exclude=",
            )
    return [pa.field(f.name, stored_type(f.type), metadata=_facts(f)) for f in own]


def _facts(column: pa.Field) -> dict[bytes, bytes]:
    wanted = (b"pg.oid", b"pg.type", b"pg.typmod", b"pg.attnum")
    return {name: value for name, value in (column.metadata or {}).items() if name in wanted}


# -- history ----------------------------------------------------------------------------------------------------------


class History:
    """Every change of one version of a table. A column keeps its type: another type is another column, `name__2`."""

    def __init__(self, source: pa.Schema, target: Target) -> None:
        self.names = MetadataNames.of(source)
        self.own = [pa.field(f.name, _roomy(f.type), metadata=f.metadata) for f in _own_fields(source, target)]
        self.pg_types = {name: _pg_type(source.field(name)) for name in own_columns(source)}
        self.schema = self._schema({f.name: f.name for f in self.own}, {f.name: f.type for f in self.own})

    def _schema(self, names: Mapping[str, str], kinds: Mapping[str, pa.DataType]) -> pa.Schema:
        own = [pa.field(names[f.name], kinds[f.name], metadata=f.metadata) for f in self.own]
        n = self.names
        whole, text = pa.int64(), pa.utf8()
        fields = [pa.field(name, kind) for name, kind in (
            (n.op, text), (n.commit_lsn, whole), (n.seq, whole), (n.lsn, whole), (n.xid, whole),
            (n.commit_ts, pa.timestamp("us", "UTC")),
        )]  # fmt: skip
        if own:
            fields.append(pa.field(n.before, pa.struct([pa.field(f.name, f.type) for f in own])))
        return pa.schema([*own, *fields, pa.field(n.unchanged, _NAMES), pa.field(n.raw, _TEXTS)])

    def names_in(self, there: pa.Schema) -> dict[str, str]:
        """By column, the column of the table that its values go to."""
        kinds = {f.name.casefold(): f for f in there}
        wanted = {f.name.casefold() for f in self.own}
        found = {}
        for column in self.own:
            name, number = column.name, 2
            while (other := kinds.get(name.casefold())) is not None or (name != column.name and name in wanted):
                if other is not None and other.name == name and fits(column.type, other.type):
                    break
                name, number = f"{column.name}__{number}", number + 1
            found[column.name] = name
            wanted.add(name.casefold())
        return found

    def table(self, changes: pa.Table, names: Mapping[str, str], there: pa.Schema) -> pa.Table:
        """The changes as rows of the table."""
        data, n = _one(changes), self.names
        known = set(there.names)
        kinds = {f.name: there.field(names[f.name]).type if names[f.name] in known else f.type for f in self.own}
        schema = self._schema(names, kinds)
        misfits = Misfits()
        own = [misfits.stored(data.column(f.name), self.pg_types[f.name], f.name).cast(kinds[f.name]) for f in self.own]
        columns = [*own, data.column(n.op).cast(pa.utf8())]
        columns += [data.column(name).cast(pa.int64()) for name in (n.commit_lsn, n.seq, n.lsn, n.xid)]
        columns.append(data.column(n.commit_ts))
        if own:
            before = data.column(n.before)
            parts = [
                misfits.stored(part, self.pg_types[f.name], n.old + f.name).cast(kinds[f.name])
                for f, part in zip(self.own, before.flatten(), strict=True)
            ]
            kind = schema.field(n.before).type
            columns.append(pa.StructArray.from_arrays(parts, fields=list(kind), mask=before.is_null()))
        unchanged, raw = data.column(n.unchanged), misfits.added_to(data.column(n.raw))
        if any(name != column for name, column in names.items()):
            unchanged = renamed(pa.chunked_array([unchanged]), names).combine_chunks()
            raw = renamed(pa.chunked_array([raw]), names, old=n.old).combine_chunks()
        columns += [unchanged.cast(_NAMES), raw.cast(_TEXTS)]
        # What is said of a column that is there must be what the table says, or nothing.
        fields = [f.remove_metadata() if f.name in known else f for f in schema]
        return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def _roomy(kind: pa.DataType) -> pa.DataType:
    """Small integers have room from the start: so the commonest change of a type is none."""
    return pa.int64() if pa.types.is_signed_integer(kind) else kind


# -- mirror -----------------------------------------------------------------------------------------------------------


class Mirror:
    """The rows that changes of one version of a table come to."""

    def __init__(self, source: pa.Schema, key: Sequence[str], target: Target) -> None:
        self.source = source
        self.names = MetadataNames.of(source)
        self.own = _own_fields(source, target)
        n = self.names
        ours = [pa.field(n.commit_lsn, pa.int64()), pa.field(n.unchanged, _NAMES), pa.field(n.raw, _TEXTS)]
        self.ours = [f.name for f in ours]
        self.schema = pa.schema([*self.own, *ours])
        self.key_fields = [self.schema.field(name) for name in key]

    def _stored(self, data: pa.RecordBatch, names: Iterable[str]) -> tuple[list[pa.Array], pa.Array]:
        misfits = Misfits()
        columns = [misfits.stored(data.column(n), _pg_type(self.source.field(n)), n) for n in names]
        return columns, misfits.added_to(data.column(self.names.raw)).cast(_TEXTS)

    def _keys(self, data: pa.RecordBatch) -> pa.Table:
        columns, raw = self._stored(data, [f.name for f in self.key_fields])
        return pa.Table.from_arrays(
            [*columns, raw], schema=pa.schema([*self.key_fields, self.schema.field(self.names.raw)])
        )

    def gone(self, net: NetRows) -> pa.Table:
        """The keys that have no row any more, and their texts."""
        return self._keys(net.gone)

    def sources(self, net: NetRows) -> pa.Table | None:
        """The keys under which the table has what was not sent; None if it has nothing of it."""
        unsent = net.puts.column(self.names.unchanged)
        if unsent.null_count == len(unsent):
            return None
        return self._keys(net.sources)

    def unsent(self, net: NetRows) -> set[str]:
        """The columns of which some row was not sent."""
        return set(pc.unique(pc.list_flatten(net.puts.column(self.names.unchanged))).to_pylist())

    def keys_of(self, data: pa.RecordBatch | pa.Table) -> KeyColumns:
        """The keys of rows as they are stored."""
        raw = _array(data, self.names.raw)
        cells = {f.name: _array(data, f.name) for f in self.key_fields}
        return KeyColumns.of(cells, self.schema, raw)

    def puts(self, net: NetRows, sources: pa.Table | None, old: pa.Table | None) -> pa.Table:
        """The rows as they are to be; `old` are those of the table at the keys of `sources`."""
        data, n = net.puts, self.names
        columns, raw = self._stored(data, [f.name for f in self.own])
        unchanged = data.column(n.unchanged).cast(_NAMES)
        if sources is not None and old is not None and len(old):
            at = _places(self.keys_of(sources), self.keys_of(old))
            columns, unchanged, raw = self._filled(columns, unchanged, raw, at, old)
        columns += [data.column(n.commit_lsn).cast(pa.int64()), unchanged, raw]
        return pa.Table.from_arrays(columns, schema=self.schema)

    def _filled(
        self, columns: list[pa.Array], unchanged: pa.Array, raw: pa.Array, at: Ints, old: pa.Table
    ) -> tuple[list[pa.Array], pa.Array, pa.Array]:
        """With the values of `old` that were not sent; what is unknown there stays so."""
        names = unchanged.to_pylist()
        old_unknown = _array(old, self.names.unchanged).to_pylist()
        old_texts = _array(old, self.names.raw).to_pylist()
        takes: dict[str, list[int]] = {}
        texts: dict[int, dict[str, str]] = {}
        for row, place in enumerate(at.tolist()):
            if names[row] is None or place < 0:
                continue
            unknown, known = set(old_unknown[place] or ()), dict(old_texts[place] or ())
            for name in names[row]:
                takes.setdefault(name, []).append(row)
                if name in known:
                    texts.setdefault(row, {})[name] = known[name]
            names[row] = [name for name in names[row] if name in unknown] or None
        for i, column in enumerate(self.own):
            if column.name in takes:
                rows = np.array(takes[column.name])
                where = np.arange(len(at))
                where[rows] = len(at) + at[rows]
                columns[i] = pa.concat_arrays([columns[i], _array(old, column.name)]).take(pa.array(where))
        return columns, pa.array(names, _NAMES), with_texts(raw, texts)

    # -- a table that changes its shape -----------------------------------------------------------------------------

    def afresh(self) -> Plan:
        """A table that keeps nothing of what it was."""
        return Plan(self.schema, [], self.names, "it was recreated", changes=True)

    def plan(self, there: pa.Schema, casts: Casts) -> Plan:
        """How the table gets the columns of these rows, and keeps those that are gone."""
        before = pa.schema([f for f in there if f.name not in self.ours], there.metadata)
        made = [self._made(before, column, casts) for column in self.own]
        sources = {m.source for m in made if m.source is not None}
        taken = {f.name.casefold() for f in (*self.own, *self.schema)}
        for column in before:
            if column.name in sources:
                continue
            name, number = column.name, 2
            while name.casefold() in taken:
                name, number = f"{column.name}__{number}", number + 1
            taken.add(name.casefold())
            facts = {k: v for k, v in (column.metadata or {}).items() if name == column.name or k != b"pg.attnum"}
            made.append(
                _Made(
                    pa.field(name, column.type, metadata=facts or None),
                    column.name,
                    said=f"{column.name} becomes {name}",
                )
            )
        said = [m.said for m in made if _differs(m, before)]
        fields = [m.field for m in made] + [self.schema.field(name) for name in self.ours]
        return Plan(pa.schema(fields), made, self.names, ", ".join(said), changes=bool(said))

    def _made(self, before: pa.Schema, column: pa.Field, casts: Casts) -> _Made:
        """How a column of now is made from the columns of before."""
        source = self.source.field(column.name)
        past = column_in(before, source if missing_of(source) is not None else column)
        if past.name is None:
            if past.known:
                default = pa.array([None if past.value is None else past.value.as_py()], source.type)
                if beyond(default) is None:
                    return _Made(column, value=stored(default)[0], said=f"{column.name} is added")
            return _Made(column, unknown=True, said=f"{column.name} is added")
        old = before.field(past.name)
        said = f"{old.name} becomes {column.name}" if old.name != column.name else f"the type of {column.name} changes"
        if old.type == column.type:
            return _Made(column, old.name, unknown=not past.known, said=said)
        cast = _cast(old, column.type)
        if casts(old.name, cast):
            return _Made(column, old.name, cast=cast, unknown=not past.known, said=said)
        return _Made(column, unknown=True, said=f"the type of {column.name} changes")


@dataclass(frozen=True, slots=True)
class _Made:
    """A column of a table and where its values come from: another column, or one value for all older rows."""

    field: pa.Field
    source: str | None = None
    cast: Cast | None = None
    value: Any = None
    unknown: bool = False
    said: str = ""


def _differs(made: _Made, before: pa.Schema) -> bool:
    if made.source != made.field.name:
        return True
    old, new = before.field(made.source), made.field
    if old.type != new.type:
        return True
    for fact in (b"pg.oid", b"pg.typmod"):
        if (old.metadata or {}).get(fact) != (new.metadata or {}).get(fact):
            return True
    numbers = attnum_of(old), attnum_of(new)
    return None not in numbers and numbers[0] != numbers[1]


def _cast(old: pa.Field, kind: pa.DataType) -> Cast:
    if pa.types.is_string(kind):
        return lambda values: written(values, _pg_type(old)).cast(kind)
    return lambda values: values.cast(kind)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a table gets from one shape to another, which may be the same.

    Attributes:
        schema: The table's schema afterwards.
        made: Where its own columns come from.
        names: The names of the metadata columns.
        said: What changes.
        changes: Whether anything does.
    """

    schema: pa.Schema
    made: list[_Made]
    names: MetadataNames
    said: str
    changes: bool

    @property
    def ours(self) -> list[str]:
        """The metadata columns."""
        return [name for name in self.schema.names if name in self.names]

    @property
    def needs(self) -> list[str]:
        """The columns of the table as it is."""
        return [*dict.fromkeys(m.source for m in self.made if m.source is not None), *self.ours]

    def project(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Rows of the table as they are afterwards."""
        if not self.changes:
            return batch
        columns = []
        for made in self.made:
            kind = made.field.type
            if made.source is None:
                columns.append(
                    pa.repeat(made.value, len(batch)).cast(kind)
                    if made.value is not None
                    else pa.nulls(len(batch), kind)
                )
            else:
                values = batch.column(made.source)
                columns.append(values if made.cast is None else made.cast(values))
        names = {made.source: made.field.name for made in self.made if made.source is not None}
        unchanged, raw = batch.column(self.names.unchanged), batch.column(self.names.raw)
        if any(name != now for name, now in names.items()) or len(names) < len(batch.schema.names) - len(self.ours):
            unchanged, raw = (renamed(pa.chunked_array([c]), names).combine_chunks() for c in (unchanged, raw))
        unknown = [made.field.name for made in self.made if made.unknown]
        replaced = {self.names.unchanged: _with_names(unchanged, unknown), self.names.raw: raw}
        columns += [replaced.get(name, batch.column(name)) for name in self.ours]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def widened(self, puts: pa.Table) -> pa.Table:
        """Rows with all columns of the table."""
        columns = [
            puts.column(f.name) if f.name in puts.schema.names else pa.nulls(len(puts), f.type) for f in self.schema
        ]
        return pa.Table.from_arrays(columns, schema=self.schema)

    def source(self, puts: pa.Table, gone: pa.Table) -> pa.Table:
        """What a merge takes: rows, and keys that are gone."""
        columns = [
            gone.column(f.name) if f.name in gone.schema.names else pa.nulls(len(gone), f.type) for f in self.schema
        ]
        both = pa.concat_tables([puts, pa.Table.from_arrays(columns, schema=self.schema)])
        flags = np.append(np.zeros(len(puts), np.bool_), np.ones(len(gone), np.bool_))
        return both.append_column(GONE, pa.array(flags)).combine_chunks()

    def matching(self, scan: Iterable[pa.RecordBatch], rows: Mirror, keys: pa.Table) -> pa.Table | None:
        """The rows, as they are afterwards, that have one of these keys; None if there are none."""
        wanted = rows.keys_of(keys)
        wanted = wanted.take(np.flatnonzero(wanted.known()))
        found = []
        for batch in scan:
            batch = self.project(batch)
            mask = _among(rows.keys_of(batch), wanted)
            if mask.any():
                found.append(batch.filter(pa.array(mask)))
        return pa.Table.from_batches(found).combine_chunks() if found else None

    def kept(
        self, scan: Iterable[pa.RecordBatch], rows: Mirror, puts: pa.Table, gone: pa.Table
    ) -> Iterator[pa.RecordBatch]:
        """The rows, as they are afterwards, that have none of these keys."""
        touched = rows.keys_of(puts).followed_by(rows.keys_of(gone))
        for batch in scan:
            batch = self.project(batch)
            yield batch.filter(pa.array(~_among(rows.keys_of(batch), touched)))


def key_is_plain(key: Sequence[pa.Field], *rows: pa.Table) -> bool:
    """Whether SQL's ``=`` over the cells of these keys tells what PostgreSQL's does."""
    return all(cells_tell(f) and not some.column(f.name).null_count for f in key for some in rows)


@contextlib.contextmanager
def streamed(
    batches: Callable[[], Iterator[pa.RecordBatch]], then: pa.Table, schema: pa.Schema
) -> Iterator[pa.RecordBatchReader]:
    """A reader of these batches and a table. A thread makes the batches: the library can't read while it writes."""
    waiting: queue.Queue[pa.RecordBatch | BaseException | None] = queue.Queue(4)
    stopped = threading.Event()

    def put(item: pa.RecordBatch | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(item, timeout=0.1)
                return

    def make() -> None:
        try:
            for batch in batches():
                put(batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as e:
            put(e)

    def read() -> Iterator[pa.RecordBatch]:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
        yield from then.to_batches()

    thread = threading.Thread(target=make, name="pgoutput-delta-reader", daemon=True)
    thread.start()
    try:
        yield pa.RecordBatchReader.from_batches(schema, read())
    finally:
        stopped.set()
        thread.join()


def _one(changes: pa.Table) -> pa.RecordBatch:
    batches = changes.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=changes.schema)


def _array(data: pa.RecordBatch | pa.Table, name: str) -> pa.Array:
    column = data.column(name)
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _among(keys: KeyColumns, wanted: KeyColumns) -> Bools:
    """Which keys are among others."""
    if not len(keys) or not len(wanted):
        return np.zeros(len(keys), np.bool_)
    codes, _ = wanted.followed_by(keys).encode()
    found: Bools = np.isin(codes[len(wanted) :], codes[: len(wanted)])
    return found


def _places(keys: KeyColumns, rows: KeyColumns) -> Ints:
    """For each key the row that has it, or -1; keys that are not known have none."""
    codes, _ = rows.followed_by(keys).encode()
    place = np.full(int(codes.max()) + 1, -1, np.int64)
    place[codes[: len(rows)]] = np.arange(len(rows))
    found: Ints = np.where(keys.known(), place[codes[len(rows) :]], -1)
    return found


def _with_names(unchanged: pa.Array, names: Sequence[str]) -> pa.Array:
    """`_unchanged` with more columns in every row."""
    if not names or not len(unchanged):
        return unchanged
    if unchanged.null_count == len(unchanged):
        return pa.array([list(names)], _NAMES).take(pa.array(np.zeros(len(unchanged), np.int64)))
    return pa.array([list(dict.fromkeys((*(known or ()), *names))) for known in unchanged.to_pylist()], _NAMES)
