"""Bytes to frames to messages of pgoutput, protocols 1 to 4, and back. Pure: nothing here does I/O."""
