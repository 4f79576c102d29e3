"""Where a model whose modules gather their weights can be cut: found by watching it, tried out in whole passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_parcor.functional.sharded import local_parts
from hf_parcor.modes import evaluation_mode
from hf_parcor.prefix.comparison import compare, numbers_of, objective_of, tolerance_of
from hf_parcor.prefix.cut import find_cut, run_alone
from hf_parcor.prefix.recomputed import RecomputedPrefix, random_devices


def find_recomputed_prefix(
    model: nn.Module, selected: Mapping[str, Tensor], run: Callable[[], Any]
) -> RecomputedPrefix:
    """Find the modules that finish before the first selected parameter is used; they are not tried out.

    The model is run once, in evaluation mode and without gradients.

    Args:
        model: Any model; its parameters are shards wherever it is not being run.
        selected: The parameters that later passes corrupt.
        run: Runs the model on one batch.

    Raises:
        PrefixError: Nothing finishes before, or it is unknown where the selected parameters come in.
    """
    with evaluation_mode(model), torch.no_grad():
        cut = find_cut(model, selected, lambda: run_alone(run))
    return RecomputedPrefix(cut.prefix, cut.starts)


def try_recomputed_prefix(
    prefix: RecomputedPrefix,
    model: nn.Module,
    selected: Mapping[str, Tensor],
    run_pass: Callable[[Callable[[Any], Tensor]], Any],
) -> None:
    """Check that three passes that share the prefix find together what full ones find.

    Their results must agree, and the gradients of all trained parameters; those of the selected ones also where the
    graph of the prefix is cut off, or one of them stands in it. Costs four stock steps, once. Gradients, modes and
    generators are as before.

    Args:
        prefix: What is to be reused.
        model: The model, in evaluation mode or not.
        selected: The parameters that later passes corrupt.
        run_pass: `run_pass(objective)` runs the model forward on one batch, sends `objective(result)` backward, which
            adds to `.grad`, and returns the result.

    Raises:
        PrefixError: They do not agree. It is raised after the last pass, so that no other process waits.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.grad for name, parameter in trained.items()}
    chosen = {id(parameter) for parameter in selected.values()}
    results: list[list[Tensor]] = []
    gradients: list[dict[str, Tensor]] = []

    def run(weight: int = 1) -> None:
        for parameter in trained.values():
            parameter.grad = None
        with torch.random.fork_rng(devices=random_devices()):  # each run draws the same numbers
            result = run_pass(lambda result: prefix.joined(weight * objective_of(result)))
        results.append([part.detach() for part in numbers_of(result)])
        taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained.values()]
        gradients.append(dict(zip(trained, local_parts(taken), strict=True)))

    try:
        with evaluation_mode(model), torch.enable_grad():
            run()
            for weight in (1, 1, 2):  # every sum a power of two: rounding is that of one pass
                with prefix.sharing(last=weight == 2):
                    run(weight)
        tolerance = tolerance_of([*results[0], *prefix.boundary])
    finally:
        prefix.forget()
        for name, parameter in trained.items():
            parameter.grad = before[name]

    for result in results[1:]:
        compare("result", result, results[0], tolerance)
    full, first, *later = gradients
    early = [name for name, parameter in trained.items() if id(parameter) in chosen]
    compare("gradient of what is selected", [first[n] for n in early], [full[n] for n in early], tolerance)
    total = [sum((other[name] for other in later), first[name]) for name in trained]
    compare("gradient", total, [4 * gradient for gradient in full.values()], tolerance)
