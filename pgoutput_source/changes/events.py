"""`ChangeEvent`: one change as a frozen object with pypgoutput's JSON, made from batches in bulk.

`events_from` turns columns into values a few thousand rows at a time, and merges all tables of a set into the exact
order in which PostgreSQL sent the changes. Events share the objects that they have in common: table and transaction.
"""

from __future__ import annotations

import functools
import hashlib
import keyword
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Self, TypeAlias, TypeVar
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, create_model, field_serializer

from pgoutput_source.changes import exact_json
from pgoutput_source.changes.schema import Column, MetadataNames, Position, TableSchema
from pgoutput_source.changes.values import annotation, misfit, rows, to_python
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.types.numbers import precision_and_scale

Row: TypeAlias = dict[str, Any]
_M = TypeVar("_M", bound=BaseModel)

_COMPACT = exact_json.JsonWriter(",", ":")
_CHUNK = 2048  # rows that become Python objects together


_tables_json: dict[int, tuple[EventTable, str]] = {}
_MOST_TABLES = 1024


def _table_json(table: EventTable) -> str:
    """The JSON of a table. Many events share the table as one object, and hashing it would cost more than its JSON."""
    known = _tables_json.get(id(table))
    if known is None or known[0] is not table:
        if len(_tables_json) >= _MOST_TABLES:
            _tables_json.clear()
        known = _tables_json[id(table)] = (table, _COMPACT(table.model_dump()))
    return known[1]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ColumnDefinition(_Frozen):
    """A column of an event's table.

    `part_of_pkey` and `optional` (whether it may be NULL) come from the catalogue if the reader has asked it. Otherwise
    they come from the replica identity: its columns are the key and not optional. With FULL neither is known of any
    column.
    """

    name: str
    part_of_pkey: bool
    type_id: int
    type_name: str
    optional: bool


class EventTable(_Frozen):
    """The table of an event, in the version that the event was written with."""

    column_definitions: tuple[ColumnDefinition, ...]
    db: str
    schema_name: str
    table: str
    relation_id: int


class Transaction(_Frozen):
    """The transaction of an event. `begin_lsn` is from the Begin message: the start of its commit record."""

    tx_id: int
    begin_lsn: int
    commit_ts: datetime

    @field_serializer("commit_ts", when_used="json")
    def _iso(self, value: datetime) -> str:
        return value.isoformat()


class ChangeEvent(_Frozen):
    """One change of one row, or the truncate of one table; with the JSON of pypgoutput's events.

    Values are exact Python objects: numeric is `Decimal`, timestamps with time zone are aware, json is parsed (its null
    is None too). A value that these can't hold (an infinite date, the year 10000) is PostgreSQL's text. PostgreSQL does
    not send a large value that did not change. Its column is absent from `after`: looking it up raises KeyError, and
    never gives None.

    Attributes:
        op: I insert, U update, D delete, T truncate, R read by the snapshot.
        message_id: The UUID (version 5) of ``pgoutput:<system>/<slot>/<position>`` among URLs: equal when the change
            is delivered again, different for every other change.
        lsn: The change record's own position in the write-ahead log.
        transaction: Its transaction, one object for all events of it.
        table_schema: Its table, one object for all events of a version of it.
        before: With REPLICA IDENTITY FULL the old row. Otherwise the old key of a delete, or of an update that changed
            it. None if PostgreSQL sent neither.
        after: The new row; None for deletes and truncates.
        seq: The change's number within its transaction. Not part of the JSON.

    Example:
        >>> from pgoutput_source.testing import batch
        >>> event, = batch("public.orders", [("U", {"id": 1, "amount": 7})]).events()
        >>> event.op, event.table, event.after, event.after["amount"]
        ('U', 'public.orders', {'id': 1, 'amount': 7}, 7)
    """

    op: str
    message_id: UUID
    lsn: int
    transaction: Transaction
    table_schema: EventTable = Field(repr=False)
    before: Row | None
    after: Row | None
    seq: int | None = Field(default=None, exclude=True)

    @field_serializer("before", "after", when_used="json")
    def _exact(self, value: Row | None) -> Row | None:
        return exact_json.to_json(value)  # type: ignore[no-any-return]

    def __hash__(self) -> int:
        return hash(self.message_id)

    @property
    def position(self) -> Position:
        """The change's place in the total order.

        Raises:
            ConfigurationError: The event was read from JSON, which does not have it.
        """
        if self.seq is None:
            raise ConfigurationError(
                "an event that was read from JSON has no position", hint="use the event that the reader returned"
            )
        return Position(Lsn(self.transaction.begin_lsn), self.seq)

    @property
    def table(self) -> str:
        """Schema and table: ``public.orders``."""
        return f"{self.table_schema.schema_name}.{self.table_schema.table}"

    @property
    def row(self) -> Row:
        """The event's row: the new one; for a delete the old one or its key; for a truncate nothing."""
        return self.after if self.after is not None else self.before or {}

    @property
    def unchanged(self) -> tuple[str, ...]:
        """The columns that are absent from `after` because PostgreSQL did not send their unchanged values."""
        if self.after is None:
            return ()
        return tuple(c.name for c in self.table_schema.column_definitions if c.name not in self.after)

    def model_dump_json(self, *, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
        """The JSON text. The numbers of `json` and `jsonb` documents are written as PostgreSQL wrote them.

        Within another pydantic model they are written as Python writes them, and numbers that don't fit a float are
        strings. `options` are those of `pydantic.BaseModel.model_dump`.
        """
        if indent is None and not ensure_ascii and not options:
            return self._compact()
        key = ":" if indent is None else ": "
        return exact_json.JsonWriter(",", key, indent=indent, ascii=ensure_ascii)(self.model_dump(**options))

    def _compact(self) -> str:
        """The same text as the writer makes of `model_dump`, in a third of the time."""
        transaction = _COMPACT(self.transaction.__dict__)
        before, after = _COMPACT(self.before), _COMPACT(self.after)
        return (
            f'{{"op":{_COMPACT(self.op)},"message_id":"{self.message_id}","lsn":{self.lsn},"transaction":{transaction},'
            f'"table_schema":{_table_json(self.table_schema)},"before":{before},"after":{after}}}'
        )

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """The event from a JSON text. The numbers of documents are as exact as in `model_dump_json`.

        Raises:
            pydantic.ValidationError: It is not the JSON of an event.
        """
        try:
            values = exact_json.loads(json_data)
        except (ValueError, RecursionError):
            return super().model_validate_json(json_data, **options)  # which raises with what is wrong
        return cls.model_validate(values, **options)

    def json(self, *, indent: int | None = None, **options: Any) -> str:
        """The JSON text as pydantic 1, and so pypgoutput, wrote it.

        `options` are `separators`, `ensure_ascii` and `sort_keys`, as in `json.dumps`.
        """
        item, key = options.pop("separators", (", ", ": "))
        ascii = options.pop("ensure_ascii", True)
        return exact_json.JsonWriter(item, key, indent=indent, ascii=ascii, **options)(self.model_dump())


@dataclass(frozen=True, slots=True)
class TableFacts:
    """What only the catalogue knows about a table: its primary key, and the columns declared NOT NULL."""

    primary_key: frozenset[str]
    not_null: frozenset[str]


Facts: TypeAlias = Callable[[TableSchema], TableFacts | None]


def events_from(
    batches: Iterable[tuple[TableSchema, pa.RecordBatch]], facts: Facts | None = None
) -> Iterator[ChangeEvent]:
    """The changes of batches, each with its version of its table, as events: what `batches.events_of` is made of."""
    makers = [
        _EventMaker(schema, data, _uncontradicted(data, facts(schema)) if facts else None)
        for schema, data in batches
        if data.num_rows
    ]
    if len(makers) == 1:
        for low in range(0, makers[0].data.num_rows, _CHUNK):
            yield from makers[0].events(low, _CHUNK, {})
    elif makers:
        yield from _merged(makers)


def _merged(makers: list[_EventMaker]) -> Iterator[ChangeEvent]:
    lsn = np.concatenate([m.data.column(m.metadata.commit_lsn).to_numpy() for m in makers])
    seq = np.concatenate([m.data.column(m.metadata.seq).to_numpy() for m in makers])
    owner = np.repeat(np.arange(len(makers)), [m.data.num_rows for m in makers])[np.lexsort((seq, lsn))]
    taken = [0] * len(makers)
    for low in range(0, len(owner), _CHUNK):
        here = owner[low : low + _CHUNK]
        known: dict[int, Transaction] = {}
        streams: dict[int, Iterator[ChangeEvent]] = {}
        for at, count in zip(*map(np.ndarray.tolist, np.unique(here, return_counts=True)), strict=True):
            streams[at] = iter(makers[at].events(taken[at], count, known))
            taken[at] += count
        for at in here.tolist():
            yield next(streams[at])


def _uncontradicted(data: pa.RecordBatch, facts: TableFacts | None) -> TableFacts | None:
    """Facts without NOT NULL columns that have a NULL here: they were declared so later, or are not any more.

    A value that PostgreSQL did not send, or whose text is in `_raw`, is not a NULL.
    """
    if facts is None:
        return None
    nulls = [name for name in facts.not_null if name in data.schema.names and data[name].null_count]
    if not nulls:
        return facts
    metadata = MetadataNames.of(data.schema)
    rows = data.filter(pc.is_in(data[metadata.op].cast(pa.utf8()), pa.array(["I", "U", "R"])))
    elsewhere = Counter(pc.list_flatten(rows[metadata.unchanged]).to_pylist())
    elsewhere.update(name for texts in rows[metadata.raw].drop_null().to_pylist() for name, _ in texts)
    contradicted = {name for name in nulls if rows[name].null_count > elsewhere[name]}
    return replace(facts, not_null=facts.not_null - contradicted) if contradicted else facts


class _EventMaker:
    """Makes the events of one batch."""

    def __init__(self, schema: TableSchema, data: pa.RecordBatch, facts: TableFacts | None) -> None:
        self.data = data
        self.metadata = schema.metadata_names
        here = set(data.schema.names)
        self.columns = [c for c in schema.columns if c.name in here]
        self.key = [c for c in schema.columns if c.key]  # with FULL, all of them
        self.table = _event_table(schema, facts, tuple(c.name for c in self.columns))
        origin = dict(schema.origin)
        name = f"pgoutput:{origin.get('system', '')}/{origin.get('slot', '')}/"
        self.prefix = uuid.NAMESPACE_URL.bytes + name.encode()

    def events(self, start: int, count: int, known: dict[int, Transaction]) -> list[ChangeEvent]:
        """Events of some rows. `known` has the transactions for which objects exist already, by commit LSN."""
        data = self.data.slice(start, count)
        after, before = self._rows(data)
        n = self.metadata
        ops, commit_lsns, seqs, lsns, xids, times = (
            to_python(data.column(c)) for c in (n.op, n.commit_lsn, n.seq, n.lsn, n.xid, n.commit_ts)
        )
        for commit_lsn, xid, commit_ts in zip(commit_lsns, xids, times, strict=True):
            if commit_lsn not in known:
                values = {"tx_id": xid, "begin_lsn": commit_lsn, "commit_ts": commit_ts}
                known[commit_lsn] = _construct(Transaction, values)
        return [
            _construct(
                ChangeEvent,
                {
                    "op": op,
                    "message_id": message_id,
                    "lsn": lsn,
                    "transaction": known[commit_lsn],
                    "table_schema": self.table,
                    "before": old,
                    "after": new,
                    "seq": seq,
                },
            )
            for op, message_id, lsn, commit_lsn, seq, old, new in zip(
                ops, _message_ids(self.prefix, commit_lsns, seqs), lsns, commit_lsns, seqs, before, after, strict=True
            )
        ]

    def _rows(self, data: pa.RecordBatch) -> tuple[list[Row | None], list[Row | None]]:
        n = data.num_rows
        metadata = self.metadata
        ops = data.column(metadata.op)
        names = [c.name for c in self.columns]
        after: list[Row | None] = [*rows(names, [to_python(data.column(c.name), c) for c in self.columns], n)]
        before = self._before(data.column(metadata.before))
        for i in _present(data.column(metadata.raw)):
            for name, text in data.column(metadata.raw)[i].as_py():
                old = name.removeprefix(metadata.old)
                _put(after[i], name, text, self.columns)
                if old != name:
                    _put(before[i], old, text, self.key)
        unchanged = data.column(metadata.unchanged)
        for i in _present(unchanged):
            row = after[i]
            for name in unchanged[i].as_py():
                if row is not None:
                    row.pop(name, None)
        gone = pc.is_in(ops.dictionary_decode(), pa.array(["D", "T"]))
        for i in np.flatnonzero(gone.to_numpy(zero_copy_only=False)).tolist():
            after[i] = None
        return after, before

    def _before(self, old: pa.StructArray) -> list[Row | None]:
        out: list[Row | None] = [None] * len(old)
        at = _present(old)
        if at:
            sent = old.drop_null()
            names = {f.name for f in old.type}
            columns = [c for c in self.key if c.name in names]
            # The struct's own nulls were dropped, so its fields can be read by themselves.
            values = [to_python(sent.field(c.name), c) for c in columns]
            for i, row in zip(at, rows([c.name for c in columns], values, len(at)), strict=True):
                out[i] = row
        return out


_set_dict = BaseModel.__dict__["__dict__"].__set__
_set_fields = BaseModel.__dict__["__pydantic_fields_set__"].__set__
_set_extra = BaseModel.__dict__["__pydantic_extra__"].__set__
_set_private = BaseModel.__dict__["__pydantic_private__"].__set__
_ALL_FIELDS: dict[type[BaseModel], set[str]] = {kind: set(kind.model_fields) for kind in (Transaction, ChangeEvent)}


def _construct(kind: type[_M], values: dict[str, Any]) -> _M:
    """`kind.model_construct(**values)` with values for all fields, in a quarter of the time."""
    model = kind.__new__(kind)
    _set_dict(model, values)
    _set_fields(model, _ALL_FIELDS[kind])
    _set_extra(model, None)
    _set_private(model, None)
    return model


_set_int = UUID.__dict__["int"].__set__
_set_safe = UUID.__dict__["is_safe"].__set__
_UUID_FREE = ~(0xF000 << 64 | 0xC000 << 48)
_UUID_5 = 5 << 76 | 0x8000 << 48


def _message_ids(prefix: bytes, commit_lsns: list[int], seqs: list[int]) -> list[UUID]:
    """The `uuid.uuid5` of each position, in a third of the time."""
    sha1, new, unknown = hashlib.sha1, UUID.__new__, uuid.SafeUUID.unknown
    found = []
    for lsn, seq in zip(commit_lsns, seqs, strict=True):
        name = b"%s%X/%X#%d" % (prefix, lsn >> 32, lsn & 0xFFFFFFFF, seq)
        message_id = new(UUID)
        number = int.from_bytes(sha1(name, usedforsecurity=False).digest()[:16])
        _set_int(message_id, number & _UUID_FREE | _UUID_5)
        _set_safe(message_id, unknown)
        found.append(message_id)
    return found


def _present(array: pa.Array) -> list[int]:
    if array.null_count == len(array):
        return []
    return np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False)).tolist()


def _put(row: Row | None, name: str, text: str, columns: Sequence[Column]) -> None:
    """Replace the null of a misfit by its value."""
    if row is not None and name in row:
        row[name] = next(misfit(text, c) for c in columns if c.name == name)


# -- tables ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _event_table_of(schema: TableSchema, database: str, facts: TableFacts | None, names: tuple[str, ...]) -> EventTable:
    key, not_null = _constraints(schema, facts)
    return EventTable(
        column_definitions=tuple(
            ColumnDefinition(
                name=c.name,
                part_of_pkey=c.name in key,
                type_id=c.type_oid,
                type_name=declared_type(c),
                optional=c.name not in not_null,
            )
            for c in schema.columns
            if c.name in names
        ),
        db=database,
        schema_name=schema.namespace,
        table=schema.name,
        relation_id=schema.relation_id,
    )


def _event_table(schema: TableSchema, facts: TableFacts | None, names: tuple[str, ...]) -> EventTable:
    return _event_table_of(schema, dict(schema.origin).get("database", ""), facts, names)


def _constraints(schema: TableSchema, facts: TableFacts | None) -> tuple[frozenset[str], frozenset[str]]:
    """The primary key and the columns that are never NULL, as far as known."""
    if facts is not None:
        return facts.primary_key, facts.not_null
    key = frozenset(schema.key) if schema.replica_identity != "f" else frozenset[str]()
    return key, key


_LENGTHS = ("character varying", "character")
_BITS = ("bit", "bit varying")


def declared_type(column: Column) -> str:
    """A column's type as declared, including what is in brackets.

    >>> declared_type(Column("price", 1700, 655366, False, "numeric", pa.decimal128(10, 2)))
    'numeric(10,2)'
    >>> declared_type(Column("at", 1184, 3, False, "timestamp with time zone", pa.timestamp("us", "UTC")))
    'timestamp(3) with time zone'
    """
    base = column.type_name.removesuffix("[]")
    array = column.type_name[len(base) :]
    typmod = column.typmod
    if typmod < 0:
        return column.type_name
    if base == "numeric":
        precision, scale = precision_and_scale(typmod)
        return f"numeric({precision},{scale}){array}"
    if base in _LENGTHS:
        return f"{base}({typmod - 4}){array}"
    if base in _BITS:
        return f"{base}({typmod}){array}"
    if match := re.fullmatch(r"(time|timestamp)( with(?:out)? time zone)", base):
        return f"{match[1]}({typmod}){match[2]}{array}"
    return column.type_name


# -- row models -----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def row_model(schema: TableSchema, facts: TableFacts | None = None) -> type[BaseModel]:
    """A pydantic model of a table's rows, one for each version of it; ``model.model_validate(event.after)``.

    Fields are named like the columns. A name that Python or pydantic can't use gets a trailing underscore, and the
    column's name as its alias. Every field is required: a row whose large, unchanged values PostgreSQL did not send is
    refused instead of being completed with None. Values may be those of events or those of their JSON.

    >>> column = Column("price", 1700, 655366, False, "numeric", pa.decimal128(10, 2))
    >>> model = row_model(TableSchema(16384, "public", "line_items", "d", (column,)))
    >>> model.__name__, model.model_validate({"price": "9.50"})
    ('LineItems', LineItems(price=Decimal('9.50')))
    """
    _, not_null = _constraints(schema, facts)
    fields: dict[str, Any] = {}
    for column in schema.columns:
        name = re.sub(r"\W", "_", column.name).lstrip("_")
        if not name.isidentifier() or keyword.iskeyword(name) or hasattr(BaseModel, name):
            name = f"column_{name}" if not name or name[0].isdigit() else f"{name}_"
        while name in fields:
            name += "_"
        kind = annotation(column)
        fields[name] = (kind if column.name in not_null else kind | None, Field(alias=column.name))
    title = "".join(word.capitalize() for word in re.split(r"\W|_", schema.name)) or "Row"
    config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=())
    model: type[BaseModel] = create_model(
        title if title.isidentifier() else f"Table{title}",
        __config__=config,
        __doc__=f"A row of {schema.table}.",
        **fields,
    )
    return model
