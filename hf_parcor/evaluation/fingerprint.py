"""Fingerprints of data and of weights, so that records say what was measured, and on what."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hf_parcor.evaluation.reach import packed_tensors, plain_parts
from hf_parcor.functional.sharded import local_part, whole


def fingerprint(batches: Iterable[Any]) -> str:
    """Return the SHA-256 of all tensors in all batches: names, shapes, dtypes and bytes, in order.

    Examples:
        >>> first = fingerprint([{"input_ids": torch.tensor([1, 2])}])
        >>> first == fingerprint([{"input_ids": torch.tensor([2, 1])}])
        False
        >>> len(first)
        64
    """
    digest = hashlib.sha256()
    for batch in batches:
        named = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
        for name, value in named:
            if isinstance(value, Tensor):
                _update(digest, str(name), value)
    return digest.hexdigest()


def fingerprint_of_weights(model: nn.Module, *, gather: bool = True) -> str:
    """Return the SHA-256 of all parameters, buffers and packed weights: names, shapes, dtypes and bytes, in order.

    Of what is offloaded, whose values are not in memory, only names, shapes and dtypes count.

    Args:
        model: Any model.
        gather: Gather shards tensor by tensor, for which all processes must call this; else hash this process's.

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> before = fingerprint_of_weights(model)
        >>> _ = nn.init.constant_(model.bias, 3.0)
        >>> fingerprint_of_weights(model) == before
        False
    """
    digest = hashlib.sha256()
    for name, tensor in chain(model.named_parameters(), model.named_buffers(), packed_tensors(model)):
        parts = plain_parts(whole(tensor.detach()) if gather else local_part(tensor.detach()))
        if not parts:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        for part in parts:
            _update(digest, name, part)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
