"""Types and tables as the database defines them, looked up when the stream first names them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pgoutput_source.decode.attributes import QUERY, Attributes, attributes_of
from pgoutput_source.postgres.connection import connect
from pgoutput_source.postgres.refusals import explained
from pgoutput_source.types import PgType, types_of
from pgoutput_source.types.catalogue import FACTS, TypeFacts, from_catalogue


class Definitions:
    """A `relations.LookUp`: each time on a connection of its own."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn

    def __call__(self, oids: Sequence[int]) -> dict[int, PgType]:
        with connect(self._dsn) as conn, explained():
            facts = conn.execute(FACTS, {"oids": list(oids)}).fetchall()
            known = types_of(conn.info.server_version)
        return from_catalogue((TypeFacts(*fact) for fact in facts), known)

    def table_name(self, relation_id: int) -> tuple[str, str] | None:
        """The schema and the name of a table; None if it is gone."""
        with connect(self._dsn) as conn, explained():
            row = conn.execute(
                "SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
                " WHERE c.oid = %s::bigint::oid",
                [relation_id],
            ).fetchone()
        return None if row is None else (str(row[0]), str(row[1]))

    def attributes(self, relation_ids: Collection[int]) -> dict[int, Attributes]:
        """All columns of these tables, dropped ones too, by relation; without the tables that are gone."""
        with connect(self._dsn) as conn, explained():
            return attributes_of(conn.execute(QUERY, {"relations": list(relation_ids)}).fetchall())
