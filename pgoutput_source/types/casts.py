"""PostgreSQL's own casts between types, as far as equal values stay equal and different ones different.

A cast that depends on settings of a session is not here: of dates to text, of timestamps to those with a time zone.
https://www.postgresql.org/docs/current/sql-createcast.html
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.types.written import written

Cast: TypeAlias = Callable[[pa.Array], pa.Array]

_TEXTS: Final = ("text", "character varying", "character")
_OF_SESSIONS: Final = (
    *(
        "real",
        "double precision",
        "money",
        "bytea",
        "interval",
        "date",
        "time without time zone",
        "time with time zone",
    ),
    *("timestamp without time zone", "timestamp with time zone"),
)
"""Types whose text depends on settings: of the number of digits, the date's style, the locale."""


def cast_of(was: pa.Field, now: pa.Field) -> Cast | None:
    """What makes of a column's cells those that ``ALTER COLUMN … TYPE`` makes of its values; None if that is unknown.

    Args:
        was: The column before, with its type in the metadata.
        now: The column after.

    >>> def typed(kind, pg_type, typmod=-1):
    ...     return pa.field("id", kind, metadata={"pg.type": pg_type, "pg.typmod": str(typmod)})
    >>> padded, trimmed = typed(pa.utf8(), "character", 7), typed(pa.utf8(), "text")
    >>> cast_of(padded, trimmed)(pa.array(["a  "])).to_pylist(), cast_of(trimmed, padded)(pa.array(["a"])).to_pylist()
    (['a'], ['a  '])
    """
    (old, _), (new, typmod) = _type(was), _type(now)
    if new in _TEXTS:
        to_text = _to_text(old, was.type)
        if to_text is None or new != "character" or typmod < 0:
            return to_text
        return lambda cells: pc.utf8_rpad(to_text(cells), typmod - 4, " ")
    if (old, new) == ("date", "timestamp without time zone"):
        return lambda cells: cells.cast(now.type)
    return None


def _type(field: pa.Field) -> tuple[str, int]:
    metadata = field.metadata or {}
    return metadata.get(b"pg.type", b"").decode(), int(metadata.get(b"pg.typmod", b"-1"))


def _to_text(pg_type: str, kind: pa.DataType) -> Cast | None:
    if not pg_type or pg_type in _OF_SESSIONS or pg_type.endswith("[]"):
        return None
    if pg_type in _CASTS:
        return _CASTS[pg_type]
    if (
        pa.types.is_string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_dictionary(kind)
    ):
        return lambda cells: written(cells, pg_type).cast(pa.utf8())
    if isinstance(kind, pa.BaseExtensionType):  # uuid
        return lambda cells: written(cells, pg_type).cast(pa.utf8())
    return None


def _with_mask(cells: pa.Array) -> pa.Array:
    """The text of an inet names the netmask; what the type sends leaves it out if there is none."""
    mask = pc.if_else(pc.match_substring(cells, ":"), "/128", "/32")
    bare = pc.invert(pc.match_substring(cells, "/"))
    return pc.if_else(bare, pc.binary_join_element_wise(cells, mask, ""), cells)


_CASTS: Final[dict[str, Cast]] = {
    "boolean": lambda cells: cells.cast(pa.utf8()),
    "character": lambda cells: pc.utf8_rtrim(cells, " "),
    "inet": _with_mask,
}
"""Types that have a cast to text beside the text that they send."""
