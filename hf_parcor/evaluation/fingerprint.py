"""A fingerprint of data, so that records say what they were measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


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
                digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
