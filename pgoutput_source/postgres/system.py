"""Identifies the server of a connection, and tells where its WAL ends.

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
    """The identity of a server: a resume state and the slot that it resumes must agree on it.

    `lsn` is the end of the WAL at the time of the query.
    """

    system_id: str
    timeline: int
    database: str
    lsn: Lsn
    server_version: int


def identify(conn: Connection) -> System:
    """System identifier, timeline, database and the end of the WAL."""
    # A primary names its current WAL file after its timeline. The control file lags until the next checkpoint.
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
    """A position that a stream is sure to reach. Everything committed before the call is at or before it.

    It is flushed, because a stream gets only flushed WAL, and a commit with synchronous_commit = off is flushed a
    moment later. On a standby it is the last replayed position.
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
            # The last record may belong to an open transaction, and nothing flushes it: the WAL writer goes only as far
            # as the last commit. A transaction that takes an xid and writes nothing moves that on.
            pushed = True
            conn.execute("SELECT pg_current_xact_id()")
        time.sleep(0.01)
    return target


def _before_page_header(lsn: Lsn, page: int, segment: int) -> Lsn:
    """The end of the last record, if the insert position is just after the header of a page that is still empty.

    The server reports where the next record will begin, after that header. A stream reports the ends of records, so it
    would reach that position only with the next record.

    >>> _before_page_header(Lsn("0/3000028"), 8192, 16 << 20), _before_page_header(Lsn("0/3002018"), 8192, 16 << 20)
    (Lsn('0/3000000'), Lsn('0/3002000'))
    >>> _before_page_header(Lsn("0/3002028"), 8192, 16 << 20)
    Lsn('0/3002028')
    """
    # SizeOfXLogLongPHD at a segment's begin, SizeOfXLogShortPHD on any other page.
    header = 40 if lsn - lsn % page == lsn - lsn % segment else 24
    return Lsn(lsn - header) if lsn % page == header else lsn
