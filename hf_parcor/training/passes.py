"""The passes of a defended step: a loop's own forward and backward, with another objective; and those of a Trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, ClassVar

from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer

from hf_parcor.batches import count_first, first_examples, items_of_part, private_copy, repeat_first_examples
from hf_parcor.defenses import Defense, Objective
from hf_parcor.distributed.ddp import data_parallel, unfinished_forward, wrapped_by
from hf_parcor.distributed.fsdp import is_sharded
from hf_parcor.model_state import StepBuffers, devices_of, modules_of, train_without_walk
from hf_parcor.overriding import counters_in, counters_kept, override, overriding
from hf_parcor.prefix import PrefixReuse, outputs_of
from hf_parcor.randomness import random_states_kept

_PLAIN = (PreTrainedModel.train, DistributedDataParallel.train)


class Ended(BaseException):
    """Ends a pass that is not to be finished; no `except Exception` of a loop stops it."""


class Passes(ABC):
    """The passes of one defended step: a loop's own forward and backward, with an objective of its loss.

    `passes(objective, index)` is what `DefendedStep` takes as `run_pass`; index −1 is a run that is not finished.
    What a pass leaves behind does not reach the next one: buffers move as in one stock step, and under DDP the last
    pass alone reduces gradients, those of all passes, which `.grad` holds.

    Args:
        accelerator: That of the loop.
        defense: It says how many passes there are, and which share of the batch each sees.
        model: The model as it was prepared.
        beside: Other models that the loss may go through, whose buffers move in a step too.

    Attributes:
        modules: All of the model's.
        moving: Those, and all of the other models'.
    """

    _batches: ClassVar[tuple[str, ...]] = ("_as_given",)  # where copies of the batch are; the last is what passes see

    def __init__(
        self, accelerator: Accelerator, defense: Defense, model: nn.Module, beside: Sequence[nn.Module] = ()
    ) -> None:
        self.accelerator, self.defense, self.model = accelerator, defense, model
        self._prefix: PrefixReuse | None = None
        self.modules = modules_of(model)
        self.moving = modules_of(model, *beside) if beside else self.modules
        self._buffers = StepBuffers(self.moving, wrapped=wrapped_by(model))

    @abstractmethod
    def prepare(self) -> None:
        """Prepare the batch, once for all passes; do nothing if it is prepared."""

    @abstractmethod
    def _run(self, objective: Objective, index: int, share: float) -> Tensor:
        """Run forward and backward on a share of the batch, and return the value of the objective, detached."""

    def __call__(self, objective: Objective, index: int) -> Tensor:
        """Run a pass, and return the value of its objective, detached."""
        share = 1.0 if index < 0 else self.defense.share_of_batch(index)
        with self._buffers.of_pass(index):
            if self._prefix is None or share == 1:
                return self._run(objective, index, share)
            with self._prefix.of_rows(*self.rows_of(share)):
                return self._run(objective, index, share)

    def share(self, prefix: PrefixReuse | None) -> None:
        """Let the passes reuse a prefix, after which there is more to be sent backward than the last pass."""
        if prefix is not None:
            self._prefix = prefix
            self._buffers = StepBuffers(self.moving, prefix.replayed, wrapped_by(self.model))

    def watch(self) -> None:
        """Run to the loss, in the mode that the model is in; the batch must be prepared."""
        with self._mode_kept():
            self._run_forward()

    def trial(self, objective: Callable[[Any], Tensor], share: float = 1.0) -> list[Any]:
        """Run as a pass does, forward and backward.

        Args:
            objective: What goes backward, made from a mapping with the `loss`.
            share: On which share of the batch.

        Returns:
            All that the model returned, and the loss.
        """
        with outputs_of(self.model) as found:
            value = self._run(lambda loss: objective({"loss": loss}), -1, share)
        return [*found, value]

    def trial_as_is(self, objective: Callable[[Any], Tensor], share: float = 1.0) -> list[Any]:
        """Run a `trial` in the mode that the model is in; the batch must be prepared."""
        with self._mode_kept():
            return self.trial(objective, share)

    def trial_of_repeated(self, objective: Callable[[Any], Tensor], share: float) -> list[Any]:
        """Run a `trial_as_is` on the examples of a share of the batch, so often that they are as many as its own."""
        repeated = {name: repeat_first_examples(getattr(self, name), share) for name in self._batches}
        with overriding(self, **repeated):
            return self.trial_as_is(objective)

    def rows_of(self, share: float) -> tuple[int, int]:
        """Return how many examples a pass over a share of the batch sees, and how many there are."""
        return count_first(getattr(self, self._batches[-1]), share)

    def _mode_kept(self) -> AbstractContextManager[object]:
        return overriding(self.model, train=lambda mode=True: self.model)

    def move_buffers(self) -> bool:
        """Run the model forward on the whole batch as it is, where the first pass is not to move the buffers.

        No generator is afterwards another, so that a run that goes on from a checkpoint, which asks anew whether any
        buffer moves, is the run that was not interrupted.

        Returns:
            Whether any moved.
        """
        if all(buffer is None for module in self.moving for buffer in module._buffers.values()):
            return False
        with self._buffers.moving(), random_states_kept(devices_of(self.model)):
            self._run_forward()
        return self._buffers.moved()

    def _run_forward(self) -> None:
        def end(loss: Tensor) -> Tensor:
            raise Ended

        with suppress(Ended):
            self._run(end, -1, share=1.0)

    @contextmanager
    def _reducing_at_the_end(self, index: int) -> Iterator[None]:
        """Let DDP reduce no gradients in a pass that is not the last."""
        reducing = data_parallel(self.model) or self.model
        if is_sharded(self.model):  # FSDP2 reduces in every pass
            yield
        elif index < 0:
            with self.accelerator.no_sync(reducing), unfinished_forward(self.model):
                yield
        elif self._prefix is not None or index < self.defense.passes - 1:
            with self.accelerator.no_sync(reducing):
                yield
        else:
            yield


def scaled(accelerator: Accelerator, objective: Objective, loss: Tensor) -> Tensor:
    """Return `objective(loss)`, computed at the scale that `backward` is going to have, where there is one."""
    scaler = accelerator.scaler
    if scaler is None:
        return objective(loss)
    # An objective may differentiate the loss itself, and in float16 that inner gradient needs the scale too:
    # without it a penalty's gradient was off by 90 %. Objectives are homogeneous, so the scale comes out again.
    scale: Tensor = scaler.scale(loss.new_ones(()))
    return objective(loss * scale) / scale


class TrainerPasses(Passes):
    """The passes of a Trainer's step: its own `training_step`, with another loss.

    What other code does in a pass does not reach the next one. The Trainer prepares the batch once (it may augment or
    generate there), and each pass gets it, or the part that the defense asks for, as it was prepared, in containers
    and tensors of its own; the first pass over the whole batch gets the prepared one itself, as in a stock step. Only
    that pass moves the numbers that the Trainer counts itself, and the loss finds the same ones in all passes.

    Args:
        trainer: The Trainer.
        stock_step: Its `training_step`, forward and backward, which returns the detached loss.
        defense: It says how many passes there are, and which share of the batch each sees.
        model: The model as the Trainer wrapped it.
        inputs: The batch.
        num_items_in_batch: As `training_step` got it.
    """

    _batches = ("_as_given", "_as_prepared")

    def __init__(
        self,
        trainer: Trainer,
        stock_step: Callable[..., Tensor],
        defense: Defense,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> None:
        super().__init__(trainer.accelerator, defense, model)
        self._trainer, self._stock_step = trainer, stock_step
        self._compute_loss, self._prepare_inputs = trainer.compute_loss, trainer._prepare_inputs
        self._items = num_items_in_batch
        self._shifted = getattr(trainer, "_loss_shifts_labels", False)  # as Transformers counts, since 5.20
        self._counting = next(index for index in range(defense.passes) if defense.share_of_batch(index) == 1)
        self._inputs: Any = inputs
        self._as_given: Any = private_copy(inputs)
        self._given = self._prepares_nothing = self._counted = False
        self._counters: dict[str, Any] | None = None  # as the first loss finds them
        self._prepared: list[Any] = []
        self._as_prepared: Any = None

    def prepare(self) -> None:
        """Run the training step until it has prepared the batch; do nothing if it is prepared."""
        if self._prepared:
            return
        with ExitStack() as uncounted:  # but what is counted while the batch is prepared counts

            def prepare(batch: Any) -> Any:
                uncounted.close()
                self._keep_prepared(batch)
                raise Ended

            def compute_loss(*args: Any, **kwargs: Any) -> Any:
                raise Ended

            uncounted.enter_context(counters_kept(self._trainer))
            with overriding(self._trainer, compute_loss=compute_loss, _prepare_inputs=prepare), suppress(Ended):
                self._stock_step(self.model, self._give(), self._items)
        if not self._prepared:
            self._prepares_nothing = True
            self._prepared.append(self._inputs)
            self._as_prepared = private_copy(self._as_given)

    def _run(self, objective: Objective, index: int, share: float) -> Tensor:
        trainer = self._trainer
        if index != self._counting:
            self.prepare()

        def compute_objective(*args: Any, **kwargs: Any) -> Any:
            if self._counters is None:
                self._counters = counters_in(vars(trainer))
            if index != self._counting:
                override(stack, trainer, **counters_in(self._counters))
            result = self._compute_loss(*args, **kwargs)
            loss, *outputs = result if isinstance(result, tuple) else (result,)
            if trainer.args.n_gpu > 1:
                loss = loss.mean()  # DataParallel returns one of each GPU, and the stock step takes their mean later
            value = scaled(trainer.accelerator, objective, loss)
            return (value, *outputs) if isinstance(result, tuple) else value

        def prepare(batch: Any) -> Any:
            if not self._prepared:
                self._keep_prepared(batch)
            if index == self._counting and not self._counted:
                self._counted = True  # else the pass is run once more, and the loss may have taken labels out of it
                return self._prepared[0]
            return private_copy(first_examples(self._as_prepared, share))

        with ExitStack() as stack:
            stack.enter_context(self._reducing_at_the_end(index))
            override(stack, trainer, compute_loss=compute_objective, _prepare_inputs=prepare)
            if index != self._counting:
                stack.enter_context(counters_kept(trainer))
            train = train_without_walk(self.modules, _PLAIN)
            if train is not None:
                override(stack, self.model, train=train)
            items = items_of_part(self._items, self._as_given, share, self._shifted)
            given = self._give()
            if self._prepares_nothing and share < 1:
                given = first_examples(given, share)
            return self._stock_step(self.model, given, items)

    def _give(self) -> Any:
        """Return the batch for a training step: the first gets the Trainer's own, as ever."""
        given, self._given = self._given, True
        return private_copy(self._as_given) if given else self._inputs

    def _keep_prepared(self, batch: Any) -> None:
        self._prepared.append(self._prepare_inputs(batch))
        self._as_prepared = private_copy(self._prepared[0])
