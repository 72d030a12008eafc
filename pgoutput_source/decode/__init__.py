"""From frames to batches: relations, whole columns at once, transactions in progress, and the assembler of all that."""
