"""A Trainer's own numbers, which must count a batch once however many passes it takes."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_NO_BOOK = object()
_DATA = ("train_dataset", "eval_dataset")  # a list of numbers may be either


@contextmanager
def books_closed(trainer: object) -> Iterator[None]:
    """Let a Trainer write its numbers into copies that are thrown away afterwards.

    Trainers count and average in `compute_loss`: TRL's the tokens seen, sentence-transformers' the parts of the loss.
    What counts as such a book is an attribute that holds numbers alone, one or a dictionary or list of them. Two that
    are one object stay one.

    Examples:
        >>> from types import SimpleNamespace
        >>> trainer = SimpleNamespace(tokens=20, metrics={"train": {"entropy": [2.9]}})
        >>> with books_closed(trainer):
        ...     trainer.tokens += 20
        ...     trainer.metrics["train"]["entropy"].append(2.8)
        >>> trainer.tokens, trainer.metrics
        (20, {'train': {'entropy': [2.9]}})
    """
    attributes = vars(trainer)
    known = set(attributes)
    seen: dict[int, Any] = {}
    copies = {name: _copy_of_book(value, seen) for name, value in attributes.items() if name not in _DATA}
    books = {name: attributes[name] for name, kept in copies.items() if kept is not _NO_BOOK}
    try:
        for name in books:
            setattr(trainer, name, copies[name])
        yield
    finally:
        for name, value in books.items():
            setattr(trainer, name, value)
        new = [name for name in attributes if name not in known]
        for name in [name for name in new if _copy_of_book(attributes[name], {}) is not _NO_BOOK]:
            delattr(trainer, name)  # opened in this pass


def _copy_of_book(value: Any, seen: dict[int, Any]) -> Any:
    """Return a copy that shares nothing with the book which can be changed; `_NO_BOOK` of what is none.

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
        return _NO_BOOK
    entries = value.values() if isinstance(value, dict) else value
    first = next(iter(entries), 0)
    if not isinstance(first, (int, float)) and _copy_of_book(first, seen) is _NO_BOOK:
        return _NO_BOOK  # rows of data, texts: the others need no look
    kept = copy.copy(value)
    if not all(issubclass(kind, (int, float)) for kind in set(map(type, entries))):
        for place, entry in list(kept.items()) if isinstance(kept, dict) else enumerate(kept):
            part = _copy_of_book(entry, seen)
            if part is _NO_BOOK:
                return _NO_BOOK
            kept[place] = part
    seen[id(value)] = kept
    return kept
