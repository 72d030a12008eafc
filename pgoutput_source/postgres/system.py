"""Which database system a connection leads to, and where its WAL ends.

https://www.postgresql.org/docs/current/functions-info.html
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from pgoutput_source.postgres.connection import Connection, one_row
from pgoutput_source.protocol.wire import Lsn

_FLUSH_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class System:
    """Which server this is: what must stay the same between a resume state and the slot that it resumes with.

    `lsn` is where its WAL ended when it was asked.
    """

    system_id: str
    timeline: int
    database: str
    lsn: Lsn
    server_version: int


def identify(conn: Connection) -> System:
    """System identifier, timeline, database and the end of the WAL."""
    # A primary names the file it writes to after its timeline; the control file lags behind until a checkpoint.
    row = one_row(
        conn,
        """
        SELECT system_identifier::text, current_database()::text,
               CASE WHEN pg_is_in_recovery()
                    THEN coalesce((SELECT received_tli FROM pg_stat_wal_receiver),
                                  (SELECT timeline_id FROM pg_control_checkpoint()))
                    ELSE ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int END,
               CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END::text
          FROM pg_control_system()
        """,
    )
    system_id, database, timeline, lsn = row
    return System(system_id, timeline, database, Lsn(lsn), conn.info.server_version)


def setting(conn: Connection, name: str) -> str:
    """A setting of the server."""
    row = conn.execute("SELECT current_setting(%s)", [name]).fetchone()
    return str(row[0]) if row else ""


def current_lsn(conn: Connection) -> Lsn:
    """A position that a stream is sure to reach, with everything at or below it that was committed before the call.

    It is flushed: a stream gets WAL only then, and commits with synchronous_commit = off are flushed a moment later.
    On a standby it is what was replayed.
    """
    standby, now, page, segment = one_row(
        conn,
        """
        SELECT pg_is_in_recovery(),
               CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END::text,
               (SELECT setting::int FROM pg_settings WHERE name = 'wal_block_size'),
               (SELECT setting::int FROM pg_settings WHERE name = 'wal_segment_size')
        """,
    )
    target = _before_page_header(Lsn(now), page, segment)
    begun = time.monotonic()
    pushed = False
    while not standby and Lsn(one_row(conn, "SELECT pg_current_wal_flush_lsn()::text")[0]) < target:
        waited = time.monotonic() - begun
        if waited > _FLUSH_PATIENCE:
            break
        if waited > 0.5 and not pushed:
            # The last record may be of a transaction that is still open, and nothing has made it be flushed: the WAL
            # writer looks only as far as commits. A transaction that gets a number and writes nothing is one.
            pushed = True
            conn.execute("SELECT pg_current_xact_id()")
        time.sleep(0.01)
    return target


def _before_page_header(lsn: Lsn, page: int, segment: int) -> Lsn:
    """The end of the last record, where the insert position stands after the header of a page still without one.

    The next record would begin there, so that is what the server names; but what a stream reports is ends of records,
    and it would get to such a position only with the next record.

    >>> _before_page_header(Lsn("0/3000028"), 8192, 16 << 20), _before_page_header(Lsn("0/3002018"), 8192, 16 << 20)
    (Lsn('0/3000000'), Lsn('0/3002000'))
    >>> _before_page_header(Lsn("0/3002028"), 8192, 16 << 20)
    Lsn('0/3002028')
    """
    # SizeOfXLogLongPHD at a segment's begin, SizeOfXLogShortPHD on any other page.
    header = 40 if lsn - lsn % page == lsn - lsn % segment else 24
    return Lsn(lsn - header) if lsn % page == header else lsn
