"""Pruning against PyTorch's own, and against a loop over blocks that sorts."""

from __future__ import annotations

import math

import pytest
import torch
from for_each import for_each
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from hf_parcor.functional import prune, prune_together

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def by_loop(block: list[float], sparsity: float) -> list[float]:
    """The last of the smallest become zero, one after the other."""
    left = list(block)
    dead: set[int] = set()
    for _ in range(round(sparsity * len(block))):
        alive = [place for place in range(len(block)) if place not in dead]
        dead.add(max(alive, key=lambda place: (-abs(block[place]), place)))
    return [0.0 if place in dead else value for place, value in enumerate(left)]


def blocks_of(matrix: Tensor, per: str | int) -> Tensor:
    if per == "tensor":
        return matrix.reshape(1, -1)
    return matrix.reshape(-1, matrix[0].numel() if per == "channel" else per)


@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.0, math.inf]), min_size=24, max_size=24),
    sparsity=st.floats(0, 1),
    shape=st.sampled_from([(2, 12), (4, 6), (2, 3, 4), (24, 1), (1, 24)]),
    per=st.sampled_from(["tensor", "channel", "group"]),
    dtype=st.sampled_from(DTYPES),
)
def test_against_a_loop(values: list[float], sparsity: float, shape: tuple[int, ...], per: str, dtype) -> None:
    matrix = torch.tensor(values, dtype=dtype).reshape(shape)
    chosen = (
        (3 if shape[-1] % 3 == 0 else 4) if per == "group" and shape[-1] > 1 else "tensor" if per == "group" else per
    )
    found = prune(matrix, sparsity, chosen)
    assert (found.dtype, found.shape) == (dtype, matrix.shape)
    for before, after in zip(blocks_of(matrix, chosen), blocks_of(found, chosen), strict=True):
        assert after.tolist() == by_loop(before.tolist(), sparsity)
        kept = after != 0
        assert torch.equal(after[kept], before[kept])


@for_each("sparsity", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_a_tensor_is_pruned_as_by_torch(sparsity: float) -> None:
    layer = nn.Linear(37, 23)
    found = prune(layer.weight, sparsity)
    torch_prune.l1_unstructured(layer, "weight", amount=sparsity)
    assert torch.equal(found, layer.weight.detach())


@for_each("sparsity", [0.1, 0.5, 0.93])
def test_all_together_are_pruned_as_by_torch(sparsity: float) -> None:
    layers = [nn.Linear(37, 23), nn.Conv2d(3, 5, 3), nn.Embedding(40, 6)]
    found = list(prune_together([layer.weight for layer in layers], sparsity))
    torch_prune.global_unstructured([(one, "weight") for one in layers], torch_prune.L1Unstructured, amount=sparsity)
    for mine, layer in zip(found, layers, strict=True):
        assert torch.equal(mine, layer.weight.detach())


def test_two_of_four_are_kept_everywhere() -> None:
    found = prune(torch.randn(50, 64), 0.5, 4)
    assert ((found.reshape(-1, 4) != 0).sum(1) == 2).all()


def test_rows_beyond_what_is_sorted_at_once(monkeypatch) -> None:
    matrix = torch.randint(-3, 4, (40, 6)).float()
    expected = prune(matrix, 0.5, "channel")
    monkeypatch.setattr("hf_parcor.functional.pruning.ROUNDED_TOGETHER", 13)
    assert torch.equal(prune(matrix, 0.5, "channel"), expected)


@for_each("per", ["tensor", "channel", 2])
def test_nan_is_kept_before_numbers_and_nothing_is_written(per: str | int) -> None:
    matrix = torch.tensor([[1.0, math.nan], [3.0, 2.0]])
    before = matrix.clone()
    assert prune(matrix, 0.5, per).isnan().tolist() == [[False, True], [False, False]]
    assert torch.equal(matrix.view(torch.int32), before.view(torch.int32))


@for_each("layout", ["transposed", "strided", "empty", "of no width"])
@for_each("per", ["tensor", "channel"])
def test_any_layout(layout: str, per: str) -> None:
    matrix = {
        "transposed": torch.randn(6, 4).T,
        "strided": torch.randn(8, 12)[::2, ::2],
        "empty": torch.zeros(0, 4),
        "of no width": torch.zeros(4, 0),
    }[layout]
    assert torch.equal(prune(matrix, 0.5, per), prune(matrix.contiguous(), 0.5, per))
    assert torch.equal(next(prune_together([matrix], 0.5)), prune(matrix, 0.5))


@for_each("per", ["channel", 4])
def test_vectors_have_no_blocks(per: str | int) -> None:
    vector = torch.randn(10)
    assert torch.equal(prune(vector, 0.5, per), vector)
    assert int((prune(vector, 0.5) == 0).sum()) == 5


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ((1.5,), ValueError, "0 <= sparsity <= 1, got 1.5"),
        ((-0.1,), ValueError, "0 <= sparsity <= 1"),
        ((math.nan,), ValueError, "NaN"),
        ((True,), TypeError, "sparsity"),
        ((0.5, "row"), ValueError, "tensor, channel"),
        ((0.5, "all"), ValueError, "tensor, channel"),
        ((0.5, 2.0), TypeError, "whole number"),
        ((0.5, 3), ValueError, "divide the last dimension"),
    ],
    ids=str,
)
def test_bad_input(arguments: tuple, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        prune(torch.zeros(2, 4), *arguments)
