"""A slot's stream: the walsender, reconnects, timelines, where a start resumes, and what is acknowledged."""
