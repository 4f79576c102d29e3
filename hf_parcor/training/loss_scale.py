"""The objective of a pass under the loss scale of float16."""

from __future__ import annotations

from accelerate import Accelerator
from torch import Tensor

from hf_parcor.defenses import Objective


def scaled(accelerator: Accelerator, objective: Objective, loss: Tensor) -> Tensor:
    """Return `objective(loss)`, computed at the scale that `backward` is going to have, where there is one."""
    scaler = accelerator.scaler
    if scaler is None:
        return objective(loss)
    # An objective may differentiate the loss itself, and in float16 that inner gradient needs the scale too:
    # without it a penalty's gradient was off by 90 %. Objectives are homogeneous, so the scale comes out again.
    scale: Tensor = scaler.scale(loss.new_ones(()))
    return objective(loss * scale) / scale
