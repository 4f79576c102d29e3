"""Corruptions that records describe, as words of a command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def strength_of(settings: Mapping[str, Any]) -> str | None:
    """Return which setting a command line takes as the strength: the radius of the constraint, or else the first.

    Examples:
        >>> strength_of({"p": 2.0, "epsilon": 0.1}), strength_of({"bits": 4, "per": 32}), strength_of({})
        ('epsilon', 'bits', None)
    """
    return "epsilon" if "epsilon" in settings else next(iter(settings), None)


def corruption_words(corruptions: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return the words of `--corruptions` that name corruptions; those that differ in their strength share one.

    Args:
        corruptions: Each by its name in the catalogue and its settings, as records have them.

    Examples:
        >>> corruption_words([("bit_flips", {"rate": 0.1}), ("quantization", {"bits": 4, "symmetric": False})])
        ['bit-flips=0.1', 'quantization=4:symmetric=false']
        >>> corruption_words(("gradient", {"p": float("inf"), "epsilon": epsilon}) for epsilon in (0.1, 0.2))
        ['gradient=0.1,0.2:norm=inf']
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name, settings in corruptions:
        strength = strength_of(settings)
        others = {key: value for key, value in settings.items() if key != strength and value is not None}
        norm = {"norm": order} if (order := others.pop("p", 2.0)) != 2.0 else {}  # which is the default
        said = [f"{key.replace('_', '-')}={_word(value)}" for key, value in {**norm, **others}.items()]
        strengths = found.setdefault((name.replace("_", "-"), ",".join(said)), [])
        strengths += [] if strength is None else [_word(settings[strength])]
    return [f"{name}={','.join(strengths)}{f':{said}' * bool(said)}" for (name, said), strengths in found.items()]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"
