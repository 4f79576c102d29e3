"""Which attributes of an object are settings: those that no call of it writes."""

from __future__ import annotations

import dis
from types import CodeType, FunctionType
from typing import Any

_CALLED = ("__call__", "of_batch", "combine", "forward")


def fixed_attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, but for those that it writes itself when it is called, such as a counter.

    Examples:
        >>> class Metric:
        ...     def __init__(self, limit):
        ...         self.limit, self.calls = limit, 0
        ...
        ...     def __call__(self, model):
        ...         self.calls += 1
        ...         return {"limit": self.limit}
        >>> fixed_attributes(Metric(3))
        {'limit': 3}
    """
    written = _written_by_calls(type(value))
    return {name: entry for name, entry in getattr(value, "__dict__", {}).items() if name not in written}


def inner_code(code: CodeType) -> list[CodeType]:
    """Return a code object and those of all functions inside of it."""
    return [code, *(part for one in code.co_consts if isinstance(one, CodeType) for part in inner_code(one))]


def _written_by_calls(kind: type) -> set[str]:
    """Return the attributes that calls write, and the methods that these call."""
    written: set[str] = set()
    seen: set[str] = set()
    left = list(_CALLED)
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        for function in (vars(base).get(name) for base in kind.__mro__):
            function = getattr(function, "__wrapped__", function)  # under a decorator such as torch.no_grad()
            for code in inner_code(function.__code__) if isinstance(function, FunctionType) else ():
                written |= {str(one.argval) for one in dis.get_instructions(code) if one.opname == "STORE_ATTR"}
                left.extend(code.co_names)
    return written
