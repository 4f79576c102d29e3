"""Corrupted weights and gradients of a model that is whole in each process, or that FSDP2 shards over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_parcor.injection import Injection, corrupted, forget_derived
from hf_parcor.sharding import drop_gathered, is_sharded, reducing


@contextmanager
def corrupted_model(
    model: nn.Module, parameters: Mapping[str, Tensor], corruption: Mapping[str, Tensor]
) -> Iterator[Injection]:
    """Corrupt some weights of a model inside a `with` block; no weights that were gathered outlive its ends."""
    with corrupted(parameters, corruption) as injection:
        drop_gathered(model)
        try:
            yield injection
        finally:
            drop_gathered(model)


def gradients(
    model: nn.Module, parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a loss; no `.grad` is changed. Of a sharded model, those of the processes' mean loss."""
    forget_derived()  # an earlier pass may have left tensors without a graph, or with one that is freed
    if not is_sharded(model):
        return torch.autograd.grad(loss(), parameters, allow_unused=True)
    # FSDP2 computes with other tensors: only a whole backward pass brings gradients to the shards.
    kept = {parameter: parameter.grad for parameter in model.parameters()}
    try:
        for parameter in kept:
            parameter.grad = None
        with reducing(model):
            loss().backward()  # type: ignore[no-untyped-call]
        return tuple(parameter.grad for parameter in parameters)
    finally:
        for parameter, gradient in kept.items():
            parameter.grad = gradient
