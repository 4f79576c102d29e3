"""How many flips break a model, against flipping by hand; and what the record says."""

from __future__ import annotations

import math

import pytest
import torch
from for_each import for_each
from torch import nn
from torch.utils.data import DataLoader

from hf_parcor import FlipRecord, WorstBitFlips, corrupted, measure_flips_to_break, select_parameters
from hf_parcor.evaluation import ClassificationMetric, DatasetGradients


@pytest.fixture
def learned(classifier, batches) -> tuple[nn.Module, ClassificationMetric]:
    """A model that is always right, since the labels are its own answers."""
    classifier.eval()
    with torch.no_grad():
        data = [{**batch, "labels": classifier(batch["input_ids"]).logits.argmax(-1)} for batch in batches]
    return classifier.train(), ClassificationMetric(data)


@for_each("of", [None, "int8"])
def test_is_the_first_count_that_breaks_it(of: str | None, learned, bits_of) -> None:
    model, metric = learned
    model.train()
    before = bits_of(model)
    record = measure_flips_to_break(
        model, metric, of=of, target_modules="all-linear", most=30, chance=0.5, progress=False
    )
    assert bits_of(model) == before
    assert model.training
    assert record.clean == 1.0
    assert record.flips is not None
    assert record.flips == len(record.values) - 1
    parameters = select_parameters(model, target_modules="all-linear")
    model.eval()
    source = DatasetGradients(model, parameters, metric.batches)
    by_hand = [1.0]
    for count in range(1, record.flips + 1):
        with corrupted(parameters, WorstBitFlips(count, of=of)(parameters, source)):
            by_hand.append(metric(model)["accuracy"])
    assert record.values[1:] == pytest.approx(by_hand[1:], nan_ok=True)
    assert by_hand[-1] <= 0.75 < min(by_hand[:-1])
    assert FlipRecord.from_json(record.to_json()) == record


@for_each("progress", [True, False])
def test_progress_counts_flips(progress, learned, capsys) -> None:
    model, metric = learned
    record = measure_flips_to_break(model, metric, target_modules="classifier", most=9, chance=0.5, progress=progress)
    shown = capsys.readouterr().err
    assert (f" {len(record.values) - 1}/9 " in shown.rpartition("\r")[2]) == progress
    assert (shown == "") != progress


@for_each(
    ("values", "greater", "chance", "flips"),
    [
        ((0.9, 0.8, 0.7, 0.2), True, 0.5, 2),
        ((0.9, 0.8, 0.7, 0.44), True, 0.0, 3),
        ((0.9, 0.8), True, 0.0, None),
        ((0.4,), True, 0.0, 0),
        ((0.9, math.nan), True, 0.0, 1),
        ((0.9, 1.7, 1.8), False, 0.0, 2),
        ((0.9, math.nan), False, 0.0, 1),
    ],
)
def test_half_of_it(values: tuple[float, ...], greater: bool, chance: float, flips: int | None) -> None:
    record = FlipRecord("m", {}, 1, {}, "m", greater, chance, 0.9, values)
    assert record.flips == flips
    again = FlipRecord.from_json(record.to_json())
    assert again.flips == flips
    assert again.values == pytest.approx(values, nan_ok=True)


@for_each(
    ("settings", "word"),
    [
        ({"search": "gradient"}, "batches"),
        ({"metric_name": "bleu", "search": "data-free"}, "metric_name"),
        ({"chance": 1.0, "search": "data-free"}, "chance"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings: dict, word: str, classifier) -> None:
    with pytest.raises(ValueError, match=word):
        measure_flips_to_break(classifier, lambda model: {"accuracy": 1.0}, progress=False, **settings)


class Counting(nn.Module):
    """Counts its runs in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return self.linear(x)


@for_each("search", ["gradient", "data-free"])
def test_all_is_measured_from_one_state_and_what_is_no_number_is_none(search: str, bits_of) -> None:
    model, x = Counting(), torch.ones(2, 4)
    found: list[tuple[float, float]] = []

    def metric(model: nn.Module) -> dict[str, object]:
        model(x)
        found.append((model.runs.item(), torch.rand(()).item()))
        return {"accuracy": 1.0, "text": "no number"}

    before, state = bits_of(model), torch.get_rng_state()
    loader = DataLoader(x, batch_size=2)  # draws a number whenever the search walks through it
    record = measure_flips_to_break(
        model, metric, loader, search=search, loss=lambda model, x: model(x).square().mean(), most=2, progress=False
    )
    assert record.values == (1.0,) * 3
    assert len(found) == 3
    assert len(set(found)) == 1
    assert bits_of(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_giving_up(classifier) -> None:
    record = measure_flips_to_break(
        classifier, lambda model: {"accuracy": 1.0}, search="data-free", most=3, progress=False
    )
    assert record.values == (1.0,) * 4
    assert record.flips is None
