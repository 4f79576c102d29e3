"""A Trainer's step without its loop; times of steps that take turns, since the speed of a machine drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
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


Steps = Mapping[str, Callable[[], object]]


def interleaved(steps: Steps, rounds: Iterable[object]) -> dict[str, list[float]]:
    """Return the seconds of each step in each round; every round takes all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in rounds:
        for name, step in steps.items():
            times[name].append(seconds(step))
    return times


def seconds(step: Callable[[], object]) -> float:
    """Time one step, from a device that has nothing to do to one that has done it."""
    wait_for_device()
    started = time.perf_counter()
    step()
    wait_for_device()
    return time.perf_counter() - started


def wait_for_device() -> None:
    """Let the GPU finish, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quartiles_of_ratios(ours: list[float], stock: list[float]) -> tuple[float, float, float]:
    """Return first quartile, median and third quartile of the ratios within a round.

    Examples:
        >>> quartiles_of_ratios([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
        (2.0, 2.0, 3.0)
    """
    low, middle, high = statistics.quantiles([one / other for one, other in zip(ours, stock, strict=True)], n=4)
    return low, middle, high
