"""GROUP BY in two steps: each batch gives partial results, and partial results add up, in any order.

Windows and aggregates share this: what a user may ask for (`Grouping`), which types can be grouped, summed and
compared, and the two steps themselves, which Arrow does. Results mean the same as in SQL: NULLs form a group, a sum of
only NULLs is NULL, NaN is greater than every number, and text compares as with ``COLLATE "C"``. Nothing overflows
silently: a sum is exact, or an error.

https://www.postgresql.org/docs/current/functions-aggregate.html
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.compute.columns import column_of, group_key, operand, refuse_misfits
from pgoutput_source.compute.state import AFRESH
from pgoutput_source.errors import ConfigurationError, DecodeError, StateError

Columns: TypeAlias = str | Sequence[str]
"""One column's name, or several."""

PARTS: Final = {"count": ("count",), "sum": ("sum",), "min": ("min",), "max": ("max",), "mean": ("sum", "count")}
"""The partial results of each function, which can be added up."""

ROWS: Final = "rows"
_ADD_UP: Final = {"rows": "sum", "count": "sum", "sum": "sum", "min": "min", "max": "max", "nan": "max"}
_FIRST: Final = {"nan": "max"}


@dataclass(frozen=True, slots=True)
class Measure:
    """One result column: ``sum`` of ``amount`` as ``amount_sum``. A `column` of None counts rows."""

    function: str
    column: str | None
    name: str


@dataclass(frozen=True, slots=True)
class Grouping:
    """The columns to group by, and the measures of each group."""

    by: tuple[str, ...]
    measures: tuple[Measure, ...]

    @classmethod
    def of(
        cls,
        by: Columns,
        *,
        count: bool | Columns = False,
        sum: Columns = (),
        min: Columns = (),
        max: Columns = (),
        mean: Columns = (),
        reserved: Iterable[str] = (),
    ) -> Grouping:
        """The grouping for the arguments of an operator. `reserved` are the names of its other result columns.

        >>> [m.name for m in Grouping.of("status", count=True, sum="amount").measures]
        ['count', 'amount_sum']
        >>> Grouping.of("status")
        Traceback (most recent call last):
        pgoutput_source.errors.ConfigurationError: nothing to measure
        hint: pass count=True, or sum=, min=, max=, mean= or count= with a column's name

        Raises:
            ConfigurationError: Nothing is measured, or two result columns would have the same name.
        """
        measures = [Measure("count", None, "count")] if count is True else []
        asked = {"count": () if isinstance(count, bool) else count, "sum": sum, "min": min, "max": max, "mean": mean}
        for function, columns in asked.items():
            measures += [Measure(function, column, f"{column}_{function}") for column in _names(columns)]
        if not measures:
            raise ConfigurationError(
                "nothing to measure", hint="pass count=True, or sum=, min=, max=, mean= or count= with a column's name"
            )
        grouping = cls(_names(by), tuple(measures))
        grouping.check(reserved)
        return grouping

    def check(self, reserved: Iterable[str]) -> None:
        """Check that no two result columns have the same name. `reserved` are the names of the other result columns.

        Raises:
            ConfigurationError: Two have the same name.
        """
        names = [*reserved, *self.by, *(m.name for m in self.measures)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigurationError(
                f"two result columns would be called {twice[0]!r}",
                column=twice[0],
                hint="name each column once; a column of this name must be renamed first, with cdc.rename",
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The table's columns that it needs, each once."""
        measured = (m.column for m in self.measures if m.column is not None)
        return tuple(dict.fromkeys([*self.by, *measured]))

    def partial(self, data: pa.RecordBatch, extra: dict[str, pa.Array]) -> pa.Table:
        """Partial results of each group of `data`. The `extra` columns are grouped by too, before the others.

        Raises:
            ConfigurationError: A column is missing, or its type can't be grouped, summed or compared.
            DecodeError: A column has a misfit (`_raw`), or a sum exceeds its type.
        """
        refuse_misfits(data, self.columns)
        keys = dict(extra)
        for i, name in enumerate(self.by):
            keys[f"by{i}"] = group_key(column_of(data, name), data.schema.field(name))
        if not keys:
            keys["all"] = pa.nulls(data.num_rows)
        operands: dict[str, pa.Array] = {}
        came_as: dict[str, pa.DataType] = {}
        for m in self.measures:
            if m.column is None:
                continue
            values, kind = column_of(data, m.column), data.schema.field(m.column)
            for part in PARTS[m.function]:
                if f"{part} {m.column}" not in operands:
                    operands[f"{part} {m.column}"] = operand(part, values, kind)
                    came_as[f"{part} {m.column}"] = values.type
            if m.function == "max" and pa.types.is_floating(values.type):
                operands[f"nan {m.column}"] = pc.is_nan(values)
        table = pa.table([*keys.values(), *operands.values()], names=[*keys, *operands])
        functions = {name: _FIRST.get(name.partition(" ")[0], name.partition(" ")[0]) for name in operands}
        return _aggregate(table, list(keys), functions | {ROWS: "count_all"}, came_as)

    def add_up(self, partials: Sequence[pa.Table], extra: Sequence[str] = ()) -> pa.Table:
        """The total of partial results.

        Raises:
            DecodeError: A sum exceeds its type.
            StateError: A column changed its type in between, so that they can't be added.
        """
        if len(partials) == 1:
            return partials[0]
        try:
            table = pa.concat_tables(partials, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as e:
            raise StateError(
                f"a column has changed its type, and new values can't be added to the kept state: {e}",
                hint=AFRESH,
            ) from e
        keys = [*extra, *(f"by{i}" for i in range(len(self.by)))] or ["all"]
        functions = {n: _ADD_UP[n.partition(" ")[0]] for n in table.column_names if n not in keys}
        return _aggregate(table, keys, functions)

    def results(self, partial: pa.Table) -> dict[str, pa.ChunkedArray]:
        """The result columns by name: the group's columns, then the measures."""
        columns = {name: partial.column(f"by{i}") for i, name in enumerate(self.by)}
        for m in self.measures:
            columns[m.name] = _result(partial, m)
        return columns


def _names(columns: Columns) -> tuple[str, ...]:
    return (columns,) if isinstance(columns, str) else tuple(columns)


def _result(partial: pa.Table, m: Measure) -> pa.ChunkedArray:
    if m.column is None:
        return partial.column(ROWS)
    if m.function == "mean":
        count = partial.column(f"count {m.column}")
        # Without values the sum is NULL, and so is the mean, so nothing is divided by zero.
        total = partial.column(f"sum {m.column}").cast(pa.float64(), safe=False)
        return pc.divide(total, count.cast(pa.float64(), safe=False))
    values = partial.column(f"{m.function} {m.column}")
    if m.function == "max" and f"nan {m.column}" in partial.column_names:
        is_nan = pc.fill_null(partial.column(f"nan {m.column}"), False)
        return pc.if_else(is_nan, pa.scalar(float("nan"), values.type), values)
    return values


def _aggregate(
    table: pa.Table, keys: list[str], functions: dict[str, str], came_as: Mapping[str, pa.DataType] | None = None
) -> pa.Table:
    """Arrow's group_by. Its sums wrap around, so columns that might overflow are summed in a wider type.

    `came_as` has the types that columns had before they were widened, which often show that none can overflow.
    """
    narrow: dict[str, pa.DataType] = {}
    for name, function in functions.items():
        if function == "sum" and _may_overflow(table.column(name), (came_as or {}).get(name)):
            kind = table.schema.field(name).type
            wide = pa.decimal256(76, kind.scale) if pa.types.is_decimal(kind) else pa.decimal128(38, 0)
            narrow[name] = kind
            table = table.set_column(table.schema.get_field_index(name), name, table.column(name).cast(wide))
    # Use one thread: batches are small, and the other cores are busy with other steps.
    asked = [([] if f == "count_all" else name, f) for name, f in functions.items()]
    done = table.group_by(keys, use_threads=False).aggregate(asked).rename_columns([*keys, *functions])
    for name, kind in narrow.items():
        try:
            fits = done.column(name).cast(kind)
        except pa.ArrowInvalid as e:
            raise DecodeError(
                f"the sum of {name.partition(' ')[2]} is beyond {kind}",
                column=name.partition(" ")[2],
                hint="sum in smaller groups or windows, or sum a scaled column that cdc.map_batches adds",
            ) from e
        done = done.set_column(done.schema.get_field_index(name), name, fits)
    return done


def _may_overflow(column: pa.ChunkedArray, came_as: pa.DataType | None) -> bool:
    kind = column.type
    if pa.types.is_integer(kind):
        limit = 2**63 - 1
    elif pa.types.is_decimal(kind):
        limit = 10**kind.precision - 1
    else:
        return False
    if came_as is not None and (most := _most(came_as)) is not None and most * len(column) <= limit:
        return False
    edges = pc.min_max(column).as_py()
    if edges["min"] is None:
        return False
    scale = 10**kind.scale if pa.types.is_decimal(kind) else 1
    return bool(max(abs(edges["min"]), abs(edges["max"])) * scale * len(column) > limit)


def _most(kind: pa.DataType) -> int | None:
    """The greatest magnitude of an integer type, or of a decimal type as a multiple of 10**-scale."""
    if pa.types.is_integer(kind):
        return int(2**kind.bit_width)
    return int(10**kind.precision) if pa.types.is_decimal(kind) else None
