"""Old rows: from `_before` if the replica identity is FULL, and otherwise from kept rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgoutput_source.changes.batches import ChangeBatch
from pgoutput_source.changes.schema import MetadataNames
from pgoutput_source.compute.columns import refuse_misfits
from pgoutput_source.compute.kept_rows import RAW, KeptRows
from pgoutput_source.compute.keyed_changes import Found, KeyedChanges
from pgoutput_source.compute.metadata import DELETE, UPDATE, Bools, Ints, operations, row_texts, unsent
from pgoutput_source.compute.state import AFRESH
from pgoutput_source.compute.versions import Seen, column_in
from pgoutput_source.errors import ConfigurationError, StateError

logger = logging.getLogger(__name__)

FULL = "f"


class OldRows:
    """What a step must remember about the rows of one table: nothing while the identity is FULL.

    `kept` has the last row of each key; it is None while the identity is FULL. `kept_all` tells whether it has every
    row that was seen.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.table: str | None = None
        self.kept: KeptRows | None = None
        self.kept_all = True
        if state is not None:
            self.table, self.kept_all = state["table"], state["kept_all"]
            self.kept = None if state["kept"] is None else KeptRows.restore(state["kept"])
        self.seen = Seen(None if state is None else state.get("schema"))

    def snapshot(self) -> dict[str, Any]:
        """The state as builtins, for the next `OldRows`."""
        return {
            "table": self.table,
            "kept_all": self.kept_all,
            "kept": None if self.kept is None else self.kept.snapshot(),
            "schema": self.seen.pack(),
        }

    def know(self, step_id: str, batch: ChangeBatch, columns: Sequence[str]) -> bool:
        """Note a batch's table, identity and version. `columns` are those that the step needs.

        Returns:
            Whether this is another table with the same name, so that no row of the earlier one exists any more.

        Raises:
            ConfigurationError: The batch is of another table than earlier batches.
            StateError: Old rows are needed that were not kept, or a column was replaced by another one.
        """
        schema = batch.schema
        if self.table is not None and not schema.full_name.written(self.table):
            raise ConfigurationError(
                f"step {step_id!r} has seen {self.table} and now gets changes of {schema.table}",
                hint="use one step for each table; publish_via_partition_root makes partitions one table",
            )
        self.table = schema.table
        before, other = self.seen.changed(batch.data.schema)
        if other:
            self.kept, self.kept_all = None, True
        elif before is not None and self.seen.schema is not None:
            self._check_columns(before, columns)
            if self.kept is not None:
                pasts = {name: column_in(before, self.seen.schema.field(name)).name for name in schema.key}
                names = {past: name for name, past in pasts.items() if past not in (None, name)}
                if names:
                    self.kept.rename({past: name for past, name in names.items() if past is not None})
        if schema.replica_identity == FULL or not schema.key:
            self.kept, self.kept_all = None, False
            return other
        if not self.kept_all and np.isin(operations(batch.data), (UPDATE, DELETE)).any():
            raise StateError(
                "the replica identity is no longer FULL: old rows are not sent any more, and were not kept",
                table=schema.table,
                hint=f"ALTER TABLE {schema.table} REPLICA IDENTITY FULL, or {AFRESH}",
            )
        if self.kept is None:
            self.kept = KeptRows(schema.key)
        elif self.kept.key != schema.key:
            self.kept.rekey(schema.key)
        return other

    def _check_columns(self, before: pa.Schema, columns: Sequence[str]) -> None:
        assert self.seen.schema is not None
        for name in columns:
            past = column_in(before, self.seen.schema.field(name))
            if past.name != name:
                raise StateError(
                    f"the column named {name} is another one now, whose values in older rows are unknown",
                    table=self.table,
                    column=name,
                    hint=f"{AFRESH}, and begin with a snapshot",
                )
            if not past.known:
                logger.warning(
                    "%s: column %s %s: rows that have not been sent since count with the value that they had",
                    self.table, name, past.reason,
                )  # fmt: skip

    def clear(self) -> None:
        """The table is empty."""
        if self.kept is not None:
            self.kept.clear()

    # -- kept -------------------------------------------------------------------------------------------------------

    def filled(self, changes: KeyedChanges, columns: Sequence[str], rows: Ints | None, found: Found) -> pa.Table:
        """Columns of the rows of some changes, or of all changes for None, without missing values.

        Raises:
            StateError: A value was not sent and never seen.
        """
        filled = changes.filled(columns, rows, found)
        for name, column in filled.items():
            if column.unknown is not None:
                raise self._not_sent(name)
        fields = [changes.data.schema.field(name) for name in filled]
        return pa.table([column.values for column in filled.values()], pa.schema(fields))

    def keep(self, changes: KeyedChanges, rows: pa.Table) -> None:
        """Keep the rows that exist after these changes."""
        assert self.kept is not None
        codes, at = changes.there
        self.kept.drop(changes.names(np.concatenate([changes.deleted[0], changes.left[0]])))
        if changes.texts:
            raw = row_texts(changes.data.column(changes.metadata.raw).take(pa.array(at)), changes.metadata.old)
            if raw.null_count < len(raw):
                rows = rows.append_column(RAW, raw)
        self.kept.put(changes.names(codes), rows)

    # -- sent -------------------------------------------------------------------------------------------------------

    def sent(self, data: pa.RecordBatch, columns: Sequence[str]) -> tuple[Bools, pa.Table]:
        """Which changes have an old row, and these columns of the old rows.

        Raises:
            StateError: An old row is missing, or a value was not sent.
            ConfigurationError: Old rows don't have these columns.
            DecodeError: A column has a misfit.
        """
        refuse_misfits(data, columns, old=True)
        ops, metadata = operations(data), MetadataNames.of(data.schema)
        has_before = data.column(metadata.before).is_valid().to_numpy(zero_copy_only=False)
        if (np.isin(ops, (UPDATE, DELETE)) & ~has_before).any():
            raise StateError(
                "an update or delete came without its old row",
                table=self.table,
                hint=f"ALTER TABLE {self.table} REPLICA IDENTITY FULL, and don't drop {metadata.before} on the way",
            )
        missing = {*columns} - {field.name for field in data.schema.field(metadata.before).type}
        if missing:
            raise ConfigurationError(
                f"{metadata.before} has no column {', '.join(sorted(missing))}",
                table=self.table,
                hint="old rows must have it too: a column that map_batches adds is not in them",
            )
        for name in unsent(data, columns):
            raise self._not_sent(name)
        olds = data.column(metadata.before).filter(pa.array(has_before))
        found = {name: pc.struct_field(olds, [name]) for name in columns}
        return has_before, pa.table(found or {metadata.op: data.column(metadata.op).filter(pa.array(has_before))})

    def _not_sent(self, name: str) -> StateError:
        return StateError(
            "an unchanged TOASTed value was not sent, and the flow has never seen it",
            table=self.table,
            column=name,
            hint=f"ALTER TABLE {self.table} REPLICA IDENTITY FULL, or begin with a snapshot",
        )
