"""The worst bit flips against brute force over all bits, and what the search promises of its rounds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from for_each import for_each
from torch import Tensor, nn

from hf_parcor import (
    BitFlips,
    CorruptionEvaluator,
    EvaluationRecord,
    Quantization,
    WorstBitFlips,
    corrupted,
    select_parameters,
)
from hf_parcor.evaluation import ClassificationMetric, DatasetGradients
from hf_parcor.functional import field_bits, flip_bits
from hf_parcor.functional.stored_numbers import StoredNumbers

Weights = Mapping[str, Tensor]
FORMATS = (None, "bfloat16", "int8", "int4")


def stored(weights: Weights, of: str | None) -> dict[str, Tensor]:
    none = torch.empty(0, dtype=torch.int64)
    return {name: flip_bits(weight, none, none, of) for name, weight in weights.items()}


def single_flips(weights: Weights, of: str | None):
    """Yield all weights with one bit flipped, for every bit that leaves a finite number."""
    base = stored(weights, of)
    for name, weight in weights.items():
        for element in range(weight.numel()):
            for bit in field_bits(of or weight.dtype):
                flipped = flip_bits(weight, torch.tensor([element]), torch.tensor([bit]), of)
                if flipped.isfinite().all():
                    yield {**base, name: flipped}


def differing_bits(weights: Weights, values: Weights, of: str | None) -> int:
    """How many stored bits differ. Integer codes are read off with the step of the weights as they were."""
    count = 0
    for name, weight in weights.items():
        before = StoredNumbers.of(weight, of)
        assert before is not None
        if before.step is None:
            now = StoredNumbers.of(values[name], of)
            assert now is not None
            after = now.bits
        else:
            whole = torch.round(values[name].detach().contiguous().view(-1) / before.step).to(torch.int32)
            after = whole & ((1 << before.width) - 1)
        count += sum(int(bits).bit_count() for bits in (before.bits ^ after).long() & ((1 << before.width) - 1))
    return count


class Linear:
    """A `GradientSource` whose loss is linear in the weights: to first order is all there is."""

    def __init__(self, weights: Weights, slopes: Weights) -> None:
        self.weights, self.slopes, self.asked = weights, slopes, []

    def gradient_at(self, values: Weights, batches: int | None = None) -> Weights:
        self.asked.append("gradient")
        return self.slopes

    def loss_at(self, values: Weights, batches: int | None = None) -> float:
        self.asked.append("loss")
        now = {**self.weights, **values}
        return sum(float((now[name].detach().double() * self.slopes[name].double()).sum()) for name in now)


@pytest.fixture
def linear(weights) -> Linear:
    return Linear(weights, {name: torch.randn(weight.shape) for name, weight in weights.items()})


@for_each("of", FORMATS)
def test_one_flip_is_the_best_of_all_bits(of: str | None, weights, linear) -> None:
    found = WorstBitFlips(1, of=of)(weights, linear)
    best = max(linear.loss_at(flipped) for flipped in single_flips(weights, of))
    assert linear.loss_at(found) == best


@for_each("of", [None, "int8"])
def test_the_loss_of_each_round_is_the_best_single_flip_from_there(of: str | None, weights, linear) -> None:
    """Three flips of a linear loss, greedily: every round against all bits."""
    rounds = [dict(values) for values in WorstBitFlips(3, of=of).walk(weights, linear)]
    gains = [linear.loss_at(after) - linear.loss_at(before) for before, after in pairwise(rounds)]
    if of == "int8":  # one of the floats' flips is so large that no other can be seen beside it
        assert gains == sorted(gains, reverse=True)
    assert all(gain >= 0 for gain in gains)
    assert linear.loss_at(rounds[1]) == max(linear.loss_at(flipped) for flipped in single_flips(weights, of))


@for_each("of", FORMATS)
@for_each("count", [1, 5, 20])
def test_so_many_bits_differ(of: str | None, count: int, weights, logistic) -> None:
    found = WorstBitFlips(count, of=of)(weights, logistic(weights))
    assert differing_bits(weights, found, of) == count
    if of is None:  # what holds no flip is never made, nor saved where it would be written
        pieces = WorstBitFlips(count).pieces(weights, logistic(weights)).whole()
        assert pieces.keys() == {name for name, weight in weights.items() if not torch.equal(found[name], weight)}


@for_each("of", ["int8", "int4"])
def test_a_convex_loss_never_falls_and_few_flips_beat_random_ones(of: str, weights, logistic) -> None:
    source = logistic(weights)
    losses = [source.loss_at(dict(values)) for values in WorstBitFlips(6, of=of, batches=None).walk(weights, source)]
    assert losses == sorted(losses)
    at_random = [
        source.loss_at(BitFlips(count=6, of=of)(weights, generator=torch.Generator().manual_seed(seed)))
        for seed in range(20)
    ]
    assert losses[-1] > max(at_random)


def test_fewer_flips_are_the_first_of_more(weights, logistic) -> None:
    walk = WorstBitFlips(4, of="int8").walk(weights, logistic(weights))
    for count, values in enumerate(walk):
        if count:
            fewer = WorstBitFlips(count, of=Quantization(8))(weights, logistic(weights))
            assert all(torch.equal(values[name], fewer[name]) for name in weights)


@for_each(("candidates", "losses"), [(1, 1), (2, 2), (10, 3)])
def test_cost_is_as_stated(candidates: int, losses: int, weights, linear) -> None:
    linear.asked.clear()
    WorstBitFlips(4, of="int8", candidates=candidates)(weights, linear)
    assert linear.asked == ["gradient", *["loss"] * losses] * 4


def test_the_loss_decides_between_tensors_not_the_gradient() -> None:
    weights = {"steep": torch.tensor([0.5, -1.0]), "flat": torch.tensor([0.5, -1.0])}

    class Deceiving(Linear):
        def loss_at(self, values: Weights, batches: int | None = None) -> float:
            return -super().loss_at(values)

    source = Deceiving(weights, {"steep": torch.tensor([2.0, 0.0]), "flat": torch.tensor([1.0, 0.0])})
    found = WorstBitFlips(1, of="int8")(weights, source)
    assert torch.equal(found["steep"], stored(weights, "int8")["steep"])
    found = WorstBitFlips(1, of="int8", candidates=1)(weights, source)
    assert torch.equal(found["flat"], stored(weights, "int8")["flat"])


@for_each("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_the_largest_and_ends_the_asking(bad: float, weights) -> None:
    class Breaking(Linear):
        def loss_at(self, values: Weights, batches: int | None = None) -> float:
            broken = not torch.equal(values["shift"], stored(self.weights, "int8")["shift"])
            return bad if broken else super().loss_at(values)

    source = Breaking(weights, {name: torch.ones_like(weight) for name, weight in weights.items()})
    found = WorstBitFlips(5, of="int8")(weights, source)
    assert source.asked.count("gradient") == 1
    assert not torch.equal(found["shift"], stored(weights, "int8")["shift"])
    assert differing_bits(weights, found, "int8") == 5


def test_a_gradient_that_is_not_finite_flips_nothing(weights) -> None:
    source = Linear(weights, {name: torch.full_like(weight, math.nan) for name, weight in weights.items()})
    found = WorstBitFlips(3)(weights, source)
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


class TestDataFree:
    @for_each("of", [None, "bfloat16"])
    @for_each("count", [1, 4, 6])
    def test_signs_of_the_largest_of_each_row(self, of: str | None, count: int, weights) -> None:
        corruption = WorstBitFlips(count, of=of, search="data-free")
        assert not corruption.uses_gradients
        found = corruption(weights)
        matrix = weights["matrix"].detach().abs()
        rows = sorted((float(row.max()), index) for index, row in enumerate(matrix))[-count:]
        expected = stored(weights, of)
        for _, index in rows:
            expected["matrix"][index, matrix[index].argmax()] *= -1
        assert all(torch.equal(found[name], expected[name]) for name in weights)
        assert differing_bits(weights, found, of) == count

    def test_where_matrices_have_too_few_rows_others_follow(self, weights) -> None:
        found = WorstBitFlips(16, search="data-free")(weights)
        assert torch.equal(found["mix"], -weights["mix"])
        assert differing_bits(weights, found, None) == 16
        with pytest.raises(ValueError, match="at most 16"):
            WorstBitFlips(17, search="data-free")(weights)

    def test_first_matrices_come_first(self) -> None:
        weights = {"bias": torch.full((3,), 9.0), "early": torch.ones(2, 2), "late": torch.full((2, 2), 5.0)}
        found = WorstBitFlips(2, search="data-free", candidates=1)(weights)
        assert torch.equal(found["early"], torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]))
        found = WorstBitFlips(2, search="data-free")(weights)
        assert torch.equal(found["early"], weights["early"])
        assert torch.equal(found["bias"], weights["bias"])

    def test_integer_codes_have_no_sign(self) -> None:
        with pytest.raises(ValueError, match="two's complement"):
            WorstBitFlips(1, of=Quantization(8), search="data-free")


@for_each(
    ("settings", "error", "word"),
    [
        ({"count": 0}, ValueError, "count"),
        ({"count": 1.5}, TypeError, "count"),
        ({"count": 1, "candidates": 0}, ValueError, "candidates"),
        ({"count": 1, "batches": 0}, ValueError, "batches"),
        ({"count": 1, "search": "genetic"}, ValueError, "search"),
        ({"count": 1, "of": "int99"}, ValueError, "bits"),
        ({"count": 1, "of": "uint8"}, ValueError, "of"),
    ],
)
def test_bad_settings_are_refused_at_once(settings: dict, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        WorstBitFlips(**settings)


def test_more_flips_than_weights(weights, logistic) -> None:
    with pytest.raises(ValueError, match="at most 34"):
        WorstBitFlips(35)(weights, logistic(weights))
    for search, most in (("gradient", 34), ("data-free", 16)):  # known before anything is measured
        WorstBitFlips(most, search=search).check(weights)
        with pytest.raises(ValueError, match=f"at most {most}"):
            WorstBitFlips(most + 1, search=search).check(weights)
    with pytest.raises(ValueError, match="at most 16"):
        WorstBitFlips(17, search="data-free")(weights)


class TestOfAModel:
    """With the library's own source of gradients, which writes into the model and gives every bit back."""

    @pytest.fixture
    def source(self, classifier: nn.Module, batches) -> DatasetGradients:
        classifier.eval()
        given = [{"input_ids": torch.randint(1, 20, (4, 6)), "labels": torch.randint(0, 2, (4,))} for _ in range(3)]
        return DatasetGradients(classifier, select_parameters(classifier, target_modules="all"), given)

    @for_each("of", [None, "int8"])
    def test_its_loss_and_gradient_are_those_of_the_corrupted_model(self, of: str | None, source, classifier) -> None:
        parameters = select_parameters(classifier, target_modules="all")
        values = BitFlips(count=9, bits="sign", of=of)(parameters, generator=torch.Generator().manual_seed(1))
        some = {name: values[name] for name in list(values)[::2]} if of is None else values
        with corrupted(parameters, type(values)(some)):
            loss = torch.stack([source.loss_on(batch) for batch in source._batches][:2]).mean()
            expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        assert source.loss_at(some, 2) == pytest.approx(loss.item(), rel=1e-6)
        found = source.gradient_at(some, 2)
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name], torch.zeros_like(found[name]) if gradient is None else gradient)

    @for_each("of", [None, "int8"])
    def test_every_bit_comes_back(self, of: str | None, source, classifier, bits_of) -> None:
        before = bits_of(classifier)
        parameters = select_parameters(classifier, target_modules="all")
        WorstBitFlips(2, of=of)(parameters, source)
        assert bits_of(classifier) == before
        calls = iter(range(100))

        def interrupted(model: nn.Module, batch: object) -> Tensor:
            if next(calls) == 4:
                raise KeyboardInterrupt
            return loss(model, batch)

        loss, source._loss = source._loss, interrupted
        with pytest.raises(KeyboardInterrupt):
            WorstBitFlips(2, of=of)(parameters, source)
        assert bits_of(classifier) == before
        assert all(parameter.grad is None for parameter in classifier.parameters())

    def test_measured_and_recorded(self, classifier, batches) -> None:
        data = [{"input_ids": torch.randint(1, 20, (6, 6)), "labels": torch.randint(0, 2, (6,))} for _ in range(2)]
        corruptions = [
            WorstBitFlips(2, of=Quantization(8)),
            WorstBitFlips(1, search="data-free"),
            BitFlips(count=3, of="int8"),
        ]
        record = CorruptionEvaluator(classifier, ClassificationMetric(data), progress=False).evaluate(corruptions, 1)
        again = EvaluationRecord.from_json(record.to_json())
        assert again == record
        settings = [json.loads(json.dumps(row.settings)) for row in again.corruptions]
        assert [type(one)(**given) for one, given in zip(corruptions, settings, strict=True)] == corruptions
        # Without batches to climb on, only what needs none can be measured.
        alone = CorruptionEvaluator(classifier, lambda model: {"one": 1.0}, progress=False)
        assert alone.evaluate(corruptions[1:], 1).corruptions[0].changed == 1
        with pytest.raises(ValueError, match="batches"):
            alone.evaluate(corruptions[:1])
