"""Operators without state: what stays, what goes, and that nothing that was hidden comes through."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import bytewax.operators as op
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from bytewax.dataflow import Dataflow, Stream
from bytewax.testing import TestingSink, TestingSource
from harness.one_table import refused, run_flow

import pgoutput_source.operators as cdc
from pgoutput_source.changes import ChangeBatch
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.testing import batch

SECRET = "4711-secret"


def run(step: Callable[[Stream[ChangeBatch]], Stream[Any]], *batches: ChangeBatch) -> list[Any]:
    out: list[Any] = []
    flow = Dataflow("test")
    op.output("out", step(op.input("in", flow, TestingSource(batches))), TestingSink(out))
    run_flow(flow)
    return out


def everywhere(identity: str = "f") -> ChangeBatch:
    """A batch in which the secret stands in each place in which a value can stand."""
    row = {"id": 1, "card": SECRET, "amount": 2}
    made = batch(
        "public.t",
        [("I", row), ("U", {**row, "amount": 3}, row), ("D", row, row), ("U", {"id": 2, "amount": 4}), ("T", None)],
        identity=identity,
        unchanged={3: ["card", "amount"]},
    )
    index = made.data.schema.get_field_index("_raw")
    field = made.data.schema.field(index)
    raw = [
        [("card", SECRET), ("amount", "NaN")],
        [("_before.card", SECRET), ("_before.amount", "NaN")],
        None,
        None,
        None,
    ]
    return made.replace(made.data.set_column(index, field, pa.array(raw, field.type)))


def bytes_of(made: ChangeBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, made.data.schema) as writer:
        writer.write_batch(made.data)
    return bytes(sink.getvalue().to_pybytes()) + pickle.dumps(made)


def column(made: ChangeBatch, name: str) -> list[Any]:
    return list(made.data.column(name).to_pylist())


def consistent(made: ChangeBatch) -> None:
    """The batch is what its schema says."""
    made.data.validate(full=True)
    assert made.data.schema.equals(made.schema.arrow, check_metadata=True)


HIDING: list[tuple[str, Callable[[Stream[ChangeBatch]], Stream[ChangeBatch]]]] = [
    ("mask", lambda up: cdc.mask("step", up, "card")),
    ("mask using", lambda up: cdc.mask("step", up, "card", using=lambda v: pc.utf8_length(v))),
    ("select", lambda up: cdc.select("step", up, "id", "amount")),
    ("mask renamed", lambda up: cdc.mask("step", cdc.rename("names", up, {"card": "c", "amount": "a"}), "c")),
]


@pytest.mark.parametrize(("name", "step"), HIDING, ids=[name for name, _ in HIDING])
def test_what_is_hidden_is_in_no_place_of_a_batch(
    name: str, step: Callable[[Stream[ChangeBatch]], Stream[ChangeBatch]]
) -> None:
    assert bytes_of(everywhere()).count(SECRET.encode()) > 3
    [made] = run(step, everywhere())
    consistent(made)
    assert SECRET.encode() not in bytes_of(made)
    amount = "a" if "renamed" in name else "amount"
    assert column(made, amount) == [2, 3, 2, 4, None]
    assert column(made, "_raw")[:2] == [[(amount, "NaN")], [(f"_before.{amount}", "NaN")]]
    assert amount in column(made, "_unchanged")[3]
    assert [b and b[amount] for b in column(made, "_before")] == [None, 2, 2, None, None]


def test_a_mask_makes_values_of_another_type_and_never_of_null() -> None:
    [made] = run(
        lambda up: cdc.mask("step", up, "card", using=lambda v: pc.fill_null(pc.utf8_length(v), -1)), everywhere()
    )
    assert column(made, "card") == [11, 11, 11, None, None]
    assert [b and b["card"] for b in column(made, "_before")] == [None, 11, 11, None, None]
    assert made.schema.columns[1].arrow == pa.int32()


def test_names_change_everywhere() -> None:
    [made] = run(lambda up: cdc.rename("step", up, {"id": "key", "card": "id"}), everywhere("d"))
    consistent(made)
    assert made.schema.key == ("key",)
    assert column(made, "_unchanged")[3] == ["id", "amount"]
    assert column(made, "_raw")[1][0] == ("_before.id", SECRET)
    assert column(made, "_before")[1] == {"key": 1, "id": SECRET, "amount": 2}


def test_columns_that_are_not_there_are_refused() -> None:
    steps: tuple[Callable[[Stream[ChangeBatch]], Stream[Any]], ...] = (
        lambda up: cdc.select("step", up, "id", "nothing"),
        lambda up: cdc.rename("step", up, {"nothing": "id2"}),
        lambda up: cdc.rename("step", up, {"id": "amount"}),
        lambda up: cdc.rename("step", up, {"id": "_op"}),
        lambda up: cdc.mask("step", up, "nothing"),
        lambda up: cdc.mask("step", up, "card", using=lambda v: v.slice(1)),
        lambda up: cdc.key_by("step", up, "nothing"),
        lambda up: cdc.filter("step", up, pc.field("nothing") == 1),
        lambda up: cdc.filter("step", up, pc.field("card") == 1),
    )
    for step in steps:
        refused(ConfigurationError, functools.partial(run, step, everywhere()))


def ops(made: Sequence[ChangeBatch]) -> str:
    return "".join(value for one in made for value in column(one, "_op"))


def test_each_operation_can_be_had_alone() -> None:
    assert ops(run(lambda up: cdc.inserts("step", up), everywhere())) == "I"
    assert ops(run(lambda up: cdc.updates("step", up), everywhere())) == "UU"
    assert ops(run(lambda up: cdc.deletes("step", up), everywhere())) == "D"
    assert run(lambda up: cdc.deletes("step", up), batch("public.t", [("I", {"id": 1})])) == []


def test_slices_by_key_are_small_whole_and_in_order() -> None:
    rows = [("I", {"id": i, "a": i % 3 or None, "b": "x" * 1000}) for i in range(999)]
    made = batch("public.t", rows)
    slices = run(lambda up: cdc.key_by("step", up, "a"), made)
    assert {key: column(one, "id") for key, one in slices} == {
        "[null]": list(range(0, 999, 3)),
        "1": list(range(1, 999, 3)),
        "2": list(range(2, 999, 3)),
    }
    assert sum(len(pickle.dumps(one)) for _, one in slices) < 1.2 * len(pickle.dumps(made))
    assert {key for key, _ in run(lambda up: cdc.key_by("step", up, "a", "id"), made)} >= {"[null, 0]", "[1, 1]"}


def test_a_function_of_ones_own_may_drop_all() -> None:
    assert run(lambda up: cdc.map_batches("step", up, lambda data: data.slice(0, 0)), everywhere()) == []
    [made] = run(lambda up: cdc.map_batches("step", up, lambda data: data.slice(1, 2)), everywhere())
    assert ops([made]) == "UD"
