"""Trainer steps against Algorithm 1 by autograd alone, in each precision; and compiled against plain ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpu.check import Row, Setting, differing_bits, distance
from gpu.models import batch_of, bert, risk, rows_for, trainer_of
from hf_parcor import ParameterDefenseTrainer

SCALE = 2.0**10  # of the loss in float16
RATE = 0.1
DTYPES = {"fp32": (None, 1e-4), "bf16": (torch.bfloat16, 3e-2), "fp16": (torch.float16, 3e-2)}


class Scaled(ParameterDefenseTrainer):
    """Starts its real loss scaler, where it has one, at another scale."""

    scale = SCALE

    def create_accelerator_and_postprocess(self) -> None:
        """Make the Accelerator."""
        super().create_accelerator_and_postprocess()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=self.scale)


class Overflowing(Scaled):
    """No float16 gradient is finite at this scale."""

    scale = 2.0**60


def longhand_step(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype | None, scale: float) -> None:
    """Take one SGD step along the risk of K = 2 and L2, ε = 0.1, as Algorithm 1 says, by autograd alone."""
    weights = list(model.parameters())
    clean = [w.detach().clone() for w in weights]
    corruption = [torch.zeros_like(w) for w in weights]
    total = [torch.zeros_like(w) for w in weights]
    device = clean[0].device.type
    for _ in range(3):
        with torch.no_grad():
            for w, w0, a in zip(weights, clean, corruption, strict=True):
                w.copy_(w0 + a)
        with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(**batch).loss
        found = torch.autograd.grad(loss * scale, weights, allow_unused=True)
        slopes = [torch.zeros_like(w) if g is None else g / scale for g, w in zip(found, weights, strict=True)]
        total = [t + g / 3 for t, g in zip(total, slopes, strict=True)]
        length = torch.sqrt(sum((g.square().sum() for g in slopes), torch.zeros((), device=device)))
        moved = [a + 1.5 * 0.1 / 2 * g / length for a, g in zip(corruption, slopes, strict=True)]
        size = torch.sqrt(sum((a.square().sum() for a in moved), torch.zeros((), device=device)))
        corruption = [a * torch.clamp(0.1 / size, max=1.0) for a in moved]
    with torch.no_grad():
        for w, w0, g in zip(weights, clean, total, strict=True):
            w.copy_(w0 - RATE * g)


def precision(setting: Setting) -> list[Row]:
    """Three Trainer steps against autograd by hand: the difference of weights over what the steps moved."""
    found = []
    for name, (dtype, limit) in DTYPES.items():
        if name == "fp16" and setting.device == "cpu":
            continue  # Accelerate refuses it there
        options: dict[str, Any] = {} if dtype is None else {name: True}
        options |= {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": RATE}
        ours, other = bert(setting), bert(setting)
        before = [w.detach().clone() for w in ours.parameters()]
        rows = rows_for(12, 16)
        trainer_of(setting, Scaled, ours, options, train_dataset=rows, defense=risk(2)).train()
        other.train()
        for start in (0, 4, 8):
            longhand_step(
                other, batch_of(rows[start : start + 4], setting.device), dtype, SCALE if name == "fp16" else 1
            )
        moved = [a.detach() - b for a, b in zip(ours.parameters(), before, strict=True)]
        expected = [a.detach() - b for a, b in zip(other.parameters(), before, strict=True)]
        found.append(Row(f"{name}: distance from autograd by hand", distance(moved, expected), limit))
        if name == "fp16":
            found.extend(overflow(setting, rows, options))
    return found


def overflow(setting: Setting, rows: list[dict[str, Any]], options: dict[str, Any]) -> list[Row]:
    """Overflowing float16 gradients: the scaler skips the step, and the weights stay."""
    model = bert(setting)
    before = [w.detach().clone() for w in model.parameters()]
    options = {**options, "max_steps": 1}
    trainer = trainer_of(setting, Overflowing, model, options, train_dataset=rows, defense=risk(2))
    trainer.train()
    scale = trainer.accelerator.scaler.get_scale()
    return [
        Row("fp16 overflow: bytes of weights that changed", differing_bits(model.parameters(), before), 0),
        Row("fp16 overflow: scale over half the first", scale / (Overflowing.scale / 2), 1),
    ]


def compiled(setting: Setting) -> list[Row]:
    """Two steps of a compiled model against those of the plain one."""
    backend = "inductor" if setting.device == "cuda" else "aot_eager"
    moved = []
    choices: list[dict[str, Any]] = [{}, {"torch_compile": True, "torch_compile_backend": backend}]
    for options in choices:
        model = bert(setting)
        before = [w.detach().clone() for w in model.parameters()]
        options |= {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": RATE}
        rows = rows_for(8, 16)
        trainer_of(setting, ParameterDefenseTrainer, model, options, train_dataset=rows, defense=risk(1)).train()
        moved.append([a.detach() - b for a, b in zip(model.parameters(), before, strict=True)])
    return [Row(f"{backend}: distance from the plain run", distance(moved[1], moved[0]), 1e-3)]
