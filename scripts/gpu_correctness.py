"""Checks of right results on a GPU, each against something that knows nothing of the package, or against the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from gpu_models import (
    L2,
    LAST,
    Row,
    Setting,
    Skipped,
    batch_of,
    bert,
    differing_bits,
    distance,
    gradients_of,
    in_bfloat16,
    risk,
    rows_for,
    step_of,
    trainer_of,
)
from torch import Tensor, nn
from transformers import Trainer

from hf_parcor import (
    AWP,
    SAM,
    BitFlips,
    GaussianNoise,
    ParameterDefenseTrainer,
    Quantization,
    RandomCorruption,
    UniformNoise,
)
from hf_parcor.functional import constrained_maximum

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
        rows = rows_for(ours, 12, 16)
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


class Stop(Exception):  # noqa: N818
    """Raised in the middle of a step."""


def restored(setting: Setting) -> list[Row]:
    """Weights after a step, and after one that an exception ends, bit for bit."""
    found = []
    defenses = {
        "whole model": (risk(2), None),
        "last layer": (risk(2), LAST),
        "SAM": (SAM(L2), None),
        "AWP": (AWP(L2), None),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for label, (defense, target) in defenses.items():
            model = bert(setting).to(dtype=dtype)
            before = [w.detach().clone() for w in model.parameters()]
            batch = batch_of(rows_for(model, 4, 16), setting.device)
            trainer = trainer_of(setting, ParameterDefenseTrainer, model, {}, defense=defense, target_modules=target)
            step = step_of(trainer, model, batch)
            step()
            label = f"{label}, {str(dtype).removeprefix('torch.')}: bytes that changed"
            found.append(Row(label, differing_bits(model.parameters(), before), 0))
            calls: list[int] = []

            def stop(*_: object, calls: list[int] = calls) -> None:
                calls.append(1)
                if len(calls) == 2:
                    raise Stop

            model.get_submodule("classifier").register_forward_pre_hook(stop)
            try:
                step()
            except Stop:
                found.append(Row(f"{label}, exception", differing_bits(model.parameters(), before), 0))
            else:
                found.append(Row(f"{label}, exception did not come", 1, 0))
    return found


def prefix(setting: Setting) -> list[Row]:
    """Gradients of a reused prefix against those of full passes."""
    found = []
    for name, limit in (("fp32", 1e-4), ("bf16", 2e-2)):
        gradients = []
        for reuse in (True, False):
            model = bert(setting) if name == "fp32" else in_bfloat16(bert(setting), setting.device)
            trainer = trainer_of(
                setting,
                ParameterDefenseTrainer,
                model,
                {},
                defense=risk(2),
                target_modules=LAST,
                reuse_prefix=reuse,
            )
            step_of(trainer, model, batch_of(rows_for(model, 8, 16), setting.device))()
            gradients.append(gradients_of(model))
            wrong = (trainer.shared_prefix is not None) is not reuse  # type: ignore[attr-defined]
            found.append(Row(f"{name}: reuse={reuse} was not followed", wrong, 0))
        found.append(Row(f"{name}: distance from full passes", distance(*gradients), limit))
    return found


def same_as_cpu(setting: Setting) -> list[Row]:
    """Corruptions of the same weights with the same seed, here and on the CPU."""
    torch.manual_seed(0)
    size = 1000 if setting.quick else 500_000
    weights = {"a": torch.randn(size), "b": torch.randn(size, 3)}
    there = {name: value.to(setting.device) for name, value in weights.items()}
    found = []
    exact = [Quantization(4), Quantization(8), BitFlips(count=100), BitFlips(rate=1e-4), GaussianNoise(0.1)]
    for corruption in [*exact, UniformNoise(0.1), RandomCorruption(L2)]:
        ours, others = (corruption(w, generator=torch.Generator().manual_seed(3)) for w in (there, weights))
        here = [value.cpu() for value in ours.values()]
        if corruption in exact and not isinstance(corruption, Quantization):
            found.append(Row(f"{corruption}: differing bytes", differing_bits(here, others.values()), 0))
        else:
            found.append(Row(f"{corruption}: distance", distance(here, others.values()), 1e-6))
    for p, n in ((2.0, size // 10), (float("inf"), size // 7)):
        vectors = [list(w.values()) for w in (there, weights)]
        top, expected = (constrained_maximum(vector, p, 0.1, n) for vector in vectors)
        chosen = sum(int(((a.cpu() != 0) != (b != 0)).sum()) for a, b in zip(top, expected, strict=True))
        found.append(Row(f"top {n}, p={p:g}: entries chosen otherwise", chosen, 0))
        found.append(Row(f"top {n}, p={p:g}: how many are not n", abs(sum(int((a != 0).sum()) for a in top) - n), 0))
        found.append(Row(f"top {n}, p={p:g}: distance", distance(top, expected), 1e-5))
    return found


def synchronizations(setting: Setting) -> list[Row]:
    """How often the host waits for the GPU in a defended step, beyond what its passes do in the stock step."""
    setting.need_cuda("counting how often the host waits")
    counts = {}
    arms: dict[str, tuple[type[Trainer], dict[str, Any], int]] = {"stock": (Trainer, {}, 1)}
    for label, target in (("whole model", None), ("last layer", LAST)):
        for steps in (1, 2):
            more = {"defense": risk(steps), "target_modules": target}
            arms[f"{label}, K = {steps}"] = (ParameterDefenseTrainer, more, steps + 1)
    for label, (kind, more, _) in arms.items():
        model = bert(setting)
        step = step_of(trainer_of(setting, kind, model, {}, **more), model, batch_of(rows_for(model, 4, 16), "cuda"))
        step()
        step()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts[label] = sum("synchroniz" in str(warning.message) for warning in caught)
    stock = counts["stock"]
    return [Row(f"{label}: waits", counts[label], stock * passes) for label, (_, _, passes) in arms.items()]


def compiled(setting: Setting) -> list[Row]:
    """Two steps of a compiled model against those of the plain one."""
    backend = "inductor" if setting.device == "cuda" else "aot_eager"
    moved = []
    choices: list[dict[str, Any]] = [{}, {"torch_compile": True, "torch_compile_backend": backend}]
    for options in choices:
        model = bert(setting)
        before = [w.detach().clone() for w in model.parameters()]
        options |= {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": RATE}
        rows = rows_for(model, 8, 16)
        trainer_of(setting, ParameterDefenseTrainer, model, options, train_dataset=rows, defense=risk(1)).train()
        moved.append([a.detach() - b for a, b in zip(model.parameters(), before, strict=True)])
    return [Row(f"{backend}: distance from the plain run", distance(moved[1], moved[0]), 1e-3)]


def two_processes(setting: Setting) -> list[Row]:
    """DDP and FSDP2 on two ranks: as many all-reduces as the stock Trainer, the same weights everywhere."""
    if setting.device == "cuda" and torch.cuda.device_count() < 2:
        raise Skipped(f"DDP and FSDP2 over NCCL need 2 GPUs, got {torch.cuda.device_count()}")
    record = Path(setting.output).resolve() / "distributed.json"
    shape = "tiny" if setting.quick else "bert-small"
    script = Path(__file__).with_name("benchmark_distributed.py")
    command = [sys.executable, str(script), "--shape", shape, "--output", str(record)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    counted = json.loads(record.read_text(encoding="utf-8"))["counted"]["DDP"]
    stock, local = (counted[arm]["collectives"]["all_reduce"] for arm in ("stock", "whole model, local"))
    return [
        Row(f"DDP, all-reduce: {what} unlike stock", abs(local[what] - stock[what]), 0) for what in ("calls", "bytes")
    ]
