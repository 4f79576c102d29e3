"""Metrics of the library `evaluate`, by name or from a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_parcor.evaluation.metrics.scores import Score
from hf_parcor.input_error import InputError, nearest, one_line


def library_score(name: str, known: Sequence[str]) -> Score:
    """Return the `compute` of a metric of `evaluate`.

    Args:
        name: Its name on the Hub, or a local folder.
        known: The names that need no library, for the message.

    Raises:
        InputError: It cannot be reached.
    """
    try:
        import evaluate
    except ImportError as error:
        raise InputError(
            f"metric: expected one of {', '.join(known)}, got {name!r}{nearest(name, known)}; name one of them, or "
            "install evaluate, which may know it: pip install 'hf-parcor[cli]'"
        ) from error
    try:
        module: Any = evaluate.load(name)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"metric: expected one of {', '.join(known)}, or a metric of evaluate that can be reached, got {name!r}"
            f"{nearest(name, known)} ({one_line(error)}); name one of them, or a local folder"
        ) from error
    score: Score = module.compute
    return score
