"""Corruptions and their results by names that logs, flags and trackers take."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence

from hf_parcor.corruptions import Corruption
from hf_parcor.evaluation import EvaluationRecord

_LETTERS = {"ε": "epsilon ", "σ": "sigma ", "∞": "inf"}
Corruptions = Sequence[Corruption] | Mapping[str, Corruption]


def plain_name(label: str) -> str:
    """Return a label in small letters, digits, points and underscores; a minus stays in an exponent.

    Examples:
        >>> [plain_name(label) for label in ("gradient-based L∞ ε=0.0002", "4-bit quantization", "Gaussian σ=0.02")]
        ['gradient_based_linf_epsilon_0.0002', '4_bit_quantization', 'gaussian_sigma_0.02']
        >>> plain_name("bit flips rate=1e-08 (any)")
        'bit_flips_rate_1e-08_any'
    """
    for letter, word in _LETTERS.items():
        label = label.replace(letter, word)
    kept = re.sub(r"[^a-z0-9.-]+", "_", label.lower())
    return re.sub(r"(?<!\de)-", "_", kept).strip("_")


def by_name(corruptions: Corruptions) -> dict[str, Corruption]:
    """Return corruptions by the names that were given to them, or by their labels in plain letters.

    Raises:
        ValueError: There is none, or two have the same name.
        TypeError: Something that is no `Corruption`.
    """
    named = list(
        corruptions.items()
        if isinstance(corruptions, Mapping)
        else ((plain_name(str(corruption)), corruption) for corruption in corruptions)
    )
    if not named:
        raise ValueError("corruptions: expected at least one, got none; pass [GaussianNoise(0.02)], say")
    for name, corruption in named:
        if not isinstance(corruption, Corruption):
            raise TypeError(f"corruptions: expected Corruption objects, got {corruption!r}; pass GaussianNoise(0.02)")
        if sum(name == other for other, _ in named) > 1:
            raise ValueError(
                f"corruptions: expected different ones, got two with the name {name!r}; pass a dict that names them"
            )
    return dict(named)


def robustness_metrics(record: EvaluationRecord, names: Sequence[str], prefix: str = "eval") -> dict[str, float]:
    """Return a record as flat numbers, means over trials, as a Trainer logs them.

    Args:
        record: What was measured.
        names: One for each corruption of the record.
        prefix: What all names of metrics begin with.

    Returns:
        `{prefix}_robustness_{name}_{metric}` for each corruption, and `{prefix}_robustness_{metric}`, the mean over
        all corruptions.
    """
    metrics: dict[str, float] = {}
    for metric in record.clean.metrics:
        values = {name: row.mean(metric) for name, row in zip(names, record.corruptions, strict=True)}
        metrics |= {f"{prefix}_robustness_{name}_{metric}": value for name, value in values.items()}
        metrics[f"{prefix}_robustness_{metric}"] = statistics.fmean(values.values())
    return metrics
