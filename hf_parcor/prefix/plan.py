"""Where a model can be cut, tried out before it is used: a run with its prefix reused finds what a full one finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_parcor.devices import in_float64
from hf_parcor.distributed.dtensors import local_part
from hf_parcor.model_state import (
    BufferSnapshot,
    StepBuffers,
    devices_of,
    evaluation_mode,
    modules_of,
    same_numbers,
    undone,
)
from hf_parcor.overriding import gradients_set_aside, hook_after, undo_at_end
from hf_parcor.prefix.consumers import Consumers, Place
from hf_parcor.prefix.cut import (
    NothingToReuse,
    PrefixError,
    check_some_is_left,
    cut_in,
    finished_before,
    in_order,
    not_called_again,
    not_compiled,
    run_alone,
    watch_calls,
)
from hf_parcor.prefix.reuse import PrefixFinished, PrefixReuse
from hf_parcor.randomness import random_states_kept

# How far a gradient that is summed in another order may be off; autocast computes in half precision, and many models
# in float64 norm in float32.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
_SMALL_GRADIENT = 1e-2  # of the largest one's size: below, a tensor's gradient is compared on this scale
_REPEATABLE = 1e-3  # two full runs that differ by more draw random numbers, or count
_OF_RUNS = 4.0  # how much farther apart than two full runs a full one and one with the prefix reused may be


_CACHES = {"past_key_values", "cache"}  # as models call it before Transformers 5.24, and since


def tolerance_of(precisions: Iterable[torch.dtype]) -> float:
    """Return the tolerance of the least precise of what was computed."""
    return max((_TOLERANCES.get(precision, 0.0) for precision in precisions), default=0.0)


def leaves_of(result: Any) -> list[Any]:
    """Return all that a run of a model found, but for the keys and values that a generation would go on from."""
    return [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in _leaves(result)]


@contextmanager
def outputs_of(model: nn.Module) -> Iterator[list[Any]]:
    """Collect the leaves of all that a model returns inside a `with` block."""
    found: list[Any] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        found.extend(leaves_of(output))

    with ExitStack() as hooks:
        hook_after(hooks, model, keep)
        yield found


def numbers_of(result: Any) -> list[Tensor]:
    """Return the numbers of a result that a loss is made from."""
    return [part for part in _leaves(result) if isinstance(part, Tensor) and part.is_floating_point()]


def _leaves(result: Any) -> list[Any]:
    if isinstance(result, Mapping):
        result = {name: value for name, value in result.items() if name not in _CACHES}
    return tree_leaves(result)


def objective_of(result: Any) -> Tensor:
    """Return a function of a result whose gradients are compared: its loss, or the mean squares of its numbers.

    Raises:
        PrefixError: None of them has a gradient.
    """
    loss = result.get("loss") if isinstance(result, Mapping) else None
    if isinstance(loss, Tensor) and loss.requires_grad:
        return loss.mean()
    parts = (in_float64(part).square().mean() for part in numbers_of(result) if part.requires_grad)
    objective = sum(parts, torch.zeros(()))
    if not isinstance(objective, Tensor) or not objective.requires_grad:
        raise PrefixError("the model returns no number that has a gradient")
    return objective


def distance(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return how far apart two lists of results are: 0 if every bit is the same, ∞ if they cannot be compared.

    Between them lies the largest difference of two tensors, or numbers, over the size of the expected one.

    Examples:
        >>> distance([torch.tensor([1.0, 2.5]), "a"], [torch.tensor([1.0, 2.0]), "a"])
        0.25
        >>> distance(["a"], ["b"])
        inf
    """
    if len(found) != len(expected):
        return math.inf
    return max((_distance(*pair) for pair in zip(found, expected, strict=True)), default=0.0)


@torch.no_grad()
def _distance(found: Any, expected: Any) -> float:
    if isinstance(found, float) and isinstance(expected, float):
        found, expected = (torch.tensor(one, dtype=torch.float64, device="cpu") for one in (found, expected))
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        plain = isinstance(expected, (bool, int, str, type(None)))
        return math.inf if plain and found != expected else 0.0  # of other objects nothing is known
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return math.inf
    if torch.equal(found, expected):
        return 0.0
    if not found.is_floating_point():
        return math.inf
    return _largest_difference(found, expected) / max(_size(expected), torch.finfo(expected.dtype).tiny)


def _largest_difference(found: Tensor, expected: Tensor) -> float:
    """Return `max |found − expected|`, of numbers that are not finite 0 where they are the same, else ∞."""
    differences = (found - expected).masked_fill_(same_numbers(found, expected), 0).abs()
    return float(differences.nan_to_num(math.inf, math.inf).max()) if differences.numel() else 0.0


def _size(tensor: Tensor) -> float:
    """Return the largest magnitude of all finite numbers."""
    return float(tensor.nan_to_num(0, 0, 0).abs().max()) if tensor.numel() else 0.0


def check_results(name: str, found: float, of_full_runs: float) -> None:
    """Check that a run with the prefix reused is as near to a full one as another full one is: on a CPU, the same.

    Args:
        name: What was compared.
        found: Its `distance` from a full run.
        of_full_runs: That of two full runs.

    Raises:
        PrefixError: It is not.
    """
    if of_full_runs > _REPEATABLE:
        raise PrefixError(f"the {name} of two full runs differs by {of_full_runs:.2g}")
    if found > _OF_RUNS * of_full_runs:
        raise PrefixError(f"the {name} differs by {found:.2g} where the prefix is reused")


@torch.no_grad()
def differing_gradient(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], factor: float, tolerance: float
) -> str | None:
    """Return the name of a gradient that is not the multiple of the expected one, but for sums in another order."""
    sizes = {name: _size(part) for name, part in expected.items()}
    least = _SMALL_GRADIENT * max(sizes.values(), default=0.0)
    for name, part in found.items():
        if _largest_difference(part, factor * expected[name]) > tolerance * factor * max(sizes[name], least):
            return name
    return None


TRIED_PASSES = 3  # what is wrong from the second replay on shows at the second
RunPass = Callable[[Callable[[Any], Tensor]], Any]
"""`run_pass(objective)` runs the model on one batch, sends `objective(result)` backward, and returns the result."""
_Prefix = TypeVar("_Prefix", bound=PrefixReuse)


def plan_prefix(
    model: nn.Module,
    selected: Mapping[str, Tensor],
    run: Callable[[], Any],
    run_pass: RunPass | None = None,
    trained: Mapping[str, Tensor] | None = None,
    passes: int = TRIED_PASSES,
    *,
    sparing: bool = False,
) -> PrefixReuse:
    """Find the modules that finish before the first selected parameter is used, and try out that they can be reused.

    Args:
        model: Any model.
        selected: The parameters that later passes corrupt.
        run: Runs the model on one batch, and returns what it returned.
        run_pass: As in `try_prefix`; None for `run`, and backward.
        trained: The parameters whose gradients are compared; None for all trainable ones.
        passes: How many passes are going to share it.
        sparing: Keep only those outputs of the prefix that something outside of it consumes, if the tried passes do
            without the rest; and where a model collects by hooks what modules inside of the prefix return, such as
            router logits, run these hooks in each pass. Default False: keep all, run none of them.

    Raises:
        PrefixError: Nothing finishes before, the model cannot be cut safely, or anything failed on the way.
    """

    def run_and_back(objective: Callable[[Any], Tensor]) -> Any:
        result = run()
        inputs = None if trained is None else list(trained.values())
        torch.autograd.backward(objective(result), inputs=inputs)
        return result

    prefix = find_prefix(model, selected, run, PrefixReuse)
    run_pass = run_pass or run_and_back
    ways = [(inner_hooks, spares) for inner_hooks in (False, True) for spares in (True, False)]
    errors: dict[bool, PrefixError] = {}
    try:
        for inner_hooks, spares in ways if sparing else [(False, False)]:
            if inner_hooks and not prefix.hooked_inside():
                break
            if inner_hooks in errors and not prefix.unused and errors[inner_hooks].__cause__ is None:
                continue  # it was not for what was not kept
            prefix.runs_inner_hooks = inner_hooks
            prefix.spare(set())
            try:
                with FailuresAsPrefixErrors():
                    try_prefix(prefix, model, selected, run_pass, trained, passes, sparing=spares)
                return prefix
            except PrefixError as error:
                errors[inner_hooks] = error
        raise errors[False]
    finally:
        errors.clear()  # their tracebacks hold this frame, and it the model, until a garbage collection


def find_prefix(
    model: nn.Module, selected: Mapping[str, Tensor], run: Callable[[], Any], kind: type[_Prefix]
) -> _Prefix:
    """Find the modules that finish before the first selected parameter is used; they are not tried out.

    The model is run once, in evaluation mode, where no layer is dropped, and without a graph.

    Args:
        model: Any model.
        selected: The parameters that later passes corrupt.
        run: Runs the model on one batch.
        kind: How they are to be reused.

    Raises:
        PrefixError: Nothing finishes before, or it is unknown where the selected parameters come in.
    """
    check_some_is_left(model, selected)
    with FailuresAsPrefixErrors(), evaluation_mode(model), torch.no_grad(), undone(model):
        calls, _ = watch_calls(model, lambda: run_alone(run))
        return kind(*cut_in(calls, model, selected, finished_before))


def try_prefix(
    prefix: PrefixReuse,
    model: nn.Module,
    selected: Mapping[str, Tensor],
    run_pass: RunPass,
    trained: Mapping[str, Tensor] | None = None,
    passes: int = TRIED_PASSES,
    *,
    in_step: bool = False,
    sparing: bool = False,
) -> None:
    """Check that passes that share the prefix find what full ones find, in the mode that the model is in.

    Every pass must find to the last bit what a full run finds (as nearly as two full runs agree, where a device
    computes in no fixed order); buffers must move as in one full run; and the gradients of all passes together must be
    the multiple of those of a full one, those of the selected parameters already where the prefix has sent none back.
    Generators go on behind a replayed call as behind a computed one, so dropout is no difference.

    Costs `passes + 1` steps, once, or one more where results differ, and memory for one gradient more. Gradients,
    buffers and generators are as before.

    Args:
        prefix: What is to be reused.
        model: The model.
        selected: The parameters that later passes corrupt.
        run_pass: Runs the model on one batch, forward and backward.
        trained: The parameters whose gradients are compared; None for all trainable ones.
        passes: How many passes are going to share it.
        in_step: Whether other processes take each pass too, so that none may be left out.
        sparing: Whether to find out first, by another run forward, which outputs are consumed, and keep no other.

    Raises:
        PrefixError: They do not agree. It is raised after the last pass, so that no other process waits.
    """
    if trained is None:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    clean = BufferSnapshot(model.modules())
    buffers = StepBuffers(modules_of(model), prefix.replayed)
    devices = devices_of(model)
    identities = {id(parameter) for parameter in selected.values()}  # names may be those of another wrapper
    chosen = {name: parameter for name, parameter in trained.items() if id(parameter) in identities}

    def alike(objective: Callable[[Any], Tensor]) -> Any:
        with random_states_kept(devices):  # each run draws the same numbers
            return run_pass(objective)

    def unused() -> set[Place]:
        consumers = Consumers()
        with (
            suppress(PrefixFinished),
            saving_nothing(),
            undone(model),
            outputs_of(model) as found,
            prefix.replaying(),
            not_compiled(model),
            prefix.seen_by(consumers),
        ):
            run_pass(finish)
        return consumers.unused(found)

    def full() -> tuple[list[Any], dict[str, Tensor], list[Tensor]]:
        with undone(model):
            clean.put_back()  # after the passes they have moved
            for parameter in trained.values():
                parameter.grad = None
            result = leaves_of(alike(objective_of))
            return result, gradients_of(trained), BufferSnapshot(model.modules()).values

    try:
        with (
            torch.enable_grad(),
            gradients_set_aside(trained.values()),
            clean.undone(),
            random_states_kept(devices),
            prefix.drawing_alike(devices),
        ):
            expected, gradients, moved = full()
            for parameter in trained.values():
                parameter.grad = None

            def record() -> None:
                with buffers.of_pass(-1):
                    alike(finish)

            prefix.begin(record)
            if sparing:
                prefix.spare(unused())
            distances = []
            for index in range(passes):
                with buffers.of_pass(index), prefix.sharing(last=index == passes - 1):
                    result = alike(lambda result: prefix.joined(objective_of(result)))
                distances.append(distance(leaves_of(result), expected))
                if index == 0:
                    first = {name: gradient.clone() for name, gradient in gradients_of(chosen).items()}
                    tolerance = tolerance_of({part.dtype for part in numbers_of(result)} | prefix.precisions)
                del result
            prefix.backward()
            total = gradients_of(trained)
            off = max(distances), distance(BufferSnapshot(model.modules()).values, moved)
            apart = 0.0, 0.0
            if in_step or any(off):
                again, _, moved_again = full()
                apart = distance(again, expected), distance(moved_again, moved)
    finally:
        prefix.forget()

    for name, *of_runs in zip(("result", "state that the model keeps in buffers"), off, apart, strict=True):
        check_results(name, *of_runs)
    differing = differing_gradient(total, gradients, passes, tolerance)
    if differing is not None:
        raise PrefixError(f"the gradient of {differing} differs where the prefix is reused")
    differing = differing_gradient(first, {name: gradients[name] for name in first}, 1, tolerance)
    if differing is not None:  # a part of it comes through the prefix
        raise PrefixError(f"{differing} is used before the module that holds it is called")


@contextmanager
def saving_nothing() -> Iterator[None]:
    """Let autograd save nothing inside a block after which no backward follows."""
    dropping = [True]
    with ExitStack() as block:
        undo_at_end(block, dropping.clear)  # hooks that an interrupt leaves behind change nothing
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: None if dropping else tensor, lambda held: held
        )
        block.enter_context(hooks)
        yield


def plan_prefixes_of_values(
    model: nn.Module, parts: Mapping[int, Mapping[str, Tensor]], run: Callable[[], Any]
) -> tuple[dict[int, PrefixReuse], list[str], Any]:
    """Find for each of several selections the modules that finish before it is used, and are not called again.

    For runs without gradients, such as a generation, which calls its encoder once and its decoder for every token: a
    module that is called again may have left something behind, such as keys and values. One run serves all selections.
    The prefixes are not tried out; what the run returned is returned beside them, to compare with.

    Args:
        model: Any model.
        parts: Selections of parameters, by any numbers.
        run: Runs the model on one batch; not run where nothing can be found.

    Returns:
        The prefix of each part that has one, by the part's number, in the order in which the parts come in; why others
        have none, but for those before which nothing finishes; and what the run returned.
    """
    found: list[tuple[int, int, PrefixReuse]] = []
    reasons: list[str] = []  # not errors, whose tracebacks would hold the model
    whole = set()
    for index, selected in parts.items():
        try:
            check_some_is_left(model, selected)
        except NothingToReuse:
            whole.add(index)
    if len(whole) == len(parts):
        return {}, reasons, None
    calls, result = watch_calls(model, run)
    began: dict[nn.Module, int] = {}
    for place, module in enumerate(in_order(calls)):
        began.setdefault(module, place)
    for index, selected in parts.items():
        if index not in whole:
            try:
                prefix, starts = cut_in(calls, model, selected, not_called_again)
            except NothingToReuse:
                pass
            except PrefixError as error:
                reasons.append(str(error))
            else:
                found.append((min(began[start] for start in starts), index, PrefixReuse(prefix, starts, again=False)))
    return {index: prefix for _, index, prefix in sorted(found, key=lambda one: one[:2])}, reasons, result


class FailuresAsPrefixErrors:
    """Turns any exception of a trial into a `PrefixError`, after which the prefix is not used.

    From Python 3.12 on, an exception that ends in a `@contextmanager` is held by a frame that it holds itself, and the
    model with it, until a garbage collection. Here it is not.
    """

    def __enter__(self) -> None:
        """Begin the trial."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise a `PrefixError` if something else failed."""
        if isinstance(error, Exception) and not isinstance(error, PrefixError):
            raise PrefixError(f"to try it out failed with {type(error).__name__}: {error}") from error


def finish(result: Any) -> Tensor:
    """Stand for the objective of a run that ends here, if not before."""
    raise PrefixFinished


def gradients_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients that parameters have, of shards those of this process; zero for none."""
    return {
        name: local_part(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for name, parameter in parameters.items()
    }
