"""Loss gradients over data, for the corruptions that climb along them."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_parcor.batches import check_batch
from hf_parcor.distributed.dtensors import local_part, local_parts
from hf_parcor.distributed.fsdp import drop_gathered, is_sharded, reducing
from hf_parcor.distributed.processes import ALONE, MeasuringProcesses
from hf_parcor.evaluation.identity.repeated_batches import RepeatedBatches
from hf_parcor.evaluation.losses import Batch, Loss, item_counter, model_loss
from hf_parcor.evaluation.outputs import own_batch
from hf_parcor.functional.vectors import working_dtype
from hf_parcor.injection import Device, Injection, Pieces, Replacement, corrupted, forget_derived
from hf_parcor.model_state import card_notes_kept
from hf_parcor.overriding import gradients_set_aside, override, undo_at_end

_LOST = "an autograd kernel was not registered"


@contextmanager
def corrupted_model(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    corruption: Mapping[str, Tensor] | Pieces,
    saved_on: Device = None,
    p: float | None = None,
) -> Iterator[Injection]:
    """Corrupt some weights of a model inside a `with` block; no weights that were gathered outlive its ends.

    Unlike `corrupted`, it takes a corruption that names no weight: one that leaves all of them as they are.

    Inside, the model and its parts refuse `save_pretrained`, and so `push_to_hub` and `Trainer.save_model`: nothing
    that a metric or a loss calls leaves a damaged model behind, nor its numbers on a card. Whoever wants one on disk
    takes `corrupted`, which knows no model. A state dict that is written by other means is not noticed.
    """
    with corrupted(parameters, corruption or Pieces(()), saved_on=saved_on, p=p) as injection, unpublished(model):
        drop_gathered(model)
        try:
            yield injection
        finally:
            drop_gathered(model)


@contextmanager
def unpublished(model: nn.Module) -> Iterator[None]:
    """Let a model and its parts refuse `save_pretrained` inside a `with` block, since weights are corrupted there.

    What is noted for its card there is forgotten.
    """
    with card_notes_kept(model), ExitStack() as refusals:
        for module in model.modules():
            if hasattr(type(module), "save_pretrained"):
                override(refusals, module, save_pretrained=_refuse_to_save)
        yield


def _refuse_to_save(*_: object, **__: object) -> None:
    raise RuntimeError(
        "save_pretrained: expected a model with its own weights, got one that is corrupted while it is measured; save "
        "it before or after, or corrupt it yourself with hf_parcor.corrupted to keep a damaged copy"
    )


def gradients(
    model: nn.Module, parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a loss; no `.grad` is changed. Of a sharded model, those of the processes' mean loss.

    Raises:
        ValueError: Something between the parameters and the loss passes no gradient back, such as quantized layers.
    """
    forget_derived()  # an earlier pass may have left tensors without a graph, or with one that is freed
    if not is_sharded(model):
        with _no_gradient_lost():
            return torch.autograd.grad(loss(), parameters, allow_unused=True)
    # FSDP2 computes with other tensors: only a whole backward pass brings gradients to the shards.
    with gradients_set_aside(model.parameters()), reducing(model), _no_gradient_lost():
        loss().backward()  # type: ignore[no-untyped-call]
        return tuple(parameter.grad for parameter in parameters)


@contextmanager
def _no_gradient_lost() -> Iterator[None]:
    """Refuse what PyTorch warns of: an operation that a gradient does not pass, which is then zero before it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", f".*{re.escape(_LOST)}", UserWarning)
        try:
            yield
        except UserWarning as error:
            if _LOST not in str(error):
                raise
            raise ValueError(
                f"gradients: expected a loss that can be differentiated, got one through {str(error).split(':')[0]}"
                "'s operations, which pass no gradient back; select parameters behind the quantized layers, take "
                "corruptions without gradients (noise, flips), or load the model without quantization"
            ) from error.with_traceback(None)  # which holds the model, see `FailuresAsPrefixErrors`


_Round = tuple[tuple[Batch, float], bool]


class DatasetGradients:
    """Gradients of a model's loss with respect to selected parameters; a `GradientSource`.

    `.grad` is not touched. Frozen parameters get gradients too, and are frozen again afterwards. The gradient over all
    data is computed once and kept: it serves every closed-form corruption of these weights.

    Args:
        model: The model, in the mode to measure it in; the mode is not changed.
        parameters: The selected parameters by name.
        batches: The same in every walk, such as a list or a `DataLoader` that does not shuffle. Unless they are a
            list, they are first walked through twice and compared.
        loss: `loss(model, batch)` returns the mean loss over a batch.
        progress: Whether to show a progress bar.
        processes: The processes that compute the gradient over all data together, each on every n-th batch. All of
            them must ask for it; otherwise they do not wait for each other. Default: this process alone.
        saved_on: Where the bits of corrupted weights are kept; None for their own device.

    Attributes:
        reached: The names of the parameters that a loss depended on which was differentiated, by this process.

    Raises:
        ValueError: There are no items, or the batches can be walked through only once, or differ between walks.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batches: Iterable[Batch] | RepeatedBatches,
        loss: Loss = model_loss,
        *,
        progress: bool = False,
        processes: MeasuringProcesses = ALONE,
        saved_on: Device = None,
    ) -> None:
        self._saved_on = saved_on
        self._batches = batches if isinstance(batches, RepeatedBatches) else RepeatedBatches(batches)
        self._batches.check()
        self._processes = processes
        self._model, self._parameters, self._loss = model, parameters, loss
        self._progress = progress
        self._count_items = item_counter(model, loss)
        with self._batches.unseen():
            self._items = [self._count(batch) for batch in self._batches]
        if not sum(self._items):
            raise ValueError(
                f"batches: expected at least one item with a label, got {len(self._items)} batches without any; "
                "is the data set empty?"
            )
        self.reached: set[str] = set()
        self._overall: dict[str, Tensor] | None = None
        self._whole: DatasetGradients | None = None
        self._walk: Iterator[Batch] = iter(())

    def _count(self, batch: Batch) -> int:
        if self._loss is model_loss:  # one of the caller's own may take anything
            check_batch(batch, named=False)
        return self._count_items(batch)

    def __len__(self) -> int:
        """Return the number of batches that have items."""
        return sum(items > 0 for items in self._items)

    def data(self) -> str:
        """Return what records keep of the data."""
        return self._batches.data()

    def of_group(self, parameters: Mapping[str, nn.Parameter]) -> DatasetGradients:
        """Return gradients of only some parameters; the one over all data is still computed once for all of them."""
        part = copy.copy(self)
        part._parameters, part._whole = parameters, self
        return part

    def over_data(self) -> dict[str, Tensor]:
        """Return the gradient of the mean loss over all data, each item counted once, in at least float32."""
        if self._whole is not None:
            overall = self._whole.over_data()
            return {name: overall[name] for name in self._parameters}
        if self._overall is None:
            self._walk_over_data()
            assert self._overall is not None
        return self._overall

    def second_moment(self) -> dict[str, Tensor]:
        """Return the mean over all items of the squared gradient, entry by entry, in at least float32.

        ::

            Σ_b n_b/N · n_b g_b²,    g_b the gradient of the mean loss of a batch of n_b items

        If every batch has one item, it is exactly the diagonal of the empirical Fisher matrix. Larger batches have the
        same expectation if gradients of items are independent and have mean zero. One walk computes it and the
        gradient over all data; only the two running sums are kept.

        Raises:
            ValueError: The model is sharded.
        """
        self._check_whole()
        squares = self._zeros()
        self._walk_over_data(squares)
        return self._processes.sum(squares)

    def batch_by_batch(self) -> Iterator[tuple[dict[str, Tensor], float]]:
        """Yield the gradient of each batch's mean loss, in the dtype of each weight, and its share of all items.

        With several processes, each yields the gradients of its own batches. Nothing is kept here: release each
        gradient before you ask for the next, and only one is in memory.

        Raises:
            ValueError: The model is sharded.
        """
        self._check_whole()
        for (batch, share), _ in self._shown(self._processes.rounds(self.shares())):
            yield dict(zip(self._parameters, self._gradient(batch), strict=True)), share

    @property
    def items(self) -> int:
        """The number of items of all data."""
        return sum(self._items)

    def _check_whole(self) -> None:
        if self._processes.in_step:
            raise ValueError(
                "model: expected all weights in every process for squared gradients, got a model that is sharded; "
                "save it, and measure it as from_pretrained loads it"
            )

    def _shown(self, rounds: Iterable[_Round]) -> Iterable[_Round]:
        """Return rounds over the data, with their progress."""
        return tqdm(
            rounds,
            desc="gradient over the data",
            total=self._processes.size(len(self)),
            leave=False,
            disable=not self._progress,
        )

    def _walk_over_data(self, squares: Mapping[str, Tensor] | None = None) -> None:
        overall = self._zeros()
        in_step, total = self._processes.in_step, self.items
        for (batch, of_batch), counts in self._shown(self._processes.rounds(self.shares())):
            share = of_batch if counts else 0.0
            # What all processes differentiate at once is the mean of their losses: the share weighs the loss.
            found = self._gradient(batch, share * self._processes.count if in_step else 1.0)
            torch._foreach_add_(local_parts(list(overall.values())), local_parts(found), alpha=1 if in_step else share)
            if squares is not None:
                for sum_of_squares, part in zip(squares.values(), found, strict=True):
                    wide = part.to(sum_of_squares.dtype)
                    sum_of_squares.addcmul_(wide, wide, value=share * share * total)  # n_b is share times total
                    del wide, part
            del found  # before the next one
        self._overall = overall if in_step else self._processes.sum(overall)

    def _zeros(self) -> dict[str, Tensor]:
        return {
            name: torch.zeros_like(parameter, dtype=working_dtype([parameter]))
            for name, parameter in self._parameters.items()
        }

    def shares(self, most: int | None = None) -> Iterator[tuple[Batch, float]]:
        """Return each batch with items, and its share of all items: weights that make batch means the overall mean.

        Batches without items are left out, because their mean is NaN.

        Args:
            most: Only the first so many batches; shares are of their items. None for all.

        Raises:
            ValueError: The number of items has changed since they were counted.
        """
        return _shares(self._batches, self._count_items, self._items, most)

    def loss_on(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch at the current weights.

        Raises:
            TypeError: It is no tensor of one number.
            ValueError: It has no gradient, where one is asked for.
        """
        loss: Any = self._loss(self._model, own_batch(batch, self._model))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss: expected a tensor with one number, got {found}; return the mean loss of the batch")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                "loss: expected one that depends on the selected weights, got one without a gradient; compute it with "
                "the model, and do not detach it, or select weights that the model uses"
            )
        return loss

    def on_next_batch(self, corruption: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradient of the next batch's mean loss at `w + a`; after the last batch comes the first."""
        return self.on_batch(self.next_batch(), corruption)

    @torch.no_grad()
    def gradient_at(self, values: Mapping[str, Tensor], batches: int | None = None) -> dict[str, Tensor]:
        """Return the gradient of the mean loss over the first batches with new values of some parameters."""
        overall: list[Tensor] = []
        with corrupted_model(self._model, self._parameters, Replacement(values), self._saved_on):
            for batch, share in self.shares(batches):
                found = self._gradient(batch, share)
                if overall:
                    torch._foreach_add_(local_parts(overall), local_parts(found))
                overall = overall or found
        return dict(zip(self._parameters, overall, strict=True))

    @torch.no_grad()
    def loss_at(self, values: Mapping[str, Tensor], batches: int | None = None) -> float:
        """Return the mean loss over the first batches with new values of some parameters."""
        with corrupted_model(self._model, self._parameters, Replacement(values), self._saved_on):
            losses = [share * self.loss_on(batch) for batch, share in self.shares(batches)]
        return float(torch.stack(losses).sum())

    def next_batch(self) -> Batch:
        """Return the next batch with items, on the device that the model takes it on; after the last, the first."""
        batch = next(self._walk, None)
        if batch is None:
            self._walk = (batch for batch, _ in self.shares())
            batch = next(self._walk)
        return own_batch(batch, self._model)

    def on_batch(self, batch: Batch, corruption: Mapping[str, Tensor] | Pieces) -> dict[str, Tensor]:
        """Return the gradient of a batch's mean loss at `w + a`, in the dtype of each weight."""
        with corrupted_model(self._model, self._parameters, corruption, self._saved_on):
            return dict(zip(self._parameters, self._gradient(batch), strict=True))

    def restart(self) -> None:
        """Start again from the first batch."""
        self._walk = iter(())

    def _gradient(self, batch: Batch, weight: float = 1.0) -> list[Tensor]:
        parameters = list(self._parameters.values())

        with trainable(parameters):
            gradient = gradients(self._model, parameters, lambda: self.loss_on(batch) * weight)
        self.reached.update(name for name, part in zip(self._parameters, gradient, strict=True) if part is not None)
        found = [
            torch.zeros_like(parameter) if part is None else part
            for part, parameter in zip(gradient, parameters, strict=True)
        ]
        return private([part.detach() for part in found], [*self._model.parameters(), *self._model.buffers(), batch])


def _shares(
    batches: Iterable[Batch], count: Callable[[Batch], int], before: Sequence[int], most: int | None
) -> Iterator[tuple[Batch, float]]:
    # Not a method: whoever keeps a walk of its own would keep itself, and the model, until a garbage collection.
    counted = [items for items in before if items][:most]
    total, found, left = sum(counted), 0, len(counted)
    for batch in batches:
        items = count(batch)  # of this very batch, whatever an earlier walk counted
        if most is not None and items and not left:
            break
        found += items
        left -= items > 0
        if items:
            yield batch, items / total
    if found != total:
        raise ValueError(
            f"batches: expected the {total} items that there were before, got {found}; do not change the batches "
            "while they are measured on"
        )


def private(tensors: Iterable[Tensor], others: Any = ()) -> list[Tensor]:
    """Return tensors that can be written into: dense, contiguous, and each in memory of its own.

    `torch.autograd.grad` may return one tensor for two parameters, one number expanded to a whole tensor, or, from a
    function with a backward of its own, what that has kept. Only what needs it is copied.

    Args:
        tensors: Any tensors.
        others: Whatever they may not share memory with, in containers of any depth.

    Examples:
        >>> one = torch.ones(2)
        >>> first, second = private([one, one])
        >>> first is one, second is one
        (True, False)
    """
    taken = {_memory(other) for other in _tensors(others)}
    found = []
    for tensor in tensors:
        own = tensor.to_dense() if tensor.layout is not torch.strided else tensor
        if not own.is_contiguous() or _memory(own) in taken:
            own = own.clone(memory_format=torch.contiguous_format)
        taken.add(_memory(own))
        found.append(own)
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in containers of any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(entry)


def _memory(tensor: Tensor) -> tuple[torch.device, int]:
    """Return where a tensor's memory begins; that of sparse and nested ones is never handed out."""
    part = local_part(tensor)
    try:
        return part.device, part.untyped_storage().data_ptr() if part.layout is torch.strided else 0
    except RuntimeError:  # a tensor that is made of others, and has no memory of its own
        return part.device, 0


@contextmanager
def trainable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let parameters have gradients inside the block, frozen ones too, and where a caller has turned gradients off."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    with ExitStack() as block:
        if torch.is_inference_mode_enabled():
            block.enter_context(torch.inference_mode(False))
        undo_at_end(block, torch.set_grad_enabled, torch.is_grad_enabled())
        torch.set_grad_enabled(True)
        undo_at_end(block, _freeze, frozen)
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield


def _freeze(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)
