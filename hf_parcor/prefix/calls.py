"""Which modules a forward pass calls, and which of them are done before others start."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Call:
    """One call of a module, with the calls that it made itself, in their order."""

    module: nn.Module | None
    inner: list[Call] = field(default_factory=list)


def watch_calls(model: nn.Module, run: Callable[[], Any]) -> tuple[Call, Any]:
    """Run a function, and return the tree of the module calls that it made (its root is the run) and its result."""
    root = Call(None)
    path = [root]

    def begin(module: nn.Module, arguments: Any) -> None:
        call = Call(module)
        path[-1].inner.append(call)
        path.append(call)

    def end(module: nn.Module, arguments: Any, output: Any) -> None:
        path.pop()

    with ExitStack() as hooks:
        for module in model.modules():
            # The first hook to begin and the last to end, so that other hooks of a module belong to its call.
            hooks.callback(module.register_forward_pre_hook(begin, prepend=True).remove)
            hooks.callback(module.register_forward_hook(end).remove)
        result = run()
    return root, result


def called_modules(call: Call) -> set[nn.Module]:
    """Return all modules of a tree of calls."""
    inner = set().union(*(called_modules(other) for other in call.inner)) if call.inner else set()
    return inner if call.module is None else {call.module, *inner}


def finished_before(call: Call, starts: Collection[nn.Module]) -> list[nn.Module]:
    """Return the modules whose calls ended before the first call of any of `starts` began, in their order.

    Only the outermost: a module that ended is not opened. All modules that were called if none of `starts` was.
    """
    finished: list[nn.Module] = []
    for other in call.inner:
        if other.module in starts:
            return finished
        if called_modules(other).intersection(starts):
            return finished + finished_before(other, starts)
        if other.module is not None:
            finished.append(other.module)
    return finished


def not_called_again(call: Call, starts: Collection[nn.Module]) -> list[nn.Module]:
    """Return those modules of `finished_before` that the rest of the run does not call.

    They may have been called several times before. A generation calls its decoder again for every token.
    """
    finished = finished_before(call, starts)
    times = {module: finished.count(module) for module in finished}
    return [module for module in dict.fromkeys(finished) if _times_called(call, module) == times[module]]


def _times_called(call: Call, module: nn.Module) -> int:
    return (call.module is module) + sum(_times_called(other, module) for other in call.inner)
