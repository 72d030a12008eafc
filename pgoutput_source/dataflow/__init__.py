"""A slot as a Bytewax source: the gate, the recovery store, and the beginning and end of a run."""
