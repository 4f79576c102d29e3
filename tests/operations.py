"""How many floating-point operations a call computes."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class _Counter(TorchDispatchMode):
    """Counts by PyTorch's formulas, as its FlopCounterMode does, which also counts for each module: twice the time."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def count_operations(run: Callable[[], object]) -> int:
    """Return the floating-point operations of matrix products and convolutions, forward and backward, in a call."""
    with _Counter() as counter:
        run()
    return counter.total
