"""Methods of one object that are others for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def overriding(instance: object, **methods: Callable[..., Any]) -> Iterator[None]:
    """Let an object's methods be others, also where a subclass has overridden them and never calls `super()`.

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
    own = {name: attributes[name] for name in methods if name in attributes}
    attributes.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del attributes[name]
        attributes.update(own)
