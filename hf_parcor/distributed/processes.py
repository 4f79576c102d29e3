"""Processes that work together: those that measure, each a share of it, and those that take one training step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object, reduce
from torch import Tensor, distributed

_T = TypeVar("_T")
_R = TypeVar("_R")


class ProcessError(RuntimeError):
    """Processes that were to work together do not: another one failed, or never joined."""


def check_all_joined(joined: int) -> None:
    """Check that as many processes work together as `accelerate launch` or `torchrun` started to.

    Args:
        joined: How many work together with this one, itself among them.

    Raises:
        ProcessError: They are fewer: each would do the whole work alone, and write over what the others wrote.

    Examples:
        >>> check_all_joined(1)  # in a program that was started alone
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if joined < started:
        raise ProcessError(
            f"processes: expected the {started} that were launched to work together, got {joined}, each for itself; "
            "without a GPU for each, tell the script to stay on the CPU (--use_cpu for a Trainer, "
            "Accelerator(cpu=True) in a loop; see examples/accelerate_configs/two_cpus.yaml), or launch one process"
        )


@dataclass(frozen=True)
class MeasuringProcesses:
    """How many processes measure together, and which of them this one is.

    Whatever they exchange begins with a word from each on whether it is well. So a process that fails says so where
    the others wait for it next, and all of them raise.

    Args:
        count: How many there are. Default 1.
        index: Which one this is, from 0.
        in_step: Whether they share one model, so that each pass is one of all of them at once. Default False: each
            has the whole model.
    """

    count: int = 1
    index: int = 0
    in_step: bool = False

    @classmethod
    def launched(cls, *, in_step: bool = False) -> MeasuringProcesses:
        """Return those that `accelerate launch` or `torchrun` started, or one.

        Raises:
            ProcessError: They did not join each other.
        """
        started = distributed.is_available() and distributed.is_initialized()
        if not started and int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return cls()
        state = PartialState(cpu=not torch.accelerator.is_available())
        check_all_joined(state.num_processes)
        return cls(state.num_processes, state.process_index, in_step)

    def share(self, pieces: Iterable[_T]) -> Iterator[_T]:
        """Return every n-th of the pieces, those of this process.

        Examples:
            >>> list(MeasuringProcesses(count=2, index=1).share("abcde"))
            ['b', 'd']
        """
        return islice(pieces, self.index, None, self.count)

    def rounds(self, pieces: Iterable[_T]) -> Iterator[tuple[_T, bool]]:
        """Yield the pieces of this process, and True; in step, also one that another has in place of each missing one.

        Examples:
            >>> list(MeasuringProcesses(count=2, index=1, in_step=True).rounds("abcde"))
            [('b', True), ('d', True), ('e', False)]
        """
        if not self.in_step:
            yield from ((piece, True) for piece in self.share(pieces))
            return
        walk = iter(pieces)
        while batch := list(islice(walk, self.count)):
            yield batch[min(self.index, len(batch) - 1)], self.index < len(batch)

    def each(self, make: Callable[[_T], _R], pieces: Iterable[_T]) -> list[_R]:
        """Return what is made of each piece, in their order; each process makes every n-th.

        Raises:
            ProcessError: Another process failed.
        """
        made = [(make(piece), counts) for piece, counts in self.rounds(pieces)]
        return self.collect([found for found, counts in made if counts])

    def size(self, pieces: int) -> int:
        """Return how many of so many pieces are in the share of this process."""
        return len(range(self.index, pieces, self.count))

    def owner(self, piece: int) -> int:
        """Return the process that has a piece in its share."""
        return piece % self.count

    def gather(self, value: _T) -> list[_T]:
        """Return what each process handed in, in their order.

        Raises:
            ProcessError: Another process failed.
        """
        if self.count == 1:
            return [value]
        found = self._tell(value, None)
        failures = [f"process {index}: {failure}" for index, (_, failure) in enumerate(found) if failure is not None]
        if failures:
            raise ProcessError(f"expected all processes to get here, but some failed: {'; '.join(failures)}")
        return [value for value, _ in found]

    def collect(self, share: Sequence[_T]) -> list[_T]:
        """Return all pieces in their order, from what each process made of its share.

        Raises:
            ProcessError: Another process failed.
        """
        shares = self.gather(share)
        total = sum(len(pieces) for pieces in shares)
        return [shares[self.owner(piece)][piece // self.count] for piece in range(total)]

    def sum(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums over all processes, on the devices of the tensors.

        Raises:
            ProcessError: Another process failed.
        """
        return self._exchanged(tensors, partial(reduce, reduction="sum"))

    def hand_round(self, tensors: Mapping[str, Tensor], owner: int) -> dict[str, Tensor]:
        """Return the tensors of one process; those that others hand in may be overwritten.

        Raises:
            ProcessError: Another process failed.
        """
        return self._exchanged(tensors, partial(broadcast, from_process=owner))

    def _exchanged(self, tensors: Mapping[str, Tensor], exchange: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        if self.count == 1:
            return dict(tensors)
        self.gather(None)
        device = PartialState().device  # contiguous there: bytes travel in the order in which they lie
        return {name: exchange(one.to(device).contiguous()).to(one.device) for name, one in tensors.items()}

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Let all processes raise if one does: before they leave the block, they wait for each other.

        Raises:
            ProcessError: Another process failed.
        """
        try:
            yield
            self.gather(None)
        except ProcessError:
            raise
        except Exception as error:
            if self.count > 1:
                self._tell(None, f"{type(error).__name__}: {error}")
            raise

    @staticmethod
    def _tell(value: Any, failure: str | None) -> list[tuple[Any, str | None]]:
        found: list[tuple[Any, str | None]] = gather_object([(value, failure)])
        return found


ALONE = MeasuringProcesses()


_FAR = 2**31 - 1  # between the seeds of two processes; a prime, so that no two of them meet
_BUCKET = 25 * 2**20  # bytes of one call, as many as DDP takes


class TrainingProcesses:
    """All processes of `torch.distributed`, for tensors that lie whole on each.

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

    def seed(self, seed: int, device: torch.device, *, shared: bool) -> int:
        """Return a seed made from that of this process: the first process's, or one that no other process has.

        Generators that were seeded alike may be in the same state on all processes.

        Args:
            seed: That of this process, below 2^62.
            device: Where the processes exchange tensors.
            shared: Whether all processes get the same.
        """
        if shared:
            found = torch.tensor(seed, device=device)
            self.agree_([found])
            return int(found)
        return (seed + distributed.get_rank() * _FAR) % 2**62


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
