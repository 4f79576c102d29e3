"""Which dimension of what a prefix hands on has the batch's rows, so that a pass over a part of them gets its part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_parcor.model_state import evaluation_mode, undone
from hf_parcor.overriding import gradients_set_aside
from hf_parcor.prefix.consumers import Place, Unkept
from hf_parcor.prefix.cut import PrefixError
from hf_parcor.prefix.plan import (
    RunPass,
    differing_gradient,
    distance,
    finish,
    gradients_of,
    leaves_of,
    numbers_of,
    objective_of,
    tolerance_of,
)
from hf_parcor.prefix.reuse import PrefixReuse, Rows, first_rows

_NARROW = 1e-3  # a tolerance above it is that of half precision, in which rounding hides what other rows do


def find_rows(
    prefix: PrefixReuse,
    model: nn.Module,
    count: int,
    examples: int,
    run_whole: RunPass,
    run_part: RunPass,
    run_repeated: RunPass,
) -> None:
    """Find the batch's rows in what a prefix keeps, and try out that a pass over the first of them gets its part.

    In evaluation mode, where dropout draws nothing, a pass over the first rows that takes its part of what was kept
    for all must find what a full pass over these rows finds, result and gradients, but for rounding: kernels sum in
    another order for fewer rows. In the mode that the model is in, on the same random numbers, what is kept of these
    rows must not depend on the others, as it does under batch statistics: but for rounding, in half precision to the
    last bit.

    Costs a step over the part, one more with the prefix over all rows, and up to six runs of the prefix more.
    Gradients, buffers and generators are as before. `prefix.rows` is set.

    Args:
        prefix: What passes over all rows reuse; it was tried out.
        model: The model.
        count: How many rows the part has.
        examples: How many the batch has.
        run_whole: Runs the model on the batch, forward and backward, in the mode that the model is in.
        run_part: The same on its first rows.
        run_repeated: The same on as many rows as the batch has, of which the first `count` are those of the batch, and
            all others these again.

    Raises:
        PrefixError: Passes over a part cannot reuse it.
    """
    if count == examples:
        raise PrefixError(f"the part of the first batch is all of it ({examples} examples), which shows no rows")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    precisions: set[torch.dtype] = set()
    prefix.rows = {}

    def kept(run: RunPass) -> dict[Place, Any]:
        with undone(model), prefix.recording():
            run(finish)
        precisions.update(prefix.precisions)
        found = {
            (module, index, number): part.detach() if isinstance(part, Tensor) and type(part) is not Unkept else part
            for (module, index), (parts, _) in prefix.recorded.items()
            for number, part in enumerate(parts)
        }
        prefix.forget()
        return found

    def full() -> tuple[list[Any], dict[str, Tensor]]:
        for parameter in trained.values():
            parameter.grad = None
        with undone(model):
            result = run_part(objective_of)
        precisions.update(part.dtype for part in numbers_of(result))
        return leaves_of(result), gradients_of(trained)

    def reusing() -> tuple[list[Any], dict[str, Tensor]]:
        for parameter in trained.values():
            parameter.grad = None
        with undone(model):
            prefix.begin(lambda: run_whole(finish))
        with undone(model), prefix.of_rows(count, examples), prefix.sharing(last=True):
            result = run_part(lambda result: prefix.joined(objective_of(result)))
        prefix.backward()
        return leaves_of(result), gradients_of(trained)

    def first(found: Mapping[Place, Any]) -> list[Any]:
        return [
            first_rows(part, prefix.rows[place], count, examples)
            for place, part in found.items()
            if place in prefix.rows and type(part) is not Unkept
        ]

    try:
        with torch.enable_grad(), gradients_set_aside(trained.values()):
            with evaluation_mode(model):
                whole, part = kept(run_whole), kept(run_part)
                if whole.keys() != part.keys():
                    raise PrefixError("a part of the batch runs other modules of the prefix")
                prefix.rows = {place: _rows_of(whole[place], part[place], count, examples) for place in whole}
                off = distance(first(whole), [one for one in part.values() if type(one) is not Unkept])
                expected, gradients = full()
                found, reused = reusing()
            tolerance = tolerance_of(precisions)
            _check(
                off, tolerance, "what the prefix hands on for a part of the batch is no part of what it does for all"
            )
            _check(distance(found, expected), tolerance, "the result of a part of the batch differs")
            differing = differing_gradient(reused, gradients, 1, tolerance)
            if differing is not None:
                raise PrefixError(f"the gradient of {differing} by a part of the batch differs")

            whole, part, repeated = kept(run_whole), kept(run_part), kept(run_repeated)
            for place in whole.keys() & part.keys():
                if place not in prefix.rows or prefix.rows[place] != _rows_of(
                    whole[place], part[place], count, examples
                ):
                    raise PrefixError("the prefix hands on other tensors in training than in evaluation")
            if whole.keys() != repeated.keys():
                raise PrefixError("which modules of the prefix run depends on other examples of the batch")
            off = distance(first(repeated), first(whole))
            if off:
                again = distance(first(kept(run_whole)), first(whole))
                tolerance = tolerance_of(precisions)
                limit = tolerance if tolerance < _NARROW else 4 * again
                _check(off, limit, "what the prefix hands on for an example depends on other examples of the batch")
    except BaseException:
        prefix.rows = {}
        raise
    finally:
        prefix.forget()


def _check(off: float, limit: float, what: str) -> None:
    if off > limit:
        raise PrefixError(f"{what} (by {off:.2g})")


def _rows_of(whole: Any, part: Any, count: int, examples: int) -> Rows:
    """Return the dimension of a tensor that has the rows of the batch, or several for each; its shape if none has.

    Raises:
        PrefixError: It cannot be told.
    """
    if not isinstance(whole, Tensor) or not isinstance(part, Tensor):
        return None
    if whole.shape == part.shape:
        return whole.shape
    sizes = enumerate(zip(whole.shape, part.shape, strict=False))
    differing = [place for place, (of_whole, of_part) in sizes if of_whole != of_part]
    if whole.dim() == part.dim() and len(differing) == 1:
        (place,) = differing
        if whole.shape[place] % examples == 0 and whole.shape[place] // examples * count == part.shape[place]:
            return place
    raise PrefixError(
        f"what the prefix hands on is of shape {tuple(whole.shape)} for the {examples} examples of a batch, and "
        f"{tuple(part.shape)} for {count} of them, which is no part of it"
    )
