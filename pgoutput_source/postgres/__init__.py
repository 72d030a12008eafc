"""PostgreSQL over ordinary connections: slots, publications, checks, and the definitions of tables and types."""
