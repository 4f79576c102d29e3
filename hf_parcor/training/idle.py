"""Notice a defense that does nothing in a run, or not to all that it was to defend."""

from __future__ import annotations

import math
import weakref
from dataclasses import fields
from typing import Any, ClassVar

from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_parcor.defenses import Defense
from hf_parcor.training.step_log import StepLog

logger = logging.get_logger(__name__)


class IdleDefenseCallback(TrainerCallback):
    """Says where a defense does nothing: at the start of a run where that can be known, else at its end.

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
                f"The defense does nothing in this run: {_zeros(defense)} is the stock training step. Raise it, or "
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
                "ever had a gradient, so nothing was corrupted. The model's forward does not use them: choose other "
                "target_modules.",
            )
        elif idle and self._log.chosen:  # all that can be trained is no choice: many models have an unused pooler
            self._warn(
                state,
                f"{len(idle)} of the {selected} defended parameters, such as {idle[0]}, never had a gradient in this "
                "run and were not corrupted: the model's forward did not use them. Leave them out of target_modules, "
                "or do not report them as defended.",
            )

    def _warn(self, state: TrainerState, text: str) -> None:
        self._said = True
        if state.is_world_process_zero:
            logger.warning(text)


class IdleLoop:
    """Says when a loop with Accelerate is over that its defense did nothing.

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

    def count(self, defense: Defense, *, active: bool, epoch: float | None) -> None:
        """Count one micro-batch; a defense that is the stock step is said at once, and once."""
        self._acted |= active
        if self._acted:
            self.summary = ""
            return
        if defense.is_stock:
            logger.warning_once(
                f"defended_backward: the defense does nothing, since {_zeros(defense)} is the stock training step."
            )
            return
        self._calls += 1
        self.summary = (
            f"The defense did nothing in this loop: none of its {self._calls} calls of defended_backward was defended "
            f"(start_epoch={defense.start_epoch:g}, interval={defense.interval}, and the last epoch was "
            f"{epoch or 0:g}). Lower start_epoch or interval, or train for longer, and do not report it as a defended "
            "run."
        )

    def _say(self) -> None:
        if self.summary:
            logger.warning(self.summary)


def _zeros(defense: Defense) -> str:
    """Return which settings are zero, of a defense that is the stock step because of them.

    Examples:
        >>> from hf_parcor.defenses import GradientPenalty
        >>> _zeros(GradientPenalty(weight=0))
        'weight=0'
    """
    constraint = getattr(defense, "constraint", None)
    settings = {
        setting.name: getattr(part, setting.name)
        for part in (defense, constraint)
        if part is not None
        for setting in fields(part)
    }
    zeros = [name for name, value in settings.items() if value == 0 and value is not False and name != "start_epoch"]
    return " and ".join(f"{name}=0" for name in zeros)


def _length_of(loader: Any) -> int:
    try:
        return len(loader)
    except TypeError:  # of a stream, or none
        return 0


def _had_its_turn(defense: Defense, first: int, end: int) -> bool:
    """Whether a multiple of the interval is among the steps; a run that was resumed may be too short for one."""
    return -(-first // defense.interval) * defense.interval < end
