"""Which numbers say how long a measurement took, and not what it found."""

from __future__ import annotations

_ENDINGS = ("runtime", "_per_second", "_time", "latency_in_seconds")


def is_of_the_clock(name: str) -> bool:
    """Return whether a metric is a time or a speed, as `Trainer.evaluate` and evaluators of `evaluate` name them.

    Examples:
        >>> [name for name in ("eval_loss", "eval_runtime", "eval_samples_per_second") if is_of_the_clock(name)]
        ['eval_runtime', 'eval_samples_per_second']
    """
    return name.endswith(_ENDINGS) or name == "total_time_in_seconds"
