"""Counts what a process sends, by collective, whoever asks for it: Python, autograd, or DDP's own C++."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def _size(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in _flat(tensors))


def _flat(tensors: Any) -> Iterator[Tensor]:
    if isinstance(tensors, Tensor):
        yield tensors
    else:
        for part in tensors:
            yield from _flat(part)


# Each operator with its collective, and where the whole tensor is: an argument, or −1 for what it returns.
_OPERATORS: dict[str, tuple[str, int]] = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::allreduce_coalesced_": ("all_reduce", 0),
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "_c10d_functional::all_reduce_": ("all_reduce", 0),
    "c10d::allgather_": ("all_gather", 0),
    "c10d::_allgather_base_": ("all_gather", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", -1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "_c10d_functional::broadcast": ("broadcast", 0),
}
_WITHOUT_BYTES = {"c10d::barrier", "_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}


class CollectiveCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts calls and bytes of collectives while it is entered, and the operations of matrix products.

    DDP reduces its buckets from C++, but through the dispatcher, in the thread state of the backward that was called;
    so it is seen here too, as a communication hook would see it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and count it.

        Raises:
            RuntimeError: A collective that the table does not have.
        """
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it is made of comes here next
        name = func._schema.name
        counted = func.namespace in {"c10d", "_c10d_functional"} and name not in _WITHOUT_BYTES
        if counted and name not in _OPERATORS:
            raise RuntimeError(f"expected one of {', '.join(_OPERATORS)}, got {name}; add it to the table")
        result = func(*args, **(kwargs or {}))
        if counted:
            collective, place = _OPERATORS[name]
            self.calls[collective] += 1
            self.bytes[collective] += _size(result if place < 0 else args[place])
        if func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result

    def read(self) -> dict[str, Any]:
        """Return what was counted since the last reading."""
        counted = {name: {"calls": self.calls[name], "bytes": self.bytes[name]} for name in sorted(self.calls)}
        found = {"collectives": counted, "operations": self.operations}
        self.calls, self.bytes, self.operations = Counter(), Counter(), 0
        return found
