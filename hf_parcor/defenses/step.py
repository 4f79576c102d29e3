"""One micro-batch of defended training: passes at `w + a_k` whose gradients add up to the gradient of the risk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType

import torch
from torch import Tensor

from hf_parcor.functional.vectors import clones
from hf_parcor.injection import CorruptionNorm, Injection


class DefendedStep:
    """The state of one micro-batch: the weights `w + a_k`, and the gradients of its passes.

    Used in a `with` block, after which the weights have their exact bits back, also after an exception, and every
    `.grad` holds what it held before plus the weighted sum of the gradients of all passes.

    The gradient of pass k serves twice: it is summed into the update and it makes `a_{k+1}`. It is the gradient of
    THIS micro-batch: what `.grad` accumulated before is set aside, and put back for the last pass.

    Args:
        parameters: The selected parameters, `w`, by name. All others just accumulate their gradients.
        run_pass: `run_pass(weight, k)` runs forward and backward of `weight · L` for pass k at the weights as they
            are, adding to `.grad`, and returns the weighted loss, detached.
        passes: How many passes there will be, so that the last one is known.
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], run_pass: Callable[[float, int], Tensor], passes: int
    ) -> None:
        self.parameters = parameters
        self._run_pass = run_pass
        self._passes = passes
        self._injection = Injection(parameters)
        self._sum: dict[str, Tensor] = {}
        self._fresh: dict[str, Tensor] = {}
        self._risk: list[Tensor] = []
        self.losses: list[Tensor] = []
        """The loss of each pass so far, unweighted, detached."""

    @property
    def risk(self) -> Tensor:
        """The weighted sum of the losses so far, detached."""
        return torch.stack(self._risk).sum()

    def backward(self, weight: float) -> None:
        """Run the next pass at `w + a_k` with the loss weighted: it adds `weight · ∇L(w + a_k)` to the update."""
        index = len(self.losses)
        last = index == self._passes - 1
        if index == 0:
            self._sum = self._take_gradients()
        if last:
            for name, gradient in self._sum.items():
                self.parameters[name].grad = gradient
        loss = self._run_pass(weight, index)
        self._risk.append(loss)
        self.losses.append(loss / weight)
        if not last:
            self._fresh = self._take_gradients()
            known = [name for name in self._fresh if name in self._sum]
            if known:
                torch._foreach_add_([self._sum[name] for name in known], [self._fresh[name] for name in known])
            new = [name for name in self._fresh if name not in self._sum]
            self._sum.update(zip(new, clones([self._fresh[name] for name in new]), strict=True))

    def gradients(self) -> dict[str, Tensor]:
        """Return the last pass's (weighted) gradients of the selected parameters, to be overwritten at will.

        In float32 at least. Parameters that got none in this pass are absent.
        """
        taken, self._fresh = self._fresh, {}
        return {
            name: gradient if gradient.dtype.itemsize >= 4 else gradient.float() for name, gradient in taken.items()
        }

    def displace(self, update: Mapping[str, Tensor], project: Callable[[list[Tensor]], None] | None = None) -> None:
        """Move the corruption, `a ← Π(a + u)`, and with it the weights."""
        self._injection.displace(update, project)

    def withdraw(self, p: float) -> CorruptionNorm:
        """Restore the weights, and return the norm of the corruption that they last held."""
        return self._injection.withdraw(p)

    def _take_gradients(self) -> dict[str, Tensor]:
        taken = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                taken[name] = parameter.grad
                parameter.grad = None
        return taken

    def __enter__(self) -> DefendedStep:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._injection.restore()
