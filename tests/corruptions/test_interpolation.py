"""Towards other weights: against longhand, to the last bit at the ends, measured part by part."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from for_each import for_each
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_parcor import (
    CorruptionEvaluator,
    CorruptionRisk,
    DefenseConfig,
    EvaluationRecord,
    Interpolation,
    LayerProbe,
    Quantization,
    RobustnessReport,
    corrupted,
)
from hf_parcor.corruptions.interpolation import OtherWeights, dequantized
from hf_parcor.records.curves import Series

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def pair(dtype: torch.dtype = torch.float32, of_other: torch.dtype = torch.float32) -> tuple[dict, dict]:
    shapes = {"a": (5, 3), "b": (4,), "none": (0, 2)}
    weights = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    return weights, {name: torch.randn(shape).to(of_other) for name, shape in reversed(shapes.items())}


@for_each("dtype", DTYPES)
@for_each("of_other", DTYPES)
@for_each("share", [-0.5, 0.0, 0.25, 0.5, 1.0, 1.5])
def test_against_longhand(share: float, dtype: torch.dtype, of_other: torch.dtype) -> None:
    weights, others = pair(dtype, of_other)
    found = Interpolation(share, others)(weights)
    assert list(found) == list(weights)
    for name, weight in weights.items():
        assert found[name].numel() == 0 or found[name].data_ptr() not in (weight.data_ptr(), others[name].data_ptr())
        expected = weight.double() + share * (others[name].double() - weight.double())
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name], expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@given(bits=st.lists(st.tuples(*[st.floats(width=32)] * 2), min_size=1, max_size=8))
def test_the_ends_are_reached_to_the_last_bit(bits: list[tuple[float, float]]) -> None:
    mine, theirs = ({"w": torch.tensor(column)} for column in zip(*bits, strict=True))
    for share, end in {0.0: mine, 1.0: theirs}.items():
        found = Interpolation(share, theirs)(mine)["w"]
        assert torch.equal(found.view(torch.int32), end["w"].view(torch.int32))


@for_each("share", [0.5, 1.0])
def test_neither_model_is_written_and_the_other_is_not_shared(share: float, bits_of) -> None:
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    parameters, before = dict(model.named_parameters()), (bits_of(model), bits_of(other))
    with corrupted(parameters, Interpolation(share, other.state_dict()).pieces(parameters)):
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert mine.data_ptr() != theirs.data_ptr()
        if share == 1:
            assert bits_of(model) == before[1]
    assert (bits_of(model), bits_of(other)) == before


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"b": torch.zeros(4)}, r"got none in 'AWQ' for 1 of 2, such as 'a'; leave them out \(exclude_modules\)"),
        ({"a": torch.zeros(5, 4), "b": torch.zeros(4)}, r"shape \(5, 4\) instead of \(5, 3\) for 'a'"),
        ({"a": torch.zeros(5, 3, dtype=torch.int8), "b": torch.zeros(4)}, "whole numbers, torch.int8 for 'a'"),
        ({"a": torch.zeros(5, 3), "b": torch.zeros(4, device="meta")}, "on the meta device for 'b'"),
    ],
    ids=["missing", "shape", "integers", "meta"],
)
def test_weights_without_a_counterpart_are_refused_before_anything_is_measured(others, said) -> None:
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4))
    measured: list[int] = []
    evaluator = CorruptionEvaluator(model, lambda model: measured.append(0) or {"loss": 0.0}, progress=False)
    away = Interpolation(1.0, others, "AWQ")
    for refused in (
        lambda: evaluator.evaluate([away]),
        lambda: away(dict(model.named_parameters())),
        lambda: away.pieces(dict(model.named_parameters())),
    ):
        with pytest.raises(ValueError, match=said):
            refused()
    assert not measured


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (("half", {}), TypeError, "share"),
        ((math.nan, {}), ValueError, "NaN"),
        ((math.inf, {}), ValueError, "finite"),
        ((1.0, nn.Linear(2, 2)), TypeError, r"got Linear; pass other.state_dict\(\)"),
        ((1.0, "a folder"), TypeError, r"got str; pass other.state_dict\(\)"),
    ],
    ids=str,
)
def test_bad_input(arguments: tuple, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        Interpolation(*arguments)


def test_what_tells_two_apart() -> None:
    _, others = pair()
    copy = {name: tensor.clone() for name, tensor in sorted(others.items())}
    changed = {**copy, "b": copy["b"] + 1}
    first, same, other = (Interpolation(1.0, one, "AWQ") for one in (others, copy, changed))
    assert first == same
    assert hash(first) == hash(same)
    assert first != other
    assert first.settings() == same.settings() != other.settings()
    assert first != Interpolation(0.5, others, "AWQ")
    assert first != Interpolation(1.0, others, "GPTQ")
    assert OtherWeights({}) != {}
    ones = [torch.ones(2, 3), torch.ones(3, 2), torch.ones(6), torch.ones(2, 3).view(torch.int32)]
    assert len({OtherWeights({"w": one}).sha256 for one in ones}) == 4
    assert OtherWeights({"w": ones[0]}).sha256 != OtherWeights({"v": ones[0]}).sha256
    single = torch.ones(6)[::3][:1]
    assert single.stride() == (3,)
    assert OtherWeights({"w": single}) == OtherWeights({"w": torch.ones(1)})
    assert first.with_strength(0.5).towards is first.towards
    assert str(first) == "weights of AWQ"
    assert repr(first) == "Interpolation(share=1.0, towards=3 tensors, name='AWQ')"


def test_zero_changes_nothing() -> None:
    weights, others = pair()
    assert Interpolation(0, others).changes_nothing
    assert not Interpolation(-1, others).changes_nothing
    assert all(torch.equal(found, weights[name]) for name, found in Interpolation(0, others)(weights).items())


class Halves(Tensor):
    """As the tensors of a quantizer: it stands for twice the numbers that it holds."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Halves:
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=torch.float32)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    def dequantize(self) -> Tensor:
        return self.held.float() * 2

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function is torch.ops.aten.detach.default, function
        return cls(args[0].held)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, and still about
def test_tensors_of_a_quantizer_are_dequantized() -> None:
    held = torch.randint(-8, 8, (3, 4), dtype=torch.int8)
    quantized = {"w": Halves(held)}
    found = Interpolation(1.0, quantized)({"w": torch.randn(3, 4)})["w"]
    assert torch.equal(found, 2.0 * held)
    assert Interpolation(1.0, quantized) == Interpolation(1.0, {"w": 2.0 * held})
    plain = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    assert dequantized(plain).dtype == torch.bfloat16
    assert dequantized(plain).data_ptr() == plain.data_ptr()
    old = torch.quantize_per_tensor(torch.tensor([0.5, 1.2]), 0.5, 0, torch.qint8)
    assert dequantized(old).tolist() == [0.5, 1.0]


def test_a_probe_says_which_layer_costs_what_a_quantizer_costs(tmp_path) -> None:
    """Part by part what the quantizer itself finds there, under any name that a curve may have."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    batch = torch.randn(20, 6)
    clean = model(batch).detach()

    @torch.no_grad()
    def error(model: nn.Module) -> dict[str, float]:
        return {"mse": float((model(batch) - clean).square().mean())}

    coarse = Quantization(3)
    with corrupted(dict(model.named_parameters()), coarse(dict(model.named_parameters()))):
        rounded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parts = {name: [name] for name in "024"}
    shares = [Interpolation(share, rounded, "rounded") for share in (0.5, 1.0)]
    sweep = LayerProbe(model, error, targets=parts, progress=False).evaluate([*shares, coarse])
    for record in sweep.records.values():
        half, whole, direct = (one.mean("mse") for one in record.corruptions)
        assert whole == direct > half > 0
        assert record.corruptions[1].corruption == "Interpolation"
        assert Series.of(record.corruptions[1]).name == "interpolation, towards rounded"
    everything = CorruptionEvaluator(model, error, progress=False).evaluate(shares)
    assert EvaluationRecord.from_json(everything.to_json()) == everything
    RobustnessReport(everything).to_markdown(tmp_path / "page.md")
    assert "towards rounded" in (tmp_path / "page.md").read_text(encoding="utf-8")


def test_a_checkpoint_of_other_weights_is_refused(tmp_path) -> None:
    model, others = nn.Linear(4, 2), {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}
    evaluator = CorruptionEvaluator(model, lambda model: {"sum": float(model.weight.detach().sum())}, progress=False)
    kept = tmp_path / "run.jsonl"
    found = evaluator.evaluate([Interpolation(1.0, others, "AWQ")], checkpoint=kept)
    assert evaluator.evaluate([Interpolation(1.0, dict(others), "AWQ")], checkpoint=kept) == found
    with pytest.raises(ValueError, match="corruptions"):
        evaluator.evaluate([Interpolation(1.0, {**others, "bias": torch.ones(2)}, "AWQ")], checkpoint=kept)


def test_what_is_trained_on_the_way_says_so_in_its_file() -> None:
    risk = CorruptionRisk(Interpolation(0.5, {"w": torch.zeros(2)}, "merged"), ramp_epochs=1.0)
    text = str(DefenseConfig(risk).to_dict())
    assert "merged" in text
    assert "1 tensors" in text
    assert len(text) < 2_000
    assert dataclasses.replace(risk) == risk
