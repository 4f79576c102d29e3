"""What decides what a metric, a loss or a score computes, as plain values: settings, code, and what these reach."""

from __future__ import annotations

import dis
import enum
import functools
import sys
from collections.abc import Iterable, Mapping, Set
from itertools import pairwise
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
from torch import Tensor, nn

from hf_parcor.evaluation.identity.fingerprint import TOLD_BY_THEIR_TEXT, fingerprint, fingerprint_of_weights
from hf_parcor.records.metric_info import is_of_evaluate

_CALLED = ("__call__", "of_batch", "combine", "forward")


def fixed_attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, but for those that it writes itself when it is called.

    That is what it sets, such as a counter, and the lists, sets and mappings that it fills.

    Examples:
        >>> class Metric:
        ...     def __init__(self, limit):
        ...         self.limit, self.calls, self.found = limit, 0, []
        ...
        ...     def __call__(self, model):
        ...         self.calls += 1
        ...         self.found.append(model)
        ...         return {"limit": self.limit}
        >>> fixed_attributes(Metric(3))
        {'limit': 3}
    """
    written = _written_by_calls(type(value))
    return {name: entry for name, entry in getattr(value, "__dict__", {}).items() if name not in written}


def inner_code(code: CodeType) -> list[CodeType]:
    """Return a code object and those of all functions inside of it."""
    return [code, *(part for one in code.co_consts if isinstance(one, CodeType) for part in inner_code(one))]


def _written_by_calls(kind: type, called: Iterable[str] = _CALLED) -> set[str]:
    """Return the attributes that calls write, and the methods that these call."""
    written: set[str] = set()
    seen: set[str] = set()
    left = list(called)
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        for function in (vars(base).get(name) for base in kind.__mro__):
            function = getattr(function, "__wrapped__", function)  # under a decorator such as torch.no_grad()
            for code in inner_code(function.__code__) if isinstance(function, FunctionType) else ():
                written |= _written_in(code)
                left.extend(code.co_names)
    return written


def _written_in(code: CodeType) -> set[str]:
    """Return the attributes that a code object sets, or calls a method of that changes a list, a set or a mapping."""
    steps = list(dis.get_instructions(code))
    changed = (
        one
        for one, then in pairwise(steps)
        if then.opname in ("LOAD_METHOD", "LOAD_ATTR") and then.argval in _CHANGING
    )
    return {
        *(str(one.argval) for one in steps if one.opname == "STORE_ATTR"),
        *(str(one.argval) for one in changed if one.opname == "LOAD_ATTR"),
    }


_CHANGING = {"append", "extend", "insert", "remove", "pop", "clear", "add", "discard", "update", "setdefault"}
_PYTHON = ("builtins", "abc", "typing", "collections")
_VERSIONED = ("hf_parcor", "torch", "transformers", "accelerate", *_PYTHON)
_LONG = 200  # characters, or entries; of what is longer the fingerprint says it
_DEEP = 20  # helpers that hold helpers
_MAKES = frozenset({"__init__", "__new__", "__post_init__"})


def settings_of(value: Any) -> Any:
    """Return all that decides what a metric, a loss or a score computes, as plain values.

    An object that has `identity` says it itself: the method returns its settings by name, plain values and whatever
    else it calls. Of a function count its name, its bytecode, defaults, and those values of closures and globals that
    are plain, functions beside it, or helpers; of a partial what it binds; of a module its weights; of any other
    object its public attributes that are plain, or helpers, and the bytecode of its class. What a call writes itself,
    such as a counter, is no setting. Libraries whose versions count anyway are known by name.

    A helper is an object of a class of the user's own, which derives from none of a library. What its methods write
    is no setting, nor are its containers of many entries, of which the number counts.

    Examples:
        >>> settings_of(functools.partial(round, ndigits=2))
        {'name': 'functools.partial', 'of': {'name': 'builtins.round'}, 'keywords': {'ndigits': 2}}
    """
    return _described(value, attributes=True)


def name_of(value: Any) -> str:
    """Return the module and the name of a class or a function; of anything else, those of its class."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', None)}.{named.__qualname__}"  # methods of built-in classes have no module


def _described(value: Any, path: tuple[int, ...] = (), *, attributes: bool = False) -> Any:
    """Return a value as plain ones.

    Args:
        value: Anything.
        path: The ids of what it is part of: a value may hold itself.
        attributes: Whether the attributes of an object count; else those of helpers do, and another is known by its
            class.
    """
    if isinstance(value, (complex, enum.Enum, *TOLD_BY_THEIR_TEXT)):
        return f"{name_of(type(value))} {value}"
    if value is None or (isinstance(value, (bool, int, float)) and not isinstance(value, np.generic)):
        return value
    if isinstance(value, str):
        return value if len(value) <= _LONG else f"text {fingerprint([value])}"
    if isinstance(value, (Tensor, np.ndarray, np.generic, bytes)):
        return f"{type(value).__name__} {fingerprint([value])}"
    if id(value) in path:
        return name_of(value)
    within = (*path, id(value))
    if callable(getattr(value, "identity", None)) and not isinstance(value, type):
        said = value.identity()
        if not isinstance(said, Mapping):
            raise TypeError(
                f"metric: expected identity() of {name_of(value)} to return settings by name, got {said!r}; "
                "return a dict, an empty one if there are none"
            )
        return {"class": name_of(value), **_code_of_class(value), **_entries(said, within, attributes=True)}
    if isinstance(value, functools.partial):
        return {
            "name": "functools.partial",
            "of": _described(value.func, within, attributes=attributes),
            **({"arguments": _described(list(value.args), within, attributes=True)} if value.args else {}),
            **({"keywords": _entries(value.keywords, within, attributes=True)} if value.keywords else {}),
        }
    if isinstance(value, MethodType):
        function, owner = _described(value.__func__, within), value.__self__
        if attributes and _is_own(type(owner)):
            return {**function, "of": _of_helper(owner, (*within, id(owner)), [value.__name__])}
        return {**function, "of": _described(owner, within, attributes=attributes)}
    if isinstance(value, FunctionType):
        return _of_function(value, within)
    if isinstance(value, (type, BuiltinFunctionType)):
        return {"name": name_of(value)}
    if isinstance(value, Mapping):
        plain = _entries(value, within, attributes=attributes)
        return plain if len(plain) <= _LONG else f"mapping {fingerprint([plain])}"
    if isinstance(value, Set):
        return sorted((_described(entry, within) for entry in value), key=repr)
    if isinstance(value, (list, tuple, range)):
        entries = [_described(entry, within, attributes=attributes) for entry in value]
        return entries if len(entries) <= _LONG else f"list {fingerprint([entries])}"
    return _of_object(value, within, attributes=attributes)


def _entries(value: Mapping[Any, Any], path: tuple[int, ...], *, attributes: bool) -> dict[str, Any]:
    return {str(name): _described(entry, path, attributes=attributes) for name, entry in value.items()}


def _of_object(value: Any, path: tuple[int, ...], *, attributes: bool) -> Any:
    if _is_tokenizer(value):
        return {"class": name_of(value), "vocabulary": fingerprint([sorted(value.get_vocab().items())])}
    if is_of_evaluate(value):  # has a seed of its own that no number depends on, and where it keeps files
        return {
            "class": name_of(value),
            "metric": getattr(value, "name", ""),
            "configuration": getattr(value, "config_name", None),
            **_code_of_class(value),
        }
    wrapped = getattr(value, "__wrapped__", None)  # of a function in a cache
    if wrapped is not None:
        return {"class": name_of(type(value)), "of": _described(wrapped, path, attributes=attributes)}
    if _is_own(type(value)) and 1 < len(path) < _DEEP:
        return _of_helper(value, path)
    if not attributes:
        return {"class": name_of(value)}
    found = {
        name: _described(entry, path)
        for name, entry in fixed_attributes(value).items()
        if not name.startswith("_") and not (isinstance(value, nn.Module) and name == "training")
    }
    weights = {"state": fingerprint_of_weights(value)} if isinstance(value, nn.Module) else {}
    return {"class": name_of(value), **_code_of_class(value), **weights, **found}


def _of_helper(value: Any, path: tuple[int, ...], called: Iterable[str] = ()) -> dict[str, Any]:
    """Return the public attributes of a helper, but for what these methods write; by default any but its makers."""
    methods = {name for kind in type(value).__mro__ for name, entry in vars(kind).items() if _functions(entry)}
    written = _written_by_calls(type(value), called or methods - _MAKES)
    held = getattr(value, "__dict__", {}).items()
    public = {name: one for name, one in held if not name.startswith("_") and name not in written}
    many = {name: len(one) for name, one in public.items() if _is_container(one) and len(one) > _LONG}
    found = {name: _described(one, path) for name, one in public.items() if name not in many}
    return {"class": name_of(value), **_code_of_class(value), **many, **found}


def _is_container(value: Any) -> bool:
    return isinstance(value, (Mapping, Set, list, tuple))


def _is_own(kind: type) -> bool:
    """Return whether a class is the user's own, and so is all that it derives from: none is of a library."""
    modules = [base.__module__ for base in kind.__mro__ if base.__module__.partition(".")[0] not in _PYTHON]
    return kind.__module__ in modules and not any(map(_is_of_a_library, modules))


def _is_of_a_library(module: str) -> bool:
    root = module.partition(".")[0]
    file = Path(getattr(sys.modules.get(module), "__file__", None) or "")
    return (
        root in _VERSIONED
        or root in sys.stdlib_module_names
        or not {"site-packages", "dist-packages"}.isdisjoint(file.parts)
    )


def _of_function(function: FunctionType, path: tuple[int, ...]) -> dict[str, Any]:
    """Return what a function computes with: its code, and the plain values that it reaches."""
    code = function.__code__
    written = _written(code)
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    closure = {name: _content(cell) for name, cell in cells if name not in written}
    used = {name: function.__globals__[name] for name in _names(code) if name in function.__globals__}
    beside = {
        name: entry
        for name, entry in used.items()
        if name not in written
        and (
            _is_constant(entry)
            or _is_own(type(entry))
            or (isinstance(entry, FunctionType) and entry.__module__ == function.__module__)
        )
    }
    parts = {
        "defaults": list(function.__defaults__ or ()),
        "keyword_defaults": dict(function.__kwdefaults__ or {}),
        "closure": closure,
        "globals": beside,
    }
    if _is_versioned(function):
        parts = {"closure": closure}
    else:
        parts["bytecode"] = _code(code)
    return {"name": name_of(function), **{name: _described(part, path) for name, part in parts.items() if part}}


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None


def _is_constant(value: Any) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return all(_is_constant(entry) for entry in value)
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes))


def _names(code: CodeType) -> list[str]:
    return sorted({name for part in inner_code(code) for name in part.co_names})


def _written(code: CodeType) -> set[str]:
    """Return the outer variables that a function sets itself: what it left there is no setting."""
    return {
        str(one.argval)
        for part in inner_code(code)
        for one in dis.get_instructions(part)
        if one.opname in ("STORE_DEREF", "STORE_GLOBAL")
    }


def _code(code: CodeType) -> str:
    """Return the SHA-256 of what is executed: no lines, names of variables or docstrings."""
    return fingerprint([[_executed(one) for one in dis.get_instructions(part)] for part in inner_code(code)])


def _executed(one: dis.Instruction) -> list[Any]:
    """Return an instruction with the constant or the name that it loads, wherever that is kept."""
    if isinstance(one.argval, CodeType):  # comes by itself
        return [one.opname]
    return [one.opname, one.argval if one.opcode in dis.hasconst or one.opcode in dis.hasname else one.arg]


def _code_of_class(value: Any) -> dict[str, str]:
    """Return the code of what a class defines and inherits, but for libraries whose versions count."""
    codes = {
        f"{name_of(kind)}.{name}": _code(function.__code__)
        for kind in type(value).__mro__
        if not _is_versioned(kind)
        for name, entry in vars(kind).items()
        for function in _functions(entry)
    }
    return {"bytecode": fingerprint([codes])} if codes else {}


def _functions(entry: Any) -> list[FunctionType]:
    if isinstance(entry, property):
        return [one for one in (entry.fget, entry.fset) if isinstance(one, FunctionType)]
    function = getattr(entry, "__func__", entry)  # of a static method or a class method
    return [function] if isinstance(function, FunctionType) else []


def _is_versioned(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] in _VERSIONED


def _is_tokenizer(value: Any) -> bool:
    return callable(getattr(value, "get_vocab", None)) and callable(getattr(value, "decode", None))
