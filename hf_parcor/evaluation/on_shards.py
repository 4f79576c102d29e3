"""Corrupted weights and gradients of a model that is whole in each process, or that FSDP2 shards over all of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_parcor.injection import Injection, corrupted, forget_derived
from hf_parcor.sharding import drop_gathered, is_sharded, reducing

_LOST = "an autograd kernel was not registered"


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
    """Return the gradients of a loss; no `.grad` is changed. Of a sharded model, those of the processes' mean loss.

    Raises:
        ValueError: Something between the parameters and the loss passes no gradient back, such as quantized layers.
    """
    forget_derived()  # an earlier pass may have left tensors without a graph, or with one that is freed
    if not is_sharded(model):
        with _no_gradient_lost():
            return torch.autograd.grad(loss(), parameters, allow_unused=True)
    # FSDP2 computes with other tensors: only a whole backward pass brings gradients to the shards.
    kept = {parameter: parameter.grad for parameter in model.parameters()}
    try:
        for parameter in kept:
            parameter.grad = None
        with reducing(model), _no_gradient_lost():
            loss().backward()  # type: ignore[no-untyped-call]
        return tuple(parameter.grad for parameter in parameters)
    finally:
        for parameter, gradient in kept.items():
            parameter.grad = gradient


@contextmanager
def _no_gradient_lost() -> Iterator[None]:
    """Refuse what PyTorch warns of: an operation that a gradient does not pass, which is then zero before it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", f".*{re.escape(_LOST)}", UserWarning)
        try:
            yield
        except UserWarning as error:
            if _LOST not in str(error):
                raise
            raise ValueError(
                f"gradients: expected a loss that can be differentiated, got one through {str(error).split(':')[0]}"
                "'s operations, which pass no gradient back; select parameters behind the quantized layers, take "
                "corruptions without gradients (noise, flips), or load the model without quantization"
            ) from error
