"""What the defended steps since the last log entry had in common, kept on the device until it is read."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.utils import logging

from hf_parcor.defenses import DefendedStep
from hf_parcor.injection import CorruptionNorm

logger = logging.get_logger(__name__)

_SWALLOWED = 0.1  # share of the corruption's norm that may be lost to rounding before it is said


class StepLog:
    """Sums over defended micro-batches; reading them waits for the device, adding does not.

    A micro-batch with a value that is not finite, from an overflow in float16, is left out, as the Trainer does with
    its own loss.
    """

    def __init__(self) -> None:
        self._warned = False
        self.reset()

    def reset(self) -> None:
        """Forget the steps since the last reading, as the stock Trainer does with its loss when a run begins."""
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

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over steps since the last reading, over all processes, and start anew."""
        if self._sums is None:
            return {}
        sums = self._sums
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, reduction="mean")
        first, last, asked, realised, counted = sums.tolist()
        steps = max(self._steps, 1) * counted / self._batches
        self.reset()
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
