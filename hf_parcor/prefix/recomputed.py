"""A prefix that is computed at the first pass and again at the last, so that every pass is a whole one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_parcor.devices import accelerators_in_use
from hf_parcor.overriding import undo_at_end
from hf_parcor.prefix.cut import before_calls
from hf_parcor.prefix.reuse import PrefixReuse, Substitute, copied
from hf_parcor.randomness import RandomStates, random_states_kept


class RecomputedPrefix(PrefixReuse):
    """Reuses a prefix where modules gather weights for each call and free them after it, as under FSDP2.

    There a run must not end early, and no graph may wait for another backward. So the first pass computes the prefix
    and drops its graph. Those between skip its modules and their hooks: nothing is gathered for them. The last one
    computes it again, with the random numbers of the first, and its backward takes along what gathered at the cut.

    It costs one forward of the prefix more, and no memory for its activations until the last pass.
    """

    forwards = 2

    def forget(self) -> None:
        """Free what was recorded."""
        super().forget()
        self._finished = False  # recording: modules of the prefix may be called again behind its end
        self._generators: dict[tuple[nn.Module, int], RandomStates] = {}
        self._gathered: list[Tensor] = []  # the gradient of each of `outputs` by all passes but the last

    def begin(self, run: Callable[[], Any]) -> None:
        """Prepare the passes of a step; the first of them records, so nothing is run."""
        self.forget()

    @contextmanager
    def sharing(self, last: bool) -> Iterator[None]:
        """Let a pass of the step reuse the prefix, its backward included.

        Args:
            last: Whether no other pass follows.
        """
        if last or self.recorded:
            with self._substituted(self._compute_again if last else self._replay):
                yield
            return

        def finish(module: nn.Module, arguments: Any) -> None:
            self._finished = True

        with self._substituted(self._record), ExitStack() as hooks:
            for module in self.starts:
                before_calls(hooks, module, finish)
            yield

    def joined(self, objective: Tensor) -> Tensor:
        """Return the objective of a pass; the last one's sends what gathered at the boundary backward too."""
        if not self.outputs:
            return objective
        joined: Tensor = _TakeAlong.apply(objective, self._gathered, *self.outputs)  # type: ignore[no-untyped-call]
        return joined

    def backward(self, prepare: object = None) -> None:
        """Free what was recorded: the last pass has sent it backward."""
        self.forget()

    @staticmethod
    def _substitute(stack: ExitStack, module: nn.Module, substitute: Substitute) -> None:
        """Put a function in the place of calling a module, hooks and checkpoints included, which counts its calls.

        Python looks `__call__` up in the class, so the module gets one of its own for the while.
        """
        kind: Any = type(module)
        calls = 0

        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return substitute(module, calls - 1, lambda: kind.__call__(module, *args, **kwargs))

        undo_at_end(stack, object.__setattr__, module, "__class__", kind)
        object.__setattr__(module, "__class__", type(kind.__name__, (kind,), {"__call__": called}))

    def _record(self, module: nn.Module, index: int, compute: Callable[[], Any]) -> Any:
        if self._finished:
            return compute()
        generators = RandomStates(accelerators_in_use())
        result = super()._record(module, index, compute)
        self._generators[module, index] = generators
        self.outputs.clear()  # and with them the graph
        return self._replay(module, index, lambda: result)

    def _compute_again(self, module: nn.Module, index: int, compute: Callable[[], Any]) -> Any:
        if (module, index) not in self.recorded:
            return compute()
        with random_states_kept(accelerators_in_use()):
            self._generators[module, index].put_back()
            parts, structure = tree_flatten(compute())
        self._draw_alike(module, index)
        for part, kept in zip(parts, self.recorded[module, index][0], strict=True):
            if isinstance(kept, Tensor) and kept.grad is not None:
                self.outputs.append(part)
                self._gathered.append(kept.grad)
        return tree_unflatten(copied(parts), structure)


class _TakeAlong(torch.autograd.Function):
    """A number whose backward sends given gradients to other tensors too."""

    @staticmethod
    def forward(context: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        context.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None, *context.gradients
