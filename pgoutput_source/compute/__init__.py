"""Groups, rows by key and accumulators, for operators and for readers of folders. Works without Bytewax."""
