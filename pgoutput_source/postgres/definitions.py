"""Looks up types and tables in the database when the stream first names them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pgoutput_source.decode.attributes import QUERY, Attributes, attributes_of
from pgoutput_source.postgres.connection import Connection, ask
from pgoutput_source.types import PgType, types_of
from pgoutput_source.types.catalogue import FACTS, TypeFacts, from_catalogue


class Definitions:
    """A `relations.LookUp` that opens a new connection for each question.

    Args:
        dsn: A libpq connection string or URL.
        patience: For how many seconds to retry while the server is away.
    """

    def __init__(self, dsn: str, patience: float = 0.0) -> None:
        self._dsn = dsn
        self._patience = patience

    def __call__(self, oids: Sequence[int]) -> dict[int, PgType]:
        def found(connection: Connection) -> dict[int, PgType]:
            facts = connection.execute(FACTS, {"oids": list(oids)}).fetchall()
            return from_catalogue((TypeFacts(*fact) for fact in facts), types_of(connection.info.server_version))

        return ask(self._dsn, found, patience=self._patience)

    def table_name(self, relation_id: int) -> tuple[str, str] | None:
        """The schema and the name of a table; None if it is gone."""

        def name(connection: Connection) -> tuple[str, str] | None:
            row = connection.execute(
                "SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
                " WHERE c.oid = %s::bigint::oid",
                [relation_id],
            ).fetchone()
            return None if row is None else (str(row[0]), str(row[1]))

        return ask(self._dsn, name, patience=self._patience)

    def attributes(self, relation_ids: Collection[int]) -> dict[int, Attributes]:
        """All columns of these tables by relation, including dropped columns. Tables that are gone are left out."""

        def found(connection: Connection) -> dict[int, Attributes]:
            return attributes_of(connection.execute(QUERY, {"relations": list(relation_ids)}).fetchall())

        return ask(self._dsn, found, patience=self._patience)
