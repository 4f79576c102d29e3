"""Pruning of a model's weights: which stay, one tensor after the other, trained for."""

from __future__ import annotations

import pytest
import torch
from for_each import for_each
from torch import nn

from hf_parcor import CorruptionEvaluator, CorruptionRisk, Pruning, corrupted
from hf_parcor.functional import prune, prune_together
from hf_parcor.functional.blocks import in_rows
from hf_parcor.functional.vectors import numel
from hf_parcor.records.curves import Series

SETTINGS = [Pruning(0.5), Pruning(0.3, "all"), Pruning(0.4, "channel"), Pruning(0.5, 4)]


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 12), nn.LayerNorm(12), nn.Conv1d(12, 4, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape) / 4 + 1 / 64)
    return dict(model.named_parameters())


@for_each("pruning", SETTINGS)
def test_matrices_are_pruned_and_vectors_stay(pruning: Pruning, weights) -> None:
    matrices = {name: weight for name, weight in weights.items() if weight.ndim > 1}
    if pruning.per == "all":
        expected = dict(zip(matrices, prune_together(list(matrices.values()), pruning.sparsity), strict=True))
    else:
        expected = {name: prune(weight, pruning.sparsity, pruning.per) for name, weight in matrices.items()}
    assert 2 < len(expected) < len(weights)
    zeros = sum(int((one == 0).sum()) for one in expected.values())
    assert zeros == pytest.approx(pruning.sparsity * numel(list(matrices.values())), rel=0.2)
    found = pruning(weights)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    assert list(found) == list(weights)
    with corrupted(weights, pruning.pieces(weights)):
        for name, weight in weights.items():
            assert torch.equal(found[name], expected.get(name, before[name])), name
            assert torch.equal(weight, found[name]), name
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())


def test_all_together_ties_go_on_from_one_tensor_to_the_next() -> None:
    weights = {name: torch.ones(2, 2) for name in "abc"}
    found = Pruning(5 / 12, "all")(weights)
    assert torch.cat([found[name].reshape(-1) for name in "abc"]).tolist() == [1.0] * 7 + [0.0] * 5


def test_vectors_alone_stay_as_they_are() -> None:
    weights = {"b": torch.randn(8)}
    for pruning in SETTINGS:
        assert torch.equal(pruning(weights)["b"], weights["b"])


def test_pieces_hold_no_second_model(peak_memory) -> None:
    weights = {str(place): torch.randn(1024, 512) for place in range(8)}
    one = weights["0"].nbytes
    for pruning in SETTINGS:
        with peak_memory() as peak:
            for _ in pruning.pieces(weights):
                pass
        assert peak.peak < 7 * one, f"{pruning}: {peak.peak / one}"


def test_a_group_that_does_not_fit_is_named_before_anything_is_written() -> None:
    weights = {"fits": torch.randn(2, 8), "odd": torch.randn(2, 6)}
    with pytest.raises(ValueError, match=r"odd: .*groups of 4 for a tensor of shape \(2, 6\)"):
        Pruning(0.5, 4).check(weights)


@for_each(
    ("settings", "said"), [((1.1,), "sparsity: expected 0"), ((0.5, "row"), "per: expected"), ((0.5, 1), "per: ")]
)
def test_settings_are_checked_at_once(settings: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Pruning(*settings)


def test_strengths() -> None:
    assert Pruning(0.8, "all").weakened(0.5) == Pruning(0.4, "all")
    assert Pruning(0.8).settings() == {"sparsity": 0.8}
    assert Pruning(0.5, 4).settings() == {"sparsity": 0.5, "per": 4}
    assert CorruptionRisk(Pruning(0.5), ramp_epochs=1.0).passes == 2


def test_curves_are_called_by_what_is_a_block() -> None:
    model = nn.Linear(8, 4)
    record = CorruptionEvaluator(model, lambda model: {"loss": 0.0}, progress=False).evaluate(SETTINGS)
    names = [Series.of(row).name.replace("\N{NO-BREAK SPACE}", " ") for row in record.corruptions]
    assert names == [
        f"magnitude pruning{more}" for more in ("", ", all together", ", per channel", ", per group of 4")
    ]


@for_each("pruning", [one for one in SETTINGS if one.per != "all"])
def test_rows_of_many_weights_are_pruned_as_each_by_itself(pruning: Pruning) -> None:
    """As off the CPU."""
    shapes = [(6, 8), (2, 8), (3, 4), (2, 2, 4)]
    weights = {str(place): torch.randint(-3, 4, shape) / 4 for place, shape in enumerate(shapes)}
    found = in_rows(weights, pruning._row_width, pruning._pruned)
    assert bool(found) == (pruning.per in ("channel", 4))
    for name, one in found.items():
        assert torch.equal(one, prune(weights[name], pruning.sparsity, pruning.per))
