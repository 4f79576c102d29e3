"""Plain values as files: JSON that every reader accepts, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NoReturn


def to_plain(value: Any, otherwise: Callable[[Any], Any] | None = None) -> Any:
    """Return a value as what strict JSON can hold: infinities and NaN as strings, dataclasses as objects.

    Read the strings "nan", "inf" and "-inf" back with `float`, which knows these words.

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
