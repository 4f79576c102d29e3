"""The states of Python's, NumPy's and PyTorch's global generators, kept and put back."""

from __future__ import annotations

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
        self._devices: list[tuple[torch.device, Any]] = [
            (device, torch.get_device_module(device).get_rng_state(device)) for device in _with_generators(devices)
        ]

    def put_back(self) -> None:
        """Let every generator go on from these states."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def random_states_kept(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Put the generators back after a block, whatever drew from them: two such blocks draw the same numbers."""
    states = RandomStates(devices)
    try:
        yield
    finally:
        states.put_back()


def _with_generators(devices: Iterable[torch.device]) -> list[torch.device]:
    """Return the accelerators that have a generator each; that of Apple's is one for all, and asks for no device."""
    return [device for device in dict.fromkeys(devices) if device.type not in ("cpu", "meta", "mps")]
