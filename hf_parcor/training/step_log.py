"""What the defended steps since the last log entry had in common, kept on the device until it is read."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.utils import logging

from hf_parcor.defenses import DefendedStep, Defense
from hf_parcor.injection import CorruptionNorm

logger = logging.get_logger(__name__)

_SWALLOWED = 0.1  # share of the corruption's norm that may be lost to rounding before it is said


class StepLog:
    """Sums over defended micro-batches; reading them waits for the device, adding does not.

    A micro-batch with a value that is not finite, from an overflow in float16, is left out, as the Trainer does with
    its own loss.

    Attributes:
        defense: What this run defends with; None before the first.
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

    def _reset(self) -> None:
        self._sums: Tensor | None = None
        self._batches = 0
        self._steps = 0

    def add(self, step: DefendedStep, norm: CorruptionNorm, *, ends_step: bool) -> None:
        """Add one micro-batch; `ends_step` if the optimizer steps after it."""
        first, last = step.losses[0], step.losses[-1]
        values = torch.stack([value.float().to(first.device) for value in (first, last, norm.asked, norm.realised)])
        finite = values.isfinite().all()
        values = torch.cat([torch.where(finite, values, 0.0), finite.view(1)])
        self._sums = values if self._sums is None else self._sums + values
        self._batches += 1
        self._steps += ends_step
        self.defended_steps += ends_step
        if self._idle is None:
            self._idle, self.selected = dict(step.parameters), len(step.parameters)
        if self._idle:  # a few, after the first micro-batch
            self._idle = {name: parameter for name, parameter in self._idle.items() if parameter.grad is None}

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over steps since the last reading, over all processes, and start anew."""
        if self._sums is None:
            return {}
        sums = self._sums
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, reduction="mean")
        first, last, asked, realised, counted = sums.tolist()
        steps = max(self._steps, 1) * counted / self._batches
        self._reset()
        if not counted:
            return {}
        asked, realised = asked / counted, realised / counted
        if abs(realised - asked) > _SWALLOWED * asked and not self._warned:
            self._warned = True
            logger.warning(
                f"The weights took a corruption of norm {realised:.3g} where {asked:.3g} was asked for: their "
                "precision swallows it. Train with float32 weights (bf16=True keeps them), or raise epsilon."
            )
        return {
            "loss_clean": first / steps,
            "loss_corrupted": last / steps,
            "sharpness": (last - first) / steps,
            "corruption_norm_asked": asked,
            "corruption_norm": realised,
        }
