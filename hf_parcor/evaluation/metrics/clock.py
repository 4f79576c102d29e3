"""Which numbers say how long a measurement took, and not what it found."""

from __future__ import annotations

_ENDINGS = (
    *("runtime", "samples_per_second", "steps_per_second", "model_preparation_time"),  # Trainer.evaluate
    *("total_time_in_seconds", "latency_in_seconds"),  # the evaluators of evaluate
)


def is_of_the_clock(name: str) -> bool:
    """Return whether a metric is a time or a speed, as `Trainer.evaluate` and evaluators of `evaluate` name them.

    Examples:
        >>> [name for name in ("eval_loss", "eval_runtime", "eval_samples_per_second") if is_of_the_clock(name)]
        ['eval_runtime', 'eval_samples_per_second']
    """
    return name.endswith(_ENDINGS)
