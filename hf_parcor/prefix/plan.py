"""Where a model can be cut: what is done before the selected parameters come in, tried out before it is used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_parcor.prefix.calls import called_modules, finished_before, watch_calls
from hf_parcor.prefix.reuse import PrefixReuse

# How far a sum in another order may be off, relative to the largest entry; autocast computes in half precision.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}


class PrefixError(RuntimeError):
    """The model cannot be cut; the message says why."""


class NothingToReuse(PrefixError):  # noqa: N818, no mistake of anybody's
    """The selected parameters come in at the very start."""


def plan_prefix(
    model: nn.Module,
    selected: Mapping[str, Tensor],
    run: Callable[[], Any],
    trained: Sequence[Tensor] | None = None,
) -> PrefixReuse:
    """Find the modules that finish before the first selected parameter is used, and try out that they can be reused.

    The model is run in evaluation mode, to watch which modules it calls, and again with its prefix reused. Results and
    gradients must agree, and no selected parameter may stand in the prefix's graph. Costs about two stock steps and
    memory for two gradients, once. Weights, gradients, modes and generators are as before.

    Args:
        model: Any model.
        selected: The parameters that later passes corrupt.
        run: Runs the model on one batch, and returns what it returned.
        trained: The parameters whose gradients are compared; None for all trainable ones.

    Raises:
        PrefixError: Nothing finishes before, or the model cannot be cut safely.
    """
    chosen = {id(parameter) for parameter in selected.values()}
    if all(id(parameter) in chosen for parameter in model.parameters()):
        raise NothingToReuse("all of the model is selected")
    if trained is None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}

    def run_alike() -> Any:
        with torch.random.fork_rng(devices=list(devices)):  # each run draws the same numbers
            return run()

    with _evaluating(model), torch.enable_grad():
        try:
            calls, expected = watch_calls(model, run_alike)
        except Exception as error:
            raise PrefixError(f"the model could not be run alone on a batch: {error}") from error
        starts = _starts(model, selected, called_modules(calls))
        prefix = finished_before(calls, starts)
        if not any(list(module.parameters()) for module in prefix):
            raise NothingToReuse("no module with parameters finishes before the first selected one starts")
        reuse = PrefixReuse(prefix, starts)
        try:
            with reuse.recording():
                run_alike()
            _check_unused(reuse.outputs, selected)
            with reuse.replaying():
                result = run_alike()
            tolerance = max(_TOLERANCES.get(t.dtype, 0.0) for t in [*_tensors(expected), *reuse.outputs])
            _compare("result", _tensors(result), _tensors(expected), tolerance)
            _compare("gradient", _gradients(result, trained, reuse), _gradients(expected, trained), tolerance)
        finally:
            reuse.forget()
    return reuse


def _check_unused(outputs: Sequence[Tensor], selected: Mapping[str, Tensor]) -> None:
    used = _leaves(outputs)
    early = [name for name, parameter in selected.items() if id(parameter) in used]
    if early:
        raise PrefixError(f"{early[0]} is used before the module that holds it is called")


def _starts(model: nn.Module, selected: Mapping[str, Tensor], called: Collection[nn.Module]) -> list[nn.Module]:
    """Return the called modules in which a selected parameter comes into the computation."""
    identities = {id(parameter) for parameter in selected.values()}
    modules = dict(model.named_modules(remove_duplicate=False))
    starts = []
    for name, module in modules.items():
        if not any(id(parameter) in identities for parameter in module._parameters.values()):
            continue
        parts = name.split(".") if name else []
        path = [modules[".".join(parts[:depth])] for depth in range(len(parts) + 1)]
        # What a checkpoint computes again must not be cut inside.
        deepest = next((depth for depth in range(len(path)) if _is_checkpointed(path[: depth + 1])), len(path) - 1)
        # A module that is never called itself is used by the nearest one around it that is.
        around = [module for module in path[: deepest + 1] if module in called]
        if not around:
            raise PrefixError(f"{name} holds a selected parameter, and no module around it is called")
        starts.append(around[-1])
    return starts


def _is_checkpointed(path: Sequence[nn.Module]) -> bool:
    """Say whether the last module of a path is one that a checkpoint computes again as a whole."""
    module = path[-1]
    if isinstance(module, (nn.ModuleList, GradientCheckpointingLayer)):
        return bool(getattr(module, "gradient_checkpointing", False))
    parents = [other for other in path[:-1] if not isinstance(other, nn.ModuleList)]
    return bool(parents) and getattr(parents[-1], "gradient_checkpointing", False) is True


def _leaves(tensors: Sequence[Tensor]) -> set[int]:
    """Return the identities of the parameters at the ends of a graph."""
    seen: set[Any] = set()
    leaves: set[int] = set()
    open_ends = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    while open_ends:
        operation = open_ends.pop()
        if hasattr(operation, "variable"):
            leaves.add(id(operation.variable))
        elif operation not in seen:
            seen.add(operation)
            open_ends += [other for other, _ in operation.next_functions if other is not None]
    return leaves


def _tensors(result: Any) -> list[Tensor]:
    """Return the numbers of a result that a loss is made from."""
    if isinstance(result, Mapping):
        result = {name: value for name, value in result.items() if name != "past_key_values"}
    return [part for part in tree_leaves(result) if isinstance(part, Tensor) and part.is_floating_point()]


def _gradients(result: Any, trained: Sequence[Tensor], reuse: PrefixReuse | None = None) -> list[Tensor]:
    """Return the gradients of a function of a result with respect to the trained parameters."""
    objective = sum(
        (part.double().square().mean() for part in _tensors(result) if part.requires_grad), torch.zeros(())
    )
    if not isinstance(objective, Tensor) or not objective.requires_grad:
        raise PrefixError("the model returns no number that has a gradient")
    boundary = [] if reuse is None else reuse.boundary
    try:
        gradients = torch.autograd.grad(objective, [*trained, *boundary], allow_unused=True)
        direct, gathered = gradients[: len(trained)], gradients[len(trained) :]
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, direct, strict=True)]
        reached = [(reuse.outputs[i], g) for i, g in enumerate(gathered) if g is not None] if reuse else []
        if reached:
            outputs, weights = zip(*reached, strict=True)
            through = torch.autograd.grad(outputs, trained, weights, allow_unused=True)
            for total, part in zip(found, through, strict=True):
                if part is not None:
                    total += part
    except RuntimeError as error:
        raise PrefixError(f"its backward failed: {error}") from error
    return found


def _compare(name: str, found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    if [part.shape for part in found] != [part.shape for part in expected]:
        raise PrefixError(f"the {name} has other shapes where the prefix is reused")
    with torch.no_grad():
        # Masked entries are infinite in both.
        size = _largest([part.masked_fill(~part.isfinite(), 0) for part in expected])
        difference = _largest([(one - other).nan_to_num(0) for one, other in zip(found, expected, strict=True)])
    if not difference <= tolerance * size:
        raise PrefixError(f"the {name} differs by {difference:.2g} where the prefix is reused")


def _largest(tensors: Sequence[Tensor]) -> float:
    return max((float(tensor.abs().max()) for tensor in tensors if tensor.numel()), default=0.0)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
