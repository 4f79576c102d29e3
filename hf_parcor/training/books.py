"""A Trainer's own numbers, which must count a batch once however many passes it takes."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_DATA = ("train_dataset", "eval_dataset")  # a list of numbers may be either


@contextmanager
def books_closed(trainer: object) -> Iterator[None]:
    """Let a Trainer write its numbers into copies that are thrown away afterwards.

    Trainers count and average in `compute_loss`: TRL's the tokens seen, sentence-transformers' the parts of the loss.
    What counts as such a book is an attribute that holds numbers alone, one or a dictionary or list of them.

    Examples:
        >>> from types import SimpleNamespace
        >>> trainer = SimpleNamespace(tokens=20, metrics={"train": {"entropy": [2.9]}})
        >>> with books_closed(trainer):
        ...     trainer.tokens += 20
        ...     trainer.metrics["train"]["entropy"].append(2.8)
        >>> trainer.tokens, trainer.metrics
        (20, {'train': {'entropy': [2.9]}})
    """
    known = set(vars(trainer))
    books = {name: value for name, value in vars(trainer).items() if name not in _DATA and _is_book(value)}
    try:
        for name, value in books.items():
            setattr(trainer, name, copy.deepcopy(value))
        yield
    finally:
        for name, value in books.items():
            setattr(trainer, name, value)
        for name in [name for name, value in vars(trainer).items() if name not in known and _is_book(value)]:
            delattr(trainer, name)  # opened in this pass


def _is_book(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.requires_grad
    if isinstance(value, dict):
        return all(map(_is_book, value.values()))
    if isinstance(value, (list, deque)):
        return all(map(_is_book, value))
    return isinstance(value, (int, float))
