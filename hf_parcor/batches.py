"""Batches: copies that a model may write into, their first examples, and which of their labels count."""

from __future__ import annotations

import copy
import math
from collections import UserDict
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import find_batch_size

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
        copied = _like(value, [_copy(part, memo) for part in value])
    else:
        return _copy_of_object(value, memo)
    memo[id(value)] = copied
    return copied


def _like(value: Any, parts: list[Any]) -> Any:
    """Return a list or a tuple of the same class; a named tuple takes its parts one by one."""
    return value._make(parts) if hasattr(value, "_make") else type(value)(parts)


def _copy_of_container(value: Any, memo: dict[int, Any]) -> Any:
    try:
        copied = copy.copy(value)
    except Exception:  # a class of its own, which may refuse in any way
        return _copy_of_object(value, memo)
    memo[id(value)] = copied  # before its parts: it may hold itself
    # What one run of a model leaves in a default dictionary, or in a class of its own, is set in the copy only.
    for place, part in enumerate(value) if isinstance(value, list) else value.items():
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


IGNORED_LABEL = -100
_ITEMS = "num_items_in_batch"
_LOADER = "DataLoader(rows, batch_size=32, collate_fn=...), with the collator of your Trainer, say"


def check_batch(batch: Any, *, named: bool = True) -> None:
    """Refuse what is no batch but one example of a data set, encoded or not, or one of the names of a mapping.

    Args:
        batch: The first that was found among what was passed as batches.
        named: Whether it has to be a mapping, too.

    Raises:
        TypeError: It is none, as those of a `TensorDataset` are.
        ValueError: It is one example, or a name.

    Examples:
        >>> import torch
        >>> check_batch({"input_ids": torch.tensor([[3, 4], [5, 6]]), "labels": torch.tensor([0, 1])})
        >>> check_batch({"input_ids": torch.tensor([3, 4]), "labels": torch.tensor(0)})
        Traceback (most recent call last):
        ...
        ValueError: batches: expected tensors with several examples in each, got one example, with 'labels' of shape
        (); collate them: DataLoader(rows, batch_size=32, collate_fn=...), with the collator of your Trainer, say
    """
    if isinstance(batch, str):
        raise ValueError(
            f"batches: expected a list of batches, got a mapping, with {batch!r}; pass [batch] where it is one batch, "
            "and a loader over one of them where it has the splits of a data set"
        )
    if not isinstance(batch, Mapping):
        if named:
            raise TypeError(
                "batches: expected mappings of tensors by the names that the model takes, got "
                f"{type(batch).__name__}; let the collator return {{'input_ids': ..., 'labels': ...}}, say"
            )
        return
    texts = [name for name, value in batch.items() if isinstance(value, str)]
    if texts:
        raise ValueError(
            f"batches: expected tensors with several examples in each, got one example, with the text {texts[0]!r}; "
            f"encode the texts by the tokenizer, and collate them: {_LOADER}"
        )
    for name, dimensions in _OF_BATCHES.items():
        shape = _shape(batch[name]) if name in batch else None
        if shape is not None and len(shape) < dimensions:
            raise ValueError(
                "batches: expected tensors with several examples in each, got one example, with "
                f"{name!r} of shape {shape}; collate them: {_LOADER}"
            )
    tokens = batch.get("input_ids")
    if isinstance(tokens, list):
        raise ValueError(
            f"batches: expected tensors, got 'input_ids' as a list of {len(tokens)}; collate them: {_LOADER}"
        )


_OF_BATCHES = {"labels": 1, "input_ids": 2}  # how many dimensions they have at least


def _shape(value: Any) -> tuple[int, ...] | None:
    """Return the shape of a tensor, an array, a number, or lists of numbers; None of other things."""
    if isinstance(value, (bool, int, float)):
        return ()
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return tuple(value.shape)
    if isinstance(value, list) and value:
        inner = _shape(value[0])
        return None if inner is None else (len(value), *inner)
    return None


def count_labels(batch: Mapping[str, Any], *, shifted: bool = False) -> Tensor | None:
    """Return how many labels of a batch count in its loss, without waiting for the device; None if it has none.

    Of labels that are numbers, of a regression say, all count: −100.0 is one of them.

    Args:
        batch: With `labels`, or `shift_labels`, which are shifted already.
        shifted: Whether the loss leaves out the first label of every row, as that of a causal language model does.

    Examples:
        >>> import torch
        >>> batch = {"labels": torch.tensor([[1, 2, -100], [3, -100, -100]])}
        >>> int(count_labels(batch)), int(count_labels(batch, shifted=True))
        (3, 1)
        >>> int(count_labels({"labels": torch.tensor([-100.0, 20.5])}))
        2
    """
    labels = batch.get("shift_labels", batch.get("labels"))
    if not isinstance(labels, Tensor):
        return None
    if shifted and "shift_labels" not in batch:
        labels = labels[..., 1:]
    counts = torch.ones_like(labels) if labels.is_floating_point() else labels != IGNORED_LABEL
    return counts.sum(dtype=torch.long)


def count_examples(batch: Any) -> int | None:
    """Return how many examples a batch has: the length of its first tensor; None without any.

    Where a batch has a list of mappings, one for each example, as detectors take their targets, that is its length:
    the images beside them may be a list as well, and the tensors inside are of what one image shows.

    Args:
        batch: Tensors, and lists, in mappings, lists or tuples.

    Examples:
        >>> import torch
        >>> targets = [{"boxes": torch.rand(7, 4)}, {"boxes": torch.rand(0, 4)}]
        >>> count_examples({"labels": targets, "pixel_values": [torch.rand(3, 8, 8), torch.rand(3, 9, 9)]})
        2
        >>> count_examples({"pixel_values": torch.rand(5, 3, 8, 8)})
        5
    """
    listed = _count_listed(batch)
    if listed is not None:
        return listed
    found: int | None = find_batch_size(batch)  # type: ignore[no-untyped-call]
    return found


def _count_listed(batch: Any) -> int | None:
    """Return the length of a mapping's first list of mappings, one for each example; None where there is no such."""
    values = batch.values() if isinstance(batch, Mapping) else ()
    return next((len(value) for value in values if _lists_examples(value)), None)


def _lists_examples(value: Any) -> bool:
    is_list = isinstance(value, (list, tuple)) and len(value) > 0
    return is_list and all(isinstance(part, Mapping) for part in value)


def first_examples(batch: Any, share: float) -> Any:
    """Return the first `⌈share · n⌉` of a batch's n examples; what is not per example stays.

    Args:
        batch: Tensors, and lists, of n examples, in mappings, lists or tuples; where a list of mappings says how many
            examples there are (see `count_examples`), lists of as many tensors have one for each.
        share: In (0, 1]; 1 returns the batch itself.

    Raises:
        ValueError: A tensor's first dimension is not that of the examples; or the batch says itself how many items its
            loss is divided by.
    """
    if share == 1:
        return batch
    if isinstance(batch, Mapping) and _ITEMS in batch:
        raise ValueError(
            f"batch_share: expected a batch that leaves it to the Trainer what its loss is divided by, got one with "
            f"{_ITEMS!r}, as of TRL's GRPOTrainer, which is that of all its examples; set batch_share to 1, and "
            "defend every n-th step instead (interval=n)"
        )
    count, examples = count_first(batch, share)
    return _take(batch, range(count), examples)


def repeat_first_examples(batch: Any, share: float) -> Any:
    """Return as many examples as a batch has: those of `first_examples`, and in place of all others these again.

    Args:
        batch: As in `first_examples`.
        share: As there.

    Raises:
        ValueError: As there.

    Examples:
        >>> import torch
        >>> repeat_first_examples({"labels": torch.tensor([5, 6, 7])}, 0.5)
        {'labels': tensor([5, 6, 5])}
    """
    count, examples = count_first(batch, share)
    return _take(batch, [place % count for place in range(examples)], examples)


def count_first(batch: Any, share: float) -> tuple[int, int]:
    """Return how many examples `first_examples` takes, and how many the batch has.

    Args:
        batch: As there.
        share: As there.

    Raises:
        ValueError: The batch has no tensor.
    """
    examples = count_examples(batch)
    if examples is None:
        raise ValueError("batch_share: expected a batch with tensors, got one without; set batch_share to 1")
    return math.ceil(share * examples * (1 - 1e-12)), examples  # 0.28 * 25 is 7.000000000000001


def _take(batch: Any, places: Sequence[int], examples: int) -> Any:
    if _count_listed(batch) is None:
        return _taken(batch, places, examples)
    return {
        name: _chosen(part, places)
        if isinstance(part, (list, tuple)) and len(part) == examples
        else _taken(part, places, examples)
        for name, part in batch.items()
    }


def _chosen(rows: Any, places: Sequence[int]) -> Any:
    """Return rows of a tensor, a list or a tuple; the first ones as a part of it."""
    if isinstance(places, range):
        return rows[: places.stop]
    return rows[list(places)] if isinstance(rows, Tensor) else type(rows)([rows[place] for place in places])


def _taken(value: Any, places: Sequence[int], examples: int) -> Any:
    if isinstance(value, Tensor) and value.dim() > 0:
        if len(value) != examples:
            raise ValueError(
                f"batch_share: expected tensors with {examples} examples in their first dimension, got one of shape "
                f"{tuple(value.shape)}; set batch_share to 1 for this model"
            )
        return _chosen(value, places)
    if isinstance(value, Mapping):
        return {name: _taken(part, places, examples) for name, part in value.items()}
    if isinstance(value, (list, tuple)) and not any(isinstance(part, Tensor) for part in value):
        return _chosen(value, places) if len(value) == examples else value
    if isinstance(value, (list, tuple)):
        return _like(value, [_taken(part, places, examples) for part in value])
    return value


def items_of_part(items: Tensor | int | None, batch: Any, share: float, shifted: bool = False) -> Tensor | int | None:
    """Return the divisor that gives the loss of a part the scale of the whole batch's.

    Models divide the sum over labels by the number of labels, `items`, of all batches of an optimizer step; a part
    with a third of its batch's labels is to be divided by a third of that.

    Args:
        items: The number of labels, None where the model takes a mean.
        batch: The whole batch.
        share: As in `first_examples`.
        shifted: Whether the loss is that of the next token, so that the first label counts for nothing.
    """
    if items is None or share == 1 or not isinstance(batch, Mapping):
        return items
    part, whole = (count_labels(some, shifted=shifted) for some in (first_examples(batch, share), batch))
    if part is None or whole is None:
        return items
    scaled: Tensor = torch.as_tensor(items, device=whole.device) * part / whole.clamp(min=1)
    return torch.where(part > 0, scaled, 1.0)  # no label, no loss
