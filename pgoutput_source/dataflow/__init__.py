"""A slot as a Bytewax source: the gate, the recovery store, and how a run begins and ends."""
