"""Trainings of a few rows: arguments for them, and what they leave to be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback

from hf_parcor import CorruptionConstraint, CorruptionRisk, GradientCorruption, Quantization
from hf_parcor.defenses import DEFENSES, Defense

# On the CPU, and neither printed, sent nor saved.
QUIET = {
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
}
# The optimizer gets the gradients as they are, of the rows in their order.
IN_ORDER = {"max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
# And it moves nothing: what changes is changed by the step itself.
UNMOVED = {**IN_ORDER, "optim": "sgd", "learning_rate": 0.0}


class KeepGradients(TrainerCallback):
    """Keeps the gradients that the optimizer is about to use, one dictionary for each of its steps."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self.kept.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def defense_named(name: str, constraint: CorruptionConstraint) -> Defense:
    """Return a defense of the catalogue, with a constraint if it has one."""
    kind = DEFENSES[name]
    if kind is CorruptionRisk:
        return CorruptionRisk([Quantization(4), GradientCorruption(constraint)])
    return kind(constraint=constraint) if "constraint" in kind.__dataclass_fields__ else kind()


def stacked(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the batch of these rows."""
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


def logs_of(trainer: Trainer) -> list[dict[str, float]]:
    """Return what was logged of the steps of a training."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in logs_of(trainer)]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
