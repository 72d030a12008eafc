"""Accumulators that can take values back: counts, exact sums and extremes of many groups, each group at a slot.

Rows come in by the thousand, each with a group and a sign: +1 for a new row, -1 for one that no longer exists. Sums are
exact, even of floats, so that adding and taking back leaves no trace: integers and decimals are added limb by limb,
floats as integers times powers of two. Python's integers hold the totals and can't overflow.
"""

from __future__ import annotations

import itertools
import operator
from abc import ABC, abstractmethod
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pgoutput_source.compute.columns import numbers, operand
from pgoutput_source.compute.keys import arrow, encode, plain
from pgoutput_source.compute.metadata import Ints
from pgoutput_source.compute.state import AFRESH
from pgoutput_source.errors import DecodeError, StateError

MOST_ROWS: Final = 1 << 20
"""How many rows may be added at once: bincount adds float64s, which hold the sum of this many 32-bit limbs exactly."""

_FEW: Final = 16  # up to this many values of a group are counted one by one, which is cheaper than making lists
_POWER: Final = 1200  # floats are summed as multiples of 2**-1200; the smallest float is 2**-1074


class Accumulator(ABC):
    """What one function of one column keeps for every slot."""

    def __init__(self, field: pa.Field) -> None:
        self.field = field

    @abstractmethod
    def grow(self, slots: int) -> None:
        """Add empty slots, up to `slots`."""

    @abstractmethod
    def add(self, slots: Ints, group: Ints, values: pa.Array, sign: Ints) -> None:
        """Add rows, or take them back. Row i belongs to the slot `slots[group[i]]`."""

    @abstractmethod
    def clear(self, slots: Ints) -> None:
        """Empty these slots."""

    @abstractmethod
    def state(self, slots: Ints) -> Any:
        """The content of these slots, as new builtins."""

    @abstractmethod
    def restore(self, state: Any) -> None:
        """Restore what `state` returned, at the slots 0, 1, 2 …"""

    def changed(self, field: pa.Field) -> None:
        """Change the column's type.

        Raises:
            StateError: Values of the two types can't be added or compared.
        """
        if not goes_with(self.field.type, field.type):
            raise StateError(
                f"a column has changed its type from {self.field.type} to {field.type}",
                column=field.name,
                hint=AFRESH,
            )
        self.field = field


def goes_with(old: pa.DataType, new: pa.DataType) -> bool:
    """Whether values of both types can be added and compared."""
    t = pa.types
    exact = all(t.is_integer(kind) or t.is_decimal(kind) for kind in (old, new))
    return bool(old == new or exact or (t.is_floating(old) and t.is_floating(new)))


class Count(Accumulator):
    """How many values are not NULL."""

    def __init__(self, field: pa.Field) -> None:
        super().__init__(field)
        self.counts = np.zeros(0, np.int64)

    def grow(self, slots: int) -> None:
        self.counts = grown(self.counts, slots)

    def add(self, slots: Ints, group: Ints, values: pa.Array, sign: Ints) -> None:
        if values.null_count:
            valid = pc.is_valid(values).to_numpy(zero_copy_only=False)
            group, sign = group[valid], sign[valid]
        self.counts[slots] += counted(group, sign, len(slots))

    def clear(self, slots: Ints) -> None:
        self.counts[slots] = 0

    def state(self, slots: Ints) -> Any:
        return self.counts[slots].tobytes()

    def restore(self, state: Any) -> None:
        self.counts = np.frombuffer(state, np.int64).copy()

    def changed(self, field: pa.Field) -> None:
        self.field = field

    def of(self, slots: Ints) -> pa.Array:
        """The counts."""
        return pa.array(self.counts[slots])


class Sum(Accumulator):
    """The exact sum of integers or decimals, as a multiple of 10**-scale."""

    def __init__(self, field: pa.Field) -> None:
        super().__init__(field)
        self.totals: NDArray[np.object_] = np.zeros(0, object)
        self.scale = 0

    def grow(self, slots: int) -> None:
        self.totals = grown(self.totals, slots)

    def add(self, slots: Ints, group: Ints, values: pa.Array, sign: Ints) -> None:
        if values.null_count:
            valid = pc.is_valid(values).to_numpy(zero_copy_only=False)
            values, group, sign = values.drop_null(), group[valid], sign[valid]
        if not len(values):
            return
        values = numbers(values, self.field)
        decimal = pa.types.is_decimal(values.type)
        if not decimal:
            values = values.cast(pa.int64())
        scale = values.type.scale if decimal else 0
        if scale > self.scale:
            self.totals *= 10 ** (scale - self.scale)
            self.scale = scale
        self.totals[slots] += added_up(values, group, sign, len(slots)) * 10 ** (self.scale - scale)

    def clear(self, slots: Ints) -> None:
        self.totals[slots] = 0

    def state(self, slots: Ints) -> Any:
        return {"scale": self.scale, "totals": self.totals[slots].tolist()}

    def restore(self, state: Any) -> None:
        self.scale = state["scale"]
        self.totals = np.array([*state["totals"], None], object)[:-1]

    def of(self, slots: Ints, counts: Ints) -> pa.Array:
        """The sums; NULL where nothing was counted.

        Raises:
            DecodeError: A sum exceeds int64 or 38 digits.
        """
        kind = self.field.type
        if pa.types.is_integer(kind):
            kind = pa.int64() if self.scale == 0 else pa.decimal128(38, self.scale)
        else:
            kind = pa.decimal256(76, self.scale) if pa.types.is_decimal256(kind) else pa.decimal128(38, self.scale)
        found = exact_array(self.totals[slots], kind, counts > 0)
        if found is None:
            raise DecodeError(
                f"the sum of {self.field.name} is beyond {kind}",
                column=self.field.name,
                hint="sum in smaller groups, or sum a scaled column that cdc.map_batches adds",
            )
        return found

    def means(self, slots: Ints, counts: Ints) -> pa.Array:
        """The sums by the counts, correctly rounded, NULL where nothing was counted."""
        unit = 10**self.scale
        return pa.array(
            [t / (unit * n) if n > 0 else None for t, n in zip(self.totals[slots], counts.tolist(), strict=True)],
            pa.float64(),
        )


class FloatSum(Accumulator):
    """The exact sum of floats, as a multiple of 2**-1200. NaN and the infinities are counted separately."""

    def __init__(self, field: pa.Field) -> None:
        super().__init__(field)
        self.totals: NDArray[np.object_] = np.zeros(0, object)
        self.special = np.zeros((0, 3), np.int64)  # NaN, Infinity, -Infinity

    def grow(self, slots: int) -> None:
        self.totals, self.special = grown(self.totals, slots), grown(self.special, slots)

    def add(self, slots: Ints, group: Ints, values: pa.Array, sign: Ints) -> None:
        if values.null_count:
            valid = pc.is_valid(values).to_numpy(zero_copy_only=False)
            values, group, sign = values.drop_null(), group[valid], sign[valid]
        floats = values.to_numpy(zero_copy_only=False).astype(np.float64)
        finite = np.isfinite(floats)
        if not finite.all():
            for i, is_it in enumerate((np.isnan(floats), np.isposinf(floats), np.isneginf(floats))):
                self.special[slots, i] += counted(group[is_it], sign[is_it], len(slots))
            floats, group, sign = floats[finite], group[finite], sign[finite]
        if not len(floats):
            return
        fraction, exponent = np.frexp(floats)
        mantissa = (fraction * 2.0**53).astype(np.int64) * sign
        # Mantissas with equal exponents are added as integers, in two halves that can't overflow.
        pair, index = np.unique(group * 4096 + (exponent + 2048), return_inverse=True)
        low = np.bincount(index, mantissa & 0xFFFFFFFF).astype(np.int64).tolist()
        high = np.bincount(index, mantissa >> 32).astype(np.int64).tolist()
        for code, lo, hi in zip(pair.tolist(), low, high, strict=True):
            self.totals[slots[code >> 12]] += ((hi << 32) + lo) << ((code & 4095) - 2048 - 53 + _POWER)

    def clear(self, slots: Ints) -> None:
        self.totals[slots], self.special[slots] = 0, 0

    def state(self, slots: Ints) -> Any:
        return {"totals": self.totals[slots].tolist(), "special": self.special[slots].tobytes()}

    def restore(self, state: Any) -> None:
        self.totals = np.array([*state["totals"], None], object)[:-1]
        self.special = np.frombuffer(state["special"], np.int64).reshape(-1, 3).copy()

    def of(self, slots: Ints, counts: Ints) -> pa.Array:
        """The sums, correctly rounded; NULL where nothing was counted.

        Raises:
            DecodeError: A sum exceeds float64.
        """
        return self._rounded(slots, counts, np.ones(len(slots), np.int64))

    def means(self, slots: Ints, counts: Ints) -> pa.Array:
        """The sums by the counts, correctly rounded, NULL where nothing was counted."""
        return self._rounded(slots, counts, counts)

    def _rounded(self, slots: Ints, counts: Ints, divisors: Ints) -> pa.Array:
        out: list[float | None] = []
        unit = 1 << _POWER
        rows = zip(self.totals[slots], self.special[slots].tolist(), counts.tolist(), divisors.tolist(), strict=True)
        for total, (nan, up, down), count, divisor in rows:
            if count <= 0:
                out.append(None)
            elif nan or (up and down):
                out.append(float("nan"))
            elif up or down:
                out.append(float("inf") if up else float("-inf"))
            else:
                try:
                    out.append(total / (unit * divisor))
                except OverflowError as e:
                    raise DecodeError(
                        f"the sum of {self.field.name} is beyond double precision",
                        column=self.field.name,
                        hint="sum in smaller groups, or sum a scaled column that cdc.map_batches adds",
                    ) from e
        return pa.array(out, pa.float64())


class Values(Accumulator):
    """How often each value occurs. A minimum or maximum needs this to take values back.

    There is an entry per distinct value of a group. Only when the extreme itself goes away are all entries searched.
    Values are Python objects in PostgreSQL's order: decimals are multiples of 10**-scale, floats are integers that sort
    like them.
    """

    def __init__(self, field: pa.Field) -> None:
        super().__init__(field)
        self.counts: list[dict[Any, int]] = []
        self.edges: list[tuple[Any, Any] | None] = []  # least and greatest value, None while unknown
        self.scale = 0

    def grow(self, slots: int) -> None:
        more = slots - len(self.counts)
        self.counts += [{} for _ in range(more)]
        self.edges += [None] * more

    def add(self, slots: Ints, group: Ints, values: pa.Array, sign: Ints) -> None:
        values = operand("min", values, self.field)
        if values.null_count:
            valid = pc.is_valid(values).to_numpy(zero_copy_only=False)
            values, group, sign = values.drop_null(), group[valid], sign[valid]
        if not len(values):
            return
        if pa.types.is_floating(values.type):
            # Equal values must have the same code, and there are two zeros and many NaNs.
            values = pa.array(_in_order(values.to_numpy(zero_copy_only=False).astype(np.float64)))
        code, some = encode([values])
        objects = self._objects(values.take(pa.array(some)))
        pair, index = np.unique(group * len(some) + code, return_inverse=True)
        net = np.bincount(index, sign).astype(np.int64)
        pair, net = pair[net != 0], net[net != 0]
        at, value = np.divmod(pair, len(some))
        found, more = [objects[i] for i in value.tolist()], net.tolist()
        ends = np.flatnonzero(np.diff(at, append=-1)) + 1
        low = 0
        for slot, high in zip(slots[at[ends - 1]].tolist(), ends.tolist(), strict=True):
            if high - low < _FEW:
                for i in range(low, high):
                    self._count(slot, found[i], more[i])
            else:
                self._count_all(slot, found[low:high], more[low:high])
            low = high

    def _count(self, slot: int, value: Any, more: int) -> None:
        """Count a value `more` times."""
        counts, edges = self.counts[slot], self.edges[slot]
        was = counts.get(value, 0)
        now = was + more
        if now:
            counts[value] = now
        else:
            del counts[value]
        if edges is not None and (was > 0) != (now > 0):
            if now > 0:
                self.edges[slot] = (min(edges[0], value), max(edges[1], value))
            elif value in edges:
                self.edges[slot] = None

    def _count_all(self, slot: int, values: list[Any], more: list[int]) -> None:
        """Count each of these distinct values `more` times."""
        counts, edges = self.counts[slot], self.edges[slot]
        was = list(map(counts.get, values, itertools.repeat(0)))
        now = list(map(operator.add, was, more))
        counts.update(zip(values, now, strict=True))
        for value in itertools.compress(values, map(operator.not_, now)):
            del counts[value]
        if edges is not None and (min(values) <= edges[0] or max(values) >= edges[1]):
            came = [v for v, w, n in zip(values, was, now, strict=True) if w <= 0 < n]
            went = [v for v, w, n in zip(values, was, now, strict=True) if n <= 0 < w]
            if edges[0] in went or edges[1] in went:
                self.edges[slot] = None
            elif came:
                self.edges[slot] = (min(edges[0], *came), max(edges[1], *came))

    def _objects(self, values: pa.Array) -> list[Any]:
        kind = values.type
        if pa.types.is_decimal(kind) or pa.types.is_integer(kind):
            scale = kind.scale if pa.types.is_decimal(kind) else 0
            if scale > self.scale:
                factor, self.scale = 10 ** (scale - self.scale), scale
                self.counts = [{value * factor: n for value, n in counts.items()} for counts in self.counts]
                self.edges = [None] * len(self.edges)
            found = _integers(values)
            return found if scale == self.scale else [i * 10 ** (self.scale - scale) for i in found]
        return list(plain(values))

    def clear(self, slots: Ints) -> None:
        for slot in slots.tolist():
            self.counts[slot], self.edges[slot] = {}, None

    def state(self, slots: Ints) -> Any:
        return {"scale": self.scale, "counts": [list(self.counts[slot].items()) for slot in slots.tolist()]}

    def restore(self, state: Any) -> None:
        self.scale = state["scale"]
        self.counts = [dict(items) for items in state["counts"]]
        self.edges = [None] * len(self.counts)

    def least(self, slots: Ints) -> pa.Array:
        """The minimums; NaN is greater than every number."""
        return self._extremes(slots, 0)

    def greatest(self, slots: Ints) -> pa.Array:
        """The maximums; NaN is greater than every number."""
        return self._extremes(slots, 1)

    def _extremes(self, slots: Ints, which: int) -> pa.Array:
        out: list[Any] = []
        for slot in slots.tolist():
            edges = self.edges[slot]
            if edges is None:
                # If the stream began in the middle, values that were never seen are taken back, and count below zero.
                counts = self.counts[slot]
                there = counts if min(counts.values(), default=0) > 0 else [v for v, n in counts.items() if n > 0]
                if not there:
                    out.append(None)
                    continue
                edges = self.edges[slot] = (min(there), max(there))
            out.append(edges[which])
        kind = operand("min", pa.array([], self.field.type), self.field).type
        if pa.types.is_floating(kind):
            valid = np.array([value is not None for value in out], np.bool_)
            floats = _from_order(np.array([value or 0 for value in out], np.int64))
            return pa.array(floats, pa.float64(), mask=~valid, from_pandas=False).cast(kind)
        if pa.types.is_decimal(kind) or (pa.types.is_integer(kind) and self.scale):
            kind = pa.decimal256(76, self.scale) if pa.types.is_decimal256(kind) else pa.decimal128(38, self.scale)
            valid = np.array([value is not None for value in out], np.bool_)
            return exact_array(np.array([*(value or 0 for value in out), None], object)[:-1], kind, valid)
        return arrow(out, kind)


def _in_order(floats: NDArray[np.float64]) -> Ints:
    """Integers that sort like these floats, NaN last."""
    floats = floats + 0.0  # -0.0 becomes 0.0
    floats[np.isnan(floats)] = np.nan
    bits = floats.view(np.int64)
    found: Ints = bits ^ ((bits >> 63) & np.int64(2**63 - 1))
    return found


def _from_order(integers: Ints) -> NDArray[np.float64]:
    found: NDArray[np.float64] = (integers ^ ((integers >> 63) & np.int64(2**63 - 1))).view(np.float64)
    return found


def _integers(values: pa.Array) -> list[int]:
    """Integers or decimals without nulls, as Python integers; the scale is ignored."""
    if not pa.types.is_decimal(values.type):
        return list(values.to_pylist())
    if values.type.precision <= 18:
        words = np.frombuffer(values.buffers()[1], "<i8").reshape(-1, values.type.bit_width // 64)
        return list(words[values.offset : values.offset + len(values), 0].tolist())
    return list(added_up(values, np.arange(len(values)), np.ones(len(values), np.int64), len(values)))


def added_up(values: pa.Array, group: Ints, sign: Ints, size: int) -> NDArray[np.object_]:
    """The exact sums of int64s or decimals by group, as Python integers. No value is null; the scale is ignored."""
    width = values.type.bit_width // 32
    limbs = np.frombuffer(values.buffers()[1], "<u4").reshape(-1, width)[values.offset :][: len(values)]
    # Limbs above 18 digits only repeat the sign.
    used = 2 if pa.types.is_decimal(values.type) and values.type.precision <= 18 else width
    # The uppermost limb carries the sign.
    parts = [limbs[:, i].view("<i4") if i == used - 1 else limbs[:, i] for i in range(used)]
    sums = [np.bincount(group, limb * sign, size).astype(np.int64) for limb in parts]
    if used == 2 and (not size or -(2**30) < sums[1].min() <= sums[1].max() < 2**30):
        return (sums[0] + (sums[1] << 32)).astype(object)
    total: NDArray[np.object_] = np.zeros(size, object)
    for i, part in enumerate(sums):
        total += part.astype(object) << (32 * i)
    return total


def exact_array(integers: NDArray[np.object_], kind: pa.DataType, valid: NDArray[np.bool_]) -> pa.Array | None:
    """Python integers as int64s, or as decimals that are multiples of 10**-scale; None if one doesn't fit."""
    n, bits = len(integers), kind.bit_width
    low, high = (min(integers), max(integers)) if n else (0, 0)
    limit = 2**63 - 1 if bits == 64 else 10**kind.precision - 1
    if not -limit <= low <= high <= limit:
        return None
    if -(2**63) <= low <= high < 2**63:
        words = np.empty((n, bits // 64), "<i8")
        words[:, 0] = integers.astype(np.int64)
        words[:, 1:] = words[:, :1] >> 63
        data = pa.py_buffer(words)
    else:
        data = pa.py_buffer(b"".join(i.to_bytes(bits // 8, "little", signed=True) for i in integers))
    return pa.Array.from_buffers(kind, n, [pa.py_buffer(np.packbits(valid, bitorder="little")), data])


def counted(group: Ints, sign: Ints, size: int) -> Ints:
    """The sum of the signs of each group."""
    return np.bincount(group, sign, size).astype(np.int64)


def grown(array: NDArray[Any], size: int) -> NDArray[Any]:
    """The array, extended with zeros to at least `size`. It grows by half, so that it is seldom copied."""
    if len(array) >= size:
        return array
    out = np.zeros((max(size, len(array) * 3 // 2 + 16), *array.shape[1:]), array.dtype)
    out[: len(array)] = array
    return out
