"""Log the losses of a defended run, and warn of a collapse and of a defense that does nothing."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_parcor.defenses import DefendedStep, Defense
from hf_parcor.distributed.dtensors import local_part
from hf_parcor.injection import CorruptionNorm, is_swallowed

logger = logging.get_logger(__name__)

_FEWEST_ENTRIES = 4  # fewer log entries say nothing about a trend
_FALL = 0.97  # a run that learns leaves its last quarter's loss well below this share of its first entry's
_EXPLODED = 4.0  # corrupted loss over clean loss: beyond, the corruption may destroy the model at every step


def signs_of_collapse(log_history: Sequence[dict[str, Any]], model: nn.Module | None = None) -> list[str]:
    """Return what speaks for a collapsed run, in plain sentences; nothing if it looks healthy.

    Looks at the weights, and at the `loss`, `loss_clean` and `loss_corrupted` of a Trainer's `state.log_history`:
    weights or a loss that are not numbers, a clean loss that did not fall from the first entry to the mean of the last
    quarter, and a corrupted loss that did not fall either and is more than four times the clean one in the last
    quarter: where it falls, the corrupted model learns too. In place of a loss that is no number a Trainer logs 0
    (`logging_nan_inf_filter`): of a model that broke nothing but its weights speaks then.

    Shares mean something for losses that are zero at best, such as a cross-entropy. Others start at zero, as that of
    a policy gradient, which rises with its KL term, or fall below it, as a likelihood of densities does: of them only
    NaN and infinity speak.

    Examples:
        >>> signs_of_collapse([{"loss": 0.69, "loss_clean": 0.69, "loss_corrupted": 5.0}] * 8)
        ['the clean loss did not fall: 0.69 at first, 0.69 in the last quarter',
         'the corrupted loss is 7.2 times the clean loss']
        >>> signs_of_collapse([{"loss": 1 / (1 + step)} for step in range(8)])
        []
        >>> signs_of_collapse([{"loss": 0.09, "loss_clean": -0.02, "loss_corrupted": 0.2}] * 8)
        []
        >>> model = nn.Linear(1, 1)
        >>> _ = nn.init.constant_(model.bias, math.nan)
        >>> signs_of_collapse([], model)
        ['1 of 2 weights, such as bias, became NaN or infinite']
    """
    weights = {} if model is None else dict(model.named_parameters())
    broken = [name for name, weight in weights.items() if not _is_finite(weight)]
    if broken:
        return [f"{len(broken)} of {len(weights)} weights, such as {broken[0]}, became NaN or infinite"]
    # A loss of exactly zero is what the Trainer logs where every step overflowed, and no defended step counted.
    entries = [entry for entry in log_history if entry.get("loss", 0) != 0 or "loss_clean" in entry]
    if any(not math.isfinite(entry["loss"]) for entry in entries):
        return ["the loss became NaN or infinite"]
    if len(entries) < _FEWEST_ENTRIES:
        return []
    clean = [entry.get("loss_clean", entry["loss"]) for entry in entries]
    if clean[0] <= 0 or min(clean) < 0:
        return []
    signs = []
    quarter = entries[-max(1, len(entries) // 4) :]
    first, last = clean[0], sum(clean[-len(quarter) :]) / len(quarter)
    if last > _FALL * first:
        which = "clean loss" if "loss_clean" in entries[0] else "loss"
        signs.append(f"the {which} did not fall: {first:.2f} at first, {last:.2f} in the last quarter")
    corrupted = [entry["loss_corrupted"] for entry in entries if "loss_corrupted" in entry]
    late = [entry["loss_corrupted"] for entry in quarter if "loss_corrupted" in entry]
    exploded = sum(late) / len(late) if late else 0.0
    if late and exploded > max(_EXPLODED * last, _FALL * corrupted[0]):
        times = exploded / last if last > 0 else math.inf
        signs.append(f"the corrupted loss is {times:.1f} times the clean loss")
    return signs


def _is_finite(weight: Tensor) -> bool:
    part = local_part(weight.detach())
    return not part.is_floating_point() or part.is_meta or bool(part.isfinite().all())


class CollapseCallback(TrainerCallback):
    """Warns at the end of training if the run shows signs of collapse."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn, with what to do."""
        signs = signs_of_collapse(state.log_history, kwargs.get("model"))
        if signs and state.is_world_process_zero:
            logger.warning(
                f"This run may have collapsed: {'; '.join(signs)}. Do not report it as a result. If the same run "
                "without a defense learns, lower epsilon (or what the corruption's strength is), start the defense "
                "later (start_epoch), or defend fewer modules; else lower the learning rate."
            )


_MEASURED = 16  # of so many micro-batches, the first one's corruption is measured


class StepLog:
    """Sums over defended micro-batches; reading them waits for the device, adding does not.

    A micro-batch with a value that is not finite, from an overflow in float16, is left out, as the Trainer does with
    its own loss. The norm of the corruption is a mean over the first micro-batch after each reading and every 16th
    from there: to measure it moves 16 bytes a weight, beside the 32 of a step with one corruption step.

    Attributes:
        defense: What this run defends with, of late; None before the first.
        chosen: Whether somebody chose what is defended.
        defended_steps: Optimizer steps of this run that were defended.
        selected: How many parameters are defended; 0 before the first defended step.
    """

    def __init__(self) -> None:
        self._warned = False
        self.begin(None)

    def begin(self, defense: Defense | None, *, chosen: bool = False) -> None:
        """Begin a run, and forget the steps before it, as the stock Trainer does with its loss.

        Args:
            defense: What the run defends with.
            chosen: Whether somebody chose what is defended.
        """
        self.defense, self.chosen = defense, chosen
        self.defended_steps = self.selected = 0
        self._idle: dict[str, nn.Parameter] | None = None
        self._reset()

    @property
    def without_gradient(self) -> list[str]:
        """The defended parameters that had no gradient in any defended micro-batch of this run."""
        return list(self._idle or ())

    @property
    def wants_norm(self) -> bool:
        """Whether the next micro-batch's corruption is to be measured."""
        return self._batches % _MEASURED == 0

    def _reset(self) -> None:
        self._sums: Tensor | None = None
        self._batches = 0
        self._steps = 0

    def add(self, step: DefendedStep, defense: Defense, norm: CorruptionNorm | None, *, ends_step: bool) -> None:
        """Add one micro-batch.

        Args:
            step: What it ran.
            defense: What it was defended with, which may be another than when the run began.
            norm: Its corruption's, if that was measured.
            ends_step: Whether the optimizer steps after it.
        """
        if defense is not self.defense:
            self.defense, self._idle = defense, None
        first, last = step.losses[0], defense.corrupted_loss(step.losses)
        values = [first, last, *((norm.asked, norm.realised) if norm else ())]
        entries = torch.stack([value.float().to(first.device) for value in values])
        finite = entries.isfinite().all()
        entries = torch.where(finite, entries, 0.0)
        counts = torch.stack([finite, finite * (norm is not None)])
        sums = torch.cat([entries, entries.new_zeros(4 - len(entries)), counts])
        self._sums = sums if self._sums is None else self._sums + sums
        self._batches += 1
        self._steps += ends_step
        self.defended_steps += ends_step
        if self._idle is None:
            self._idle = dict(step.parameters) if defense.uses_gradients else {}
            self.selected = len(step.parameters)
        if self._idle:  # a few, after the first micro-batch
            self._idle = {name: parameter for name, parameter in self._idle.items() if parameter.grad is None}

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over steps since the last reading, over all processes, and start anew."""
        if self._sums is None:
            return {}
        sums = self._sums
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, reduction="mean")
        first, last, asked, realised, counted, measured = sums.tolist()
        steps = max(self._steps, 1) * counted / self._batches
        self._reset()
        if not counted:
            return {}
        losses = {"loss_corrupted": last / steps}
        if self.defense is None or self.defense.first_pass_is_clean:
            losses = {"loss_clean": first / steps, **losses, "sharpness": (last - first) / steps}
        if not measured:
            return losses
        asked, realised = asked / measured, realised / measured
        if is_swallowed(asked, realised) and not self._warned:
            self._warned = True
            logger.warning(
                f"The weights took a corruption of norm {realised:.3g} where {asked:.3g} was asked for: their "
                "precision swallows it. Train with float32 weights (bf16=True keeps them), or raise epsilon."
            )
        return {**losses, "corruption_norm_asked": asked, "corruption_norm": realised}


class IdleDefenseCallback(TrainerCallback):
    """Warns of a defense that does nothing: at the start of a run where that can be known, else at its end.

    Args:
        log: What the defended steps of the run leave behind.
    """

    def __init__(self, log: StepLog) -> None:
        self._log = log
        self._begun_at = 0
        self._said = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn of a defense that is the stock step, and of a run that ends before it starts or comes again."""
        self._begun_at, self._said = state.global_step, False
        defense = self._log.defense
        if defense is None:
            return
        if defense.is_stock:
            self._warn(
                state,
                f"The defense does nothing in this run: {defense.why_stock} is the stock training step. Change it, or "
                "take the stock Trainer (--defense none).",
            )
            return
        micro_batches = _length_of(kwargs.get("train_dataloader"))
        steps_an_epoch = math.ceil(micro_batches / args.gradient_accumulation_steps)
        epochs = state.max_steps / steps_an_epoch if steps_an_epoch else math.inf
        if defense.start_epoch >= min(epochs, state.num_train_epochs):
            self._warn(
                state,
                f"The defense does nothing in this run: it is to start at epoch {defense.start_epoch:g}, and training "
                f"ends at epoch {min(epochs, state.num_train_epochs):g}. Lower start_epoch, or train for longer.",
            )
        elif defense.interval > state.max_steps > 1:
            often = "in the first step alone" if defense.start_epoch == 0 else "in no step"
            self._warn(
                state,
                f"The defense acts {often}: its interval of {defense.interval} steps is longer than this run of "
                f"{state.max_steps}. Lower interval, or train for longer.",
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn of a run without a defended step, and of what was to be defended and never had a gradient."""
        defense = self._log.defense
        if defense is None or self._said:
            return
        if self._log.defended_steps:
            self._warn_of_what_is_not_used(state)
        elif _had_its_turn(defense, self._begun_at, state.global_step):
            self._warn(
                state,
                f"The defense did nothing in this run: no step of {state.global_step - self._begun_at} was defended "
                f"(start_epoch={defense.start_epoch:g}, interval={defense.interval}, and training ended at epoch "
                f"{state.epoch or 0:g}). Do not report it as a defended run.",
            )

    def _warn_of_what_is_not_used(self, state: TrainerState) -> None:
        idle, selected = self._log.without_gradient, self._log.selected
        if len(idle) == selected:
            self._warn(
                state,
                f"The defense did nothing in this run: none of the {selected} defended parameters, such as {idle[0]}, "
                "ever had a gradient, so nothing was corrupted. The model does not use them, or something behind them "
                "passes none back: choose other target_modules.",
            )
        elif idle and self._log.chosen:  # all that can be trained is no choice: many models have an unused pooler
            self._warn(
                state,
                f"{len(idle)} of the {selected} defended parameters, such as {idle[0]}, never had a gradient in this "
                "run and were not corrupted: the model did not use them, or something behind them passed none back. "
                "Leave them out of target_modules, or do not report them as defended.",
            )

    def _warn(self, state: TrainerState, text: str) -> None:
        self._said = True
        if state.is_world_process_zero:
            logger.warning(text)


class IdleLoop:
    """Warns at the end of a loop with Accelerate whose defense did nothing.

    Such a loop tells nobody its length or its end, so this is when its Accelerator goes, at the latest at the end of
    the program. Only the main process says it.

    Examples:
        >>> from hf_parcor.defenses import GradientPenalty
        >>> loop = IdleLoop.of(Accelerator(cpu=True))
        >>> loop.count(GradientPenalty(start_epoch=3), active=False, epoch=1)
        >>> loop.summary.partition("(")[0]
        'The defense did nothing in this loop: none of its 1 calls of defended_backward was defended '
    """

    _known: ClassVar[weakref.WeakKeyDictionary[Accelerator, IdleLoop]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self.summary = ""
        self._calls, self._acted = 0, False

    @classmethod
    def of(cls, accelerator: Accelerator) -> IdleLoop:
        """Return what was counted with this Accelerator."""
        loop = cls._known.get(accelerator)
        if loop is None:
            loop = cls._known[accelerator] = cls()
            if accelerator.is_main_process:
                weakref.finalize(accelerator, loop._say)
        return loop

    def count(self, defense: Defense, *, active: bool, epoch: float | None, unused: str = "") -> None:
        """Count one micro-batch, with a defended parameter if none had a gradient; a stock step is said at once."""
        self._acted |= active and not unused
        if self._acted:
            self.summary = ""
            return
        if defense.is_stock:
            logger.warning_once(
                f"defended_backward: the defense does nothing, since {defense.why_stock} is the stock training step."
            )
            return
        self._calls += 1
        if unused:
            self.summary = (
                f"The defense did nothing in this loop: in {self._calls} calls of defended_backward no defended "
                f"parameter, such as {unused}, ever had a gradient, so nothing was corrupted. Let loss_fn compute "
                "with the model that was passed beside it, or defend what its loss depends on."
            )
            return
        self.summary = (
            f"The defense did nothing in this loop: none of its {self._calls} calls of defended_backward was defended "
            f"(start_epoch={defense.start_epoch:g}, interval={defense.interval}, and the last epoch was "
            f"{epoch or 0:g}). Lower start_epoch or interval, or train for longer, and do not report it as a defended "
            "run."
        )

    def _say(self) -> None:
        if self.summary:
            logger.warning(self.summary)


def _length_of(loader: Any) -> int:
    try:
        return len(loader)
    except TypeError:  # of a stream, or none
        return 0


def _had_its_turn(defense: Defense, first: int, end: int) -> bool:
    """Whether a multiple of the interval is among the steps; a run that was resumed may be too short for one."""
    return -(-first // defense.interval) * defense.interval < end
