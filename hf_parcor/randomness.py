"""Python's, NumPy's and PyTorch's random numbers: the states of their generators, kept and put back."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class RandomStates:
    """The states of all global generators as they are: Python's, NumPy's, PyTorch's on the CPU and on accelerators.

    Args:
        devices: The accelerators whose generators count; those of the CPU always do.

    Examples:
        >>> states = RandomStates()
        >>> first = torch.rand(2), random.random()
        >>> states.put_back()
        >>> torch.equal(first[0], torch.rand(2)), first[1] == random.random()
        (True, True)
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global state)
        self._cpu = torch.get_rng_state()
        accelerators = [device for device in dict.fromkeys(devices) if device.type not in ("cpu", "meta")]
        self._devices = [(device, _get_state(device)) for device in accelerators]

    def put_back(self) -> None:
        """Let every generator go on from these states."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            torch.get_device_module(device).set_rng_state(state, *_place(device))


@contextmanager
def random_states_kept(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Put the generators back after a block, whatever drew from them: two such blocks draw the same numbers."""
    states = RandomStates(devices)
    try:
        yield
    finally:
        states.put_back()


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


def seed_the_cpu(seed: int) -> None:
    """Seed every global generator of the CPU, and no other: those of accelerators are the model's.

    Examples:
        >>> draws = []
        >>> for seed in (3, 3, 4):
        ...     seed_the_cpu(seed)
        ...     draws.append((random.random(), np.random.random(), torch.rand(()).item()))
        >>> draws[0] == draws[1], [one == other for one, other in zip(draws[0], draws[2])]
        (True, [False, False, False])
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)


def _get_state(device: torch.device) -> Any:
    return torch.get_device_module(device).get_rng_state(*_place(device))


def _place(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # there is one of Apple's
