"""JSON that every reader accepts: NaN and the infinities are strings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any


def to_strict_json(value: Any) -> str:
    """Return plain data as standard JSON; NaN and infinities become the strings "nan", "inf" and "-inf".

    Read them back with `float`, which knows these words.

    Raises:
        TypeError: The data holds something that JSON has no word for.

    Examples:
        >>> print(to_strict_json({"p": math.inf}), end="")
        {
          "p": "inf"
        }
    """
    return json.dumps(_plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Integral):  # NumPy's integers
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return [_plain(entry) for entry in value]
    return value
