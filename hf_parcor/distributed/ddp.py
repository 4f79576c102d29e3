"""One gradient all-reduce a step under DistributedDataParallel, however many passes the step takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def data_parallel(model: nn.Module) -> DistributedDataParallel | None:
    """Return the DDP wrapper of a model as the Trainer wrapped it; None if there is none."""
    # One that is compiled as one tells by its forward what it runs: Accelerate's unwrap_model leaves it with an
    # _orig_mod without DDP. One that is compiled in regions is a wrapper itself, made from another that no pass runs.
    runs = unwrap(model.forward)
    found = (one for one in (model, getattr(runs, "__self__", runs)) if isinstance(one, DistributedDataParallel))
    return next(found, None)


def wrapped_by(model: nn.Module) -> nn.Module | None:
    """Return what DDP wraps; None if it does not."""
    wrapper = data_parallel(model)
    return None if wrapper is None else wrapper.module


@contextmanager
def unfinished_forward(model: nn.Module) -> Iterator[None]:
    """Let a forward pass that ends early count as the step's first, the one at which DDP sends buffers."""
    try:
        yield
    finally:
        wrapper = data_parallel(model)
        if wrapper is not None:
            wrapper.require_forward_param_sync = False


@contextmanager
def sending_no_buffers(model: nn.Module) -> Iterator[None]:
    """Let forward passes in the block send no buffers, since another process may run none; the next one does."""
    wrapper = data_parallel(model)
    if wrapper is None:
        yield
        return
    due = wrapper.require_forward_param_sync
    wrapper.require_forward_param_sync = False
    try:
        yield
    finally:
        wrapper.require_forward_param_sync = due


def reduction_of(model: nn.Module) -> Callable[[], Tensor] | None:
    """Return a function that prepares one all-reduce of all gradients; None without DDP.

    What it returns is a graph that ends in every trained parameter, and brings no gradient. Sent backward along with
    another graph, it lets DDP reduce each bucket as soon as its gradients are final, what `.grad` held before
    included. DDP's own forward pass prepares it, so nothing private is used, and inside `no_sync` nothing is reduced.
    """
    wrapper = data_parallel(model)
    if wrapper is None:
        return None

    def prepare() -> Tensor:
        module = wrapper.module
        try:
            wrapper.module = _Ends([parameter for parameter in module.parameters() if parameter.requires_grad])
            ends: Tensor = wrapper()
        finally:
            wrapper.module = module
        return ends

    return prepare


class _Ends(nn.Module):
    """A model whose result depends on the parameters, and whose backward gives them no gradient."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self._trained = parameters  # in a list: they are not this module's own

    def forward(self) -> Tensor:
        ends: Tensor = _NoGradient.apply(*self._trained)  # type: ignore[no-untyped-call]
        return ends


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, *parameters: Tensor) -> Tensor:
        context.count = len(parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[None, ...]:
        nothing: tuple[None, ...] = (None,) * context.count
        return nothing
