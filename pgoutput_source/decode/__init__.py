"""From frames to change sets.

`assembler` calls the others in this order: `in_progress` (streamed transactions, until they commit), `frames`,
`order`, `transactions`, `relations`, and `columns`, which uses `tuples` and `cells`. For a COPY `copied` does what
`columns` does for the stream. `attributes` finds the catalogue's column for each column of a Relation message. `raw`
keeps changes as bytes, to be decoded later.
"""
