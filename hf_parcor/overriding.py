"""Replace methods and attributes of one object for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_OVERRIDDEN = "_overridden_by_hf_parcor"
_NONE = object()


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
