"""The other processes that train the same model, as far as a defense has to know them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Processes(Protocol):
    """Processes that take the same step, each with a batch of its own; all of them must make the same calls."""

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite each tensor with its mean over the processes."""

    def agree_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite each tensor with that of the first process."""
