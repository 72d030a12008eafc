"""All metrics. Bytewax's `/metrics` page shows them beside its own.

Each has the label `slot`. Positions are bytes of WAL, so the difference between two is a lag in bytes.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge

CHANGES: Final = Counter("pgoutput_changes", "Changes delivered to the dataflow", ["slot"])
SKIPPED: Final = Counter(
    "pgoutput_changes_skipped", "Changes that the server sent again and that were skipped", ["slot"]
)
RECONNECTS: Final = Counter("pgoutput_reconnects", "Replication connections that were lost and replaced", ["slot"])
COPIED: Final = Counter("pgoutput_copied_rows", "Rows read by the initial copy", ["slot"])
COPYING: Final = Gauge("pgoutput_copying_tables", "Tables whose initial copy is not complete", ["slot"])
COPY_READ: Final = Gauge("pgoutput_copying_read_rows", "Rows of these tables that were read", ["slot"])
COPY_EXPECTED: Final = Gauge("pgoutput_copying_expected_rows", "Rows that these tables have, by estimate", ["slot"])
COPY_LEFT: Final = Gauge("pgoutput_copying_seconds_left", "Time until they are read, at the present rate", ["slot"])
SPILLED: Final = Counter(
    "pgoutput_spilled_bytes", "Bytes of transactions in progress that went to temporary files (streaming)", ["slot"]
)
PARKED: Final = Gauge("pgoutput_parked_changes", "Changes that are parked (on_table_error)", ["slot", "table"])
PARKED_BEFORE: Final = Gauge(
    "pgoutput_destination_parked_changes",
    "Changes that a destination refused and that wait in its spool (on_table_error)",
    ["slot", "table"],
)
RECEIVED: Final = Gauge("pgoutput_received_lsn", "Highest position received", ["slot"])
ACKNOWLEDGED: Final = Gauge("pgoutput_acknowledged_lsn", "Position that PostgreSQL was told it may forget", ["slot"])
LAG: Final = Gauge("pgoutput_lag_bytes", "WAL received and not yet acknowledged", ["slot"])
COMMIT_TIME: Final = Gauge("pgoutput_last_commit_timestamp_seconds", "Commit time of the last change", ["slot"])
GATE_TIME: Final = Gauge("pgoutput_last_gate_timestamp_seconds", "When an epoch was last known to be durable", ["slot"])
STALLED: Final = Gauge("pgoutput_stalled_seconds", "How long Bytewax has not called the source, if too long", ["slot"])
