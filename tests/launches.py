"""Devices where launches cost, in the CPU's place."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch


@contextmanager
def launches(cost: bool) -> Iterator[None]:
    """Let calls on a CPU cost something however little they do, or nothing."""
    norms, vectors = (sys.modules[f"hf_parcor.functional.{name}"] for name in ("norms", "vectors"))
    with (
        patch.object(norms, "has_launches", lambda device: cost),
        patch.object(vectors, "has_launches", lambda device: cost),
    ):
        yield
