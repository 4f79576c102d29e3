"""Where a model can be cut: where selected parameters come into its computation, and what is done by then."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_parcor.overriding import hook_after, hook_before, override


def is_compiled(module: nn.Module) -> bool:
    """Say whether calls of a module run code that was compiled from all of it, which no module inside may leave."""
    compiler = sys.modules.get("torch._dynamo")  # not loaded for this question: it takes seconds
    wrapped = compiler is not None and isinstance(module, compiler.OptimizedModule)
    return wrapped or module._compiled_call_impl is not None


def not_inside_compiled(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model but for those inside of one that is compiled."""
    found: dict[nn.Module, None] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            waiting += [] if is_compiled(module) else reversed(list(module.children()))
    return list(found)


def not_compiled(model: nn.Module) -> AbstractContextManager[object]:
    """Let what is compiled run as it was written, inside a block that watches what happens there."""
    compiled = any(is_compiled(module) for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def before_calls(hooks: ExitStack, module: nn.Module, begin: Callable[[nn.Module, Any], None]) -> None:
    """Let a function run before each call of a module, before its hooks; outside of what is compiled."""
    if module._compiled_call_impl is None:
        hook_before(hooks, module, begin)
        return
    compiled = module._compiled_call_impl

    def called(*args: Any, **kwargs: Any) -> Any:
        begin(module, args)
        return compiled(*args, **kwargs)

    override(hooks, module, _compiled_call_impl=called)


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
        hooks.enter_context(not_compiled(model))
        for module in not_inside_compiled(model):
            # The first hook to begin and the last to end, so that other hooks of a module belong to its call.
            hook_before(hooks, module, begin)
            hook_after(hooks, module, end)
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
    times = Counter(finished_before(call, starts))
    in_all = Counter(in_order(call))
    return [module for module in times if in_all[module] == times[module]]


def in_order(call: Call) -> Iterator[nn.Module]:
    """Yield the modules of a tree of calls as their calls began, each as often as it was called."""
    if call.module is not None:
        yield call.module
    for other in call.inner:
        yield from in_order(other)


class PrefixError(RuntimeError):
    """The model cannot be cut; the message says why."""


class NothingToReuse(PrefixError):  # noqa: N818, no mistake of anybody's
    """The selected parameters come in at the very start."""


class CalledAgain(PrefixError):  # noqa: N818, as above
    """A run calls a module of the prefix that it was to call no more."""


COMPILED_AS_ONE = (
    "the defended parameters lie in what is compiled as one with what comes before them; compile the layers, each by "
    "itself, with layer.compile() or Accelerate's use_regional_compilation"
)


def check_some_is_left(model: nn.Module, selected: Mapping[str, Tensor]) -> None:
    """Refuse a selection of all of a model.

    Raises:
        NothingToReuse: It is one.
    """
    identities = {id(parameter) for parameter in selected.values()}
    if all(id(parameter) in identities for parameter in model.parameters()):
        raise NothingToReuse("all of the model is selected")


def cut_in(
    calls: Call,
    model: nn.Module,
    selected: Mapping[str, Tensor],
    finished: Callable[[Call, Collection[nn.Module]], list[nn.Module]],
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the modules that finish before the selected parameters come in, and those where these do.

    Args:
        calls: Those of a run of the model on one batch.
        model: The model.
        selected: The parameters that other runs corrupt.
        finished: Which modules finish, given the calls and where the selected parameters come in.

    Raises:
        NothingToReuse: No module with parameters finishes before.
        PrefixError: It is unknown where the selected parameters come in.
    """
    called = called_modules(calls)
    if not called:
        raise PrefixError("the run on the first batch calls no module of the model")
    starts = _find_starts(model, selected, called)
    prefix = finished(calls, starts)
    if not any(list(module.parameters()) for module in prefix):
        if any(is_compiled(module) and any(module.children()) for module in starts):
            raise PrefixError(COMPILED_AS_ONE)
        raise NothingToReuse("no module with parameters finishes before the first selected one starts")
    return prefix, starts


def run_alone(run: Callable[[], Any]) -> Any:
    """Run a model on one batch by itself.

    Raises:
        PrefixError: It cannot be.
    """
    try:
        return run()
    except Exception as error:
        raise PrefixError(f"the model could not be run alone on a batch: {error}") from error


def _find_starts(model: nn.Module, selected: Mapping[str, Tensor], called: Collection[nn.Module]) -> list[nn.Module]:
    """Return the called modules in which a selected parameter comes into the computation."""
    identities = {id(parameter) for parameter in selected.values()}
    modules = dict(model.named_modules(remove_duplicate=False))
    starts = []
    for name, module in modules.items():
        if not any(id(parameter) in identities for parameter in module._parameters.values()):
            continue
        parts = name.split(".") if name else []
        path = [modules[".".join(parts[:depth])] for depth in range(len(parts) + 1)]
        # What a checkpoint computes again, or is compiled, must not be cut inside.
        wholes = (
            depth for depth in range(len(path)) if is_compiled(path[depth]) or _is_checkpointed(path[: depth + 1])
        )
        deepest = next(wholes, len(path) - 1)
        # A module that is never called itself is used by the nearest one around it that is.
        around = [module for module in path[: deepest + 1] if module in called]
        if not around:
            raise PrefixError(f"{name} holds a selected parameter, and no module around it is called")
        starts.append(around[-1])
    return starts


def _is_checkpointed(path: Sequence[nn.Module]) -> bool:
    """Say whether the last module of a path is one that a checkpoint computes again as a whole."""
    module = path[-1]
    if hasattr(module, "_checkpoint_wrapped_module"):  # of FSDP's activation checkpointing
        return True
    if isinstance(module, (nn.ModuleList, GradientCheckpointingLayer)):
        return bool(getattr(module, "gradient_checkpointing", False))
    parents = [other for other in path[:-1] if not isinstance(other, nn.ModuleList)]
    if not parents or getattr(parents[-1], "gradient_checkpointing", False) is not True:
        return False
    # BertModel has the flag that its layers read: what holds such layers is no checkpoint itself.
    return not any(isinstance(inner, GradientCheckpointingLayer) for inner in module.modules())
