"""Settings from plain JSON values, with every name and type checked; any dataclass, no code of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_NOT_FINITE = ("inf", "-inf", "nan")


def from_plain(kind: Any, value: Any, name: str) -> Any:
    """Return what `to_plain` wrote as a value of the type `kind`, a dataclass by its type hints.

    Args:
        kind: A dataclass, a plain type, or a union, list, tuple or `Literal` of them.
        value: The plain value.
        name: How errors call it.

    Raises:
        ValueError: The value is of another type, or a setting is unknown or missing. What the dataclass itself
            refuses, it refuses with an error of its own.
        TypeError: `kind` is none of these.

    Examples:
        >>> from hf_parcor import CorruptionConstraint
        >>> from_plain(CorruptionConstraint, {"p": "inf", "epsilon": 0.1, "top_n": None}, "constraint")
        CorruptionConstraint(p=inf, epsilon=0.1, top_n=None)
        >>> from_plain(float | None, "large", "epsilon")
        Traceback (most recent call last):
        ...
        ValueError: epsilon: expected a number or "inf", got 'large'
    """
    if isinstance(kind, type) and is_dataclass(kind):
        return _dataclass_from_plain(kind, value, name)
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _member_from_plain(parts, value, name)
    if origin in (list, tuple):
        entries = _checked(isinstance(value, list), value, name, "a list")
        return origin(from_plain(parts[0], entry, f"{name}[{index}]") for index, entry in enumerate(entries))
    if origin is Literal:
        return _checked(value in parts, value, name, f"one of {', '.join(map(repr, parts))}")
    if kind not in _PLAIN:
        raise TypeError(f"{name}: expected a plain type, a dataclass or a union, list or tuple of them, got {kind}")
    expected, fits = _PLAIN[kind]
    _checked(fits(value), value, name, expected)
    return float(value) if value in _NOT_FINITE and kind is float else value


def _is_number(value: Any) -> bool:
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or value in _NOT_FINITE


_PLAIN: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    NoneType: ("null", lambda value: value is None),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    float: ('a number or "inf"', _is_number),
    str: ("a string", lambda value: isinstance(value, str)),
}


def _checked(fits: bool, value: Any, name: str, expected: str) -> Any:
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return value


def _member_from_plain(parts: tuple[Any, ...], value: Any, name: str) -> Any:
    if value is None and NoneType in parts:
        return None
    errors = []
    for part in parts:
        if part is not NoneType:
            try:
                return from_plain(part, value, name)
            except ValueError as error:
                errors.append(str(error))
    raise ValueError("; or ".join(errors))


def _dataclass_from_plain(kind: type, value: Any, name: str) -> Any:
    _checked(isinstance(value, dict), value, name, "an object of settings")
    hints = get_type_hints(kind)
    known = [setting.name for setting in fields(kind) if setting.init]
    if set(value) != set(known):
        unknown = [key for key in value if key not in known]
        missing = [key for key in known if key not in value]
        got = [*(f"the unknown {key}" for key in unknown), *(f"no {key}" for key in missing)]
        raise ValueError(f"{name}: expected exactly the settings {', '.join(known)}, got {', '.join(got)}")
    return kind(**{key: from_plain(hints[key], entry, f"{name}.{key}") for key, entry in value.items()})
