"""Notice a training run that collapsed, so that nobody reports it as a result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

_FEWEST_ENTRIES = 4  # fewer log entries say nothing about a trend
_FALL = 0.97  # a run that learns leaves its last quarter's loss well below this share of its first entry's
_EXPLODED = 4.0  # corrupted loss over clean loss: beyond, the corruption destroys the model at every step


def signs_of_collapse(log_history: Sequence[dict[str, Any]]) -> list[str]:
    """Return what speaks for a collapsed run, in plain sentences; nothing if it looks healthy.

    Looks at the `loss`, `loss_clean` and `loss_corrupted` of a Trainer's `state.log_history`: a loss that is not a
    number, a clean loss that did not fall from the first entry to the mean of the last quarter, and a corrupted loss
    of more than four times the clean one in the last quarter.

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
    """
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
        signs.append(f"the clean loss did not fall: {first:.2f} at first, {last:.2f} in the last quarter")
    corrupted = [entry["loss_corrupted"] for entry in quarter if "loss_corrupted" in entry]
    if corrupted and sum(corrupted) / len(corrupted) > _EXPLODED * last:
        times = sum(corrupted) / len(corrupted) / last if last > 0 else math.inf
        signs.append(f"the corrupted loss is {times:.1f} times the clean loss")
    return signs


class CollapseCallback(TrainerCallback):
    """Says at the end of training if the run shows signs of collapse."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn, with what to do."""
        signs = signs_of_collapse(state.log_history)
        if signs and state.is_world_process_zero:
            logger.warning(
                f"This run may have collapsed: {'; '.join(signs)}. Do not report it as a result: lower epsilon, start "
                "the defense later (start_epoch), or defend fewer modules."
            )
