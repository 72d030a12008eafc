"""A slot's stream: the walsender, reconnects, timelines, where a start goes on, and what is acknowledged."""
