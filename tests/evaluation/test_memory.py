"""What an evaluation takes beside the weights, in bytes for each corrupted weight, counted as tensors come and go."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from for_each import for_each
from torch import nn

from hf_parcor import (
    BitFlips,
    CorruptionConstraint,
    CorruptionEvaluator,
    GaussianNoise,
    GradientCorruption,
    MultiStepCorruption,
    Quantization,
    RandomCorruption,
    UniformNoise,
    WorstBitFlips,
)
from hf_parcor.evaluation import NotEnoughMemoryError
from hf_parcor.evaluation.placement.memory import check_memory, free_memory, needed_memory

WIDTH, LAYERS = 32, 32  # one of 32 tensors: the largest one of a Llama is less of it
L2, L_INF = CorruptionConstraint(epsilon=0.1), CorruptionConstraint(p=math.inf, epsilon=1e-3)
FEW, P3 = CorruptionConstraint(epsilon=0.1, top_n=100), CorruptionConstraint(p=3, epsilon=0.1)
# Saved bits are 2 bytes a weight, a gradient is 2 until it is added up in float32, where it is 4.
LIMITS = {
    "noise": ([GaussianNoise(0.1)], 2),
    "uniform": ([UniformNoise(0.1)], 2),
    "random, L2": ([RandomCorruption(L2)], 2),
    "random, L_inf": ([RandomCorruption(L_INF)], 4),
    "quantization": ([Quantization(4)], 2),
    "flips": ([BitFlips(rate=1e-3)], 2),
    "gradient, L2": ([GradientCorruption(L2)], 4 + 2),
    "gradient, L_inf": ([GradientCorruption(L_INF)], 4 + 2),
    "gradient, L3": ([GradientCorruption(P3)], 4 + 4),
    "one step, L2": ([MultiStepCorruption(L2, steps=1)], 2 + 2),
    "one step, L_inf": ([MultiStepCorruption(L_INF, steps=1)], 2 + 2),
    "two steps, L2": ([MultiStepCorruption(L2, steps=2)], 2 + 2 + 2),
    "multi-step, L2": ([MultiStepCorruption(L2, steps=3)], 4 + 2 + 2),
    "multi-step, L_inf": ([MultiStepCorruption(L_INF, steps=3)], 4 + 2 + 2),
    "worst flips": ([WorstBitFlips(2)], 2),
    "worst flips of integer codes": ([WorstBitFlips(2, of="int8")], 2 + 2 + 2),
    "gradient and worst flips": ([GradientCorruption(L2), WorstBitFlips(2)], 4 + 2),
    "gradient and multi-step": ([GradientCorruption(L2), MultiStepCorruption(L2, steps=3)], 4 + 4 + 2 + 2),
}


@pytest.fixture
def small_scratch(monkeypatch) -> None:
    """Make what does not grow with a model as small as this one is."""
    vectors = sys.modules["hf_parcor.functional.vectors"]
    monkeypatch.setattr(vectors, "_CHUNK", 256)
    monkeypatch.setattr(vectors, "TOGETHER", 1)
    monkeypatch.setattr(sys.modules["hf_parcor.corruptions.random"], "_LARGE", 0)


def model_of_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))).to(torch.bfloat16)


def evaluator_of(model, metric=None, **settings) -> CorruptionEvaluator:
    x = torch.randn(1, WIDTH, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    return CorruptionEvaluator(
        model,
        metric or (lambda model: {"loss": model(x).square().mean().item()}),
        [x, x],
        loss=lambda model, x: model(x).square().mean(),
        progress=False,
        **settings,
    )


@pytest.mark.slow
@for_each(("corruptions", "limit"), LIMITS.values())
def test_bytes_a_weight(corruptions, limit, peak_memory, small_scratch) -> None:
    model = model_of_layers()
    evaluator, weights = evaluator_of(model), WIDTH * WIDTH * LAYERS
    with peak_memory() as memory:
        record = evaluator.evaluate(corruptions, trials=1)
    found = memory.peak / weights
    assert all(row.changed for row in record.corruptions)
    assert limit - 0.2 <= found <= limit + 0.5, (list(map(str, corruptions)), found)
    if corruptions[0].uses_gradients:  # what is asked for before it starts is what it takes
        assert needed_memory([dict(model.named_parameters())], corruptions) == {torch.device("cpu"): limit * weights}


@for_each("corruption", [GradientCorruption(L2), MultiStepCorruption(FEW), GradientCorruption(P3), GaussianNoise(0.1)])
def test_too_little_memory_is_said_before_anything_is_measured(corruption, monkeypatch, bits_of) -> None:
    model = model_of_layers()
    before, asked = bits_of(model), []
    needed = needed_memory([dict(model.named_parameters())], [corruption]).get(torch.device("cpu"), 0)

    def evaluate(free: int | None) -> None:
        monkeypatch.setattr("hf_parcor.evaluation.placement.memory.free_memory", lambda device: free)
        evaluator_of(model, metric=lambda model: asked.append(model) or {"score": 1.0}).evaluate(
            [corruption], trials=1
        )

    if needed:
        with pytest.raises(NotEnoughMemoryError, match=r"expected at least 0\.00 GiB free on cpu.*target_modules"):
            evaluate(needed - 1)
        assert not asked
    for enough in (needed, None):
        evaluate(enough)
    assert bits_of(model) == before
    assert len(asked) == 4


def test_where_saved_bits_are_kept_counts(monkeypatch) -> None:
    def check(free: int, *what) -> None:
        monkeypatch.setattr("hf_parcor.evaluation.placement.memory.free_memory", lambda device: free)
        check_memory([weights], *what)

    weights = {"w": torch.empty(1000, dtype=torch.bfloat16, device="meta")}  # stands for an accelerator
    climbs = [MultiStepCorruption(L2)]
    here, there = (needed_memory([weights], climbs, device) for device in (None, torch.device("cpu")))
    assert (here, there) == ({torch.device("meta"): 8000}, {torch.device("meta"): 6000})
    with pytest.raises(NotEnoughMemoryError, match='saved_on="cpu"'):
        check(7000, climbs)
    check(7000, climbs, torch.device("cpu"))
    with pytest.raises(NotEnoughMemoryError, match=r"^((?!saved_on).)*$"):  # which would not help
        check(5000, climbs, torch.device("cpu"))
    check(4000, [MultiStepCorruption(L2, steps=1)])
    check(0, [GaussianNoise(0.1)])
    assert free_memory(torch.device("cpu")) is None


def test_of_several_groups_a_gradient_is_added_up_for_all_together() -> None:
    """But what an ascent holds is that of one of them."""
    halves = [{name: torch.empty(500, dtype=torch.bfloat16)} for name in "ab"]
    (whole,) = needed_memory([halves[0] | halves[1]], [GradientCorruption(L2)]).values()
    assert [*needed_memory(halves, [GradientCorruption(L2)]).values()] == [whole]
    (of_one,) = needed_memory(halves[:1], [MultiStepCorruption(L2)]).values()
    assert [*needed_memory(halves, [MultiStepCorruption(L2)]).values()] == [of_one]


def test_what_pytorch_holds_for_later_is_free(monkeypatch) -> None:
    module = SimpleNamespace(
        mem_get_info=lambda device: (100, 1000),
        memory_reserved=lambda device: 60,
        memory_allocated=lambda device: 20,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert free_memory(torch.device("cuda")) == 100 + 60 - 20
    assert free_memory(torch.device("meta")) is None
    del module.mem_get_info
    assert free_memory(torch.device("cuda")) is None, "a kind of device that does not say"


@for_each(
    "corruption", [GaussianNoise(0.1), Quantization(4), GradientCorruption(L2), MultiStepCorruption(L2, steps=2)]
)
def test_saved_bits_elsewhere_change_no_number(corruption, bits_of) -> None:
    model = model_of_layers()
    before = bits_of(model)
    records = [evaluator_of(model, saved_on=device).evaluate([corruption], trials=2) for device in (None, "cpu")]
    assert records[0].corruptions == records[1].corruptions
    assert bits_of(model) == before


@pytest.mark.slow
@for_each("corruption", [one for corruptions, _ in LIMITS.values() for one in corruptions])
def test_all_bits_are_saved_there(corruption, monkeypatch) -> None:
    gradients = sys.modules["hf_parcor.evaluation.passes.gradients"]
    corrupted, found = gradients.corrupted, []

    def seen(*arguments, saved_on=None, **settings):
        found.append(saved_on)
        return corrupted(*arguments, saved_on=saved_on, **settings)

    monkeypatch.setattr(gradients, "corrupted", seen)
    evaluator_of(model_of_layers(), saved_on="cpu").evaluate([corruption], trials=1)
    assert set(found) == {torch.device("cpu")}, str(corruption)


@pytest.mark.slow
@for_each("saved_on", [None, "cpu"])
@for_each("steps", [1, 2])
@for_each("constraint", [L2, L_INF, CorruptionConstraint(epsilon=1e-25)])
def test_an_ascent_that_is_remembered_ends_where_one_does_that_is_kept(
    constraint, steps, saved_on, monkeypatch, bits_of
) -> None:
    for step_size in (None, 0.3 * constraint.epsilon):
        corruption, model = MultiStepCorruption(constraint, steps, step_size), model_of_layers()
        before, seen = bits_of(model), []

        def metric(model, seen=seen) -> dict[str, float]:
            seen.append(bits_of(model))
            return {"score": 1.0}

        evaluator = evaluator_of(model, metric, saved_on=saved_on)
        evaluator.evaluate([corruption], trials=1)
        with monkeypatch.context() as patches:
            patches.setattr(MultiStepCorruption, "remembered", lambda self, weights: None)
            evaluator.evaluate([corruption], trials=1)
        clean, remembered, _, alike = seen
        assert remembered == alike
        assert (remembered != clean) == (constraint.epsilon > 1e-20)
        assert bits_of(model) == before


@for_each("device", ["meta", "nowhere", 1.5])
def test_devices_that_keep_nothing_are_refused(device) -> None:
    with pytest.raises(ValueError, match=r"saved_on: expected .* device"):
        evaluator_of(model_of_layers(), saved_on=device)
