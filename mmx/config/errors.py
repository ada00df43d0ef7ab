"""The one exception that means: the user gave something that cannot work, and here is what to change."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting, a path or a file that cannot work; the message says what to change.

    Launchers print the message alone, without a traceback, and exit with status 1.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``"; did you mean 'num_heads'?"``, or the known names if none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}"
