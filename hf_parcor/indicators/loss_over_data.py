"""A model's loss over data as a function of selected parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_parcor.evaluation.losses import Batch, Loss, model_loss
from hf_parcor.evaluation.passes.gradients import DatasetGradients, corrupted_model
from hf_parcor.evaluation.placement.replicas import whole_model
from hf_parcor.injection import Pieces, check_weights, forget_derived
from hf_parcor.model_state import BufferSnapshot, evaluation_mode
from hf_parcor.statistics import exact_sum


class LossOverData:
    """The mean loss over data as a function of the selected parameters: its value, its changes, its gradient.

    Every item of the data counts once, however the data are batched. The model is measured in evaluation mode, so
    without dropout. Its training flags, its weights and buffers, every `.grad`, and PyTorch's global CPU generator are
    restored afterwards. The gradient is computed once and kept: make a new object after the weights have changed.

    Under `torchrun` or `accelerate launch` each process computes everything.

    Args:
        model: Any PyTorch model, bare or under DistributedDataParallel.
        parameters: Parameters by name, as `select_parameters` returns them, seen as ONE vector of length k.
        batches: A list, or a `DataLoader` that does not shuffle. Unless they are a list, they are first walked through
            twice and compared.
        loss: `loss(model, batch)` returns the mean loss of a batch. By default, the model's own loss.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: There are no parameters or no items; the batches can be walked through only once, or differ between
            walks; or FSDP or tensor parallelism has split the weights.
        TypeError: A parameter is not floating point.

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 3.0)
        >>> half_square = LossOverData(
        ...     model, dict(model.named_parameters()), [torch.eye(2)], lambda m, x: m(x).square().sum() / 2
        ... )
        >>> half_square.value()
        9.0
        >>> half_square.change({"weight": torch.tensor([[1.0, -1.0]])})
        1.0
        >>> half_square.gradient()
        {'weight': tensor([[3., 3.]])}
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batches: Iterable[Batch],
        loss: Loss = model_loss,
        *,
        progress: bool = False,
    ) -> None:
        check_weights(parameters)
        self.model = whole_model(model)
        self.parameters = dict(parameters)
        self.gradients = DatasetGradients(self.model, self.parameters, batches, loss, progress=progress)
        self._value: float | None = None
        self._precision = 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Put the model into evaluation mode inside a `with` block; restore it and the global generator after it."""
        forget_derived()
        buffers = BufferSnapshot(self.model.modules()).undone()
        with evaluation_mode(self.model), buffers, torch.random.fork_rng(devices=[]):
            yield

    def value(self) -> float:
        """Return L(w), the mean loss over the data; it is computed once."""
        if self._value is None:
            self._value = self._mean()
        return self._value

    def change(self, corruption: Mapping[str, Tensor] | Pieces) -> float:
        """Return L(w + a) − L(w).

        Args:
            corruption: a by name, or a `Replacement`; or either as `Pieces`.

        Raises:
            ValueError: A name or a shape does not belong to the parameters.
        """
        before = self.value()
        with corrupted_model(self.model, self.parameters, corruption):
            return self._mean() - before

    def resolution(self) -> float:
        """Return the smallest loss change that rounding cannot explain: the loss times its dtype's epsilon.

        It is a lower limit. Many models compute their loss in float32 even if their weights are float64.
        """
        return abs(self.value()) * self._precision

    def gradient(self) -> dict[str, Tensor]:
        """Return the gradient g of L at w by name; it is computed once."""
        with self.measuring():
            return self.gradients.over_data()

    @torch.no_grad()
    def _mean(self) -> float:
        parts = []
        with self.measuring():
            for batch, share in self.gradients.shares():
                loss = self.gradients.loss_on(batch)
                self._precision = torch.finfo(loss.dtype).eps
                parts.append(share * float(loss))
        return exact_sum(parts)
