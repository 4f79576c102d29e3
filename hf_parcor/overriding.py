"""Replace attributes, set hooks, or let a Trainer count and log in vain, until a block ends, however it ends."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._script import RecursiveScriptModule

_NO_COUNTER = object()
_DATA = ("train_dataset", "eval_dataset")  # a list of numbers may be either
_SMALL = 1 << 16  # entries; what is counted is smaller, and copied in each pass


class _Begun(threading.local):
    """What a thread has to undo, in the order in which it was begun."""

    def __init__(self) -> None:
        self.undos: list[Callable[[], object]] = []


_BEGUN = _Begun()


def undo_at_end(block: ExitStack, undo: Callable[..., object], *arguments: Any) -> None:
    """Undo what is going to be done when a block ends, or `undoing_left` if an interrupt prevents that.

    Python may raise `KeyboardInterrupt` just where a block ends, and then nothing of it is ended.

    Args:
        block: At its end it is undone.
        undo: Called with `arguments`, with no effect if there is nothing to undo.
        *arguments: For `undo`.
    """
    entry, begun = partial(undo, *arguments), _BEGUN.undos
    begun.append(entry)
    block.push(partial(_end, begun, entry))


def _end(
    begun: list[Callable[[], object]], entry: Callable[[], object], kind: type[BaseException] | None, *_: object
) -> None:
    for place in reversed(range(len(begun))):
        if begun[place] is entry:
            break
    else:
        return  # it was undone as what was left, and others may have begun since
    if kind is None or issubclass(kind, GeneratorExit):  # the latter at any time: a block is thrown away
        entry()
        del begun[place]
    else:
        _undo_from(begun, place)  # what is left of the blocks inside goes first


def _undo_from(begun: list[Callable[[], object]], place: int) -> None:
    while len(begun) > place:
        begun[-1]()
        del begun[-1]


@contextmanager
def undoing_left() -> Iterator[None]:
    """Undo, if a block or a decorated function fails, what was begun inside and has not ended, the gradient mode too.

    Examples:
        >>> from types import SimpleNamespace
        >>> trainer = SimpleNamespace(compute_loss=lambda: 1.0)
        >>> try:
        ...     with undoing_left():
        ...         override(ExitStack(), trainer, compute_loss=lambda: 0.5)
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt:
        ...     trainer.compute_loss()
        1.0
    """
    begun, gradients = _BEGUN.undos, torch.is_grad_enabled()
    before = len(begun)
    try:
        yield
    except BaseException:
        torch.set_grad_enabled(gradients)
        _undo_from(begun, before)
        raise


def override(block: ExitStack, instance: object, /, **replacing: Any) -> None:
    """Replace attributes of an object until a block ends; methods too, even where a subclass overrides them."""
    attributes = vars(instance)
    kept = {name: attributes[name] for name in replacing if name in attributes}
    undo_at_end(block, _put_back, attributes, kept, replacing.keys() - kept.keys())
    attributes.update(replacing)


def _put_back(attributes: dict[str, Any], kept: dict[str, Any], absent: Iterable[str]) -> None:
    attributes.update(kept)
    for name in absent:
        attributes.pop(name, None)


@contextmanager
def overriding(instance: object, /, **replacing: Any) -> Iterator[None]:
    """Replace attributes of an object inside a block, as `override` does.

    Examples:
        >>> from types import SimpleNamespace
        >>> trainer = SimpleNamespace(compute_loss=lambda: 1.0)
        >>> with overriding(trainer, compute_loss=lambda: 0.5):
        ...     trainer.compute_loss()
        0.5
        >>> trainer.compute_loss()
        1.0
    """
    with ExitStack() as block:
        override(block, instance, **replacing)
        yield


@contextmanager
def gradients_set_aside(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let a block begin without gradients, and give every `.grad` back what it held."""
    kept = [(tensor, tensor.grad) for tensor in tensors]
    with ExitStack() as block:
        undo_at_end(block, _give_back, kept)
        for tensor, _ in kept:
            tensor.grad = None
        yield


def _give_back(kept: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    for tensor, gradient in kept:
        tensor.grad = gradient


def hook_after(block: ExitStack, module: nn.Module, function: Callable[[nn.Module, Any, Any], Any]) -> None:
    """Let a function run after each call of a module, after its hooks, until a block ends; not of TorchScript."""
    if isinstance(module, RecursiveScriptModule):  # it runs no hooks
        return
    undo_at_end(block, _unhook, module, "_forward_hooks", function)
    module.register_forward_hook(function)


def hook_before(block: ExitStack, module: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
    """Let a function run before each call of a module, before its hooks, until a block ends; not of TorchScript."""
    if isinstance(module, RecursiveScriptModule):
        return
    undo_at_end(block, _unhook, module, "_forward_pre_hooks", function)
    module.register_forward_pre_hook(function, prepend=True)


def hook_gradient(block: ExitStack, tensor: Tensor, function: Callable[[Tensor], Any]) -> None:
    """Let a function run with each gradient of a tensor, after its hooks, until a block ends."""
    undo_at_end(block, _unhook, tensor, "_backward_hooks", function)
    tensor.register_hook(function)  # type: ignore[no-untyped-call]


def _unhook(owner: nn.Module | Tensor, where: str, function: Callable[..., Any]) -> None:
    hooks = getattr(owner, where) or {}
    for key in [key for key, hook in hooks.items() if hook is function]:
        del hooks[key]


def counters_in(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of the attributes that a Trainer counts in; two that are one object stay one.

    They hold numbers alone: one, a small tensor, a dictionary or list of numbers; or None, before the first.
    """
    seen: dict[int, Any] = {}
    copies = {name: _copy_of_counter(value, seen) for name, value in attributes.items() if name not in _DATA}
    return {name: kept for name, kept in copies.items() if kept is not _NO_COUNTER}


@contextmanager
def counters_kept(trainer: object) -> Iterator[None]:
    """Let a Trainer write its numbers into copies that are thrown away afterwards, and log nothing.

    Trainers count and average in `compute_loss`: TRL's the tokens seen, sentence-transformers' the parts of the loss.

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
    with ExitStack() as block:
        undo_at_end(block, _forget_counters_beyond, attributes, set(attributes))
        override(block, trainer, **counters_in(attributes))
        if hasattr(trainer, "log"):
            override(block, trainer, log=lambda *args, **kwargs: None)
        yield


def _forget_counters_beyond(attributes: dict[str, Any], known: set[str]) -> None:
    for name in [name for name in attributes if name not in known]:
        if _copy_of_counter(attributes[name], {}) is not _NO_COUNTER:
            del attributes[name]  # begun in this pass


def _copy_of_counter(value: Any, seen: dict[int, Any], most: int = _SMALL) -> Any:
    """Return a copy that shares nothing with the counter which can be changed; `_NO_COUNTER` of what is none.

    Lists may hold millions of numbers: what they hold is judged by the few types of it, and copied, without a Python
    instruction an entry.
    """
    if value is None or isinstance(value, (int, float)):
        return value
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, Tensor) and value.numel() <= most and not value.requires_grad:
        seen[id(value)] = value.clone()
        return seen[id(value)]
    if not isinstance(value, (dict, list, deque)):
        return _NO_COUNTER
    entries, most = (value.values(), most) if isinstance(value, dict) else (value, 1)
    first = next(iter(entries), 0)
    if _copy_of_counter(first, seen, most) is _NO_COUNTER:
        return _NO_COUNTER  # rows of data, texts: the others need no look
    kept = copy.copy(value)
    if not all(issubclass(kind, (int, float)) for kind in set(map(type, entries))):
        for place, entry in list(kept.items()) if isinstance(kept, dict) else enumerate(kept):
            part = _copy_of_counter(entry, seen, most)
            if part is _NO_COUNTER:
                return _NO_COUNTER
            kept[place] = part
    seen[id(value)] = kept
    return kept
