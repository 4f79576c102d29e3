"""The risk under any corruption: what it draws, what may be frozen, and that ACRT, SAM and QAT are cases of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from for_each import for_each
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from hf_parcor import (
    ACRT,
    SAM,
    BitFlips,
    CorruptionConstraint,
    CorruptionRisk,
    FloatQuantization,
    GaussianNoise,
    GradientCorruption,
    MultiStepCorruption,
    Quantization,
    RandomCorruption,
    UniformNoise,
    WorstBitFlips,
)
from hf_parcor.corruptions import Corruption
from hf_parcor.defenses import DefendedStep
from hf_parcor.functional.quantization import MOST_BITS

L2, MAX = CorruptionConstraint(p=2, epsilon=0.3), CorruptionConstraint(p=math.inf, epsilon=0.05)
INPUTS, LABELS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def step_of(defense, model, seen=None, epoch=0.0, selected=None):
    """Run one micro-batch, and return the step; `seen` gets the weights of each pass."""
    selected = dict(model.named_parameters()) if selected is None else selected
    others = [p for name, p in model.named_parameters() if name not in selected]

    def run_pass(objective, index):
        if seen is not None:
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        loss = objective(cross_entropy(model(INPUTS), LABELS))
        loss.backward()
        return loss.detach()

    with DefendedStep(selected, run_pass, defense.passes, others, epoch=epoch) as step:
        defense.minimize(step)
    return step


@for_each("constraint", [L2, MAX, CorruptionConstraint(p=2, epsilon=0.3, top_n=3)])
@for_each("alpha", [0.25, 0.5, 1.0])
def test_along_the_gradient_it_is_acrt_and_sam(constraint, alpha):
    ours, theirs, sam = network(), network(), network()
    step_of(CorruptionRisk(GradientCorruption(constraint), clean_weight=1 - alpha), ours)
    step_of(ACRT(constraint, alpha=alpha), theirs)
    step_of(SAM(constraint), sam)
    for other in (theirs, sam) if alpha == 1 else (theirs,):
        for first, second in zip(ours.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(first.grad, second.grad)  # w + a is rounded once or twice


@for_each("constraints, p", [([L2], 2.0), ([MAX], math.inf), ([MAX, MAX], math.inf), ([L2, MAX], 2.0), ([], 2.0)])
def test_norms_are_logged_in_the_order_that_all_have(constraints, p):
    assert CorruptionRisk([*map(GradientCorruption, constraints)] or [Quantization(4)]).p == p


@for_each("corruption", [GaussianNoise(0.1), UniformNoise(0.1), RandomCorruption(L2), BitFlips(count=9)])
def test_draws_are_fresh_and_a_seed_means_them(corruption):
    defense, runs = CorruptionRisk(corruption, clean_weight=0), []
    for _ in range(2):
        model, seen = network(), []
        torch.manual_seed(5)
        for _ in range(2):
            step_of(defense, model, seen)
        runs.append(seen)
    first, second = runs
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(first[0][name], first[1][name]) for name in first[0])


def test_each_corruption_is_of_the_clean_weights_and_all_bits_come_back():
    model, seen = network(), []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step_of(CorruptionRisk([Quantization(2), GaussianNoise(0.1), Quantization(2)]), model, seen)
    clean, rounded, noisy, again = seen
    for name, weight in before.items():
        assert torch.equal(clean[name], weight)
        assert torch.equal(model.get_parameter(name), weight)
        assert torch.equal(rounded[name], again[name])
        assert torch.equal(rounded[name], Quantization(2)({name: weight})[name])
        assert not torch.equal(noisy[name], rounded[name])


@for_each("dtype", [torch.float32, torch.bfloat16, torch.float16])
@for_each(
    "corruption",
    [Quantization(4, 8, code_range="full", arithmetic="weight"), Quantization(3), BitFlips(count=9, bits="mantissa")],
)
def test_merged_weights_are_corrupted_in_the_dtype_that_they_will_have(corruption, dtype):
    """As PEFT merges: the sum is rounded to the dtype of the base weight, and what is deployed is made from that."""
    weight, change = nn.Parameter(torch.randn(4, 8).to(dtype), requires_grad=False), 0.1 * torch.randn(4, 8)
    merged = {"w": weight.detach().clone()}
    merged["w"] += change
    torch.manual_seed(5)
    expected = corruption(merged, generator=torch.Generator().manual_seed(int(torch.randint(2**62, ()))))["w"]
    step = DefendedStep({"w": weight}, lambda objective, index: objective(torch.ones(())), 1, merged={"w": change})
    with step:
        torch.manual_seed(5)
        step.corrupt(corruption)
        assert torch.equal(weight, (expected.float() - change).to(dtype))


@given(count=st.integers(1, 4), clean_weight=st.sampled_from([0.0, 0.3, 1.0]), draw_one=st.booleans())
@settings(max_examples=25, deadline=None)
def test_passes_are_counted(count, clean_weight, draw_one):
    corruptions = [Quantization(4), GaussianNoise(0.1), Quantization(3), GaussianNoise(0.2)][:count]
    defense = CorruptionRisk(corruptions, clean_weight=clean_weight, draw_one=draw_one)
    if defense.is_stock:
        assert (clean_weight, defense.passes) == (1, 1)
        return
    seen = []
    step_of(defense, network(), seen)
    assert len(seen) == defense.passes == (clean_weight > 0) + (1 if draw_one else count)


def test_on_average_the_drawn_one_is_all_of_them():
    corruptions = [Quantization(2), Quantization(3), Quantization(5)]
    drawn = []
    for seed in range(60):
        model = network()
        torch.manual_seed(seed)
        step_of(CorruptionRisk(corruptions, draw_one=True), model)
        drawn.append(model[0].weight.grad)
    everything = network()
    step_of(CorruptionRisk(corruptions), everything)
    kinds = torch.stack(drawn).unique(dim=0)
    assert len(kinds) == len(corruptions)
    torch.testing.assert_close(kinds.mean(0), everything[0].weight.grad)


def test_frozen_weights_are_corrupted_where_no_gradient_of_them_is_needed():
    """What trains beside them learns at the corrupted weights."""
    model, seen = network(), []
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    defense = CorruptionRisk(Quantization(2), clean_weight=0)
    step_of(defense, model, seen, selected=dict(model[0].named_parameters(prefix="0")))
    assert model[0].weight.grad is None
    expected = network()
    with torch.no_grad():
        for parameter in expected[0].parameters():
            parameter.copy_(Quantization(2)({"w": parameter})["w"])
    cross_entropy(expected(INPUTS), LABELS).backward()
    assert torch.equal(model[2].weight.grad, expected[2].weight.grad)
    assert not defense.uses_gradients
    assert CorruptionRisk(GradientCorruption(L2)).uses_gradients


RAMPS = {
    "noise": (GaussianNoise(0.4), lambda share: GaussianNoise(0.4 * share)),
    "radius": (RandomCorruption(L2), lambda share: RandomCorruption(CorruptionConstraint(epsilon=0.3 * share))),
    "rate": (BitFlips(rate=0.5), lambda share: BitFlips(rate=0.5 * share)),
    "count": (BitFlips(count=10), lambda share: BitFlips(count=max(1, round(10 * share)))),
    "bits": (Quantization(4), lambda share: Quantization(MOST_BITS - round(12 * share))),
}


@for_each(("corruption", "expected"), RAMPS.values())
@for_each(("epoch", "share"), [(1.0, 0.0), (1.5, 0.25), (2.0, 0.5), (3.0, 1.0), (9.0, 1.0)])
def test_a_ramp_begins_with_none_and_ends_with_all(corruption, expected, epoch, share):
    runs = []
    for defense in (
        CorruptionRisk(corruption, clean_weight=0, start_epoch=1, ramp_epochs=2),
        CorruptionRisk(expected(share), clean_weight=0),
    ):
        torch.manual_seed(1)
        step_of(defense, network(), seen := [], epoch)
        runs.append(seen[0])
    for one, other in zip(*(run.values() for run in runs), strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))  # flips make NaN, which equals nothing


@dataclass(frozen=True)
class AlongTheGradient(Corruption):
    """One of somebody's own, for which no other is known to stand."""

    uses_gradients: ClassVar[bool] = True

    def __str__(self) -> str:
        return "along the gradient"

    def _choose(self, weights, gradients, generator):
        return gradients.over_data()


@for_each(
    ("corruption", "options", "error", "says"),
    [
        ([], {}, ValueError, "at least one"),
        (0.1, {}, TypeError, "Corruption objects"),
        ([Quantization(4), "noise"], {}, TypeError, "Corruption objects"),
        (MultiStepCorruption(L2), {}, ValueError, "MultiStepRisk"),
        (WorstBitFlips(2), {}, ValueError, "BitFlips"),
        (AlongTheGradient(), {}, ValueError, "^(?!.*(MultiStepRisk|BitFlips)).*along the gradient"),
        (FloatQuantization("nf4"), {"ramp_epochs": 1}, ValueError, "NF4.*strength.*ramp"),
        (Quantization(4), {"clean_weight": 1.5}, ValueError, "clean_weight"),
        (Quantization(4), {"clean_weight": math.nan}, ValueError, "clean_weight"),
        (Quantization(4), {"ramp_epochs": -1}, ValueError, "ramp_epochs"),
    ],
)
def test_bad_settings_are_refused(corruption, options, error, says):
    with pytest.raises(error, match=says):
        CorruptionRisk(corruption, **options)
