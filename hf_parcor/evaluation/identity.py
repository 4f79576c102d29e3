"""What decides the numbers of a run: two runs alike in all of it measure the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hf_parcor.corruptions import Corruption
from hf_parcor.evaluation.provenance import library_versions
from hf_parcor.sharding import class_of
from hf_parcor.strict_json import to_strict_json

# Where a model lies, and what a first loss writes there: not what the model computes.
_PASSING = ("_name_or_path", "transformers_version", "problem_type")


def identity_of_run(
    model: nn.Module,
    weights: str,
    metric: Any,
    loss: Any,
    data: str,
    metric_data: str,
    selections: Mapping[str, Mapping[str, nn.Parameter]],
    corruptions: Sequence[Corruption],
    trials: int,
    seed: int,
) -> dict[str, Any]:
    """Return what decides the numbers of a run, as plain values by name.

    A metric or a loss that is a function of the caller is known by its name alone.

    Args:
        model: The model.
        weights: Fingerprint of its weights.
        metric: The metric.
        loss: The loss.
        data: Fingerprint of the batches that gradients are taken on.
        metric_data: Fingerprint of those of a `BatchMetric`.
        selections: The parameters of each part, by its name.
        corruptions: What is measured.
        trials: Trials of each stochastic corruption.
        seed: First seed.
    """
    configuration: Any = getattr(model, "config", None)
    settings = configuration.to_dict() if hasattr(configuration, "to_dict") else {}
    plain = {name: str(value) for name, value in settings.items() if name not in _PASSING}
    return {
        "model": class_of(model).__name__,
        "configuration": hashlib.sha256(to_strict_json(plain).encode()).hexdigest(),
        "weights": weights,
        "data": data,
        "metric": _name(metric),
        "metric_data": metric_data,
        "loss": _name(loss),
        "targets": {label: list(selection) for label, selection in selections.items()},
        "corruptions": [{"corruption": _name(one), **one.settings()} for one in corruptions],
        "trials": trials,
        "seed": seed,
        "versions": library_versions(),
    }


def _name(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
