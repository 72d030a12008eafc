"""PostgreSQL over ordinary connections: slots, publications, checks, definitions and facts of tables."""
