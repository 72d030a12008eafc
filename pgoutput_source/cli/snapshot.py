"""`python -m pgoutput_source snapshot`: ask a running flow to copy tables again.

The flow sends a `T` for each table and then all of its rows as `R`, while the changes of all tables stream. Rows that
are downstream and not in the table any more are gone after that.
"""

from __future__ import annotations

from collections.abc import Sequence

from pgoutput_source.changes.schema import TableName
from pgoutput_source.copy.requests import request
from pgoutput_source.embedded import connection_string
from pgoutput_source.postgres import checks
from pgoutput_source.postgres.connection import connect
from pgoutput_source.settings import SourceSettings


def run(settings: SourceSettings, tables: Sequence[str]) -> int:
    """Write the request, and say on standard output what will happen; the exit status is 0.

    Args:
        settings: Which slot, and where.
        tables: Schema and table of each: ``public.orders``.

    Raises:
        ConfigurationError: A name can't be read.
        SlotNotFound, SlotLost, PublicationError: The slot can't be used, or a table is not published.
        NotConfigured: The server is a standby.
    """
    names = [TableName.parse(table) for table in dict.fromkeys(tables)]
    with connect(connection_string(settings.dsn)) as conn:
        slot = checks.check(conn, settings)
        request(conn, settings, names)
    for name in names:
        print(f"{name}: asked for")
    if not slot.active:
        print(f"note: nobody reads slot {slot.name} now; the flow copies them when it runs again")
    return 0
