"""Python's, NumPy's and PyTorch's random numbers, put back where they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Put back the state of every global generator, those of the CPU and of one device, whatever drew from them."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global state is what is kept)
    accelerators = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    try:
        with torch.random.fork_rng(accelerators, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
