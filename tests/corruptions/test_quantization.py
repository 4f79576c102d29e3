"""Quantization takes every tensor by itself."""

from __future__ import annotations

import math
import sys
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
from for_each import for_each
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_parcor import CorruptionEvaluator, FloatQuantization, Quantization, corrupted
from hf_parcor.corruptions.blocks import by_blocks
from hf_parcor.functional import quantize, quantize_to_float
from hf_parcor.functional.blocks import in_rows


@for_each("bits", [2, 4, 8, 16])
def test_every_tensor_has_its_own_step(bits: int, weights) -> None:
    with torch.no_grad():
        weights["mix"].mul_(1000)
    result = Quantization(bits)(weights)
    assert all(torch.equal(result[name], quantize(weight, bits)) for name, weight in weights.items())
    assert len(result["matrix"].unique()) > 1


@for_each("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_injected_as_it_is(dtype: torch.dtype) -> None:
    weights = {"w": torch.randn(10_000).to(dtype)}
    values = Quantization(8)(weights)
    with corrupted(weights, values):
        assert torch.equal(weights["w"], values["w"])
        assert len(weights["w"].unique()) <= 255


def test_twice_is_once(weights) -> None:
    once = Quantization(5)(weights)
    assert all(torch.equal(twice, once[name]) for name, twice in Quantization(5)(once).items())


@for_each(("bits", "error"), [(1, ValueError), (17, ValueError), (4.0, TypeError), (True, TypeError)])
def test_bad_widths_are_refused_at_once(bits, error: type[Exception]) -> None:
    with pytest.raises(error, match="bits: expected a whole number"):
        Quantization(bits)


@for_each(
    ("settings", "expected"),
    [
        ({"symmetric": "yes"}, "symmetric: expected True or False"),
        ({"symmetric": False, "code_range": "full"}, "code_range: expected none where codes are asymmetric"),
        ({"zero_point": "float"}, "zero_point: expected none where codes are symmetric"),
        *(({name: "half"}, f"{name}: expected .* got 'half'") for name in ("code_range", "zero_point", "arithmetic")),
    ],
)
def test_settings_that_mean_nothing_are_refused_at_once(settings, expected: str) -> None:
    with pytest.raises((TypeError, ValueError), match=expected):
        Quantization(4, **settings)


SETTINGS = [
    {},
    {"per": "channel"},
    {"per": 2},
    {"code_range": "full"},
    {"per": 2, "code_range": "unclipped"},
    {"symmetric": False},
    {"symmetric": False, "zero_point": "float"},
    {"arithmetic": "weight"},
]


FLOATS = ["fp8_e4m3", "fp8_e5m2", "mxfp4", "nvfp4", "nf4"]


@for_each("settings", SETTINGS)
def test_is_the_pure_function(settings) -> None:
    weights = {"matrix": torch.randn(6, 4), "vector": torch.randn(4)}
    found = Quantization(3, **settings)(weights)
    assert all(torch.equal(found[name], quantize(weight, 3, **settings)) for name, weight in weights.items())
    assert Quantization(3, **settings).settings() == {"bits": 3, **settings}, "records of before say the bits alone"


@for_each("name", FLOATS)
def test_float_formats_are_the_pure_function(name: str) -> None:
    weights = {"matrix": torch.randn(6, 64), "vector": torch.randn(64)}
    found = FloatQuantization(name)(weights)
    assert all(torch.equal(found[key], quantize_to_float(weight, name)) for key, weight in weights.items())
    assert torch.equal(found["vector"], weights["vector"])


TOGETHER = [*(Quantization(3, **settings) for settings in SETTINGS), *map(FloatQuantization, FLOATS)]
TOGETHER += [Quantization(8, "channel", code_range="full"), FloatQuantization("fp8_e4m3", "channel")]


@for_each("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@for_each("corruption", TOGETHER)
def test_rows_of_many_weights_are_rounded_as_each_by_itself(corruption, dtype) -> None:
    """As off the CPU, to the last bit, where some entries are zero, not finite, or at the ends of the range."""
    shapes = [(6, 64), (2, 64), (3, 2, 32), (64,), (2, 128), (0, 64), (3, 128), (4, 33), (2, 33), (64, 6)]
    odd = torch.tensor([0.0, -0.0, math.inf, math.nan, 1e-45, 3e38, -3e38])
    weights = {str(place): 10.0**place * torch.randn(shape) for place, shape in enumerate(shapes)}
    weights["1"].view(-1)[: len(odd)] = odd
    weights["2"][1] = weights["7"][2] = 0
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    weights["9"] = weights["9"].t()
    if isinstance(getattr(corruption, "per", None), int) and corruption != FloatQuantization("nf4"):
        del weights["7"], weights["8"]  # no groups
    expected = corruption(weights)
    found = in_rows(weights, corruption._row_width, corruption._rounded)
    joined = corruption.per != "tensor" and corruption != FloatQuantization("nvfp4")
    assert len(found) >= 6 if joined else not found
    for name, one in found.items():
        assert (one.dtype, one.shape) == (expected[name].dtype, expected[name].shape)
        torch.testing.assert_close(one, expected[name], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(one.signbit(), expected[name].signbit())


@st.composite
def extreme_weights(draw) -> torch.Tensor:
    """Draw numbers from the smallest subnormal one of a dtype to its largest, among zeros or others of all sizes."""
    kind = torch.finfo(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])))
    ends = [0.0, kind.smallest_normal * kind.eps, kind.smallest_normal, kind.max]
    lowest, highest = math.log2(ends[1]), math.log2(ends[3])
    sizes = st.sampled_from(ends) | st.floats(lowest, math.nextafter(highest, 0)).map(lambda size: 2.0**size)
    known = draw(st.lists(st.tuples(sizes, st.sampled_from([-1, 1])), min_size=1, max_size=6))
    period = draw(st.sampled_from([1, 3, 16, 33, 256]))
    weights = torch.zeros(256, dtype=torch.float64)
    places = torch.arange(0, 256, period)
    numbers = torch.tensor([size * sign for size, sign in known], dtype=torch.float64)
    weights[places] = numbers[torch.arange(len(places)) % len(numbers)]
    return weights.view(2, 128).to(getattr(torch, kind.dtype))


@pytest.mark.parametrize("corruption", TOGETHER, ids=str)
@given(weights=extreme_weights())
@example(weights=torch.tensor([1e-36] + [0.0] * 127).view(1, 128))
@example(weights=torch.tensor([3e-35] + [1e-45] * 127).view(1, 128))
@example(weights=torch.tensor([1e-45] + [0.0] * 127).view(1, 128))
@example(weights=torch.full((1, 128), torch.finfo(torch.float16).max, dtype=torch.float16))
@settings(max_examples=50, deadline=None)
def test_extreme_weights_stay_finite_and_zeros_zero(corruption, weights) -> None:
    found = corruption({"w": weights})["w"]
    assert found.isfinite().all()
    if getattr(corruption, "zero_point", "integer") == "integer":
        assert not found[weights == 0].any()


def test_what_is_joined_is_bounded() -> None:
    """Twice the limit at most; a large weight alone, without a copy, as all of a model of 7 B."""
    rows = [1, 4, 3, 10, 9, 9, 9, 40, 2, 2, 5]
    weights = {str(place): torch.empty(count, 10, device="meta") for place, count in enumerate(rows)}
    seen = []

    def rounded(part: torch.Tensor) -> torch.Tensor:
        seen.append(len(part))
        return part

    with ExitStack() as limits:
        for place in ("corruptions.blocks", "functional.blocks"):
            limits.enter_context(patch.object(sys.modules[f"hf_parcor.{place}"], "ROUNDED_TOGETHER", 100))
        names = [name for name, _ in by_blocks(weights, lambda weight: 10, rounded)]
    assert names == list(weights)
    assert seen == [1 + 4 + 3, 10, 9 + 9, 9, 40, 2 + 2 + 5]


def test_an_error_says_which_weight_it_was() -> None:
    weights = {"fits": torch.randn(2, 32), "head.weight": torch.randn(2, 33)}
    for corruption in (Quantization(4, per=32), FloatQuantization("mxfp4")):
        with pytest.raises(ValueError, match=r"head.weight: per: .*32.*exclude_modules"):
            corruption(weights)


@for_each("corruption", TOGETHER)
def test_an_evaluator_refuses_what_a_call_does_and_in_its_words(corruption) -> None:
    """Nothing but that, and before anything is measured: what can be rounded is."""
    measured = []
    for shape in ((3, 7), (4, 16), (2, 3, 32), (33,)):
        measured.clear()
        model = torch.nn.Module()
        model.fits = torch.nn.Parameter(torch.randn(2, 64))
        model.head = torch.nn.Parameter(torch.randn(shape))
        evaluator = CorruptionEvaluator(model, lambda model: measured.append(0) or {"loss": 0.0}, progress=False)

        def said(run, *given) -> str:
            try:
                run(*given)
            except ValueError as error:
                return str(error)
            return ""

        words = said(corruption, dict(model.named_parameters()))
        assert said(evaluator.evaluate, [corruption]) == words
        assert not words or words.startswith("head: ")
        assert len(measured) == (0 if words else 2)


def test_shown() -> None:
    assert str(Quantization(4)) == "4-bit quantization"
    labels = [str(Quantization(4, **settings)) for settings in SETTINGS]
    labels += [str(FloatQuantization("fp8_e4m3", per)) for per in ("tensor", "channel", 32)]
    labels += [str(FloatQuantization(name)) for name in ("fp8_e5m2", "mxfp4", "nvfp4", "nf4")]
    assert len(set(labels)) == len(labels)
    assert "per group of 2" in labels[2]
