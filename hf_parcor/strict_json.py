"""Plain values as files: JSON that every reader accepts, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

_NOT_FINITE = ("inf", "-inf", "nan")


def to_plain(value: Any, otherwise: Callable[[Any], Any] | None = None) -> Any:
    """Return a value as what strict JSON can hold: infinities and NaN as strings, dataclasses as objects.

    `from_plain` reads it back.

    Args:
        value: Anything.
        otherwise: What becomes of a value that has no such form; None, the default, leaves it.

    Examples:
        >>> from hf_parcor import CorruptionConstraint
        >>> to_plain(CorruptionConstraint(p=math.inf, epsilon=0.1))
        {'p': 'inf', 'epsilon': 0.1, 'top_n': None}
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):  # NumPy's integers
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else str(float(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name), otherwise) for field in fields(value) if field.init}
    if isinstance(value, Mapping):
        return {str(key): to_plain(entry, otherwise) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return [to_plain(entry, otherwise) for entry in value]
    return value if otherwise is None else otherwise(value)


Reader = Callable[[Any, str], Any]
"""Returns a value from a plain one, given what errors call it."""


def from_plain(
    kind: Any, value: Any, name: str, readers: Mapping[Any, Reader] | None = None, *, complete: bool = True
) -> Any:
    """Return what `to_plain` wrote as a value of the type `kind`, a dataclass by its type hints.

    Args:
        kind: A dataclass, a plain type, `Any`, or a union, list, tuple or mapping of them.
        value: The plain value.
        name: How errors call it.
        readers: Types that are read in another way, each with a function. Default None.
        complete: Whether an object must have all settings, or may lack those of a dataclass that have a default.

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

    def read(kind: Any, value: Any, name: str) -> Any:
        return from_plain(kind, value, name, readers, complete=complete)

    if readers and kind in readers:
        return readers[kind](value, name)
    if isinstance(kind, type) and is_dataclass(kind):
        hints, given = _hints(kind), _settings_of(kind, value, name, complete)
        return kind(**{key: read(hints[key], entry, f"{name}.{key}") for key, entry in given.items()})
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _member_of(parts, value, name, read)
    if origin is Literal:
        return checked(value in parts, value, name, f"one of {', '.join(map(repr, parts))}")
    if isinstance(origin, type) and issubclass(origin, Mapping):
        checked(isinstance(value, dict), value, name, "an object")
        return {key: read(parts[1], entry, f"{name}.{key}") for key, entry in value.items()}
    if origin in (list, tuple, Collection, Sequence):
        checked(isinstance(value, list), value, name, "a list")
        kinds = parts if origin is tuple and parts[-1] is not ... else parts[:1] * len(value)
        checked(len(kinds) == len(value), value, name, f"a list of {len(kinds)}")
        entries = [
            read(one, entry, f"{name}[{index}]") for index, (one, entry) in enumerate(zip(kinds, value, strict=True))
        ]
        return entries if origin is list else tuple(entries)
    if kind is Any:
        return float(value) if value in _NOT_FINITE else value
    if kind not in _PLAIN:
        raise TypeError(
            f"{name}: expected a plain type, a dataclass or a union, list, tuple or mapping of them, got {kind}"
        )
    expected, fits = _PLAIN[kind]
    checked(fits(value), value, name, expected)
    return float(value) if kind is float else value


def checked(fits: bool, value: Any, name: str, expected: str) -> Any:
    """Return a plain value if it fits.

    Raises:
        ValueError: It does not.
    """
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {value!r:.200}")
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _is_number(value: Any) -> bool:
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or value in _NOT_FINITE


_PLAIN: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    NoneType: ("null", lambda value: value is None),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    float: ('a number or "inf"', _is_number),
    str: ("a string", lambda value: isinstance(value, str)),
}


def _settings_of(kind: Any, value: Any, name: str, complete: bool) -> dict[str, Any]:
    given: dict[str, Any] = checked(isinstance(value, dict), value, name, "an object of settings")
    known = [setting.name for setting in fields(kind) if setting.init]
    unknown = [key for key in given if key not in known]
    missing = [key for key in known if key not in given] if complete else []
    if unknown or missing:
        got = [*(f"the unknown {key}" for key in unknown), *(f"no {key}" for key in missing)]
        raise ValueError(f"{name}: expected exactly the settings {', '.join(known)}, got {', '.join(got)}")
    return given


class OwnClassError(ValueError):
    """A file names a class of the user's own: it is sound, and nothing is imported from it."""


def _member_of(parts: tuple[Any, ...], value: Any, name: str, read: Callable[[Any, Any, str], Any]) -> Any:
    if value is None and NoneType in parts:
        return None
    errors = []
    for part in parts:
        if part is not NoneType:
            try:
                return read(part, value, name)
            except OwnClassError:
                raise
            except ValueError as error:
                errors.append(str(error))
    raise ValueError("; or ".join(errors))


def to_strict_json(value: Any) -> str:
    """Return plain values, or dataclasses of them, as standard JSON.

    Raises:
        TypeError: There is something that JSON has no word for.

    Examples:
        >>> print(to_strict_json({"p": math.inf}), end="")
        {
          "p": "inf"
        }
    """
    return json.dumps(to_plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def read_strict_json(path: str | os.PathLike[str]) -> Any:
    """Return what a file of standard JSON holds.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not JSON, or has NaN or infinities that are not strings.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f'expected strict JSON, got {constant}; write it as a string, "inf" say')

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected JSON, got {error}") from error


def flattened(values: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Return settings at any depth by names such as "metric.settings.num_beams", to show those that differ.

    Examples:
        >>> flattened({"norm": {"p": 2, "parts": {}}})
        {'norm.p': 2, 'norm.parts': {}}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{within}{name}.")
        else:
            flat[f"{within}{name}"] = value
    return flat


def replace_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text into a file as `replace_bytes` does, its line endings as they are."""
    return replace_bytes(path, text.encode())


def replace_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write a file such that another process, and an interruption, find either the old content or the new one.

    A link is replaced, and what it leads to is left alone: downloads of the Hub are links to files of its cache.

    Returns:
        Its path; the folder is created if needed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        return partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
