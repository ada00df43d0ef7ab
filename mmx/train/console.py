"""What a run says while it works: a live line on a terminal, plain lines in a log, process 0 only."""

import sys
import time
from typing import TextIO


class Console:
    """Writes messages and progress."""

    def __init__(self, speaks: bool = True, stream: TextIO | None = None):
        """``speaks`` is False on every process but one."""
        self._speaks = speaks
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._open_line = False

    def say(self, message: str) -> None:
        """A line that stays."""
        if self._speaks:
            self._end_line()
            self._write(f"{message}\n")

    def progress(self, message: str) -> None:
        """The state of the run: replaces the last one on a terminal, is a line with the time in a log."""
        if not self._speaks:
            return
        if self._live:
            self._write(f"\r\033[K{message}")
            self._open_line = True
        else:
            self._write(f"{time.strftime('%H:%M:%S')} {message}\n")

    def _end_line(self) -> None:
        if self._open_line:
            self._write("\n")
            self._open_line = False

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
