"""What PostgresSink does when a table changes its shape, by policy."""

from __future__ import annotations

import logging
from typing import Any

import pyarrow as pa
import pytest
from harness.database import Database

from pgoutput_source.destinations.base import Job, Refused
from pgoutput_source.destinations.policies import SchemaPolicy
from pgoutput_source.destinations.postgres import PostgresDestination
from pgoutput_source.destinations.targets import Target
from pgoutput_source.testing import batch

TARGET = Target("public", "t")


def job(number: int, row: dict[str, Any], numbers: tuple[int, ...], relation: int = 1) -> Job:
    """One inserted row; `numbers` are those of its columns at the source."""
    data = batch("public.t", [("I", row)], lsn=1000 * number).data
    schema = data.schema
    for i, attnum in enumerate(numbers):
        schema = schema.set(i, schema.field(i).with_metadata({b"pg.attnum": str(attnum).encode()}))
    metadata = {**(schema.metadata or {}), b"pg.relation_id": str(relation).encode()}
    table = pa.Table.from_batches([data]).cast(schema).replace_schema_metadata(metadata)
    return Job(TARGET, number, (1000 * number, 0), ("id",), "d", table)


BEFORE = job(1, {"id": 1, "a": "1", "b": "x"}, (1, 2, 3))
ADDED = job(2, {"id": 2, "a": "2", "b": "y", "c": 7}, (1, 2, 3, 4))
DROPPED = job(2, {"id": 2, "a": "2"}, (1, 2))
RENAMED = job(2, {"id": 2, "a": "2", "n": "y"}, (1, 2, 3))
RETYPED = job(2, {"id": 2, "a": 2, "b": "y"}, (1, 2, 3))
RECREATED = job(2, {"id": 2, "a": "2", "b": "y"}, (1, 2, 3), relation=2)
AGAIN = job(3, {"id": 3, "a": "3", "b": 3}, (1, 2, 4))  # a column of an old name


def applied(target: Database, jobs: list[Job], mode: str = "mirror", **policy: str) -> list[dict[str, Any]]:
    made = PostgresDestination(target.dsn, mode=mode, policy=SchemaPolicy.of(policy))  # type: ignore[arg-type]
    try:
        for each in jobs:
            made.apply([each])
    finally:
        made.close()
    with target.connect() as c:
        cursor = c.execute("SELECT * FROM public.t ORDER BY id")
        names = [column.name for column in cursor.description or ()]
        return [
            {n: v for n, v in zip(names, row, strict=True) if n != "_commit_lsn" and (n, v) != ("_unchanged", None)}
            for row in cursor.fetchall()
        ]


FOLLOWED: list[tuple[list[Job], dict[str, str], list[dict[str, Any]]]] = [
    (
        [DROPPED],
        {},
        [{"id": 1, "a": "1", "b": "x"}, {"id": 2, "a": "2", "b": None}],
    ),
    ([DROPPED], {"on_drop": "drop"}, [{"id": 1, "a": "1"}, {"id": 2, "a": "2"}]),
    (
        [DROPPED, AGAIN],
        {},
        [
            {"id": 1, "a": "1", "b__2": "x", "b": None, "_unchanged": ["b"]},
            {"id": 2, "a": "2", "b__2": None, "b": None, "_unchanged": ["b"]},
            {"id": 3, "a": "3", "b__2": None, "b": 3},
        ],
    ),
    ([RENAMED], {}, [{"id": 1, "a": "1", "n": "x"}, {"id": 2, "a": "2", "n": "y"}]),
    (
        [RENAMED],
        {"on_rename": "add"},
        [{"id": 1, "a": "1", "b": "x", "n": None, "_unchanged": ["n"]}, {"id": 2, "a": "2", "b": None, "n": "y"}],
    ),
    (
        [RENAMED],
        {"on_rename": "add", "on_drop": "drop"},
        [{"id": 1, "a": "1", "n": None, "_unchanged": ["n"]}, {"id": 2, "a": "2", "n": "y"}],
    ),
    ([RETYPED], {}, [{"id": 1, "a": 1, "b": "x", "_unchanged": ["a"]}, {"id": 2, "a": 2, "b": "y"}]),
    (
        [RETYPED],
        {"on_retype": "add"},
        [{"id": 1, "a__2": "1", "b": "x", "a": None, "_unchanged": ["a"]}, {"id": 2, "a__2": None, "b": "y", "a": 2}],
    ),
    ([RECREATED], {}, [{"id": 2, "a": "2", "b": "y"}]),
]


@pytest.mark.parametrize(("jobs", "policy", "expected"), FOLLOWED)
def test_a_policy_is_followed(
    db: Database,
    jobs: list[Job],
    policy: dict[str, str],
    expected: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "pgoutput_source.destinations"):
        assert applied(db, [BEFORE, *jobs], **policy) == expected
    assert "public.t: " in caplog.text


@pytest.mark.parametrize(
    ("change", "policy"),
    [
        (ADDED, "on_add"),
        (DROPPED, "on_drop"),
        (RENAMED, "on_rename"),
        (RETYPED, "on_retype"),
        (RECREATED, "on_recreate"),
    ],
)
def test_a_change_is_refused_and_nothing_of_it_is_there(db: Database, change: Job, policy: str) -> None:
    with pytest.raises(Refused, match="the policy is to fail"):
        applied(db, [BEFORE, change], **{policy: "fail"})
    # What is refused can be applied under another policy, and other changes are not refused.
    assert len(applied(db, [change], **{policy: getattr(SchemaPolicy(), policy)})) == 1 + (change is not RECREATED)
