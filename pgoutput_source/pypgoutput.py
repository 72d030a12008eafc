"""The interface of pypgoutput 0.0.3: its `LogicalReplicationReader`, on top of `PgOutputReader`."""

from __future__ import annotations

import psycopg
from psycopg.conninfo import make_conninfo

from pgoutput_source.changes.events import ChangeEvent
from pgoutput_source.errors import ConfigurationError
from pgoutput_source.postgres.creation import create_publication_and_slot
from pgoutput_source.reader import PgOutputReader
from pgoutput_source.stream.start import connect_when_started


class LogicalReplicationReader(PgOutputReader):
    """The reader of pypgoutput 0.0.3: the same arguments, the same iteration, the same JSON.

    It creates the slot if it is missing, but not the publication. A change is acknowledged when the next one is asked
    for. Unlike pypgoutput it never ends silently: errors are raised.

    Args:
        publication_name: The publication.
        slot_name: The replication slot.
        dsn: A libpq connection string or URL.
        metadata_prefix: For tables that have a column called `_op`, `_seq` or the like: see `SourceSettings`.
        kwargs: libpq's options, such as `host`, `port`, `database`, `user` and `password`; None leaves one out. Without
            options and DSN, libpq's environment variables decide where to connect.

    Example:
        >>> import psycopg
        >>> from pgoutput_source.embedded import shop
        >>> from pgoutput_source.embedded import Server
        >>> with Server() as server:
        ...     shop.create(server.dsn())
        ...     reader = LogicalReplicationReader(publication_name="shop", slot_name="shop", dsn=server.dsn())
        ...     with psycopg.connect(server.dsn()) as connection:
        ...         _ = connection.execute("UPDATE customers SET city = 'Quito' WHERE id = 1")
        ...     for message in reader:
        ...         print(message.op, message.table_schema.table, message.after["city"])
        ...         break
        ...     reader.stop()
        U customers Quito
    """

    def __init__(
        self,
        publication_name: str,
        slot_name: str,
        dsn: str | None = None,
        *,
        metadata_prefix: str = "_",
        **kwargs: str | None,
    ) -> None:
        given = {"dbname" if k == "database" else k: v for k, v in kwargs.items() if v is not None}
        try:
            conninfo = make_conninfo(dsn or "", **given)
        except psycopg.ProgrammingError as e:
            raise ConfigurationError(
                "the connection options can't be used", hint="give options of libpq: host, port, database, user …"
            ) from e
        super().__init__(
            conninfo,
            slot=slot_name,
            publication=publication_name,
            slot_wait_seconds=0,
            metadata_prefix=metadata_prefix,
        )
        self.open()

    def open(self) -> None:
        """Create the slot if it is missing, connect and start to stream. The constructor calls it."""
        if self._session is None:
            with connect_when_started(self._address(), self.settings) as connection:
                create_publication_and_slot(connection, slot=self.settings.slot, publications=())
        super().open()

    def __next__(self) -> ChangeEvent:
        if isinstance(self._given, ChangeEvent):
            self.ack(self._given)
        return super().__next__()

    def stop(self) -> None:
        """End the iteration and the connection. The slot is free then."""
        super().stop()
        self.close()
