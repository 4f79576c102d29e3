"""A Trainer's step without its loop; times of steps beside a stock step, since the speed of a machine drifts."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

_FOLDER = tempfile.TemporaryDirectory()  # until the program ends: a Trainer makes its folder, and then leaves it empty


def quiet_arguments(**more: Any) -> TrainingArguments:
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
    return TrainingArguments(output_dir=_FOLDER.name, **{**quiet, **more})


def step_of(trainer: Trainer, model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return a training step by hand: forward and backward on one batch, no optimizer."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.epoch = 0.0
    return lambda: trainer.training_step(model, dict(batch))


def in_bfloat16(model: nn.Module, device: str) -> nn.Module:
    """Let a model compute in bf16 autocast, as the Trainer's loop would; steps by hand do not come through there."""
    model.forward = torch.autocast(device, torch.bfloat16)(model.forward)
    return model


Step = Callable[[], object]


def pairs_with(
    stock: Step, steps: Mapping[str, Step], rounds: Iterable[object]
) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds of each step in each round, with those of a stock step that was taken just before it."""
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in rounds:
        for name, step in steps.items():
            before = seconds(stock)
            pairs[name].append((seconds(step), before))
    return pairs


def seconds(step: Step) -> float:
    """Time one step: on a GPU from when it has nothing to do to when it has done it, else the CPU's time for it.

    That is the time that the threads of this process computed, whatever else the machine did meanwhile.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    wait_for_device()
    started = clock()
    step()
    wait_for_device()
    return clock() - started


def wait_for_device() -> None:
    """Let the GPU finish, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quartiles_of_ratios(pairs: Iterable[tuple[float, float]]) -> tuple[float, float, float]:
    """Return first quartile, median and third quartile of the ratios of pairs.

    Examples:
        >>> quartiles_of_ratios([(2.0, 1.0), (4.0, 2.0), (9.0, 3.0)])
        (2.0, 2.0, 3.0)
    """
    low, middle, high = statistics.quantiles([one / other for one, other in pairs], n=4)
    return low, middle, high
