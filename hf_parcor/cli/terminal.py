"""What is written to the terminal: results to the standard output, everything else to the standard error."""

from __future__ import annotations

import os
import sys
import textwrap

_WIDTH = 80


def speaks() -> bool:
    """Return whether this process is the one that says and writes what all of those that `torchrun` started found."""
    return os.environ.get("RANK", "0") == "0"


def tell(text: str) -> None:
    """Write a line about the work, not a result."""
    if speaks():
        print(f"hf-parcor: {text}", file=sys.stderr)


def wrapped(text: str) -> str:
    """Return text in lines for a terminal of 80 columns; names and paths are not cut."""
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
