"""A vector whose tensors are spread over processes: the parts that are here, and what all ranks must agree on.

What computes with weights knows of ranks by this alone. Functions work on the local parts, as on any list of tensors;
where a number is of the whole vector (a maximum, a norm, a count), each rank finds that of its parts, and these few
numbers travel. What is random is drawn for a whole tensor on each rank, one tensor after the other, and cut: as one
process draws it. No tensor is gathered but by `whole`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

Cuts = tuple[tuple[DeviceMesh, int], ...]
"""The dimensions of a mesh that a tensor is cut along; none where each rank holds all of it."""


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, in the same memory; a plain tensor is itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return what this rank holds of each tensor."""
    return [local_part(tensor) for tensor in tensors] if has_shards(tensors) else list(tensors)


def addresses_of(tensors: Sequence[Tensor]) -> list[int]:
    """Return where what this rank holds of each tensor begins in memory; 0 for sparse ones and those without."""
    return [part.data_ptr() if part.layout is torch.strided else 0 for part in local_parts(tensors)]


def has_shards(tensors: Iterable[Tensor]) -> bool:
    """Say whether any tensor is a `DTensor`: most are of one or two classes."""
    return any(issubclass(kind, DTensor) for kind in set(map(type, tensors)))


def cuts_of(tensor: Tensor) -> Cuts:
    """Return the dimensions of the mesh that a tensor is cut along; replicas are not counted twice.

    Raises:
        TypeError: The ranks hold summands of the tensor.
    """
    if not isinstance(tensor, DTensor):
        return ()
    if any(placement.is_partial() for placement in tensor.placements):
        raise TypeError(
            f"expected a tensor that is sharded or replicated, got placements {tensor.placements}; "
            "redistribute it first"
        )
    return tuple(
        (tensor.device_mesh, dimension)
        for dimension, placement in enumerate(tensor.placements)
        if placement.is_shard() and tensor.device_mesh.size(dimension) > 1
    )


class ShardedVector(list[Tensor]):
    """The local parts of tensors that make up one vector together with those on other ranks.

    Every rank must hold parts of the same tensors, in the same order; a part may be empty.

    Args:
        tensors: At least one is a `DTensor`; the others are the same on all ranks.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__(local_parts(tensors))
        self.entries = sum(tensor.numel() for tensor in tensors)
        """The length of the whole vector."""
        self._places: dict[Cuts, list[int]] = {}
        for place, tensor in enumerate(tensors):
            self._places.setdefault(cuts_of(tensor), []).append(place)

    def replaced(self, tensors: Sequence[Tensor]) -> ShardedVector:
        """Return a vector spread in the same way, with other local parts."""
        other = ShardedVector.__new__(ShardedVector)
        other.extend(tensors)
        other.entries, other._places = self.entries, self._places
        return other

    def gather(self, measure: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """Return the measure, one number, of each part of the vector: those of all ranks, and in their order."""
        parts = [
            _gathered(measure([self[place] for place in places]), cuts).reshape(-1)
            for cuts, places in self._places.items()
        ]
        dtype, device = parts[0].dtype, parts[0].device
        for part in parts[1:]:
            dtype = torch.promote_types(dtype, part.dtype)
        return torch.cat([part.to(dtype=dtype, device=device) for part in parts])

    def total(self, measure: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """Return the sum of a measure of any shape over all parts of the vector."""
        sums = [_summed(measure([self[place] for place in places]), cuts) for cuts, places in self._places.items()]
        return torch.stack(sums).sum(0)

    def before(self, counts: Tensor) -> Tensor:
        """Return how much was counted before each local part begins.

        Args:
            counts: One for each local part. The order is that of the tensors and, within one, of the ranks: for
                shards of the first dimension this is row-major order.
        """
        everywhere, lower = counts.clone(), torch.zeros_like(counts)
        for cuts, places in self._places.items():
            rows = _gathered(counts[places], cuts)
            everywhere[places] = rows.sum(0)
            lower[places] = rows[: _own_row(cuts)].sum(0)
        return everywhere.cumsum(0) - everywhere + lower


def one_vector(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors as the list that functions of one vector work on: in the same memory, and aware of ranks."""
    if isinstance(tensors, ShardedVector):
        return tensors
    if has_shards(tensors):
        return ShardedVector(tensors)
    return tensors if isinstance(tensors, list) else list(tensors)


def total(tensors: Sequence[Tensor], measure: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Return the sum of a measure over all ranks; for tensors of one process, the measure itself."""
    return tensors.total(measure) if isinstance(tensors, ShardedVector) else measure(list(tensors))


def alike(vector: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Return local parts as a vector with the sharding of another one."""
    return vector.replaced(tensors) if isinstance(vector, ShardedVector) else tensors


def spread_alike(first: Tensor, second: Tensor) -> bool:
    """Say whether two tensors of one shape are sharded alike: every rank holds the same places of both."""
    if isinstance(first, DTensor) and isinstance(second, DTensor):
        return first.device_mesh == second.device_mesh and first.placements == second.placements
    return not isinstance(first, DTensor) and not isinstance(second, DTensor)


def sharded_as(part: Tensor, like: Tensor) -> Tensor:
    """Return the tensor whose part on this rank is `part`, sharded as `like` is; the part stays where it lies."""
    if not isinstance(like, DTensor):
        return part
    if part.device.type != like.device_mesh.device_type:  # offloaded: `from_local` would bring it to where ranks meet
        made = torch.empty_like(like, dtype=part.dtype)
        local_part(made).data = part
        return made
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def cut_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that every rank has whole, spread as `like` is: each keeps its part, and nothing travels."""
    if not isinstance(like, DTensor):
        return tensor
    cut = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return sharded_as(local_part(cut).to(local_part(like).device), like)


def has_whole_rows(tensor: Tensor) -> bool:
    """Say whether a tensor is cut along its first dimension alone, if at all."""
    return not isinstance(tensor, DTensor) or all(
        tensor.placements[dimension].is_shard(0) for _, dimension in cuts_of(tensor)
    )


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from the ranks that hold its parts, all of which must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_generator(tensors: Sequence[Tensor], generator: torch.Generator | None) -> torch.Generator | None:
    """Return a source of randomness that is in the same state on all ranks which hold parts of the tensors.

    One that is given is brought into the state of the first rank's. In place of PyTorch's global one, which dropout
    moves differently on each rank, another is seeded by a number that the first rank draws from it.
    """
    if not has_shards(tensors):
        return generator
    if generator is None:
        seed = int(of_first_rank(torch.randint(2**62, ()), tensors))
        return torch.Generator(local_part(tensors[0]).device).manual_seed(seed)
    generator.set_state(of_first_rank(generator.get_state(), tensors))
    return generator


def of_first_rank(value: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """Return a value as the first of the ranks has it which hold parts of the tensors; without shards, as it is."""
    mesh = next((tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)), None)
    if mesh is None:
        return value
    return _gathered(value, tuple((mesh, dimension) for dimension in range(mesh.ndim)))[0]


def _own_row(cuts: Cuts) -> int:
    row = 0
    for mesh, dimension in cuts:
        row = row * mesh.size(dimension) + mesh.get_local_rank(dimension)
    return row


def _gathered(value: Tensor, cuts: Cuts) -> Tensor:
    """Return a value of each rank, one a row."""
    rows = value.reshape(1, -1)
    for mesh, dimension in reversed(cuts):
        here = rows.to(mesh.device_type).reshape(1, -1)  # weights may be offloaded from where their ranks meet
        there = here.new_empty((mesh.size(dimension), here.shape[1]))
        distributed.all_gather(list(there), here[0], group=mesh.get_group(dimension))
        rows = there
    return rows.to(value.device).reshape(-1, *value.shape)


def _summed(value: Tensor, cuts: Cuts) -> Tensor:
    for mesh, dimension in cuts:
        here = value.to(mesh.device_type)
        distributed.all_reduce(here, group=mesh.get_group(dimension))
        value = here.to(value.device)
    return value
