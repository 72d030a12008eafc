"""A folder of Parquet files: how it is written, read, and folded into the table as it is now. No Bytewax here."""
