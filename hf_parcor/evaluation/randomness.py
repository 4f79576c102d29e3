"""Python's, NumPy's and PyTorch's random numbers, put back where they were."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def generator_kept(collator: Any) -> Iterator[None]:
    """Let a collator draw from a copy of its own generator, if it has one, as those of Transformers with a seed do."""
    collator = getattr(collator, "data_collator", collator)  # of a Trainer's that removes columns
    if not hasattr(collator, "generator"):
        yield
        return
    own = collator.generator
    collator.generator = copy.deepcopy(own)  # None where it is made at the first batch
    try:
        yield
    finally:
        collator.generator = own


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


def seed_the_cpu(seed: int) -> None:
    """Seed every global generator of the CPU, and no other: those of accelerators are the model's."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
