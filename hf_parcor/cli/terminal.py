"""What is written to the terminal: results to the standard output, everything else to the standard error."""

from __future__ import annotations

import sys
import textwrap

_WIDTH = 80


def tell(text: str) -> None:
    """Write a line about the work, not a result."""
    print(f"hf-parcor: {text}", file=sys.stderr)


def wrapped(text: str) -> str:
    """Return text in lines for a terminal of 80 columns; names and paths are not cut."""
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
