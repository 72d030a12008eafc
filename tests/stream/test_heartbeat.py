"""The heartbeat on real servers: it moves a slot where nothing happens, nobody sees it, its failure ends nothing."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from harness.database import Database
from harness.flow import Flow, confirmed, following, publish, wait_for
from harness.waiting import until
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgoutput_source import ChangeSet, PgOutputReader, peek


def test_it_moves_a_slot_and_is_no_message(any_db: Database) -> None:
    streaming = "on" if any_db.server.major % 2 else "off"
    publish(any_db)
    with any_db.connect() as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY)")
        reader = PgOutputReader(
            any_db.dsn, slot="cdc", publication="cdc", heartbeat_seconds=0.1, status_interval=0.2, streaming=streaming
        )
        got: list[ChangeSet] = []

        def read() -> None:
            for changes in reader.sets():
                got.append(changes)
                reader.ack(changes)

        thread = threading.Thread(target=read)
        thread.start()
        until(lambda: reader._session is not None)
        before = confirmed(any_db)
        until(lambda: confirmed(any_db) > before)  # and nobody else writes
        connection.execute("SELECT pg_logical_emit_message(true, 'a', 'mine'), pg_logical_emit_message(false, 'b', '')")
        connection.execute("INSERT INTO t VALUES (1)")
        until(lambda: len([b for changes in got for b in changes.batches]) == 1)
        after = confirmed(any_db)
        until(lambda: confirmed(any_db) > after)
        reader.stop()
        thread.join()
        reader.close()

    assert sorted(m.prefix for changes in got for m in changes.messages) == ["a", "b"]
    assert peek(any_db.dsn, slot="cdc", publication="cdc").messages == ()


def test_a_bounded_flow_ends_in_spite_of_it(db: Database, tmp_path: Path) -> None:
    publish(db)
    flow = Flow(db, tmp_path, PGOUTPUT_HEARTBEAT_SECONDS="0.01", PGOUTPUT_UNTIL="current")
    flow.run("-s", "0", *flow.recovery())


def test_it_fails_with_a_warning_and_comes_back(db: Database, tmp_path: Path) -> None:
    publish(db)
    flow = Flow(db, tmp_path, PGOUTPUT_HEARTBEAT_SECONDS="0.2", PGOUTPUT_STATUS_INTERVAL="0.2")
    role = sql.Identifier(db.name)
    with db.connect() as connection:
        function = sql.SQL("FUNCTION pg_logical_emit_message(boolean, text, text, boolean)")
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN REPLICATION PASSWORD 'x'").format(role))
        connection.execute(sql.SQL("REVOKE EXECUTE ON {} FROM PUBLIC").format(function))
        try:
            process = flow.start("-s", "1", PGOUTPUT_DSN=make_conninfo(db.dsn, user=db.name, password="x"))
            with following(process) as lines:
                wait_for(lines, "no heartbeat: ", process)
                time.sleep(1)
                assert len([line for line in lines if "no heartbeat" in line]) == 1
                connection.execute(sql.SQL("GRANT EXECUTE ON {} TO PUBLIC").format(function))
                wait_for(lines, "the heartbeat is back", process)
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%%emit_message%%'"
                    " AND datname = current_database() AND pid <> pg_backend_pid()"
                )
                until(lambda: len([line for line in lines if "heartbeat is back" in line]) == 2)
                process.terminate()
                assert process.wait(20) == 0, lines
        finally:
            connection.execute(sql.SQL("GRANT EXECUTE ON {} TO PUBLIC").format(function))
            connection.execute(sql.SQL("DROP ROLE {}").format(role))
