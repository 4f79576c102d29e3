"""The gradient of a risk under L2 corruption, by autograd at copies of the weights: no code of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def longhand_passes(
    model: nn.Module,
    loss_of: Callable[[Callable[..., Any]], Tensor],
    steps: int,
    epsilon: float = 0.2,
    selected: Iterable[str] | None = None,
) -> list[dict[str, Tensor]]:
    """Return the gradient of each of K + 1 passes, without the parameters that took no part in it.

    `loss_of(call)` computes the loss, `call` being the model at the corrupted weights. With one step the corruption is
    the closed form, with more it takes steps of 1.5 epsilon / K and is scaled back into the ball. It is of the
    `selected` names; None for all that are trained.
    """
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    a = {name: torch.zeros_like(base[name]) for name in (trained if selected is None else selected)}
    passes = []
    for _ in range(steps + 1):
        values = {name: value + a.get(name, 0) for name, value in base.items()}
        wanted = [values[name].requires_grad_() for name in trained]
        loss = loss_of(
            lambda *given, values=values, **inputs: torch.func.functional_call(model, values, given, kwargs=inputs)
        )
        found = zip(trained, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True)
        passes.append({name: part for name, part in found if part is not None})
        climbed = {name: part for name, part in passes[-1].items() if name in a}
        norm = torch.sqrt(sum(part.double().square().sum() for part in climbed.values()))
        if norm > 0 and steps:
            a |= {name: a[name] + 1.5 * epsilon / steps * part / norm for name, part in climbed.items()}
            size = torch.sqrt(sum(part.double().square().sum() for part in a.values()))
            a = {name: part * min(1.0, epsilon / float(size)) for name, part in a.items()}
    return passes


def longhand(
    model: nn.Module,
    loss_of: Callable[[Callable[..., Any]], Tensor],
    weights: Sequence[float],
    epsilon: float = 0.2,
    selected: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """Return the gradient of the risk in which the loss at pass k has `weights[k]`, of all that is trained."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    passes = longhand_passes(model, loss_of, len(weights) - 1, epsilon, selected)
    for weight, found in zip(weights, passes, strict=True):
        total |= {name: total[name] + weight * part for name, part in found.items()}
    return total
