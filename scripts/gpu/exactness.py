"""What must not depend on the way: restored weights, a reused prefix, and corruptions drawn here or on the CPU."""

from __future__ import annotations

import torch
from steps.by_hand import step_of

from gpu.check import Row, Setting, differing_bits, distance
from gpu.models import L2, LAST, batch_of, bert, gradients_of, in_bfloat16, risk, rows_for, trainer_of
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
            batch = batch_of(rows_for(4, 16), setting.device)
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
            step_of(trainer, model, batch_of(rows_for(8, 16), setting.device))()
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
