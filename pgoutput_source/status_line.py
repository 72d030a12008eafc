"""A line at the bottom of a terminal that says how far something is. Log lines appear above it."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from typing import TextIO

_ERASE = "\r\x1b[K"


class StatusLine(logging.StreamHandler[TextIO]):
    r"""Writes log lines to a terminal, and keeps one line below them.

    Example:
        >>> import io
        >>> terminal = StatusLine(io.StringIO())
        >>> terminal.show("half")
        >>> terminal.stream.getvalue().replace(chr(27), "ESC")
        '\rESC[Khalf\r'
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._shown = ""

    @staticmethod
    def possible() -> bool:
        """Whether standard error is a terminal that can erase a line."""
        return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"

    def show(self, text: str) -> None:
        """Replace the line. What doesn't fit is cut off. An empty text removes the line."""
        self.acquire()
        try:
            if text or self._shown:
                self._shown = text[: shutil.get_terminal_size().columns - 1]
                # The cursor goes back, so that whatever else is printed begins at the left.
                self.stream.write(_ERASE + self._shown + ("\r" if self._shown else ""))
                self.flush()
        finally:
            self.release()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a log line above the line."""
        shown = self._shown
        self.show("")
        super().emit(record)
        self.show(shown)


def status_line() -> StatusLine | None:
    """The terminal that shows the log of this process, if one does."""
    handlers = logging.getLogger("pgoutput_source").handlers
    return next((handler for handler in handlers if isinstance(handler, StatusLine)), None)
