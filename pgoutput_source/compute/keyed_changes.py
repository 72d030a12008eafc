"""The changes of a batch by key: the outcome for each key, and whole rows with the help of kept ones."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.changes.schema import MetadataNames
from pgoutput_source.compute.columns import column_of
from pgoutput_source.compute.kept_rows import RAW, KeptRows, known
from pgoutput_source.compute.keys import KeyColumns, moved
from pgoutput_source.compute.metadata import (
    DELETE,
    INSERT,
    READ,
    Bools,
    Ints,
    MisfitTexts,
    operations,
    own_columns,
    spans,
    texts,
    unsent,
)
from pgoutput_source.compute.net_effect import Crowd, Lives, Standing, digests, lives


@dataclass(frozen=True, slots=True)
class Filled:
    """A column of rows, with the values that PostgreSQL did not send filled in.

    Attributes:
        values: The cells.
        unknown: Where the value is unknown; None if all are known.
        texts: By row, the exact text of a filled-in value that its type can't hold.
    """

    values: pa.Array
    unknown: Bools | None = None
    texts: dict[int, str] = field(default_factory=dict)


class Found:
    """The kept rows of some keys, and for each key the index of its row, or -1."""

    def __init__(self, kept: KeptRows | None, changes: KeyedChanges) -> None:
        places = np.full(changes.count, -1, np.int64) if kept is None else kept.find(changes.keys)
        have = places >= 0
        self.of_key: Ints = np.where(have, np.cumsum(have) - 1, -1)
        self.rows = kept.take(places[have]) if kept is not None and have.any() else None

    @functools.cached_property
    def texts(self) -> dict[str, dict[int, str]]:
        """The texts of misfits by column and row."""
        if self.rows is None or RAW not in self.rows.column_names:
            return {}
        found = texts(self.rows.column(RAW).combine_chunks())
        return {name: dict(zip(t.rows.tolist(), t.texts, strict=True)) for name, t in found.items()}


class KeyedChanges:
    """Changes of one table, without truncates, by key.

    Args:
        data: The changes.
        key: The columns that identify a row.
        whole: Whether the replica identity is FULL, so that old rows have all columns.
        standing: With identity FULL, what earlier batches had of a transaction that may continue here.
    """

    def __init__(
        self, data: pa.RecordBatch, key: tuple[str, ...], *, whole: bool = False, standing: Standing | None = None
    ) -> None:
        self.data, self.key, self.whole, self.standing = data, key, whole, standing
        self.ops = operations(data)
        self.metadata = MetadataNames.of(data.schema)
        raw = data.column(self.metadata.raw)
        self.texts: dict[str, MisfitTexts] = texts(raw)
        self.crowd: Crowd | None = None
        news = KeyColumns.of({name: column_of(data, name) for name in key}, data.schema, raw)
        before = data.column(self.metadata.before)
        self.moves = np.zeros(0, np.int64)
        self._keys = news
        if before.null_count < len(before):
            cells = {name: pc.struct_field(before, [name]) for name in key}
            olds = KeyColumns.of(cells, data.schema, raw, self.metadata.old)
            sent = before.is_valid().to_numpy(zero_copy_only=False)
            self.moves = moved(self.ops, news, olds, sent, sent & whole)
            if len(self.moves):
                self._keys = news.followed_by(olds.take(self.moves))
        codes, self.some = self._keys.encode()
        """A change for each touched key, by the key's code; an old key's is its move's number, after all changes."""
        self.count = len(self.some)
        """How many keys the changes touch."""
        self.code, self.old_code = codes[: len(data)], codes[len(data) :]

    @functools.cached_property
    def keys(self) -> list[Hashable]:
        """Each touched key, by its code."""
        return self._keys.take(self.some).objects()

    @functools.cached_property
    def lives(self) -> Lives:
        """The lives in the changes; see `net_effect`."""
        if self.whole:
            self.crowd = self._crowd()
        return lives(self.ops, self.code, self.moves, self.old_code, self.crowd)

    @functools.cached_property
    def _last(self) -> tuple[Ints, Ints, Bools, Bools]:
        may_crowd = self.whole and (
            (self.standing is not None and self.standing.rows)
            or bool((self.ops == DELETE).any() and np.isin(self.ops, (INSERT, READ)).any())
        )
        if len(self.moves) or may_crowd:
            events = self.lives.last()
            return (
                self.lives.code[events],
                self.lives.row[events],
                self.lives.ends[events],
                self.lives.leaves[events],
            )
        last = np.zeros(len(self.some), np.int64)
        last[self.code] = np.arange(len(self.code))
        return np.arange(len(last)), last, self.ops[last] == DELETE, np.zeros(len(last), np.bool_)

    @functools.cached_property
    def there(self) -> tuple[Ints, Ints]:
        """The codes of keys that have a row in the end, and the last change of each."""
        codes, rows, gone, _ = self._last
        return codes[~gone], rows[~gone]

    @functools.cached_property
    def deleted(self) -> tuple[Ints, Ints]:
        """The codes of keys whose row was deleted, and the delete of each."""
        codes, rows, gone, left = self._last
        return codes[gone & ~left], rows[gone & ~left]

    @functools.cached_property
    def left(self) -> tuple[Ints, Ints]:
        """The codes of keys whose row moved to another key, and the update of each."""
        codes, rows, _, left = self._last
        return codes[left], rows[left]

    def names(self, codes: Ints) -> list[Hashable]:
        """Keys by their codes."""
        if len(codes) == self.count and np.array_equal(codes, np.arange(self.count)):
            return self.keys
        return list(map(self.keys.__getitem__, codes.tolist()))

    def events(self) -> Ints:
        """Each change's event at its new key. With identity FULL some may have none: -1."""
        found = np.full(len(self.data), -1, np.int64)
        at = np.flatnonzero(~self.lives.leaves)
        found[self.lives.row[at]] = at
        return found

    def came_from(self, name: str, rows: Ints) -> Ints:
        """The keys, by code, under which some rows had a column before these changes, which did not bring it; or -1."""
        sent = ~unsent(self.data, [name])[name] & (self.ops != DELETE)
        return self.lives.origins(sent, self.events()[rows]).key

    def filled(self, columns: Sequence[str], rows: Ints | None, found: Found) -> dict[str, Filled]:
        """Columns of some rows as they are after these changes, with the values that PostgreSQL did not send.

        Args:
            columns: Which columns.
            rows: The changes; None for all of them.
            found: The kept rows of `keys`.
        """
        masks = unsent(self.data, columns)
        every = rows is None
        have = np.arange(len(self.data)) if rows is None else rows
        out = {}
        for name in columns:
            values = column_of(self.data, name)
            if name not in masks:
                out[name] = Filled(values if every else values.take(pa.array(have)))
                continue
            origin = self.lives.origins(~masks[name] & (self.ops != DELETE), self.events()[have])
            at = np.where(origin.key >= 0, found.of_key[origin.key], -1)
            if found.rows is not None and (at >= 0).any():
                at = np.where(known(found.rows, name)[at], at, -1)
                if name in found.rows.column_names:
                    old = found.rows.column(name).combine_chunks()
                    values = pa.concat_arrays([values, old.cast(values.type) if old.type != values.type else old])
            missing = masks[name][have] & (origin.change < 0)
            index = np.where(masks[name][have] & (origin.change >= 0), origin.change, have)
            index = np.where(missing & (at >= 0), len(self.data) + at, index)
            unknown = missing & (at < 0)
            filled_texts = self._filled_texts(name, have, origin.change, np.where(missing, at, -1), found)
            out[name] = Filled(values.take(pa.array(index)), unknown if unknown.any() else None, filled_texts)
        return out

    def _filled_texts(self, name: str, have: Ints, change: Ints, at: Ints, found: Found) -> dict[int, str]:
        out = {}
        if name in self.texts:
            here = dict(zip(self.texts[name].rows.tolist(), self.texts[name].texts, strict=True))
            for i in np.flatnonzero((change >= 0) & (change != have)).tolist():
                if change[i] in here:
                    out[i] = here[int(change[i])]
        if name in found.texts:
            for i in np.flatnonzero(at >= 0).tolist():
                if at[i] in found.texts[name]:
                    out[i] = found.texts[name][int(at[i])]
        return out

    # -- several rows with the same key -----------------------------------------------------------------------------

    def _crowd(self) -> Crowd:
        transaction = self.data.column(self.metadata.commit_lsn).to_numpy().astype(np.int64)
        is_whole = self.data.column(self.metadata.before).is_valid().to_numpy(zero_copy_only=False)
        return Crowd(transaction, is_whole, self._news, self._olds, self.standing, self._key_digests)

    def _news(self, rows: Ints) -> list[bytes]:
        names = own_columns(self.data.schema)
        return self._digests({name: self.data.column(name) for name in names}, rows, "")

    def _olds(self, rows: Ints) -> list[bytes]:
        before = self.data.column(self.metadata.before)
        names = [n for n in own_columns(self.data.schema) if before.type.get_field_index(n) >= 0]
        return self._digests({name: pc.struct_field(before, [name]) for name in names}, rows, self.metadata.old)

    def _digests(self, columns: dict[str, pa.Array], rows: Ints, prefix: str) -> list[bytes]:
        index = pa.array(rows)
        found = digests([column.take(index) for column in columns.values()])
        for name in sorted(columns):
            if prefix + name in self.texts:
                odd = dict(zip(self.texts[prefix + name].rows.tolist(), self.texts[prefix + name].texts, strict=True))
                for i, row in enumerate(rows.tolist()):
                    if row in odd:
                        found[i] += f"{name}={odd[row]}".encode()
        return found

    def _key_digests(self, codes: Ints) -> list[bytes]:
        keys = self._keys.take(self.some[codes])
        none = pa.nulls(len(codes), pa.utf8())
        parts = [part for column in keys.columns for part in (column.cells, column.texts)]
        return digests([none if part is None else part for part in parts])

    def standing_after(self) -> Standing:
        """What the last transaction has so far. It may continue in the next batch."""
        lsn = int(self.data.column(self.metadata.commit_lsn)[len(self.data) - 1].as_py())
        before = self.standing if self.standing is not None and self.standing.commit_lsn == lsn else None
        rows = {} if before is None else dict(before.rows)
        codes, last, gone, _ = self._last
        transaction = self.data.column(self.metadata.commit_lsn).to_numpy().astype(np.int64)
        came = np.zeros(len(self.some), np.bool_)
        arrivals = np.isin(self.ops, (INSERT, READ))
        arrivals[self.moves] = True
        came[self.code[arrivals & (transaction == lsn)]] = True
        touched = np.zeros(len(self.some), np.bool_)
        touched[self.code[transaction == lsn]] = True
        touched[self.old_code[transaction[self.moves] == lsn]] = True
        if not came.any() and not rows:
            return Standing(lsn)
        of = np.flatnonzero(touched)
        names = dict(zip(of.tolist(), self._key_digests(of), strict=True))
        stood = {code: rows.pop(name, None) for code, name in names.items()}
        left = {} if self.crowd is None else {code: rows for (code, of), rows in self.crowd.left.items() if of == lsn}
        row_of = dict(zip(codes[~gone].tolist(), last[~gone].tolist(), strict=True))
        plain_codes = [c for c in names if c not in left and c in row_of and (came[c] or stood[c])]
        contents = dict(zip(plain_codes, self._news(np.array([row_of[c] for c in plain_codes], np.int64)), strict=True))
        for code, name in names.items():
            remain = left[code] if code in left else [contents[code]] if code in contents else []
            if remain:
                rows[name] = remain
        return Standing(lsn, rows)


def by_span(data: pa.RecordBatch) -> Iterator[tuple[bool, pa.RecordBatch]]:
    """A batch split at its truncates. Each span has its changes, and whether a truncate comes right before."""
    for span in spans(operations(data)):
        yield span.truncated, data.slice(span.start, span.end - span.start)
