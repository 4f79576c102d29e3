"""What every process must have alike before the work is spread: the model, its weights, and all data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from accelerate.utils import model_has_dtensor
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from hf_parcor.distributed.fsdp import as_written, drop_gathered, is_sharded
from hf_parcor.distributed.processes import MeasuringProcesses
from hf_parcor.evaluation.placement.reach import plain_parts
from hf_parcor.evaluation.placement.weights import weights_of

_PIECE = 2**18  # integers that are hashed at once
_BASE = 6364136223846793005  # odd: Knuth's multiplier for 64 bits


def measurable_model(model: nn.Module) -> nn.Module:
    """Return what `whole_model` does, or a model that FSDP2 shards, every parameter its shard.

    Raises:
        ValueError: FSDP1 or tensor parallelism has split the weights, or FSDP2 has left some of them out.
    """
    model = as_written(model)
    if not is_sharded(model):
        return whole_model(model)
    drop_gathered(model)
    _check_shards(model)
    return model


def whole_model(model: nn.Module) -> nn.Module:
    """Return what `as_written` does.

    The passes of DistributedDataParallel would wait for each other, DataParallel returns a loss for each GPU, and a
    prefix cannot be cut out of what `torch.compile` has made one piece of.

    Raises:
        ValueError: The weights are split.
    """
    if model_has_dtensor(model) or _is_wrapped_by_fsdp(model):
        raise ValueError(
            "model: expected all weights in every process (evaluators take FSDP2's shards too), got weights that FSDP "
            "or tensor parallelism has split; save the model, and evaluate it as from_pretrained loads it"
        )
    return as_written(model)


def _check_shards(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        ways = sum(not place.is_replicate() for place in parameter.placements) if isinstance(parameter, DTensor) else 0
        if ways > 1 or not isinstance(parameter, DTensor):
            raise ValueError(
                f"model: expected every parameter sharded by FSDP2 alone, got {name!r}, which is "
                f"{'split again by tensor parallelism' if ways else 'left out of it'}; save the model, and evaluate "
                "it as from_pretrained loads it"
            )


def _is_wrapped_by_fsdp(model: nn.Module) -> bool:
    if not distributed.is_available() or not distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def all_batches(batches: Iterable[Any]) -> Iterable[Any]:
    """Return the batches of all processes, also where Accelerate has prepared a `DataLoader` for the share of one.

    Such a share is filled up with examples that count twice; the evaluator spreads batches itself.
    """
    if not isinstance(batches, DataLoaderShard) or not isinstance(batches.batch_sampler, BatchSamplerShard):
        return batches
    return DataLoader(
        batches.dataset,
        batch_sampler=batches.batch_sampler.batch_sampler,
        collate_fn=batches.collate_fn,
        num_workers=batches.num_workers,
        worker_init_fn=batches.worker_init_fn,
        multiprocessing_context=batches.multiprocessing_context,
    )


def check_same_weights(model: nn.Module, processes: MeasuringProcesses) -> None:
    """Refuse a model whose parameters or buffers differ between processes; shards do, and are of one model.

    Raises:
        ValueError: They differ.
    """
    source = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**63), 2**63 - 1, (_PIECE,), generator=source, device=source.device)
    hashes = {}
    for name, tensor in weights_of(model):
        if not isinstance(tensor, DTensor):
            hashes[name] = _hash_of_bits(tensor, keys)
        del tensor  # before the next one is read
    first, *others = processes.gather(hashes)
    for other in others:
        for name in [name for name in {**first, **other} if first.get(name) != other.get(name)]:
            raise ValueError(
                f"model: expected the same weights in every process, got others for {name!r}; load the same "
                "checkpoint in all of them, or seed them before new weights are drawn"
            )


def _hash_of_bits(tensor: torch.Tensor, keys: torch.Tensor) -> int:
    """Return a hash of a tensor's bits and of their order, computed where the tensor is.

    A piece of as many integers b as there are random keys k has the hash `Σ k_i b_i`, modulo 2^64: integers have the
    same sum in any order, which floats have not. Hashes of pieces are the coefficients of a polynomial.
    """
    kinds = {1: torch.uint8, 2: torch.int16}
    found = 0
    for part in plain_parts(tensor.detach()):
        bits = part.contiguous().reshape(-1).view(kinds.get(part.dtype.itemsize, torch.int32))
        for piece in torch.split(bits, len(keys)):
            products = piece.to(torch.int64) * keys[: len(piece)].to(piece.device)
            found = (found * _BASE + int(products.sum())) % 2**64
    return found


def check_same_data(name: str, fingerprint: str, processes: MeasuringProcesses) -> None:
    """Refuse data that differs between processes.

    Raises:
        ValueError: It differs.
    """
    if len(set(processes.gather(fingerprint))) > 1:
        raise ValueError(
            f"{name}: expected all data in every process, in the same order, got other data in some; pass a list or "
            "a DataLoader that does not shuffle, and let the evaluator spread its batches"
        )
