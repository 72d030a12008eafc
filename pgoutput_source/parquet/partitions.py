"""Hive-style partitions of a folder: ``day=2026-11-25/`` has the changes that were committed on that day, UTC."""

from __future__ import annotations

from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.changes.schema import MetadataNames
from pgoutput_source.compute.metadata import own_columns
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.files import folder_name

DAY: Final = "day"
_NULL: Final = "__HIVE_DEFAULT_PARTITION__"


def partitions(changes: pa.Table, by: str) -> list[tuple[str, pa.Table]]:
    """Changes by the folder that they go to, in order within each. Rows without the column go to no folder, "".

    Args:
        changes: Changes of one version of a table.
        by: "day" for the day of the commit, or the name of a column.

    Raises:
        ConfigurationError: The column has a type that makes no names of folders, or is called "day".

    Example:
        >>> from pgoutput_source.testing import batch
        >>> made = batch("public.t", [("I", {"id": 1, "to": "a/b"}), ("I", {"id": 2, "to": None})]).data
        >>> [(folder, len(rows)) for folder, rows in partitions(pa.table(made), "to")]
        [('to=a%2Fb', 1), ('to=__HIVE_DEFAULT_PARTITION__', 1)]
        >>> [folder for folder, _ in partitions(pa.table(made), "day")]
        ['day=2024-01-01']
    """
    own = own_columns(changes.schema)
    if by == DAY:
        if DAY in own:
            raise ConfigurationError(
                "there is a column called 'day', and readers would take the partition for it",
                hint="partition by another column, or exclude the table",
            )
        values = changes.column(MetadataNames.of(changes.schema).commit_ts).cast(pa.timestamp("us")).cast(pa.date32())
    elif by not in own:
        return [("", changes)]
    else:
        values = changes.column(by)
        if not _names_folders(values.type):
            raise ConfigurationError(
                f"column {by!r} has type {values.type}, which makes no names of folders",
                hint="partition by text, an integer, a boolean or a date",
            )
    texts = values.cast(pa.large_utf8()).combine_chunks()
    found = []
    for value in pc.unique(texts).to_pylist():
        rows = changes.filter(pc.is_null(texts) if value is None else pc.equal(texts, value))
        found.append((f"{folder_name(by)}={_NULL if value is None else folder_name(value)}", rows))
    return found


def _names_folders(kind: pa.DataType) -> bool:
    t = pa.types
    text = t.is_string(kind) or t.is_large_string(kind)
    return bool(text or t.is_integer(kind) or t.is_boolean(kind) or t.is_date32(kind))
