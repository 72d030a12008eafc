"""Stores that hold the tables of a publication: the spool in front of them, and how each applies what is spooled.

A destination knows nothing of epochs. It applies parts, which are numbered, and keeps the number of the last one in the
same commit: so a part that comes again is not applied again.
"""
