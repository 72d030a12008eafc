"""PostgreSQL change data capture for Python: pgoutput, columnar, as a Bytewax source."""
