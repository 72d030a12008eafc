"""`python -m pgoutput_source check`: whether server, slot and publication are what a flow needs."""

from __future__ import annotations

from pgoutput_source.embedded import connection_string
from pgoutput_source.postgres import checks
from pgoutput_source.postgres.connection import connect
from pgoutput_source.postgres.published import remarks
from pgoutput_source.postgres.system import current_lsn
from pgoutput_source.settings import SourceSettings


def run(settings: SourceSettings) -> int:
    """Check, print the slot's state and any remarks, and return 0. Nothing is changed.

    Raises:
        PgOutputError: A flow with these settings can't run.
    """
    with connect(connection_string(settings.dsn)) as conn:
        slot = checks.check(conn, settings)
        found = list(remarks(conn, settings))
        now = current_lsn(conn)
    lag = now - (slot.confirmed_flush_lsn or now)
    print(f"slot {slot.name}: ready, acknowledged up to {slot.confirmed_flush_lsn}, {lag:,d} bytes of WAL to read")
    for remark in found:
        print(f"note: {remark.text}\n  hint: {remark.hint}")
    return 0
