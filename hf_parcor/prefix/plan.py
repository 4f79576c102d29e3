"""Where a model can be cut: what is done before the selected parameters come in, tried out before it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_parcor.modes import evaluation_mode
from hf_parcor.prefix.calls import not_called_again
from hf_parcor.prefix.comparison import compare, numbers_of, objective_of, tolerance_of
from hf_parcor.prefix.cut import PrefixError, find_cut, run_alone
from hf_parcor.prefix.reuse import PrefixReuse


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
    if trained is None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}

    def run_alike() -> Any:
        with torch.random.fork_rng(devices=list(devices)):  # each run draws the same numbers
            return run()

    with evaluation_mode(model), torch.enable_grad():
        cut = find_cut(model, selected, lambda: run_alone(run_alike))
        expected = cut.result
        reuse = PrefixReuse(cut.prefix, cut.starts)
        try:
            with reuse.recording():
                run_alike()
            _check_unused(reuse.outputs, selected)
            with reuse.replaying():
                result = run_alike()
            tolerance = tolerance_of([*numbers_of(expected), *reuse.outputs])
            compare("result", numbers_of(result), numbers_of(expected), tolerance)
            compare("gradient", _gradients(result, trained, reuse), _gradients(expected, trained), tolerance)
        finally:
            reuse.forget()
    return reuse


def _check_unused(outputs: Sequence[Tensor], selected: Mapping[str, Tensor]) -> None:
    used = _leaves(outputs)
    early = [name for name, parameter in selected.items() if id(parameter) in used]
    if early:
        raise PrefixError(f"{early[0]} is used before the module that holds it is called")


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


def _gradients(result: Any, trained: Sequence[Tensor], reuse: PrefixReuse | None = None) -> list[Tensor]:
    """Return the gradients of a function of a result with respect to the trained parameters."""
    objective = objective_of(result)
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


def plan_prefix_of_values(
    model: nn.Module, selected: Mapping[str, Tensor], run: Callable[[], Any]
) -> tuple[PrefixReuse, Any]:
    """Find the modules that finish before the first selected parameter is used, and are not called again.

    For runs without gradients, such as a generation, which calls its encoder once and its decoder for every token: a
    module that is called again may have left something behind, such as keys and values. Not tried out; what the run
    returned is returned beside it, to compare with.

    Args:
        model: Any model.
        selected: The parameters that other runs corrupt.
        run: Runs the model on one batch.

    Raises:
        PrefixError: Nothing finishes before, or it is unknown where the selected parameters come in.
    """
    cut = find_cut(model, selected, run, not_called_again)
    return PrefixReuse(cut.prefix, cut.starts), cut.result
