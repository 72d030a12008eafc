"""Groups, rows by key and accumulators: what operators and readers of folders compute with. No Bytewax here."""
