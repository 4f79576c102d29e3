"""What tests of cards look for, and read."""

from __future__ import annotations

OURS = "## Robustness to parameter corruption"


def read(folder):
    return (folder / "README.md").read_bytes().decode()
