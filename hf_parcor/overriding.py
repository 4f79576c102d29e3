"""Replace methods and attributes of one object, or the numbers that it counts, for a block; undo what it leaves."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

_LEFT: WeakKeyDictionary[nn.Module, list[Callable[[], object]]] = WeakKeyDictionary()
_OVERRIDDEN = "_overridden_by_hf_parcor"
_NONE = object()
_NO_COUNTER = object()
_DATA = ("train_dataset", "eval_dataset")  # a list of numbers may be either


@contextmanager
def overriding(instance: object, **methods: Any) -> Iterator[None]:
    """Replace attributes of an object inside a block, methods too, even where a subclass overrides them.

    Examples:
        >>> from types import SimpleNamespace
        >>> trainer = SimpleNamespace(compute_loss=lambda: 1.0)
        >>> with overriding(trainer, compute_loss=lambda: 0.5):
        ...     trainer.compute_loss()
        0.5
        >>> trainer.compute_loss()
        1.0
    """
    attributes = vars(instance)
    before = {name: attributes.get(name, _NONE) for name in methods}
    attributes[_OVERRIDDEN] = (*attributes.get(_OVERRIDDEN, ()), before)
    try:
        attributes.update(methods)
        yield
    finally:
        _put_back(attributes, before)


def end_overriding(instance: object) -> None:
    """Restore what is still replaced after an interrupt.

    Examples:
        >>> from types import SimpleNamespace
        >>> trainer = SimpleNamespace(compute_loss=lambda: 1.0)
        >>> broken_off = overriding(trainer, compute_loss=lambda: 0.5)
        >>> broken_off.__enter__()
        >>> end_overriding(trainer)
        >>> trainer.compute_loss()
        1.0
    """
    attributes = vars(instance)
    for before in reversed(attributes.get(_OVERRIDDEN, ())):
        _put_back(attributes, before)


def undo_at_end(block: ExitStack, module: nn.Module, undo: Callable[..., object], *arguments: Any) -> None:
    """Undo what is going to be done to a module when a block ends, or `undoing_left` if an interrupt prevents that.

    Python may raise `KeyboardInterrupt` just where a block ends, and then nothing of it is ended.

    Args:
        block: At its end it is undone.
        module: What is going to be changed, after this call.
        undo: Called with `arguments`, with no effect if there is nothing to undo.
        *arguments: For `undo`.
    """
    entry = partial(undo, *arguments)
    _LEFT.setdefault(module, []).append(entry)
    block.callback(_end, module, entry)


def _end(module: nn.Module, entry: Callable[[], object]) -> None:
    entry()
    left = [other for other in _LEFT.get(module, ()) if other is not entry]
    if left:
        _LEFT[module] = left
    else:
        _LEFT.pop(module, None)


@contextmanager
def undoing_left(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Undo, if a block fails, all that others inside of it have done to these modules and did not undo."""
    try:
        yield
    except BaseException:
        for module in modules if _LEFT else ():
            for undo in reversed(_LEFT.pop(module, [])):
                undo()
        raise


def _put_back(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    overridden = attributes.get(_OVERRIDDEN, ())
    if not any(one is before for one in overridden):
        return  # it was ended from outside, and others may have begun since
    for name, value in before.items():
        if value is _NONE:
            attributes.pop(name, None)
        else:
            attributes[name] = value
    left = tuple(one for one in overridden if one is not before)
    if left:
        attributes[_OVERRIDDEN] = left
    else:
        attributes.pop(_OVERRIDDEN, None)


@contextmanager
def counters_kept(trainer: object) -> Iterator[None]:
    """Let a Trainer write its numbers into copies that are thrown away afterwards.

    Trainers count and average in `compute_loss`: TRL's the tokens seen, sentence-transformers' the parts of the loss.
    What counts as a counter is an attribute that holds numbers alone, one or a dictionary or list of them. Two that
    are one object stay one.

    Examples:
        >>> from types import SimpleNamespace
        >>> trainer = SimpleNamespace(tokens=20, metrics={"train": {"entropy": [2.9]}})
        >>> with counters_kept(trainer):
        ...     trainer.tokens += 20
        ...     trainer.metrics["train"]["entropy"].append(2.8)
        >>> trainer.tokens, trainer.metrics
        (20, {'train': {'entropy': [2.9]}})
    """
    attributes = vars(trainer)
    known = set(attributes)
    seen: dict[int, Any] = {}
    copies = {name: _copy_of_counter(value, seen) for name, value in attributes.items() if name not in _DATA}
    counters = {name: attributes[name] for name, kept in copies.items() if kept is not _NO_COUNTER}
    try:
        for name in counters:
            setattr(trainer, name, copies[name])
        yield
    finally:
        for name, value in counters.items():
            setattr(trainer, name, value)
        new = [name for name in attributes if name not in known]
        for name in [name for name in new if _copy_of_counter(attributes[name], {}) is not _NO_COUNTER]:
            delattr(trainer, name)  # begun in this pass


def _copy_of_counter(value: Any, seen: dict[int, Any]) -> Any:
    """Return a copy that shares nothing with the counter which can be changed; `_NO_COUNTER` of what is none.

    Lists may hold millions of numbers: what they hold is judged by the few types of it, and copied, without a Python
    instruction an entry.
    """
    if isinstance(value, (int, float)):
        return value
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad:
        seen[id(value)] = value.clone()
        return seen[id(value)]
    if not isinstance(value, (dict, list, deque)):
        return _NO_COUNTER
    entries = value.values() if isinstance(value, dict) else value
    first = next(iter(entries), 0)
    if _copy_of_counter(first, seen) is _NO_COUNTER:
        return _NO_COUNTER  # rows of data, texts: the others need no look
    kept = copy.copy(value)
    if not all(issubclass(kind, (int, float)) for kind in set(map(type, entries))):
        for place, entry in list(kept.items()) if isinstance(kept, dict) else enumerate(kept):
            part = _copy_of_counter(entry, seen)
            if part is _NO_COUNTER:
                return _NO_COUNTER
            kept[place] = part
    seen[id(value)] = kept
    return kept
