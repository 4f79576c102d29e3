"""Methods and attributes of one object that are others for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def overriding(instance: object, **methods: Any) -> Iterator[None]:
    """Let an object's attributes be others; methods too, even if a subclass overrides them without `super()`.

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
    with ExitStack() as stack:
        # Built-in methods put them back, and are registered first: an interrupt between two lines prevents nothing.
        stack.callback(attributes.update, {name: attributes[name] for name in methods if name in attributes})
        for name in methods:
            stack.callback(attributes.pop, name, None)
        attributes.update(methods)
        yield
