"""Check whether a loss has a right second derivative, by trying it: PyTorch does not say where one is missing.

Two kinds of functions bring a gradient that has no derivative, or a wrong one: a reentrant checkpoint runs a backward
of its own, which `autograd.grad` does not see; and a fused loss may compute its gradient in forward, as a constant.
Both are functions of the user's or a library's own, so a graph of PyTorch's operations alone needs no look.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from hf_parcor.defenses.step import DefendedStep
from hf_parcor.functional.norms import vector_norm
from hf_parcor.injection import Injection
from hf_parcor.overriding import hook_gradient
from hf_parcor.randomness import random_states_kept

_Node: TypeAlias = Any  # of autograd's graph, which has no type of its own
_Vector: TypeAlias = "list[Tensor]"

# Where these bend, a gradient jumps: a difference of gradients sees that, a second derivative does not.
_BENT = (
    *("Relu", "Threshold", "LeakyRelu", "Prelu", "Rrelu", "Hardtanh", "Hardswish", "Hardsigmoid", "Hardshrink"),
    *("Softshrink", "Clamp", "Abs", "Max", "Min", "Amax", "Amin", "Fmax", "Fmin", "AdaptiveMax", "FractionalMax"),
    *("Cummax", "Cummin", "Sort", "Topk", "Kthvalue", "Median", "Round", "Floor", "Ceil", "FakeQuantize"),
)
_STEPS = (3e-3, 3e-2)  # of the weights' norm: the second for gradients that are rounded to bfloat16
_WRONG = 0.25  # share of the change of the gradient that its derivative must miss
_MOST_GROUPS = 3
_CERTAIN = 10.0  # how many times what two steps disagree by


class TriedModel:
    """The model that was tried out last; a copy has tried none."""

    def __init__(self) -> None:
        self._parameter: weakref.ref[nn.Parameter] | None = None

    def __reduce__(self) -> tuple[type[TriedModel], tuple[()]]:
        return TriedModel, ()

    def is_of(self, parameter: nn.Parameter) -> bool:
        """Whether it was the one with this parameter."""
        return self._parameter is not None and self._parameter() is parameter

    def keep(self, parameter: nn.Parameter) -> None:
        """Remember it by this parameter."""
        self._parameter = weakref.ref(parameter)


def _name(node: _Node) -> str:
    """Return the name of a node; PyTorch 2.11 refuses `name()` of those that are written in Python."""
    return type(node).__name__ if isinstance(node, BackwardCFunction) else node.name()


def own_functions(loss: Tensor) -> list[_Node]:
    """Return the nodes of a loss's graph that are `torch.autograd.Function`s, or a library's in C++."""
    return [node for node in _graph([loss.grad_fn]) if isinstance(node, BackwardCFunction) or "CppNode" in node.name()]


def may_hold_a_gradient(function: _Node) -> bool:
    """Whether a function keeps something for its backward, which could be a gradient that is computed already."""
    if not isinstance(function, BackwardCFunction):
        return True
    kept = vars(function).values()
    return bool(function._raw_saved_tensors) or any(isinstance(value, (Tensor, list, tuple)) for value in kept)


@contextmanager
def gradients_put_back(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Give every `.grad` back what it holds now, if the block raises."""
    kept = [(parameter, parameter.grad) for parameter in parameters]
    values = [None if gradient is None else gradient.clone() for _, gradient in kept]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for (parameter, gradient), value in zip(kept, values, strict=True):
                parameter.grad = gradient
                if gradient is not None and value is not None:
                    gradient.copy_(value)
        raise


@contextmanager
def refusing_hidden_gradients(
    parameters: Sequence[nn.Parameter], gradient: Sequence[Tensor | None], functions: Sequence[_Node]
) -> Iterator[None]:
    """Raise where backward brings more than the gradient which `autograd.grad` found.

    Args:
        parameters: Of which it was asked for the gradient.
        gradient: What it found of each: None, or a part that backward brings at once.
        functions: The functions that may hide the rest.

    Raises:
        RuntimeError: There is more.
    """
    still = [int(part is not None) for part in gradient]

    def arrived(place: int, gradient: Tensor) -> None:
        still[place] -= 1
        if still[place] < 0:
            raise RuntimeError(
                "GradientPenalty: expected a loss whose whole gradient autograd.grad finds, got one where backward "
                f"brings more, to a parameter of shape {tuple(gradient.shape)}, through {_names(functions)}; it would "
                "have no penalty. Reentrant checkpoints do that: pass use_reentrant=False to them "
                "(gradient_checkpointing_kwargs), or choose another defense"
            )

    with ExitStack() as hooks:
        for place, parameter in enumerate(parameters):
            hook_gradient(hooks, parameter, partial(arrived, place))
        yield


def check_second_derivative(step: DefendedStep, functions: Sequence[_Node]) -> None:
    """Compare the derivative of the gradient, along itself, with differences of gradients at weights beside these.

    Two lengths of the step say how certain the difference is. Nothing is refused that cannot be decided: where
    rounding or chance is larger than what is looked for, or where every weight is followed by a function that bends,
    or by one that rounds.

    Args:
        step: The step, whose batch is run again, with the same random numbers; nothing of these runs stays.
        functions: The functions that may be wrong.

    Raises:
        RuntimeError: The derivative misses a quarter of the difference, or more.
    """
    if any(parameter.dtype.itemsize < 4 for parameter in step.parameters.values()):
        return  # weights that round the step itself
    if _missed_share(step, None) == 0:
        return
    # One function that bends, or rounds with a straight-through gradient, which is meant to differ, hides the others:
    # weights that meet the same functions are looked at by themselves, those first that meet the fewest.
    groups: list[set[int]] = []
    _rehearse(step, lambda loss: groups.extend(_alike(loss)[:_MOST_GROUPS]))
    for share in (_missed_share(step, group) for group in groups):
        if share:
            raise RuntimeError(
                "GradientPenalty: expected a loss with a right second derivative, got one that misses "
                f"{share:.0%} of how the gradient really changes, through {_names(functions)}. Fused losses that "
                "compute their gradient in forward do that: switch them off (use_liger_kernel=False), or choose "
                "another defense, such as ACRT, which is the same to first order"
            )


def _missed_share(step: DefendedStep, moved: set[int] | None) -> float | None:
    """Return which share of the change of the gradient its derivative misses, 0 if that is little; None if uncertain.

    Args:
        step: The step.
        moved: The weights to move, by id; None for all.
    """
    parameters = list(step.parameters.values())
    found: list[tuple[_Vector, _Vector]] = []

    def differentiate(loss: Tensor) -> None:
        gradient = _gradient(loss, parameters, create_graph=True)
        direction = _direction(loss, parameters, gradient, moved)
        product = torch.stack([(part * to).sum() for part, to in zip(gradient, direction, strict=True)]).sum()
        if product.requires_grad:
            found.append((direction, _gradient(product, parameters)))
        else:
            found.append((direction, [torch.zeros_like(parameter) for parameter in parameters]))

    _rehearse(step, differentiate)
    direction, derivative = found[0]
    weights = [parameter.detach() for parameter, to in zip(parameters, direction, strict=True) if to.any()]
    size, expected = (_norm(weights) if weights else 0.0), _norm(derivative)
    if not size or not expected < torch.inf:
        return None
    for relative in _STEPS:
        whole = _difference(step, direction, relative * size)
        half = _difference(step, direction, relative * size / 2)
        change, uncertain = _norm(half), _norm(_minus(whole, half))
        missed = _norm(_minus(half, derivative))
        if missed <= _WRONG * change:
            return 0.0
        if min(change, missed) > _CERTAIN * uncertain and change > _WRONG * expected:
            return missed / change
    return None


def _rehearse(step: DefendedStep, see: Any) -> None:
    with random_states_kept(parameter.device for parameter in step.parameters.values()):
        step.rehearse(see)


def _difference(step: DefendedStep, direction: _Vector, length: float) -> _Vector:
    """Return the central difference of gradients, over the length of the step."""
    parameters = list(step.parameters.values())
    ends: list[_Vector] = []
    injection = Injection(step.parameters)
    for sign in (1, -1):
        try:
            update = zip(step.parameters, direction, strict=True)
            injection.displace({name: to * (sign * length) for name, to in update})
            _rehearse(step, lambda loss: ends.append(_gradient(loss, parameters)))
        finally:
            injection.restore()
    return [part / (2 * length) for part in _minus(*ends)]


def _gradient(loss: Tensor, parameters: list[nn.Parameter], create_graph: bool = False) -> _Vector:
    return list(
        torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    )


def _direction(loss: Tensor, parameters: list[nn.Parameter], gradient: _Vector, moved: set[int] | None) -> _Vector:
    """Return the gradient as a direction, of length one, without the weights that a bent function follows."""
    bent = [node for node in _graph([loss.grad_fn]) if _name(node).startswith(_BENT)]
    still = _leaves(bent)
    direction = [
        torch.zeros_like(part) if id(parameter) in still or (moved and id(parameter) not in moved) else part.detach()
        for parameter, part in zip(parameters, gradient, strict=True)
    ]
    norm = _norm(direction)
    return [part / norm if 0 < norm < torch.inf else torch.zeros_like(part) for part in direction]


def _alike(loss: Tensor) -> list[set[int]]:
    """Return the leaves that doubtful functions follow, by id: groups that the same ones follow, the fewest first."""
    followed: dict[int, list[int]] = {leaf: [] for leaf in _leaves([loss.grad_fn])}
    for place, function in enumerate(filter(may_hold_a_gradient, own_functions(loss))):
        for leaf in _leaves([function]):
            followed[leaf].append(place)
    groups: dict[tuple[int, ...], set[int]] = {}
    for leaf, places in followed.items():
        groups.setdefault(tuple(places), set()).add(leaf)
    return [groups[places] for places in sorted(groups, key=len) if places]


def _leaves(starts: Iterable[_Node]) -> set[int]:
    return {id(node.variable) for node in _graph(starts) if hasattr(node, "variable")}


def _graph(starts: Iterable[_Node]) -> Iterator[_Node]:
    todo, seen = [node for node in starts if node is not None], set()
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            yield node
            todo += [following for following, _ in node.next_functions if following is not None]


def _minus(one: _Vector, other: _Vector) -> _Vector:
    return [first - second for first, second in zip(one, other, strict=True)]


def _norm(vector: _Vector) -> float:
    return float(vector_norm([part.detach() for part in vector]))


def _names(functions: Sequence[_Node]) -> str:
    names = sorted({_name(node).removesuffix("Backward") for node in functions})
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
