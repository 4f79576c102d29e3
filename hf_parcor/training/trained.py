"""What a training step updates: the defended parameters, and those beside them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from torch import nn
from torch.optim import Optimizer


def check_trained(selected: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the selected parameters, all of which must be trainable.

    Raises:
        ValueError: A parameter is frozen.
    """
    frozen = [name for name, parameter in selected.items() if not parameter.requires_grad]
    if frozen:
        raise ValueError(
            f"target_modules: expected trainable parameters, got {len(frozen)} frozen ones such as {frozen[0]!r}; "
            "a defense needs their gradient: unfreeze them, or exclude them with exclude_modules"
        )
    return selected


def trained_beside(
    selected: Iterable[nn.Parameter], model: nn.Module, optimizer: Optimizer | None
) -> list[nn.Parameter]:
    """Return all other trainable parameters, each once: the model's, and those that only the optimizer holds.

    Losses may have parameters of their own, such as the classifier of a sentence-transformers' `SoftmaxLoss`.

    Examples:
        >>> model, head = nn.Linear(2, 2), nn.Linear(2, 1, bias=False)
        >>> optimizer = Optimizer([*model.parameters(), *head.parameters()], defaults={})
        >>> others = trained_beside([model.weight], model, optimizer)
        >>> [other is known for other, known in zip(others, (model.bias, head.weight))]
        [True, True]
    """
    groups = [] if optimizer is None else optimizer.param_groups
    known = chain(model.parameters(), *(group["params"] for group in groups))
    trained = {id(parameter): parameter for parameter in known if parameter.requires_grad}
    for parameter in selected:
        trained.pop(id(parameter), None)
    return list(trained.values())
