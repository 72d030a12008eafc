"""The initial copy: rows that are older than the slot, read in chunks while the slot streams.

`visibility` answers the question on which everything rests: does a snapshot show a transaction? `ledger` records what
was read under which snapshot. `judge` decides for each streamed change whether the copy already shows it.
"""
