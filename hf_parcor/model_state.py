"""The state of a model beside its weights: buffers, which the passes of a step move once, mode, and notes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_parcor.overriding import hook_before, override, undo_at_end
from hf_parcor.randomness import random_states_kept

_SMALL = 1 << 16  # entries; statistics, counters and averages are smaller, packed weights and queues are larger


def modules_of(*models: nn.Module) -> list[nn.Module]:
    """Return `model.modules()`, of several models each once, in a fraction of the time.

    Examples:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU()))
        >>> [one is other for one, other in zip(modules_of(model), model.modules(), strict=True)]
        [True, True, True, True]
    """
    found: dict[nn.Module, None] = {}
    left = list(reversed(models))
    while left:
        module = left.pop()
        if module not in found:
            found[module] = None
            left.extend(child for child in reversed(module._modules.values()) if child is not None)
    return list(found)


def train_without_walk(
    modules: Sequence[nn.Module], known: Collection[Callable[..., object]] = ()
) -> Callable[..., nn.Module] | None:
    """Return a method `train` for `modules[0]` that does nothing where all train already, and else what its own does.

    None where a module has a `train` of its own, which may do anything.

    Args:
        modules: All modules of a model, itself first.
        known: Methods `train` that do nothing beside `nn.Module.train` where the mode is the same as before.

    Examples:
        >>> model = nn.Sequential(nn.ReLU())
        >>> train = train_without_walk(modules_of(model))
        >>> train() is model, train(False).training, train().training
        (True, False, True)
    """
    model, plain = modules[0], {nn.Module.train, *known}
    if any(type(module).train not in plain or "train" in module.__dict__ for module in modules):
        return None
    own: Callable[..., nn.Module] = type(model).train

    def train(mode: bool = True) -> nn.Module:
        if mode is True and all(module.training for module in modules):
            return model
        return own(model, mode)

    return train


class BufferSnapshot:
    """The buffers of modules as they are, to be put back.

    Not every write shows in a tensor's version counter (BatchNorm's do not), so values are kept: those of buffers of
    at most 65,536 entries, and of larger ones that are asked for, floating-point ones unless told otherwise: large
    integers are packed weights.

    Args:
        modules: Whose buffers; those of modules inside of them are not taken along.
        large: Which larger buffers to keep the values of.

    Attributes:
        kept: The buffers whose values are kept, each once; written there, no graph takes it for overwritten.
        values: These values, in the same order.
    """

    def __init__(
        self, modules: Iterable[nn.Module], large: Callable[[Tensor], bool] = Tensor.is_floating_point
    ) -> None:
        held = [module._buffers for module in dict.fromkeys(modules) if module._buffers]
        found = [(buffers, name, buffer) for buffers in held for name, buffer in buffers.items()]
        self._places = [(buffers, name, buffer) for buffers, name, buffer in found if buffer is not None]
        self._absent = [(buffers, name) for buffers, name, buffer in found if buffer is None]
        self._versions = {id(buffer): _version_of(buffer) for _, _, buffer in self._places}
        known = {id(buffer): buffer for _, _, buffer in self._places if _is_plain(buffer)}
        kept = [buffer for buffer in known.values() if buffer.numel() <= _SMALL or large(buffer)]
        self.kept = [buffer.data for buffer in kept]
        self.values = [torch.empty_like(buffer, requires_grad=False) for buffer in kept]
        _copy(self.kept, self.values)
        self._known = {id(buffer): value for buffer, value in zip(kept, self.values, strict=True)}

    @torch.no_grad()
    def put_back(self) -> None:
        """Give every buffer its tensor and its bits back; one that was None, as what is computed once is, is None."""
        for buffers, name, buffer in self._places:
            if name not in buffers or buffers[name] is not buffer:  # those of TorchScript have no `get`
                buffers[name] = buffer
        for buffers, name in self._absent:
            buffers[name] = None
        _copy(self.values, self.kept)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Put the buffers back after a block: some models count and average in evaluation too."""
        try:
            yield
        finally:
            self.put_back()

    def sees_a_write(self, buffer: Tensor) -> bool:
        """Say whether a buffer is another one now, or was written to in a way that its version counter shows."""
        return self._versions.get(id(buffer)) != _version_of(buffer)

    def moved(self) -> bool:
        """Say whether any buffer is another one now, or was written to; waits for the device."""
        for buffers, name, buffer in self._places:
            if name not in buffers or buffers[name] is not buffer or self.sees_a_write(buffer):
                return True
            before = self._known.get(id(buffer))
            if before is not None and not same_numbers(buffer, before).all():
                return True
        return False


def same_numbers(found: Tensor, expected: Tensor) -> Tensor:
    """Return where two tensors have the same number, or both none (NaN).

    Examples:
        >>> same_numbers(Tensor([1, torch.inf, torch.nan, 0]), Tensor([1, torch.inf, torch.nan, torch.nan]))
        tensor([ True,  True,  True, False])
    """
    return (found == expected) | (found.isnan() & expected.isnan())


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copy tensors, those of one kind and device in one call."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for place, source in enumerate(sources):
        kinds.setdefault((source.dtype, source.device), []).append(place)
    for places in kinds.values():
        torch._foreach_copy_([targets[place] for place in places], [sources[place] for place in places])


def _is_plain(buffer: Tensor) -> bool:
    """Say whether a buffer's values can be copied: what is packed or made of other tensors is no running state.

    Nor is what is expanded, so that entries share memory: nothing can be written there.
    """
    own_class = type(buffer).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if buffer.layout is not torch.strided or buffer.is_meta or buffer.is_quantized or own_class:
        return False
    return all(step or size == 1 for step, size in zip(buffer.stride(), buffer.shape, strict=True))


def _version_of(buffer: Tensor) -> int:
    return -1 if buffer.is_inference() else buffer._version


class StepBuffers:
    """Lets buffers move in the passes of one defended step as in one clean stock step, whatever the passes are.

    The first pass moves them, at the clean weights; all others find them as the first one did, so that they compute
    the same function of the weights, and leave no trace. With a prefix that is run once, its modules move theirs in
    the run that records it, and all others in the first pass. Where the first pass is not the stock one (it starts
    from a random corruption, or sees a part of the batch), a forward pass before them all moves the buffers, in
    `moving`.

    Args:
        modules: Those of the model, all of them, found once: walking through a model takes as long as many launches.
        replayed: Returns the modules of a prefix whose calls compute nothing in the passes.
        wrapped: What the model wraps, where it is a wrapper that sends buffers before each forward pass, as DDP does.

    Examples:
        >>> norm = nn.BatchNorm1d(1, momentum=1.0)
        >>> buffers = StepBuffers([norm])
        >>> for index, batch in enumerate(torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]])):
        ...     with buffers.of_pass(index):
        ...         _ = norm(batch)
        >>> norm.running_mean, norm.num_batches_tracked
        (tensor([2.]), tensor(1))
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        replayed: Callable[[], Iterable[nn.Module]] = tuple,
        wrapped: nn.Module | None = None,
    ) -> None:
        self._modules, self._replayed, self._wrapped = modules, replayed, wrapped
        self._ends: tuple[BufferSnapshot, BufferSnapshot] | None = None  # before any pass, after all of them

    def moved(self) -> bool:
        """Say whether any buffer moved in `moving`; waits for the device."""
        return self._ends is not None and self._ends[0].moved()

    @contextmanager
    def of_pass(self, index: int) -> Iterator[None]:
        """Guard the buffers during a pass.

        Args:
            index: Which pass, from 0; −1 for a run that records the prefix, or one that is not finished.
        """
        if index < 0:
            with self._recording():
                yield
        elif self._ends is None:
            with self.moving():
                yield
        else:
            before, after = self._ends
            before.put_back()
            try:
                yield
            finally:
                after.put_back()

    @contextmanager
    def _recording(self) -> Iterator[None]:
        if self._ends is not None:
            self._ends[0].put_back()
        with self._beginning() as before:
            try:
                yield
            finally:
                recorded = self._of_replayed()
                before[0].put_back()
                recorded.put_back()
        if self._ends is not None:
            after = self._ends[1]
            self._ends = BufferSnapshot(self._modules), after
            after.put_back()

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Let the buffers move inside the block, to what the step is to leave, and in no pass after it."""
        recorded = self._of_replayed()
        with self._beginning() as before:
            yield
        recorded.put_back()  # the hooks of a replayed module ran again
        self._ends = before[0], BufferSnapshot(self._modules, large=before[0].sees_a_write)

    @contextmanager
    def _beginning(self) -> Iterator[list[BufferSnapshot]]:
        """Record the buffers as a run begins: under a wrapper such as DDP, after it has sent them to all processes."""
        before = [BufferSnapshot(self._modules)]
        with ExitStack() as until_begun:

            def begin(module: nn.Module, arguments: Any) -> None:
                until_begun.close()
                before[0] = BufferSnapshot(self._modules)

            if self._wrapped is not None:
                hook_before(until_begun, self._wrapped, begin)
            yield before

    def _of_replayed(self) -> BufferSnapshot:
        return BufferSnapshot(modules_of(*self._replayed()))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module's own training flag back afterwards.

    Raises:
        ValueError: It has none, as a module that `torch.export` made.
    """
    flags = [(module, module.training) for module in model.modules()]
    with ExitStack() as block:
        undo_at_end(block, _set_flags, flags)
        try:
            model.eval()
        except NotImplementedError as error:
            raise ValueError(
                f"model: expected one with an evaluation mode, got {type(model).__name__} ({error}); take the model "
                "that it was exported from"
            ) from error
        yield


def _set_flags(flags: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, training in flags:
        module.training = training


def devices_of(model: nn.Module) -> list[torch.device]:
    """Return the devices that a model's parameters lie on."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


@contextmanager
def card_notes_kept(model: nn.Module) -> Iterator[None]:
    """Let what the evaluators of sentence-transformers find in a block stay out of the model's card.

    They note it in the model's `model_card_data`, of which its README is made when it is saved next.
    """
    with ExitStack() as block:
        for module in model.modules():
            data = vars(module).get("model_card_data")  # `getattr` raises inside for each module without
            noted = getattr(data, "__dict__", {})
            if "eval_results_dict" in noted:
                override(block, data, eval_results_dict=dict(noted["eval_results_dict"]))
            if "training_logs" in noted:
                override(block, data, training_logs=[dict(row) for row in noted["training_logs"]])
        yield


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Put a model's buffers and the generators back after a block."""
    with BufferSnapshot(model.modules()).undone(), random_states_kept(devices_of(model)):
        yield
