"""Optimizers inside of backward: hooks on parameters that update them as soon as their gradient is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

from torch import nn
from torch.optim import Optimizer

# They average gradients over processes, which is the same for the sum of all passes as for each of them.
_AVERAGE = ("torch.nn.parallel.distributed", "transformers.trainer")


def refuse_updates_inside_backward(parameters: Iterable[nn.Parameter]) -> None:
    """Check that nothing takes a gradient as soon as backward brings it: a pass of a defended step is not all of it.

    A hook that runs after a gradient was accumulated is refused whatever it does, but for those with which PyTorch and
    Transformers average gradients; a hook that runs before is refused if it holds an optimizer, as LOMO's do.

    Args:
        parameters: All parameters that are trained.

    Raises:
        ValueError: There is such a hook.

    Examples:
        >>> import torch
        >>> weight = nn.Parameter(torch.ones(2))
        >>> handle = weight.register_post_accumulate_grad_hook(lambda weight: print(weight.grad))
        >>> refuse_updates_inside_backward([weight])
        Traceback (most recent call last):
        ...
        ValueError: ... register_post_accumulate_grad_hook ...
        >>> handle.remove()
        >>> refuse_updates_inside_backward([weight])
    """
    for parameter in parameters:
        # Read as attributes: most parameters have none of the three.
        after, before = parameter._post_accumulate_grad_hooks, parameter._backward_hooks
        if after or before or hasattr(parameter, "_in_backward_optimizers"):
            _refuse(parameter, (after or {}).values(), (before or {}).values())


def _refuse(parameter: nn.Parameter, after: Iterable[Any], before: Iterable[Any]) -> None:
    kind = "register_post_accumulate_grad_hook"
    found = [hook for hook in after if _function(hook).__module__ not in _AVERAGE]
    if not found:
        kind = "register_hook"
        found = [hook for hook in before if _holds_an_optimizer(hook)]
    if not found:
        kind = "_apply_optimizer_in_backward"
        found = list(getattr(parameter, "_in_backward_optimizers", []))
    if found:
        function = _function(found[0])
        name = getattr(function, "__qualname__", type(function).__qualname__)
        raise ValueError(
            "parameters: expected gradients that nobody takes before a defended step is done, got a hook by "
            f"{kind} ({function.__module__}.{name}) on one of shape "
            f"{tuple(parameter.shape)}; an optimizer there would update at corrupted weights, once a pass: take "
            "the hook away and let the optimizer step after backward, or train without a defense"
        )


def _function(hook: Any) -> Any:
    return _function(hook.func) if isinstance(hook, partial) else hook


def _holds_an_optimizer(hook: Callable[..., Any]) -> bool:
    return any(isinstance(held, Optimizer) for held in _held(hook))


def _held(hook: Any) -> Iterator[Any]:
    """Yield what a function can update: its object, what it closes over, and what is in dictionaries of these."""
    parts = [getattr(hook, "__self__", None), *getattr(hook, "__dict__", {}).values()]
    if isinstance(hook, partial):
        parts += [*hook.args, *hook.keywords.values()]
        yield from _held(hook.func)
    for cell in getattr(hook, "__closure__", None) or ():
        with suppress(ValueError):  # not filled yet
            parts.append(cell.cell_contents)
    yield from parts
    yield from chain.from_iterable(part.values() for part in parts if isinstance(part, Mapping))
