"""Corrupted weights inside a `with` block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from hf_parcor.injection.checks import check_corruption, check_mapping
from hf_parcor.injection.injection import Injection


class Replacement(dict[str, Tensor]):
    """New values of weights, by name, where a difference would not do.

    Quantized weights and flipped bits are values: where an exponent bit flips, `w + (w' − w)` is not `w'` in floating
    point, and `w'` may be ∞ or NaN. Any other mapping of names to tensors is a corruption `a` to be added.
    """


@contextmanager
def corrupted(parameters: Mapping[str, Tensor], corruption: Mapping[str, Tensor]) -> Iterator[Injection]:
    """Corrupt weights inside a `with` block; after it, and after any exception in it, every bit is back.

    Args:
        parameters: Weights by name, as `select_parameters` returns them.
        corruption: What to add to them, by name (names that are absent stay as they are), or a `Replacement` with
            new values. It is computed in float32 and rounded once to the weight's own precision.

    Yields:
        The injection, whose `withdraw(p)` ends the corruption early and tells its realised norm.

    Raises:
        ValueError: A name or a shape does not belong to the parameters, no name is given, or one weight stands under
            two names; nothing is written then.
        TypeError: A named weight is not floating point, or something is no tensor; nothing is written then.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> before = layer.weight.detach().clone()
        >>> with corrupted(dict(layer.named_parameters()), {"weight": torch.tensor([[0.5, 0.0]])}):
        ...     print(layer.weight.detach() - before)
        tensor([[0.5000, 0.0000]])
        >>> torch.equal(layer.weight, before)
        True
    """
    check_mapping("parameters", parameters, "select_parameters(model, ...) returns one")
    check_corruption(parameters, corruption)
    touched = {name: parameters[name] for name in corruption}
    if not touched:
        raise ValueError("corruption: expected at least one tensor, got none; corrupt at least one parameter")
    injection = Injection(touched)
    try:
        if isinstance(corruption, Replacement):
            injection.replace(corruption)
        else:
            devices = {name: weight.device for name, weight in touched.items()}
            injection.displace({name: change.detach().to(devices[name]) for name, change in corruption.items()})
        yield injection
    finally:
        injection.restore()
