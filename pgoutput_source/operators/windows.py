"""`cdc.window`: sums, counts and extremes of changes per span of commit time, over whole batches.

Arrow turns a batch into a small table of partial results, grouped by window. Only these partial results go into the
state and, in a cluster, over the wire. So the cost is per batch, not per change.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from bytewax import operators as op
from bytewax.dataflow import Stream, operator
from bytewax.operators import StatefulBatchLogic
from bytewax.operators.windowing import UTC_MAX, UTC_MIN, Clock, ClockLogic

from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.changes.schema import MetadataNames
from pgoutput_source.compute.columns import ROW, filtered, sorted_batch
from pgoutput_source.compute.grouping import ROWS, Columns, Grouping
from pgoutput_source.compute.metadata import of_operations
from pgoutput_source.compute.state import pack, unpack
from pgoutput_source.errors import ConfigurationError, check_version

logger = logging.getLogger(__name__)

STATE_VERSION: Final = 1

_ORIGIN: Final = (
    946_857_600_000_000  # Monday 2000-01-03 00:00 UTC in µs since 1970, so that windows of a week begin on Mondays
)
_TICKS: Final = 5  # an idle span is waited for in this many steps, and the process must be alive in each
_AFTER_START: Final = timedelta(minutes=1)  # a server may need this long to reach a slot's first change
_NOTICE: Final = timedelta(seconds=1)
_COMPACT_ROWS: Final = 131_072
_TIMESTAMP: Final = pa.timestamp("us", "UTC")


@dataclass(frozen=True)
class WindowStream(Stream[pa.RecordBatch]):
    """The results of `window`: an ordinary stream, with another stream `late` for what came too late.

    Example:
        >>> from bytewax import operators as op
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSource
        >>> from pgoutput_source.testing import batch
        >>> orders = op.input("in", Dataflow("shop"), TestingSource([batch("public.orders", [("I", {"id": 1})])]))
        >>> per_minute = window("per_minute", orders, every=timedelta(minutes=1), count=True)
        >>> isinstance(per_minute, WindowStream), isinstance(per_minute.late, Stream)
        (True, True)
    """

    late: Stream[pa.RecordBatch]


@dataclass(frozen=True)
class WindowOut:
    """The operator's outputs: results of closed windows, and of changes that came after their window was closed."""

    down: Stream[pa.RecordBatch]
    late: Stream[pa.RecordBatch]


def window(
    step_id: str,
    up: Stream[ChangeBatch],
    *,
    every: timedelta,
    hop: timedelta | None = None,
    by: Columns = (),
    count: bool | Columns = False,
    sum: Columns = (),
    min: Columns = (),
    max: Columns = (),
    mean: Columns = (),
    where: pc.Expression | None = None,
    ops: Sequence[str] = ("I", "U"),
    wait: timedelta = timedelta(0),
    idle: timedelta | None = timedelta(seconds=5),
    shards: int = 1,
) -> WindowStream:
    """Measure the *changes* in each span of commit time, once, when the span is over.

    A change counts in the windows that contain its transaction's commit time. Inserts and the new rows of updates
    count, each as a change: an order that is inserted and updated twice counts three times, unless `where` or `ops` say
    otherwise. Deletes and truncates take nothing back. To measure what a table holds *now* use `cdc.aggregate`.

    Results come in record batches with `window_start` and `window_end` (timestamp[us, UTC]; the end is exclusive), the
    columns of `by`, ``count`` and ``<column>_<function>``, sorted in this order. Windows and groups without changes
    give no row. Sums of integers are int64, sums of decimals decimal128(38, s). They are exact, and on overflow they
    raise an error instead of wrapping around. A `numeric` without declared precision counts as decimal128(38, 18).
    Means are float64. NULL is a group; a sum of only NULLs is NULL.

    **When a window closes.** Commits drive the time: a window closes once `up` has a commit at or after the window's
    end plus `wait`. PostgreSQL sends transactions in commit order, so the only reasons to wait are clocks that are set
    back, or several slots in one stream. When nothing comes for `idle`, the wall clock takes over, and windows whose
    end plus `wait` lies before it close. Only time in which this process was alive and idle counts, and at first it
    waits for a minute, so that a backlog after an outage is never late. At the end of the input all windows close.

    **What comes too late**, after its window has closed, never reopens a window. It is measured separately, in rows
    with the same columns on `.late`, and logged as a warning. Counts and sums of both add up.

    Args:
        step_id: Unique name of the step; the state is kept under it.
        up: Batches.
        every: Length of a window. Windows are aligned to Monday 2000-01-03 00:00 UTC, so that minutes, hours, days and
            weeks start where one expects.
        hop: Time from the start of one window to the start of the next, at most `every`. By default windows don't
            overlap.
        by: Columns to group by.
        count: True counts changes, as ``count``; a column's name counts its values that are not NULL.
        sum: Columns to sum. This and the following ignore NULLs.
        min: Columns whose minimum to find.
        max: Columns whose maximum to find.
        mean: Columns whose mean to compute.
        where: Only changes for which this Arrow expression is true count.
        ops: The operations that count: some of `I`, `U`, `D` and `R`. A delete's row is what the replica identity
            sends.
        wait: How much older than the newest commit a change may be.
        idle: Time without any batch after which the wall clock closes windows. With None only commits do.
        shards: How many parts the state has, split by `by`. The workers of a cluster share them.

    Guarantees:
        With recovery every change counts exactly once. The result does not depend on how changes are split into
        batches, except that changes in one batch are never late relative to each other.

    State:
        One row per group of each open window: its values plus about 30 bytes.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from pgoutput_source.testing import batch
        >>> orders = [("I", {"id": 1, "customer": "ann", "amount": 10})]  # at 12:00:00, 12:00:30 and 12:01:00
        >>> orders += [("I", {"id": 2, "customer": "bob", "amount": 5})]
        >>> orders += [("U", {"id": 1, "customer": "ann", "amount": 12})]
        >>> flow, out = Dataflow("shop"), []
        >>> up = op.input("orders", flow, TestingSource([batch("public.orders", orders)]))
        >>> revenue = window("revenue", up, every=timedelta(minutes=1), by="customer", count=True, sum="amount")
        >>> op.output("out", revenue, TestingSink(out))
        >>> run_main(flow)
        >>> for row in pa.Table.from_batches(out).to_pylist():
        ...     print(f"{row['window_start']:%H:%M}", row["customer"], row["count"], row["amount_sum"])
        12:00 ann 1 10
        12:00 bob 1 5
        12:01 ann 1 12

    Raises:
        ConfigurationError: The arguments are invalid. Once batches come: a column is missing, or its type can't be
            grouped, summed or compared.
        DecodeError: A sum exceeds its type, or a value can't be computed with (see `_raw`).
    """
    spans = Spans.of(every, every if hop is None else hop)
    grouping = Grouping.of(
        by, count=count, sum=sum, min=min, max=max, mean=mean, reserved=("window_start", "window_end")
    )
    if not set(ops) <= set("IUDR") or not ops:
        raise ConfigurationError(f"ops={tuple(ops)!r}: use 'I', 'U', 'D' or 'R'", hint="leave it out for I and U")
    if wait < timedelta(0) or (idle is not None and idle <= timedelta(0)):
        raise ConfigurationError("wait is negative, or idle is not positive", hint="idle=None lets only commits close")
    if shards < 1:
        raise ConfigurationError(f"shards={shards}", hint="use 1 or more")
    out = windows(step_id, up, spans, grouping, where, frozenset(ops), wait, idle, shards)
    return WindowStream(out.down.stream_id, out.down._scope, out.late)


class CommitClock(Clock[Any, datetime]):
    """Event time for Bytewax's own windows, driven by commits alone, so that an outage makes nothing late.

    Bytewax's `EventClock` advances with the system's clock, even while the flow is down, and then considers the backlog
    late. Here a key's watermark is the newest commit time of that key, minus `wait`. Once a second it catches up with
    the newest commit time of any key in this process, so that silent keys close their windows too.

    Args:
        of: Returns the commit time of an item; by default that of a `ChangeEvent`.
        wait: How much older than the newest commit of its key an item may be.

    Example:
        >>> import bytewax.operators.windowing as win
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> minutes = win.TumblingWindower(length=timedelta(minutes=1), align_to=datetime(2024, 1, 1, tzinfo=UTC))
        >>> commits = [("ann", datetime(2024, 1, 1, 12, 0, second, tzinfo=UTC)) for second in (0, 20, 59)]
        >>> flow, out = Dataflow("shop"), []
        >>> ups = op.input("commits", flow, TestingSource(commits))
        >>> clock = CommitClock(of=lambda commit: commit)
        >>> counts = win.fold_window("count", ups, clock, minutes, lambda: 0, lambda n, _: n + 1, lambda a, b: a + b)
        >>> op.output("out", counts.down, TestingSink(out))
        >>> run_main(flow)
        >>> [n for _, (_, n) in out]
        [3]
    """

    def __init__(
        self, of: Callable[[Any], datetime] = lambda event: event.transaction.commit_ts, wait: timedelta = timedelta(0)
    ) -> None:
        self.of, self.wait = of, wait
        self.newest = UTC_MIN

    def build(self, resume_state: datetime | None) -> _CommitTime:
        """The clock of one key."""
        return _CommitTime(self, UTC_MIN if resume_state is None else resume_state)


class _CommitTime(ClockLogic[Any, datetime]):
    def __init__(self, clock: CommitClock, watermark: datetime) -> None:
        self.clock, self.watermark = clock, watermark

    def before_batch(self) -> None:
        pass

    def on_item(self, value: Any) -> tuple[datetime, datetime]:
        time = self.clock.of(value)
        self.clock.newest = max(self.clock.newest, time)
        self._advance(time)
        return time, self.watermark

    def on_notify(self) -> datetime:
        self._advance(self.clock.newest)
        return self.watermark

    def on_eof(self) -> datetime:
        return UTC_MAX

    def to_system_utc(self, timestamp: datetime) -> datetime | None:
        return datetime.now(UTC) + _NOTICE

    def snapshot(self) -> datetime:
        return self.watermark

    def _advance(self, time: datetime) -> None:
        if time > UTC_MIN + self.clock.wait:
            self.watermark = max(self.watermark, time - self.clock.wait)


@dataclass(frozen=True, slots=True)
class Spans:
    """The layout of windows: their length, and the time from the start of one to the start of the next, in µs."""

    every: int
    hop: int

    @classmethod
    def of(cls, every: timedelta, hop: timedelta) -> Spans:
        """Check the arguments.

        Raises:
            ConfigurationError: A window has no length, or there are gaps between windows.
        """
        if not timedelta(0) < hop <= every:
            raise ConfigurationError(
                f"every={every}, hop={hop}: not 0 < hop <= every", hint="leave hop out for windows that don't overlap"
            )
        return cls(every // timedelta(microseconds=1), hop // timedelta(microseconds=1))

    def panes(self, times: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The start of each time's pane. A pane is the largest span that each window contains wholly or not at all."""
        pane = math.gcd(self.every, self.hop)
        starts: np.ndarray[Any, Any] = (times - _ORIGIN) // pane * pane + _ORIGIN
        return starts

    def spread(self, panes: pa.Table) -> pa.Table:
        """Turn rows per pane (`window`) into rows per window: a row once for each window that contains its pane."""
        if self.hop == self.every:
            return panes
        starts = panes.column("window").to_numpy()
        first = (starts - _ORIGIN) // self.hop * self.hop + _ORIGIN
        copies = []
        for back in range(0, self.every, self.hop):
            holds = starts - (first - back) < self.every
            copy = panes.set_column(panes.schema.get_field_index("window"), "window", pa.array(first - back))
            copies.append(copy.filter(pa.array(holds)))
        return pa.concat_tables(copies)


@dataclass(frozen=True, slots=True)
class Partial:
    """The result of some batches: the newest commit time in them (µs since 1970), their partial results, and what
    the names of their metadata columns begin with.
    """

    newest: int
    results: pa.Table
    prefix: str = "_"


@operator
def windows(
    step_id: str,
    up: Stream[ChangeBatch],
    spans: Spans,
    grouping: Grouping,
    where: pc.Expression | None,
    ops: frozenset[str],
    wait: timedelta,
    idle: timedelta | None,
    shards: int,
) -> WindowOut:
    """The steps of `window`: partial results of each batch, kept per window, delivered when it closes."""

    def partials(batches: list[ChangeBatch]) -> list[tuple[str, Partial]]:
        return [keyed for batch in batches if len(batch) for keyed in _split(partial(batch.data), grouping, shards)]

    def partial(data: pa.RecordBatch) -> Partial:
        metadata = MetadataNames.of(data.schema)
        times = data.column(metadata.commit_ts).cast(pa.int64()).to_numpy()
        newest = int(times.max())
        data = of_operations(data.append_column(ROW, pa.array(spans.panes(times))), ops)
        if where is not None:
            data = filtered(data, where)
        return Partial(newest, spans.spread(grouping.partial(data, {"window": data.column(ROW)})), metadata.prefix)

    keyed = op.flat_map_batch("parts", up, partials)

    def build(state: Any | None) -> _Windows:
        return _Windows(step_id, spans, grouping, wait, idle, state)

    closed = op.key_rm("unkey", op.stateful_batch("windows", keyed, build))
    split = op.branch("is_late", closed, lambda item: item[0])
    return WindowOut(
        op.map("down", split.falses, lambda item: item[1]), op.map("late", split.trues, lambda item: item[1])
    )


def _split(partial: Partial, grouping: Grouping, shards: int) -> list[tuple[str, Partial]]:
    """Split partial results by shard. Every shard gets the time."""
    if shards == 1:
        return [("0", partial)]
    names = [f"by{i}" for i in range(len(grouping.by))]
    groups = zip(*(partial.results.column(name).to_pylist() for name in names), strict=True) if names else ()
    # All workers must agree, in every process and version. Python's own hash() would not.
    shard = np.array([zlib.crc32(repr(group).encode()) % shards for group in groups], np.int64)
    if not names:
        shard = np.zeros(partial.results.num_rows, np.int64)
    return [(str(i), replace(partial, results=partial.results.filter(pa.array(shard == i)))) for i in range(shards)]


class _Windows(StatefulBatchLogic[Partial, tuple[bool, pa.RecordBatch], dict[str, Any]]):
    """The open windows of one shard. Emits (too late, results)."""

    def __init__(
        self,
        step_id: str,
        spans: Spans,
        grouping: Grouping,
        wait: timedelta,
        idle: timedelta | None,
        state: dict[str, Any] | None,
    ) -> None:
        self.step_id, self.spans, self.grouping = step_id, spans, grouping
        self.wait = wait // timedelta(microseconds=1)
        self.idle = idle
        self.newest: int | None = None  # the newest commit time seen
        self.closed: int | None = None  # windows that end here or earlier are closed for good
        self.names = MetadataNames.of(pa.schema([]))
        self.open: list[pa.Table] = []
        if state is not None:
            check_version(state, STATE_VERSION, f"step {step_id!r}")
            self.newest, self.closed = state["newest"], state["closed"]
            self.names = MetadataNames.with_prefix(state.get("prefix", self.names.prefix))
            kept = unpack(state["open"])
            self.open = [] if kept is None else [kept]
        self._compacted = sum(t.num_rows for t in self.open)
        self._first = _first(self.open)  # the start of the first open window
        self._quiet = 0
        self._tick = timedelta(0)
        self._next: datetime | None = None
        if idle is not None:
            self._wait_for_quiet(max(idle, _AFTER_START))

    def on_batch(self, values: list[Partial]) -> tuple[Iterable[tuple[bool, pa.RecordBatch]], bool]:
        out = []
        for partial in values:
            self.names = MetadataNames.with_prefix(partial.prefix)
            out += self._take(partial)
            watermark = partial.newest - self.wait
            if self.closed is None or watermark > self.closed:
                out += self._close(watermark)
                self.closed = watermark if self.closed is None else max(self.closed, watermark)
            self.newest = partial.newest if self.newest is None else max(self.newest, partial.newest)
        if self.idle is not None:
            self._wait_for_quiet(self.idle)
        return out, self.RETAIN

    def on_notify(self) -> tuple[Iterable[tuple[bool, pa.RecordBatch]], bool]:
        # A worker that was held up must not mistake that for silence, so only time in which it came here counts.
        self._quiet += 1
        self._next = datetime.now(UTC) + self._tick
        if self._quiet < _TICKS:
            return (), self.RETAIN
        now = (datetime.now(UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
        return self._close(now - self.wait), self.RETAIN

    def on_eof(self) -> tuple[Iterable[tuple[bool, pa.RecordBatch]], bool]:
        return self._close(None), self.RETAIN

    def notify_at(self) -> datetime | None:
        return self._next if self.open else None

    def snapshot(self) -> dict[str, Any]:
        self._compact()
        kept = pack(self.open[0]) if self.open else None
        return {
            "v": STATE_VERSION,
            "newest": self.newest,
            "closed": self.closed,
            "open": kept,
            "prefix": self.names.prefix,
        }

    def _wait_for_quiet(self, span: timedelta) -> None:
        self._quiet = 0
        self._tick = span / _TICKS
        self._next = datetime.now(UTC) + self._tick

    def _take(self, partial: Partial) -> list[tuple[bool, pa.RecordBatch]]:
        """Keep what belongs to open windows, and return the results of what comes too late."""
        results = partial.results
        if not results.num_rows:
            return []
        late = []
        if self.closed is not None:
            is_late = results.column("window").to_numpy() + self.spans.every <= self.closed
            if is_late.any():
                rest = results.filter(pa.array(is_late))
                rows = pc.sum(rest.column(ROWS)).as_py()
                logger.warning("step %s: %d changes came after their window was closed", self.step_id, rows)
                late = [(True, self._results(rest))]
                results = results.filter(pa.array(~is_late))
        if results.num_rows:
            self.open.append(results)
            self._first = min(self._first, _first([results]))
            # Merging costs as much as there is, so wait until that has doubled: each row is merged only a few times.
            if sum(t.num_rows for t in self.open) > max(2 * self._compacted, _COMPACT_ROWS) or len(self.open) > 256:
                self._compact()
        return late

    def _compact(self) -> None:
        if len(self.open) > 1:
            self.open = [self.grouping.add_up(self.open, ["window"])]
        self._compacted = self.open[0].num_rows if self.open else 0

    def _close(self, watermark: int | None) -> list[tuple[bool, pa.RecordBatch]]:
        """The results of windows that end at or before the watermark; of all windows if it is None."""
        if not self.open:
            return []
        if watermark is not None and self._first + self.spans.every > watermark:
            return []
        self._compact()
        [table] = self.open
        ends = table.column("window").to_numpy() + self.spans.every
        over = np.ones(len(ends), np.bool_) if watermark is None else ends <= watermark
        done, rest = table.filter(pa.array(over)), table.filter(pa.array(~over))
        self.open = [rest] if rest.num_rows else []
        self._compacted, self._first = rest.num_rows, _first(self.open)
        last = int(ends[over].max())
        self.closed = last if self.closed is None else max(self.closed, last)
        return [(False, self._results(done))]

    def _results(self, partial: pa.Table) -> pa.RecordBatch:
        start = partial.column("window")
        columns = {
            "window_start": start.cast(_TIMESTAMP),
            "window_end": pc.add(start, self.spans.every).cast(_TIMESTAMP),
            **self.grouping.results(partial),
        }
        return sorted_batch(columns, ["window_start", *self.grouping.by], self.names)


def _first(tables: Sequence[pa.Table]) -> float:
    """The start of the first window in these partial results; infinity if there is none."""
    return min((int(t.column("window").to_numpy().min()) for t in tables if t.num_rows), default=math.inf)
