"""A Trainer that saves and logs nothing, and its step without its loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments


def quiet_arguments(folder: str, **more: Any) -> TrainingArguments:
    """Return arguments of plain SGD that saves and logs nothing, on a GPU where there is one."""
    quiet: dict[str, Any] = {
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "optim": "sgd",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=folder, **{**quiet, **more})


def step_of(trainer: Trainer, model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return a training step by hand: forward and backward on one batch, no optimizer."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.epoch = 0.0
    return lambda: trainer.training_step(model, dict(batch))
