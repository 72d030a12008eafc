"""Which test holds which of the numbered conformance cases, and which behaviour that others have learned to test.

Most cases carry their number in the name of a test, or are lines of the table in `test_conformance`. The others are
listed here, with the test that holds them or the reason why there is none. Each number is in one place.

What PostgreSQL itself does otherwise, and nobody who reads a stream can see or mend:

    60          14 and 15 go on with the old name of a renamed schema until the next connection; once another table
                takes the name, the catalogue is asked: `test_schema_changes`
    93, 95      14 goes on, until the next connection, to send an attached partition's rows as the partition's, and a
                detached one's as its former root's
    21          is run at a tenth of its size, and whole by `benchmarks/big_transaction.py`
    27          a table in pg_catalog is announced with an empty schema
    43, 47      the order of a primary key's columns is not on the wire: batches say which columns it has
    113         a message of a savepoint that was rolled back is streamed as the transaction's own
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from harness.conformance_cases import CASES

HERE = Path(__file__).parent

ELSEWHERE: dict[int, str] = {
    87: "test_settings::test_a_wrong_option_is_one_clear_error",
    117: "test_reader::test_nothing_acknowledged_is_repeated_and_nothing_else_is_lost",
    119: "test_replication::test_a_server_that_crashes_is_waited_for",
    120: "test_reconcile::test_a_slot_that_does_not_fit",
    121: "test_reconcile::test_a_slot_behind_the_state_sends_again_what_is_dropped",
    122: "test_replication::test_only_what_was_received_can_be_acknowledged",
    123: "test_reader::test_a_quiet_publication_lets_go_of_the_busy_databases_wal",
    124: "test_reader::test_what_is_outstanding_keeps_the_slot_where_it_is",
    125: "test_replication::test_a_stalled_consumer_keeps_its_connection_by_the_reporter",
    126: "test_replication::test_an_idle_connection_lives_longer_than_the_servers_patience",
    127: "test_replication::test_a_server_stops_at_once_with_a_reader_attached",
    128: "test_replication::test_a_terminated_walsender_is_replaced_and_nothing_is_lost",
    129: "test_replication::test_a_slot_that_stays_in_use_names_its_holder",
    130: "test_replication::test_a_slot_that_is_lost_meanwhile_is_not_tried_again",
    131: "test_checks::test_a_slot_that_can_not_be_used_is_refused_with_its_remedy",
    132: "test_replication::test_a_walsender_streams_from_a_slot_once_and_then_ends",
    133: "test_reader::test_a_cancelled_task_loses_nothing",
    137: "test_checks::test_a_role_without_rights_is_told_what_it_lacks",
    138: "test_reconcile::test_a_promoted_standby_goes_on_where_the_primary_was_killed",
    139: "test_reconcile::test_a_state_of_another_server",
    142: "test_checks::test_the_creation_of_a_slot_says_what_it_waits_for",
    172: "test_initial::test_a_busy_table_is_copied_exactly",
    173: "test_copied_steps::test_steps_over_a_copy_and_its_stream_equal_sql",
    175: "test_as_streamed::test_what_is_copied_is_what_is_streamed",
    177: "test_copied_flows::test_kill_9_of_flow_and_server_in_the_midst_of_the_copy",
    178: "test_judge::test_without_a_rule_it_fails",
    179: "test_judge::test_what_is_delivered_is_what_the_table_went_through",
    180: "test_types_stream::test_copy_decoded_by_the_same_table_equals_the_stream",
}

NOWHERE: dict[range, str] = {
    range(
        136, 137
    ): "a value of more than 1 GiB as text is the server's error; benchmarks/large_values.py reads others",
    range(140, 141): "PostgreSQL 10 is not supported",
    range(141, 142): "the storm takes a failover slot whose standby is away for minutes; one a minute is logged",
    range(174, 175): "no snapshot is exported: each chunk has its own",
    range(176, 177): "chunks are ranges of the key, not of the ctid: a streamed change has none",
}

LAST = 180

BEHAVIOURS: dict[str, str] = {
    # What is decoded
    "every message is read and written byte for byte": "test_messages::test_recorded_messages_are_read_and_written",
    "an LSN is a number and its text": "test_wire",
    "texts of any UTF-8, and empty ones, end with a zero byte": "test_messages::test_every_message_reads_back",
    "a type that nobody knows is its text": "test_types::test_an_unknown_type_is_its_exact_text",
    "a table without columns": "test_conformance 25",
    "names that are quoted, long, or look like SQL": "test_security::test_names_that_look_like_sql_are_names",
    "names that differ in case only": "test_conformance 26",
    "the identity is not the primary key": "test_conformance 34",
    "without an identity the server refuses, and the stream goes on": "test_conformance 36",
    "a key of several columns": "test_conformance 43",
    "a key that changes brings the old one": "test_conformance 3",
    "a table without a primary key": "test_conformance 28",
    "truncates of one table and of several, CASCADE, RESTART IDENTITY, partitions": "test_conformance 94",
    "logical messages, transactional or not, come once": (
        "test_reader::test_logical_messages_come_with_the_sets_and_hold_the_slot_until_they_are_acknowledged"
    ),
    "an origin is that of its own transaction": "test_conformance 101",
    "what is rolled back is never seen, streamed or not": "test_streaming 108",
    "a connection that is lost amid a streamed transaction": (
        "test_streaming::test_a_lost_connection_in_the_midst_of_chunks_loses_and_repeats_nothing"
    ),
    "transactions come in the order of their commits": "test_conformance 29",
    "changes that share an LSN are all there, in order": "test_conformance 12",
    "a key that is updated again and again within a transaction": (
        "test_aggregates::test_at_every_commit_it_equals_group_by_on_the_source"
    ),
    # Values that are not sent
    "an unchanged large value is marked and is no NULL": "test_conformance 37",
    "with a full identity it is filled from the old row": "test_conformance 38",
    "a NULL among the columns that are no key is not taken for one": "test_conformance 40",
    "it does not begin a version of the table": (
        "test_columns::test_a_schema_change_cuts_and_the_same_schema_sent_again_does_not"
    ),
    "a large value and a key that changes at once": "test_conformance 48",
    "an insert and an update that does not send all, compacted": (
        "test_mirror::test_current_rows_are_those_of_the_tables"
    ),
    "values of many megabytes": "test_memory::test_the_memory_of_a_very_large_value_is_given_back",
    # Types
    "each type, of the copy and of the stream": (
        "test_types_stream::test_copy_decoded_by_the_same_table_equals_the_stream"
    ),
    "each type in text and in binary": (
        "test_binary::test_a_column_of_every_type_is_the_same_in_binary_and_in_any_mixture"
    ),
    "a value that its Arrow type can't hold is never NULL": "test_types::test_a_decoded_value_is_the_servers_value",
    "settings of role and database do not shape values": (
        "test_checks::test_settings_of_role_and_database_do_not_shape_values"
    ),
    "enums, domains, composites and extensions": (
        "test_defined_types::test_enums_domains_composites_ranges_and_extensions_are_typed"
    ),
    "a label that an enum got in the midst of the stream": "test_conformance 66",
    "generated columns": "test_conformance 73",
    "bytes that are no text of the encoding": "test_types_encoding 134",
    # Tables that change
    "columns that are added, dropped, renamed and retyped": (
        "test_schema_changes::test_files_over_all_versions_of_a_table"
    ),
    "a change of the table without a change of rows": "test_conformance 22",
    "several changes of a table and of rows in one transaction": (
        "test_schema_changes::test_files_over_all_versions_of_a_table"
    ),
    "columns that are dropped one after the other": (
        "test_reader::test_a_table_whose_columns_came_and_went_is_one_arrow_table"
    ),
    "a column with a default is filled in for old rows": "test_conformance 52",
    "another primary key": "test_conformance 45",
    "a table that changes while nobody reads": "test_schema_changes::test_files_over_all_versions_of_a_table",
    "a table that is dropped, and one that is made again": (
        "test_schema_changes::test_a_table_that_is_dropped_and_made_again_is_two_versions_of_one_name"
    ),
    "an identity that is altered": "test_conformance 44",
    "what a table was is remembered with what is durable": (
        "test_conformance::test_a_flow_whose_tables_must_not_change_remembers_them"
    ),
    # Publications
    "of tables, schemas and everything; tables that come and go": "test_conformance 80",
    "column lists and row filters": "test_conformance 82",
    "partitions as themselves and as their root": "test_conformance 93",
    "partitions that are attached and detached": "test_conformance 95",
    "inheritance": "test_conformance 96",
    "a publication that is missing where a change stands": "test_conformance 77",
    "a publication and a slot are made where that is asked for": "test_checks::test_what_is_created_passes_the_check",
    "tables that are not published move the slot all the same": (
        "test_flow::test_an_idle_publication_lets_the_wal_of_other_tables_go"
    ),
    # Slots and restarts
    "a slot in use names its holder": "test_replication::test_a_slot_that_stays_in_use_names_its_holder",
    "nothing is acknowledged before it is durable": (
        "test_gate::test_every_epoch_is_published_before_it_is_acknowledged"
    ),
    "a crash at any step": "test_kill_points::test_a_death_loses_and_repeats_nothing",
    "a restart in the midst of a transaction": (
        "test_streaming::test_a_reader_resumes_in_the_midst_of_a_streamed_transaction"
    ),
    "a signal publishes and acknowledges": "test_flow::test_a_signal_drains_publishes_and_acknowledges",
    "what is replayed is the source": "test_flow::test_files_replayed_equal_the_tables",
    "a slot that is gone, moved or another's": "test_reconcile::test_a_slot_that_does_not_fit",
    "a slot that was invalidated": "test_checks::test_a_slot_whose_wal_is_gone_is_lost",
    "a resume state that is corrupt": "test_bad_input::test_a_recovery_folder_that_is_corrupt",
    "a standby as source, and its promotion": "test_standby::test_a_standby_is_read_while_it_is_promoted",
    "servers that stop, crash and stay away": "test_replication::test_a_server_that_crashes_is_waited_for",
    # Time
    "an idle table in a busy database": "test_reader::test_a_quiet_publication_lets_go_of_the_busy_databases_wal",
    "a heartbeat where nobody writes": "test_heartbeat::test_it_moves_a_slot_and_is_no_message",
    "a keepalive does not acknowledge what is outstanding": (
        "test_reader::test_what_is_outstanding_keeps_the_slot_where_it_is"
    ),
    "a sink that is slower than wal_sender_timeout": (
        "test_failing_sinks::test_a_sink_that_hangs_for_longer_than_wal_sender_timeout"
    ),
    "a server that does not answer is left": "test_replication::test_a_server_that_does_not_answer_is_left",
    "what is not asked for stays with the server": (
        "test_replication::test_a_poll_keeps_its_limits_and_the_rest_stays_with_the_server"
    ),
    "a bounded run ends although others write": "test_flow::test_a_bounded_run_stops_although_writers_go_on",
    # Files
    "each file is in the index, and no other": (
        "test_parquet::test_any_sequence_of_crashes_loses_nothing_and_doubles_nothing"
    ),
    "other programs read the same values": "test_parquet::test_every_value_survives_and_other_programs_read_it",
    "a sink that fails loses nothing": "test_failing_sinks::test_a_sink_that_fails",
    # Operation
    "what is missing at the server is told with its remedy": (
        "test_checks::test_a_slot_that_can_not_be_used_is_refused_with_its_remedy"
    ),
    "TLS as libpq does it": "test_security::test_tls_modes",
    "passwords and values are in no text": "test_security::test_passwords_and_row_values_are_nowhere_but_in_the_files",
    "columns that are hidden, masked and renamed": "test_operators::test_what_is_hidden_is_in_no_place_of_a_batch",
    "every supported major": "test_reader::test_the_readers_on_every_major_give_the_same_changes",
    # What is done otherwise, or not
    "multi-dimensional arrays": "are exact text, a misfit of the list that their column is",
    "messages of a prefix only": "cdc.messages(…, prefix=…) leaves out the others",
    "begin and commit as events of their own": "each change says its transaction",
    "a snapshot, whole or piece by piece, and a signal for one": "test_initial::"
    "test_a_message_asks_for_a_table_again_and_others_are_left_alone",
    "values that are fetched again because they were not sent": "unknown is said, never guessed: _unchanged",
    "a slot that is made again by itself": "never: what it held is lost, and resync says so and asks",
    "statements at connect, SSH tunnels, cloud identities": "libpq's connection string is all there is",
}


@cache
def numbered() -> dict[int, set[str]]:
    """The tests that carry each number in their name, and the lines of the table."""
    found: dict[int, set[str]] = {}
    for file in sorted(HERE.rglob("test_*.py")):
        for name in functions(file.stem):
            if span := re.match(r"test_cases_(\d+)_to_(\d+)_", name):
                numbers = [*range(int(span[1]), int(span[2]) + 1)]
            elif each := re.match(r"test_case_((?:\d+_)+)", name):
                numbers = [int(n) for n in each[1].strip("_").split("_")]
            else:
                continue
            for number in numbers:
                found.setdefault(number, set()).add(file.stem)
    for case in CASES:
        for number in map(int, case.number.split()):
            found.setdefault(number, set()).add("test_conformance")
    return found


@cache
def functions(module: str) -> set[str]:
    tree = ast.parse(next(HERE.rglob(f"{module}.py")).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_each_number_is_a_test_of_its_name_or_stands_here_once() -> None:
    nowhere = [number for span in NOWHERE for number in span]
    places = Counter([*numbered(), *ELSEWHERE, *nowhere])

    assert sorted(places) == list(range(1, LAST + 1))
    assert {number: count for number, count in places.items() if count > 1} == {}
    assert all(reason for reason in NOWHERE.values())


@pytest.mark.parametrize("test", sorted({*ELSEWHERE.values(), *BEHAVIOURS.values()}))
def test_what_is_named_exists(test: str) -> None:
    module, found, name = test.partition("::")
    if found:
        assert name in functions(module)
    elif number := re.fullmatch(r"(test_\w+) (\d+)", test):
        assert number[1] in numbered()[int(number[2])]
    elif test.startswith("test_"):
        assert functions(test)
