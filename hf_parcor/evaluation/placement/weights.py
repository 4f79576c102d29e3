"""All weights of a model, one after the other: also those that Accelerate has offloaded, as if they were in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain

from torch import Tensor, nn

from hf_parcor.evaluation.placement.device_map import kept_of, ties_of
from hf_parcor.evaluation.placement.reach import packed_tensors, plain_parts
from hf_parcor.functional.vectors import bytes_of


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of all parameters, buffers and packed weights, as the model in memory has them.

    What Accelerate has offloaded, to the CPU or the disk, lies on the meta device, and is read from where its hooks
    keep it when its turn comes: whoever lets go of a weight before the next one is asked for has one of them in
    memory. Names that a Transformers model ties come once, although offloading unties them. What no hook keeps under
    its name (of a model that was only built on the meta device) is yielded as it is.

    Args:
        model: Any model; it is not changed, and nothing is to be written into what is yielded.

    Raises:
        OSError: A file of offloaded weights is gone.

    Examples:
        >>> [name for name, _ in weights_of(nn.BatchNorm1d(1))]
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    tied = ties_of(model) if any(parameter.is_meta for parameter in model.parameters()) else {}
    seen = set()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        held = _held(model, name, tensor)
        mark = (tied[name], _mark(held)) if name in tied else ("", "")  # of two with different values neither is tied
        if mark not in seen:
            if mark[1]:
                seen.add(mark)
            yield name, held
        del held  # before the next one is read
    yield from packed_tensors(model)


def _held(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    kept = kept_of(model, name, tensor) if tensor.is_meta else None
    return tensor if kept is None else kept.to(tensor.dtype)  # as the hook does before the module is called


def _mark(tensor: Tensor) -> str:
    """Return a hash of a tensor's numbers, "" where they are not in memory."""
    parts = plain_parts(tensor.detach())
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    for part in parts:
        digest.update(bytes_of(part))
    return digest.hexdigest() if parts else ""
