"""A folder of Parquet files: writes it, reads it, and folds it into the current table. Works without Bytewax."""
