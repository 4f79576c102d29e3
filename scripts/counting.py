"""What a step does, counted and not timed: bytes that operations move, launches, memory that tensors take, calls.

Nothing here depends on how fast or how busy a machine is.
"""

from __future__ import annotations

import cProfile
import math
import pstats
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_parcor.defenses import DefendedStep, Defense
from hf_parcor.defenses.step import Objective
from hf_parcor.injection import corruptible


@torch.library.impl("aten::_fused_sgd_.tensor_lr", "Meta")
def _has_a_size_alone(*args: object, **kwargs: object) -> None:
    """Let weights that have a size alone be counted: PyTorch has no such kernel for the fused SGD."""


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations inside, and what each reads and writes.

    Views, empty tensors, repetitions of an expanded one, and readings by the host cost nothing.

    Attributes:
        bytes: What was read and written, of tensors of all sizes, by operation.
        launches: How often each operation was called. On a GPU a batched one over many tensors is several kernels.
    """

    NOT_WRITTEN = (("_fused_sgd_", "grads"),)  # but where they are unscaled, too
    NOT_READ = ("copy_", "_foreach_copy_", "zero_", "_foreach_zero_", "fill_")  # nor what goes under the name `out`
    FREE = ("empty", "new_empty", "detach", "_unsafe_view", "_local_scalar")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    @staticmethod
    def _size(value: object) -> int:
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        return sum(
            tensor.itemsize
            * math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
            for tensor in tensors
        )

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count it."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if function.is_view or name.startswith(self.FREE):
            return result
        moved = 0
        for place, argument in enumerate(function._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            written = written and (name, argument.name) not in self.NOT_WRITTEN
            moved += self._size(value) * written
            moved += self._size(value) * (not written or not (argument.is_out or name in self.NOT_READ))
        if all(returned.alias_info is None for returned in function._schema.returns):
            moved += self._size(result)
        self.bytes[name] += moved
        self.launches[name] += 1
        return result


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest number of bytes in tensors made inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and watch what it returns."""
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                address, size = storage.data_ptr(), storage.nbytes()
                if address and address not in self._known and not self._is_argument(address, args):
                    self._known.add(address)
                    self.live += size
                    weakref.finalize(storage, self._free, address, size)
        self.peak = max(self.peak, self.live)
        return result

    @staticmethod
    def _is_argument(address: int, args: Any) -> bool:
        return any(
            isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() == address for leaf in tree_leaves(args)
        )

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def calls_of(step: Callable[[], object]) -> int:
    """Count the functions that a step calls, those of Python and of C: what it costs the host, whatever it computes.

    Examples:
        >>> few, many = (calls_of(lambda: [abs(number) for number in range(count)]) for count in (1, 9))
        >>> many - few
        8
    """
    with cProfile.Profile() as profile:
        step()
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def step_without_passes(defense: Defense, weights: Mapping[str, nn.Parameter]) -> None:
    """Take a defended step whose passes do nothing but give every weight memory for its gradient.

    Args:
        defense: One that needs neither inputs nor a graph.
        weights: The selected parameters; on the meta device they have a size alone, and can be asked for nothing.
    """
    loss = torch.ones((), device=next(iter(weights.values())).device)

    def run_pass(objective: Objective, index: int) -> Tensor:
        for weight in weights.values():
            weight.grad = torch.empty_like(weight, requires_grad=False) if weight.grad is None else weight.grad
        return objective(loss).detach()

    with DefendedStep(weights, run_pass, defense.passes) as step:
        defense.minimize(step)
    for weight in weights.values():
        weight.grad = None


def traffic_beyond_passes(defense: Defense, weights: Mapping[str, Tensor]) -> Traffic:
    """Count what a defended step does beside its passes, as on a GPU, where nothing is asked for its value.

    Args:
        defense: As in `step_without_passes`.
        weights: Give names, shapes and dtypes.
    """
    sizes = {name: nn.Parameter(torch.empty_like(weight, device="meta")) for name, weight in weights.items()}
    traffic = Traffic()
    with patch.object(corruptible, "obstacle", return_value=None), traffic:  # the meta device is one
        step_without_passes(defense, sizes)
    return traffic


def kernels_beyond_passes(defense: Defense, weights: Mapping[str, nn.Parameter]) -> int:
    """Count the kernels and copies that a GPU runs in a defended step beside its passes.

    Args:
        defense: As in `step_without_passes`.
        weights: The selected parameters, on a GPU, without gradients; they keep their bits.

    Raises:
        RuntimeError: The profiler saw none.
    """
    step_without_passes(defense, weights)  # which loads what is loaded once
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step_without_passes(defense, weights)
        torch.cuda.synchronize()
    found = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
    if not found:
        raise RuntimeError("expected kernels in the profile, got none; let this user read the GPU's counters")
    return len(found)
