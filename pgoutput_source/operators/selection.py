"""`cdc.table`, `cdc.tables` and `cdc.messages`: what a dataflow takes from the source's change sets."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from bytewax import operators as op
from bytewax.dataflow import Stream, operator

from pgoutput_source.changes.batches import ChangeBatch, ChangeSet, Message, UndecodedBatch
from pgoutput_source.changes.schema import TableName
from pgoutput_source.dataflow.taken import take, take_matching
from pgoutput_source.destinations.targets import Patterns


@operator
def table(step_id: str, up: Stream[ChangeSet], name: str) -> Stream[ChangeBatch]:
    """The changes of one table, as batches in position order. A change of its schema starts a new batch.

    Args:
        step_id: Unique name of the step.
        up: The output of `PgOutputSource`.
        name: Schema and table: ``public.orders``, or ``a."b.c"`` when a dot would be ambiguous.

    Raises:
        ConfigurationError: `name` has no schema, or dots that can be read in several ways.
        DecodeError, ConfigurationError, SchemaChanged: Once changes come: those of this table can't be decoded.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from pgoutput_source.testing import batch
        >>> poll = ChangeSet((batch("public.orders", [("I", {"id": 1})]), batch("public.items", [("I", {"id": 7})])))
        >>> flow, out = Dataflow("shop"), []
        >>> op.output("out", table("orders", op.input("in", flow, TestingSource([poll])), "public.orders"),
        ...           TestingSink(out))
        >>> run_main(flow)
        >>> [(batch.table, batch.data["id"].to_pylist()) for batch in out]
        [('public.orders', [1])]
    """
    wanted = TableName.parse(name)
    take(up, lambda: [wanted])

    def of_table(sets: list[ChangeSet]) -> list[ChangeBatch]:
        return [batch for s in sets for batch in s.of(wanted)]

    return op.flat_map_batch("of_table", up, of_table)


@operator
def tables(
    step_id: str,
    up: Stream[ChangeSet],
    tables: str | Iterable[str] = ("*",),
    *,
    exclude: str | Iterable[str] = (),
) -> Stream[ChangeBatch]:
    """The changes of all tables that match, those that are created later included.

    Each batch has changes of one table and knows which: `ChangeBatch.table` and `schema`. Batches of a table come in
    position order. Those of different tables come table by table within a poll, so the order of changes across tables
    is in `_commit_lsn` and `_seq`.

    Args:
        step_id: Unique name of the step.
        up: The output of `PgOutputSource`.
        tables: Patterns over schema and name, as ``public.*``: `*`, `?` and ``[seq]`` as in a shell. All by default. A
            name without these is checked at the start, as in `table`; a pattern that no published table matches is a
            warning.
        exclude: Patterns of the tables to leave out.

    Raises:
        ConfigurationError: A name has no schema, or dots that can be read in several ways.
        DecodeError, ConfigurationError, SchemaChanged: Once changes come: those of such a table can't be decoded.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from pgoutput_source.testing import batch
        >>> names = ["public.orders", "public.audit_1", "sales.items"]
        >>> poll = ChangeSet(tuple(batch(name, [("I", {"id": 1})]) for name in names))
        >>> flow, out = Dataflow("shop"), []
        >>> changes = op.input("in", flow, TestingSource([poll]))
        >>> op.output("out", tables("public", changes, "public.*", exclude="*.audit_*"), TestingSink(out))
        >>> run_main(flow)
        >>> [batch.table for batch in out]
        ['public.orders']
    """
    patterns = Patterns(tables, exclude)
    take_matching(up, patterns.tables)

    def of_tables(sets: list[ChangeSet]) -> list[ChangeBatch]:
        found = [batch for s in sets for batch in s.batches if patterns.take(batch.schema.full_name)]
        for batch in found:
            if isinstance(batch, UndecodedBatch):
                raise copy.copy(batch.error)
        return found

    return op.flat_map_batch("of_tables", up, of_tables)


@operator
def messages(step_id: str, up: Stream[ChangeSet], *, prefix: str = "") -> Stream[Message]:
    """Logical decoding messages: what ``pg_logical_emit_message(transactional, prefix, content)`` wrote.

    A transactional message comes with its transaction, and only if that commits. Others come at once. Within a set they
    are in WAL order. With `streaming`, a transactional message that was written after a savepoint comes even if the
    savepoint was rolled back: PostgreSQL does not tell which subtransaction a message belongs to.

    Args:
        step_id: Unique name of the step.
        up: The output of `PgOutputSource`.
        prefix: Only messages whose prefix begins with this; "" for all.

    Example:
        >>> from bytewax.dataflow import Dataflow
        >>> from bytewax.testing import TestingSink, TestingSource, run_main
        >>> from pgoutput_source.protocol.wire import Lsn
        >>> made = [Message(Lsn(n), prefix, b"hello", False) for n, prefix in enumerate(["audit.login", "beat"])]
        >>> flow, out = Dataflow("shop"), []
        >>> changes = op.input("changes", flow, TestingSource([ChangeSet((), tuple(made))]))
        >>> op.output("out", messages("audit", changes, prefix="audit."), TestingSink(out))
        >>> run_main(flow)
        >>> [(message.prefix, message.content) for message in out]
        [('audit.login', b'hello')]
    """

    def of_prefix(sets: list[ChangeSet]) -> list[Message]:
        return [message for s in sets for message in s.messages if message.prefix.startswith(prefix)]

    return op.flat_map_batch("of_prefix", up, of_prefix)
