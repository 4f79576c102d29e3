"""What processes tell each other about a step: averages, and what one of them drew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, distributed

_BUCKET = 25 * 2**20  # bytes of one call, as many as DDP takes


class ProcessGroup:
    """All processes of `torch.distributed`, for tensors that lie whole on each; see `hf_parcor.defenses.Processes`.

    Tensors travel in buckets, so that a model takes a few calls, and no second copy of it.
    """

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite each tensor with its mean over the processes; every process gets the same bits."""

        def mean_(bucket: Tensor) -> None:
            bucket /= distributed.get_world_size()  # first, as DDP does: a sum of many overflows sooner
            distributed.all_reduce(bucket)

        _in_buckets(tensors, mean_)

    def agree_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite each tensor with that of the first process."""
        _in_buckets(tensors, lambda bucket: distributed.broadcast(bucket, src=0))


@torch.no_grad()
def _in_buckets(tensors: Sequence[Tensor], communicate_: Callable[[Tensor], object]) -> None:
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        communicate_(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in bucket])
        torch._foreach_copy_(bucket, [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)])


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group neighbours of one kind and device until a bucket is full."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        another = bucket and (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)
        if bucket and (another or size + tensor.nbytes > _BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
