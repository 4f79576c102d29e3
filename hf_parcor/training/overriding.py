"""Methods and attributes of one object that are others for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    own = {name: attributes[name] for name in methods if name in attributes}
    attributes.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del attributes[name]
        attributes.update(own)
