"""What the tests of pure functions share: reading tensors bit for bit, and as one vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@pytest.fixture(scope="session")
def same_bits() -> Callable[[Sequence[Tensor], Sequence[Tensor]], bool]:
    """Return a comparison that tells -0.0 from 0.0 and one NaN from another."""

    def compare(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
        return len(first) == len(second) and all(
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(
                a.detach().contiguous().view(INTEGERS[a.dtype.itemsize]),
                b.detach().contiguous().view(INTEGERS[b.dtype.itemsize]),
            )
            for a, b in zip(first, second, strict=True)
        )

    return compare


@pytest.fixture(scope="session")
def joined() -> Callable[[Sequence[Tensor]], Tensor]:
    """Return the concatenation of tensors in float64: the one vector that they stand for."""

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])

    return join


class _Entries(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.count += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


@pytest.fixture(scope="session")
def entries_made() -> Callable[[Callable[[], object]], int]:
    """Return a measure of work that no clock is needed for: the entries of all tensors that a call makes."""

    def count(call: Callable[[], object]) -> int:
        with _Entries() as entries:
            call()
        return entries.count

    return count
