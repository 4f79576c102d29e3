"""Which outputs of a prefix something outside of it consumes, found in one pass; the others need not be kept."""

from __future__ import annotations

import pickle
import random
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

Place = tuple[nn.Module, int, int]
"""A tensor that a prefix hands on: the module, the number of its call, and which of the tensors that it returns."""


class Consumers(TorchDispatchMode):
    """Sees, inside a `with` block, what becomes of the tensors that a prefix hands on.

    A tensor is consumed if an operation takes it or a view of it, if it is a part of what the model returns, or if
    somebody still holds it when the pass is over.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._places: dict[int | None, Place] = {}
        self._held: list[tuple[Place, Tensor]] = []
        self._consumed: set[Place] = set()
        self._chance = False

    def hand_on(self, module: nn.Module, index: int, parts: Iterable[Any]) -> None:
        """Remember what a module's call hands on."""
        for number, part in enumerate(parts):
            if isinstance(part, Tensor):
                storage = _storage_of(part) if type(part) is Tensor else None
                if storage is not None:  # else it is kept: of a class of its own, views cannot be told
                    place = module, index, number
                    self._places[storage] = place
                    self._held.append((place, part))  # no other tensor takes its memory meanwhile

    def __enter__(self) -> Consumers:
        self._drawn = _state_of_others()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._chance |= self._drawn != _state_of_others()

    def leave(self) -> None:
        """End the block, if it has not ended."""
        if self in _get_current_dispatch_mode_stack():
            self.__exit__(None, None, None)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._see((args, kwargs))
        result = function(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in function.tags:
            self._chance |= any(isinstance(leaf, Tensor) and leaf.numel() == 1 for leaf in tree_leaves(result))
        return result

    def _see(self, values: Any) -> None:
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor):
                place = self._places.get(_storage_of(leaf))
                if place is not None:
                    self._consumed.add(place)

    def unused(self, result: Any) -> set[Place]:
        """Return what was not consumed, once the block is over.

        Nothing where a single number was drawn outside of the prefix: which layers run may depend on it, and so what
        other passes consume.

        Args:
            result: What the model returned.
        """
        self._see(result)
        held = [(place, weakref.ref(tensor)) for place, tensor in self._held]
        self._held.clear()
        return {
            place for place, tensor in held if tensor() is None and place not in self._consumed and not self._chance
        }


def _storage_of(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def _state_of_others() -> tuple[Any, ...]:
    """Return the states of the generators that are not PyTorch's."""
    return random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002 (the global state)


class Unkept(Tensor):
    """Stands for a tensor that nothing outside of the prefix consumes: it has all of it but numbers.

    An operation on it raises.
    """

    @staticmethod
    def of(tensor: Tensor) -> Unkept:
        """Return one of the tensor's shape, dtype, device and strides."""
        return Unkept._made(tensor, tensor.shape)

    def first(self, dimension: int, size: int) -> Unkept:
        """Return what stands for the first part along a dimension."""
        return Unkept._made(self, [size if place == dimension else other for place, other in enumerate(self.shape)])

    @staticmethod
    def _made(tensor: Tensor, shape: Sequence[int]) -> Unkept:
        made: Unkept = Tensor._make_wrapper_subclass(
            Unkept,
            shape,
            strides=tensor.stride(),
            dtype=tensor.dtype,
            device=tensor.device,
            requires_grad=tensor.requires_grad,
        )
        return made

    __torch_function__: Callable[..., Any] = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise UnkeptError(
            f"{function}: expected an output of the shared prefix that the first step did not use to be used by none; "
            "pass reuse_prefix=False"
        )


class UnkeptError(RuntimeError):
    """What was not kept of a prefix is used after all."""
