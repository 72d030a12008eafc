"""What PostgreSQL's catalogues say of slots, publications and the server, and whether a stream can run on it.

Everything here runs over an ordinary connection, at a start or when somebody asks, never per row. A finding that stops
a stream is an error with its remedy as SQL.
https://www.postgresql.org/docs/current/view-pg-replication-slots.html
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from pgoutput_source.embedded import default_dsn
from pgoutput_source.errors import (
    ConfigurationError,
    NotConfigured,
    PublicationError,
    SlotLost,
    SlotMismatch,
    SlotNotFound,
)
from pgoutput_source.postgres.connection import (
    Connection,
    connect,
    missing_publication_hint,
    missing_slot_hint,
    quote_name,
    resync_hint,
    server_error,
)
from pgoutput_source.protocol.wire import Lsn
from pgoutput_source.settings import SourceSettings
from pgoutput_source.types import TYPES, PgType, types_of
from pgoutput_source.types.catalogue import FACTS, TypeFacts, from_catalogue

__all__ = [
    "SlotState",
    "System",
    "check",
    "connect",
    "connection_string",
    "create",
    "create_publication_and_slot",
    "create_slot",
    "current_lsn",
    "defined_types",
    "identify",
    "publications",
    "published_tables",
    "setting",
    "slot_state",
    "target",
]

logger = logging.getLogger(__name__)

PLUGIN: Final = "pgoutput"

_INVALIDATIONS: Final = {
    "wal_removed": "max_slot_wal_keep_size says how much WAL a slot may keep",
    "idle_timeout": "idle_replication_slot_timeout says for how long a slot may be unused",
    "rows_removed": "on a standby, hot_standby_feedback with a physical slot on the primary keeps the rows it needs",
    "conflict with recovery": "on a standby, hot_standby_feedback with a physical slot on the primary prevents it",
    "wal_level_insufficient": "the primary's wal_level must stay 'logical'",
}
"""What to change so that it does not happen again, by the reason of an invalidation."""

_WAITS: Final = {
    False: "creating slot %r waits for the transactions that were running: "
    "SELECT pid, xact_start, state, query FROM pg_stat_activity WHERE backend_xid IS NOT NULL",
    True: "creating slot %r waits for the primary to say which transactions run. Run there: "
    "SELECT pg_log_standby_snapshot()",
}
"""On a primary, and on a standby."""

_LOG_EVERY = 5.0  # seconds
_FLUSH_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class System:
    """Which server this is: what must stay the same between a resume state and the slot that it goes on with.

    `lsn` is where its WAL ended when it was asked.
    """

    system_id: str
    timeline: int
    database: str
    lsn: Lsn
    server_version: int


@dataclass(frozen=True, slots=True)
class SlotState:
    """A replication slot as `pg_replication_slots` shows it; what the server's version has no column for is None.

    `invalidation` is the reason why the slot can't be used any more, such as "wal_removed" or "idle_timeout".
    """

    name: str
    slot_type: str
    plugin: str | None
    database: str | None
    temporary: bool
    active: bool
    active_pid: int | None
    restart_lsn: Lsn | None
    confirmed_flush_lsn: Lsn | None
    wal_status: str | None
    safe_wal_size: int | None
    two_phase: bool | None
    invalidation: str | None
    failover: bool | None
    synced: bool | None

    @classmethod
    def _of(cls, row: dict[str, Any]) -> SlotState:
        def lsn(name: str) -> Lsn | None:
            return None if row.get(name) is None else Lsn(str(row[name]))

        # 17 names the reason, 16 knows only that a conflict with recovery was one, before that the WAL was the only.
        invalidation = row.get("invalidation_reason")
        if invalidation is None and row.get("conflicting"):
            invalidation = "conflict with recovery"
        elif invalidation is None and row.get("wal_status") == "lost":
            invalidation = "wal_removed"
        return cls(
            name=row["slot_name"],
            slot_type=row["slot_type"],
            plugin=row["plugin"],
            database=row["database"],
            temporary=row["temporary"],
            active=row["active"],
            active_pid=row["active_pid"],
            restart_lsn=lsn("restart_lsn"),
            confirmed_flush_lsn=lsn("confirmed_flush_lsn"),
            wal_status=row.get("wal_status"),
            safe_wal_size=row.get("safe_wal_size"),
            two_phase=row.get("two_phase"),
            invalidation=invalidation,
            failover=row.get("failover"),
            synced=row.get("synced"),
        )


def connection_string(settings: SourceSettings) -> str:
    """The DSN to connect with: the configured one, or the embedded server's, which is started if need be.

    Raises:
        EmbeddedError: There is no DSN, and the embedded server can't be had.
    """
    return default_dsn() if settings.dsn is None else settings.dsn


def identify(conn: Connection) -> System:
    """System identifier, timeline, database and the end of the WAL."""
    # A primary names the file it writes to after its timeline; the control file lags behind until a checkpoint.
    row = _one(
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


def slot_state(conn: Connection, slot: str) -> SlotState | None:
    """The slot, None if there is none of this name."""
    with conn.cursor(row_factory=dict_row) as cursor, _explained(slot):
        row = cursor.execute("SELECT * FROM pg_replication_slots WHERE slot_name = %s", [slot]).fetchone()
    return None if row is None else SlotState._of(row)


def publications(conn: Connection, names: Iterable[str]) -> dict[str, bool]:
    """Which of these publications exist now, and whether each has any table in this database."""
    with _explained():
        rows = conn.execute(
            "SELECT pubname::text, EXISTS (SELECT FROM pg_publication_tables t WHERE t.pubname = p.pubname)"
            "  FROM pg_publication p WHERE pubname = ANY(%s)",
            [list(names)],
        ).fetchall()
    return dict(rows)


def setting(conn: Connection, name: str) -> str:
    """A setting of the server."""
    with _explained():
        row = conn.execute("SELECT current_setting(%s)", [name]).fetchone()
    return str(row[0]) if row else ""


def published_tables(conn: Connection, names: Iterable[str]) -> tuple[str, ...]:
    """The tables of these publications now, with their schemas, as SQL writes them."""
    with _explained():
        rows = conn.execute(
            "SELECT DISTINCT format('%%I.%%I', schemaname, tablename) AS name"
            "  FROM pg_publication_tables WHERE pubname = ANY(%s) ORDER BY name",
            [list(names)],
        ).fetchall()
    return tuple(name for (name,) in rows)


def check(conn: Connection, settings: SourceSettings) -> SlotState:
    """Whether a stream can run with these settings: the slot if it can, otherwise an error with the remedy.

    A slot that another process streams from now is no error here, that may pass. A publication without a table is a
    warning in the log.

    Raises:
        NotConfigured: wal_level, or a role that may not replicate.
        SlotNotFound, SlotMismatch, SlotLost: The slot is missing, can't be used by this reader, or is dead.
        PublicationError: A publication is missing.
        ConfigurationError: An option that this server is too old for.
    """
    check_server(conn)
    check_options(conn, settings)
    found = publications(conn, settings.publication)
    missing = [name for name in settings.publication if name not in found]
    slot = slot_state(conn, settings.slot)
    if slot is None:
        raise SlotNotFound(
            f"there is no replication slot {settings.slot!r} on {settings.server}",
            hint=missing_slot_hint(settings.slot, missing),
        )
    check_slot(conn, slot)
    if missing:
        names = ", ".join(map(repr, missing))
        raise PublicationError(
            f"there is no publication {names} in database {slot.database!r}, and slot {slot.name!r} is there already",
            hint=missing_publication_hint(slot.name, missing),
        )
    for name, has_tables in found.items():
        if not has_tables:
            logger.warning("publication %r has no table yet: ALTER PUBLICATION … ADD TABLE …", name)
    return slot


def check_server(conn: Connection) -> None:
    """Whether the server decodes logically, and this role may have it do so.

    Raises:
        NotConfigured: wal_level, or the role.
    """
    # From 19 on a logical slot raises the effective level by itself.
    standby, level, effective, role, may_replicate = _one(
        conn,
        """
        SELECT pg_is_in_recovery(),
               current_setting('wal_level'), current_setting('effective_wal_level', true), current_user::text,
               (SELECT rolsuper OR rolreplication FROM pg_roles WHERE rolname = current_user)
               OR coalesce((SELECT pg_has_role(oid, 'member') FROM pg_roles WHERE rolname = 'rds_replication'), false)
        """,
    )
    if standby and conn.info.server_version < 160_000:
        raise NotConfigured(
            f"this server is a standby of PostgreSQL {conn.info.server_version // 10_000}, which does not decode",
            hint="connect to the primary: target_session_attrs=read-write; from PostgreSQL 16 on standbys decode, too",
        )
    if "logical" not in (level, effective) and not (effective and level == "replica"):
        raise NotConfigured(
            f"the server's wal_level is {level!r}, and logical replication needs 'logical'",
            hint="ALTER SYSTEM SET wal_level = 'logical'; then restart the server",
        )
    if not may_replicate:
        raise NotConfigured(
            f"role {role!r} may not replicate",
            hint=f"as a superuser: ALTER ROLE {quote_name(role)} REPLICATION; "
            "on Amazon RDS: GRANT rds_replication TO …",
        )


def check_options(conn: Connection, settings: SourceSettings) -> None:
    """Whether the server is new enough for the options of the stream.

    Raises:
        ConfigurationError: It is not; which version it takes, and what to do without.
    """
    for option, value, since, instead in (
        ("streaming", "parallel", 16, "streaming='on' gives the same changes"),
        ("origin", "none", 16, "without it, a publication of other tables keeps replicated ones out"),
    ):
        if getattr(settings, option) == value and conn.info.server_version < since * 10_000:
            raise ConfigurationError(
                f"{option}={value!r} needs PostgreSQL {since}, and {settings.server} runs "
                f"{conn.info.server_version // 10_000}",
                hint=f"leave it out; {instead}",
            )
    if settings.binary == "on" and (columns := text_columns(conn, settings.publication)):
        raise ConfigurationError(
            f"binary='on': these columns can be read as text only: {'; '.join(columns)}",
            hint="leave it out, or use binary='auto'; or leave the columns out of the publication (PostgreSQL 15)",
        )


def binary_option(conn: Connection, binary: str, names: Iterable[str]) -> dict[str, str]:
    """What pgoutput is told about binary: nothing without, as ever."""
    if binary == "auto" and conn.info.parameter_status("server_encoding") == "SQL_ASCII":
        binary = "off"  # of an array in binary it can't be told which element is not UTF-8
    if binary == "auto" and (columns := text_columns(conn, names, by_value=True)):
        logger.info(
            "values come as text, because some can't be read, or only slowly, in binary: %s", "; ".join(columns)
        )
        binary = "off"
    return {} if binary == "off" else {"binary": "true"}


def text_columns(conn: Connection, names: Iterable[str], *, by_value: bool = False) -> list[str]:
    """The columns of these publications, with their types, that can be read as text only.

    With `by_value` also those whose values can be read only one by one, which takes longer than their text does.
    What a type without a send function has is sent as text in any case.
    """
    # pg_publication_tables has column lists from PostgreSQL 15 on: as a key of the row's JSON it may be absent.
    with _explained():
        columns = conn.execute(
            """
            SELECT DISTINCT p.schemaname || '.' || p.tablename || '.' || a.attname, a.atttypid::bigint,
                   pg_catalog.format_type(a.atttypid, NULL)
              FROM pg_publication_tables AS p
              JOIN pg_namespace AS n ON n.nspname = p.schemaname
              JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = p.tablename
              JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
              JOIN pg_type AS t ON t.oid = a.atttypid AND t.typsend <> 0
             WHERE p.pubname = ANY(%s) AND coalesce((to_jsonb(p) -> 'attnames') ? a.attname, a.attgenerated = '')
             ORDER BY 1
            """,
            [list(names)],
        ).fetchall()
        defined = sorted({oid for _, oid, _ in columns} - TYPES.keys())
        facts = conn.execute(FACTS, {"oids": defined}).fetchall() if defined else []
    rows = TYPES | from_catalogue((TypeFacts(*fact) for fact in facts), TYPES)
    readers = {oid: row.binary for oid, row in rows.items()}
    return [
        f"{column} {name}"
        for column, oid, name in columns
        if (reader := readers.get(oid)) is None or (by_value and reader.by_value)
    ]


def check_slot(conn: Connection, slot: SlotState) -> None:
    """Whether this reader, in this database, can use the slot at all; nothing is said of its position.

    Raises:
        SlotMismatch: It is physical, of another plugin or database, two-phase, or another server's copy.
        SlotLost: It was invalidated.
    """
    database, standby = _one(conn, "SELECT current_database()::text, pg_is_in_recovery()")
    name = f"slot {slot.name!r}"
    other = "name another slot, or drop this one if nobody needs it"
    if slot.slot_type != "logical":
        raise SlotMismatch(f"{name} is a {slot.slot_type} slot, and changes need a logical one", hint=other)
    if slot.plugin != PLUGIN:
        raise SlotMismatch(f"{name} uses the plugin {slot.plugin!r}, and this reader needs {PLUGIN!r}", hint=other)
    if slot.database != database:
        raise SlotMismatch(
            f"{name} belongs to database {slot.database!r}, and this connection is to {database!r}",
            hint=f"connect with dbname={slot.database}, or name another slot",
        )
    if slot.two_phase:
        raise SlotMismatch(
            f"{name} was created for two-phase commits, whose rows would come before they are committed",
            hint=f"use a slot without: SELECT pg_create_logical_replication_slot('…', '{PLUGIN}')",
        )
    if slot.invalidation:
        raise SlotLost(
            f"{name} was invalidated by the server ({slot.invalidation}): changes that it held are lost",
            hint=f"{resync_hint(slot.name)}; {_INVALIDATIONS.get(slot.invalidation, 'the server log has the reason')}",
        )
    if slot.synced and standby:
        raise SlotMismatch(
            f"{name} is a copy that this standby keeps of the primary's slot",
            hint="connect to the primary; the copy can be used once this standby is promoted",
        )


def create(conn: Connection, settings: SourceSettings) -> None:
    """Create the publications (for all tables) and then the slot, as far as they are missing.

    A publication that is missing while the slot is there is left alone: it would be younger than the slot, which
    `check` then explains.
    """
    if slot_state(conn, settings.slot) is None:
        check_server(conn)
        create_publication_and_slot(conn, slot=settings.slot, publications=settings.publication)


def create_publication_and_slot(
    conn: Connection, *, slot: str, publications: Iterable[str], tables: Iterable[str] | None = None
) -> None:
    """Create what is missing of the publications, then the slot: the stream fails if the slot is the older one.

    Creating a slot waits for all transactions that write at this moment; the log says so every few seconds.

    Args:
        conn: In autocommit mode.
        slot: Its name.
        publications: Their names.
        tables: Tables of new publications, as SQL wants them (``public.orders``, ``"We Ird"``); None for all tables,
            which needs a superuser.

    Raises:
        NotConfigured: The role may not do this, or all slots are in use.
    """
    wanted = list(publications)
    found = _publications(conn, wanted)
    what = "ALL TABLES" if tables is None else f"TABLE {', '.join(tables)}"
    for name in wanted:
        if name in found:
            continue
        try:
            # The names of tables are SQL on purpose: ONLY, column lists and row filters are allowed.
            conn.execute(sql.SQL("CREATE PUBLICATION {} FOR ").format(sql.Identifier(name)) + sql.SQL(what))
        except psycopg.errors.DuplicateObject:
            continue
        except psycopg.errors.InsufficientPrivilege as e:
            raise NotConfigured(
                f"publication {name!r} can't be created: {e.diag.message_primary}",
                hint=f"as the tables' owner with CREATE on the database: CREATE PUBLICATION {quote_name(name)} "
                "FOR TABLE …; FOR ALL TABLES needs a superuser",
            ) from e
        except psycopg.Error as e:
            raise server_error(e) from e
        logger.info("created publication %r for %s", name, what.lower() if tables is None else what)
    if slot_state(conn, slot) is None:
        create_slot(conn, slot)


def create_slot(conn: Connection, slot: str, *, failover: bool = False) -> None:
    """Create the slot; nothing happens if there is one of this name.

    Args:
        conn: In autocommit mode.
        slot: Its name.
        failover: Whether standbys keep a copy of it; from PostgreSQL 17 on.

    Raises:
        NotConfigured: The role may not do this, or all slots are in use.
    """
    try:
        with _patience(_WAITS[_one(conn, "SELECT pg_is_in_recovery()")[0]], slot):
            row = conn.execute(
                "SELECT lsn::text FROM pg_create_logical_replication_slot(%s, %s"
                + (", failover => true)" if failover else ")"),
                [slot, PLUGIN],
            ).fetchone()
    except psycopg.errors.DuplicateObject:
        return
    except psycopg.Error as e:
        raise server_error(e, slot=slot) from e
    logger.info("created replication slot %r at %s", slot, row[0] if row else "?")


_publications = publications  # the parameter above has the function's name


@contextmanager
def _patience(message: str, *arguments: object) -> Iterator[None]:
    """Repeat a line in the log while the body takes its time."""
    done = threading.Event()

    def say() -> None:
        while not done.wait(_LOG_EVERY):
            logger.info(message, *arguments)

    thread = threading.Thread(target=say, name="pgoutput-patience", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def defined_types(dsn: str) -> Definitions:
    """What looks up the types that the database defines, and the names of its tables."""
    return Definitions(dsn)


class Definitions:
    """A `relations.LookUp`: each time on a connection of its own."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn

    def __call__(self, oids: Sequence[int]) -> dict[int, PgType]:
        with connect(self._dsn) as conn, _explained():
            facts = conn.execute(FACTS, {"oids": list(oids)}).fetchall()
            known = types_of(conn.info.server_version)
        return from_catalogue((TypeFacts(*fact) for fact in facts), known)

    def table_name(self, relation_id: int) -> tuple[str, str] | None:
        """The schema and the name of a table; None if it is gone."""
        with connect(self._dsn) as conn, _explained():
            row = conn.execute(
                "SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
                " WHERE c.oid = %s::bigint::oid",
                [relation_id],
            ).fetchone()
        return None if row is None else (str(row[0]), str(row[1]))


def current_lsn(conn: Connection) -> Lsn:
    """A position that a stream is sure to reach, with everything at or below it that was committed before the call.

    It is flushed: a stream gets WAL only then, and commits with synchronous_commit = off are flushed a moment later.
    On a standby it is what was replayed.
    """
    standby, now, page, segment = _one(
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
    while not standby and Lsn(_one(conn, "SELECT pg_current_wal_flush_lsn()::text")[0]) < target:
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


def target(conn: Connection, settings: SourceSettings) -> Lsn | None:
    """Where a bounded run ends, as `settings.until` says it; None if it has no end."""
    if settings.until is None:
        return None
    return current_lsn(conn) if settings.until == "current" else Lsn(settings.until)


def _before_page_header(lsn: Lsn, page: int, segment: int) -> Lsn:
    """The end of the last record, where the insert position stands behind the header of a page still without one.

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


def _one(conn: Connection, query: str) -> tuple[Any, ...]:
    with _explained():
        row = conn.execute(query.encode()).fetchone()
    assert row is not None, "a query of one row"
    return tuple(row)


@contextmanager
def _explained(slot: str | None = None) -> Iterator[None]:
    try:
        yield
    except psycopg.Error as e:
        raise server_error(e, slot=slot) from e
