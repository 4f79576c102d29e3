"""A copy of a batch that a model may write into."""

from __future__ import annotations

import copy
from collections import UserDict
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

Batch = TypeVar("Batch")

_UNCHANGEABLE = frozenset({type(None), bool, int, float, complex, str, bytes})


def private_copy(batch: Batch) -> Batch:
    """Return a copy of a batch that shares nothing with it that can be written into.

    Models and Trainers pop labels, also from nested inputs, and normalise tensors in place; whoever runs one more than
    once on a batch hands a copy to each run.

    Containers are copied at every depth, of their own classes; tensors are cloned, arrays copied, and what stands in
    two places does so in the copy. Handed on as they are: tensors that require a gradient, modules, and objects that
    cannot be copied.

    Args:
        batch: Mappings, lists and tuples of tensors, arrays and anything else.

    Examples:
        >>> import torch
        >>> batch = {"input_ids": torch.tensor([1.0, 2.0]), "extra": {"labels": torch.tensor([0, 1])}}
        >>> copied = private_copy(batch)
        >>> copied["input_ids"].div_(2), copied["extra"].pop("labels")
        (tensor([0.5000, 1.0000]), tensor([0, 1]))
        >>> batch
        {'input_ids': tensor([1., 2.]), 'extra': {'labels': tensor([0, 1])}}
    """
    copied: Batch = _copy(batch, {})
    return copied


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """Return the copy of a part. The memo is that of `copy.deepcopy`: copies by the id of what they are of."""
    if type(value) in _UNCHANGEABLE or isinstance(value, nn.Module):
        return value
    if id(value) in memo:
        return memo[id(value)]
    copied: Any
    if isinstance(value, Tensor):
        copied = value if value.requires_grad else value.clone()
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        copied = value.copy()
    elif isinstance(value, (dict, UserDict, list)):
        return _copy_of_container(value, memo)
    elif isinstance(value, MappingProxyType):
        copied = MappingProxyType(_copy(dict(value), memo))
    elif isinstance(value, tuple) and (type(value) is tuple or hasattr(value, "_make")):
        parts = [_copy(part, memo) for part in value]
        copied = value._make(parts) if hasattr(value, "_make") else tuple(parts)
    else:
        return _copy_of_object(value, memo)
    memo[id(value)] = copied
    return copied


def _copy_of_container(value: Any, memo: dict[int, Any]) -> Any:
    try:
        copied = copy.copy(value)
    except Exception:  # a class of its own, which may refuse in any way
        return _copy_of_object(value, memo)
    memo[id(value)] = copied  # before its parts: it may hold itself
    # What one run of a model leaves in a default dictionary, or in a class of its own, is set in the copy only.
    for place, part in enumerate(value) if isinstance(value, list) else list(value.items()):
        if type(part) not in _UNCHANGEABLE:
            copied[place] = _copy(part, memo)
    return copied


def _copy_of_object(value: Any, memo: dict[int, Any]) -> Any:
    # A memo of its own, since a copy that fails leaves halves of copies there.
    trial = dict(memo)
    try:
        copied = copy.deepcopy(value, trial)
    except Exception:  # locks, generators, results of a computation with a gradient: each refuses in its own way
        copied = value
    else:
        memo.update(trial)
        memo.setdefault(id(memo), []).append(trial)  # alive, so that no other object gets its id
    memo[id(value)] = copied
    return copied
