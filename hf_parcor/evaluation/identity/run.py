"""What decides the numbers of a run: two runs alike in all of it measure the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_parcor.corruptions import Corruption
from hf_parcor.distributed.fsdp import class_of
from hf_parcor.evaluation.identity.provenance import library_versions
from hf_parcor.evaluation.identity.settings import name_of, settings_of
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

    Of metric and loss count what `settings_of` sees: settings, code, plain values. What they reach otherwise, a file
    or a server, is theirs to say in `identity`. Kind of device and autocast count, since other kernels in another
    precision find other numbers, and a record has room for one of them. Left out is what moves numbers by rounding
    alone: how many threads and processes there are, which attention kernel or matrix product runs, and the name of the
    machine.

    Args:
        model: The model.
        weights: Fingerprint of its weights, with their dtypes.
        metric: The metric.
        loss: The loss.
        data: Fingerprint of the batches that gradients are taken on.
        metric_data: Fingerprint of the batches of a `BatchMetric`.
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
        "generation": _generation(model),
        "adapters": _adapters(model),
        "weights": weights,
        "data": data,
        "metric": settings_of(metric),
        "metric_data": metric_data,
        "loss": settings_of(loss),
        "targets": {label: list(selection) for label, selection in selections.items()},
        "corruptions": [{"corruption": name_of(one), **one.settings()} for one in corruptions],
        "trials": trials,
        "seed": seed,
        **_precision(model),
        "versions": library_versions(),
    }


def _generation(model: nn.Module) -> Any:
    """Return the settings that `generate` takes from the model."""
    configuration: Any = getattr(model, "generation_config", None)
    if not hasattr(configuration, "to_diff_dict"):
        return {}
    settings = configuration.to_diff_dict()
    return {name: settings_of(value) for name, value in settings.items() if name not in _PASSING}


def _adapters(model: nn.Module) -> Any:
    """Return which adapters are active: the weights of all are there whichever is.

    Those of the layers: Transformers' model says it by a method, which refuses versions of PEFT.
    """
    adapted = model.modules() if hasattr(model, "peft_config") else ()
    said = (getattr(module, "active_adapters", None) for module in adapted)
    return settings_of(next((one for one in said if one is not None and not callable(one)), None))


def _precision(model: nn.Module) -> dict[str, str]:
    devices = sorted({parameter.device.type for parameter in model.parameters()})
    autocast = [str(torch.get_autocast_dtype(kind)) for kind in devices if _is_autocast(kind)]
    return {"device": " ".join(devices), "autocast": " ".join(autocast)}


def _is_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
