"""The initial copy: rows that were there before the slot, read in chunks while the slot streams.

`visibility` is the question that decides everything: does a snapshot show a transaction? `ledger` remembers what was
read under which snapshot, and `judge` asks, for each streamed change, whether the copy already shows it.
"""
