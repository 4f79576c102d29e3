"""What goes wrong when parameters are named."""

from __future__ import annotations

__all__ = ["TargetError"]


class TargetError(ValueError):
    """The targets that were asked for do not fit the model.

    The message says what was expected, what the model has, and what to write instead.

    Examples:
        >>> from torch import nn
        >>> from hf_parcor.targets import select_parameters
        >>> select_parameters(nn.Sequential(nn.Linear(2, 2)), ["querry"])
        Traceback (most recent call last):
        ...
        hf_parcor.targets.errors.TargetError: expected the name (or its dotted end) of a module or parameter in
        target_modules, got "querry", which matches nothing, use a word ...
    """
