"""Weights narrower than float32 swallow small corruptions: the record says so, and of which."""

import math

import pytest
import torch
from for_each import for_each
from torch import nn

from hf_parcor import (
    CorruptionConstraint,
    CorruptionEvaluator,
    GaussianNoise,
    GradientCorruption,
    MultiStepCorruption,
    Quantization,
    RandomCorruption,
)
from hf_parcor.injection import Pieces, corrupted

TINY = 1e-6
KINDS = {
    "noise": lambda size: GaussianNoise(size),
    "at random": lambda size: RandomCorruption(CorruptionConstraint(epsilon=50 * size)),
    "along the gradient": lambda size: GradientCorruption(CorruptionConstraint(epsilon=50 * size)),
    "two steps": lambda size: MultiStepCorruption(CorruptionConstraint(epsilon=50 * size), steps=2),
}


def notes_of(dtype, corruption, checkpoint=None):
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False).to(dtype)
    data = [torch.randn(4, 64, dtype=dtype)]

    def loss(of, batch):
        return of(batch).float().square().mean()

    evaluator = CorruptionEvaluator(
        model, lambda of: {"loss": loss(of, data[0]).item()}, batches=data, loss=loss, progress=False
    )
    (row,) = evaluator.evaluate([corruption], trials=2, checkpoint=checkpoint).corruptions
    return row.notes


@for_each("kind", list(KINDS))
@for_each(
    ("dtype", "size", "is_said"),
    [
        (torch.bfloat16, TINY, True),
        (torch.float16, TINY, True),
        (torch.bfloat16, 0.05, False),
        (torch.float16, 0.05, False),
        (torch.float32, TINY, False),
    ],
)
def test_it_is_said_where_a_corruption_is_swallowed(kind, dtype, size, is_said):
    notes = notes_of(dtype, KINDS[kind](size))
    assert bool(notes) == is_said, notes
    assert all("measure in float32" in note or "no weight changed" in note for note in notes)


def test_rounding_is_what_it_is():
    assert notes_of(torch.bfloat16, Quantization(8)) == ()


def test_a_run_that_went_on_says_the_same(tmp_path):
    corruption = GaussianNoise(TINY)
    first, again = (notes_of(torch.bfloat16, corruption, checkpoint=tmp_path / "run.jsonl") for _ in range(2))
    assert first == again
    assert "with seed 1" in first[1]


@for_each("as_pieces", [False, True])
def test_what_was_asked_for_is_the_norm_of_what_was_to_be_added(as_pieces):
    torch.manual_seed(0)
    weights = {"narrow": torch.randn(40, 10).to(torch.float16), "wide": torch.randn(30)}
    corruption = {name: 1e-4 * torch.randn(weight.shape) for name, weight in weights.items()}
    expected = math.sqrt(sum(change.double().square().sum() for change in corruption.values()))
    given = Pieces.consuming(dict(corruption)) if as_pieces else corruption
    with corrupted(weights, given, p=2) as injection:
        size = injection.size()
    assert size.asked == pytest.approx(expected, rel=1e-5)
    assert size.norm != pytest.approx(expected, rel=0.05)
