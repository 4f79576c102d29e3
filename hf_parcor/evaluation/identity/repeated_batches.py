"""Data that is walked through again and again: whether every walk finds the same batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from hf_parcor.evaluation.identity.fingerprint import Fingerprint, fingerprint
from hf_parcor.evaluation.identity.row_fingerprint import RowFingerprint, data_fingerprint
from hf_parcor.evaluation.placement.replicas import all_batches
from hf_parcor.randomness import generator_kept, random_states_kept, seed_the_cpu

_REMEDY = "do not shuffle (shuffle=False), let the collator draw no random numbers, or pass list(loader)"
_MARK = 8  # bytes of each entry's digest that are kept: enough to tell two apart


def check_repeatable(batches: Iterable[Any], name: str = "batches") -> None:
    """Refuse data that can be walked through only once.

    Raises:
        TypeError: It cannot be walked through at all.
        ValueError: It is an iterator.
    """
    given: object = batches
    if not isinstance(given, Iterable) and not hasattr(given, "__getitem__"):
        raise TypeError(
            f"{name}: expected a list of batches or a DataLoader, got {type(batches).__name__}; pass one of these"
        )
    if isinstance(batches, Iterator) and iter(batches) is batches:
        raise ValueError(
            f"{name}: expected a collection that can be walked through again, got the iterator {batches!r}; "
            "pass a list or a DataLoader"
        )


@contextmanager
def unseen(batches: Iterable[Any]) -> Iterator[None]:
    """Restore, after a `with` block, the generators that walks draw from: the global ones and the loader's own."""
    generator: Any = getattr(batches, "generator", None)
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    try:
        with random_states_kept():
            yield
    finally:
        if state is not None:
            generator.set_state(state)


class RepeatedBatches:
    """Batches that are the same in every walk, those of all processes.

    What one walk counts weighs what another differentiates, and corruptions are compared that were measured in
    different walks. So the first two walks that come to their end are compared, batch by batch, before the second of
    them hands a batch on. A list or a tuple is not looked at: it cannot differ.

    Args:
        batches: Such as a list, or a `DataLoader` that does not shuffle; one that Accelerate prepared will do.
        name: What the caller's argument is called, for errors.

    Raises:
        ValueError: They can be walked through only once.

    Examples:
        >>> batches = RepeatedBatches(DataLoader([1, 2, 3]))
        >>> batches.check()
        >>> [batch.item() for batch in batches]
        [1, 2, 3]
        >>> RepeatedBatches(DataLoader([1, 2, 3], shuffle=True)).check()
        Traceback (most recent call last):
        ...
        ValueError: batches: expected the same batches in every walk, got a DataLoader that shuffles (RandomSampler);
        do not shuffle (shuffle=False), let the collator draw no random numbers, or pass list(loader)
    """

    def __init__(self, batches: Iterable[Any], name: str = "batches") -> None:
        check_repeatable(batches, name)
        self._batches, self._name = all_batches(batches), name
        self._fixed = type(batches) in (list, tuple)
        self._marks: list[bytes] = []  # of each batch in the first walk
        self._walks = 0
        self._fingerprint = self._of_rows = ""

    def __iter__(self) -> Iterator[Any]:
        """Walk through the batches.

        Raises:
            ValueError: In the second walk, if it differs from the first.
        """
        return iter(self._batches) if self._fixed or self._walks > 1 else self._compared()

    def check(self) -> None:
        """Walk through the batches until two walks are compared; no global generator is afterwards another.

        Raises:
            ValueError: The walks differ, the second fails, or the batches are those of a `DataLoader` that shuffles.
        """
        if self._fixed:
            return
        shuffler = _shuffler(self._batches)
        if shuffler:
            raise self._different(f"got a DataLoader that shuffles ({shuffler})")
        with self.unseen():
            while self._walks < 2:  # both within one block: a shuffle must not begin with the same state twice
                for _ in self:
                    pass

    def unseen(self) -> AbstractContextManager[None]:
        """Restore, after a `with` block, the generators that walks draw from: the global ones and the loader's own."""
        return unseen(self._batches)

    def fingerprint(self) -> str:
        """Return the fingerprint of the batches, after `check`."""
        self.check()
        return fingerprint(self._batches) if self._fixed else self._fingerprint

    def data(self) -> str:
        """Return what records keep of the data, as `data_fingerprint`, after `check`."""
        self.check()
        return data_fingerprint(self._batches) if self._fixed else self._of_rows or self._fingerprint

    def _compared(self) -> Iterator[Any]:
        found, rows, count = Fingerprint(), RowFingerprint(), 0
        for count, batch in enumerate(self._told(), start=1):
            entries = list(found.marks(batch))
            marks = b"".join(mark[:_MARK] for _, mark in entries)
            if count <= len(self._marks):
                self._compare(count - 1, entries, marks)
            elif self._walks:
                raise self._different(f"got more than the {len(self._marks)} batches of the first walk in the second")
            else:
                self._marks.append(marks)
                rows.add(batch)
            yield batch
        if count < len(self._marks):
            raise self._different(
                f"got {count} batches in the second walk and {len(self._marks)} in the first, as of data that can be "
                "walked through once"
            )
        if not self._walks:
            self._of_rows = rows.text()
        self._walks += 1
        self._fingerprint = found.hexdigest()

    def _compare(self, index: int, entries: list[tuple[str, bytes]], marks: bytes) -> None:
        expected = self._marks[index]
        if marks == expected:
            return
        differing = [
            name
            for place, (name, mark) in enumerate(entries)
            if mark[:_MARK] != expected[place * _MARK : (place + 1) * _MARK]
        ]
        entry = f"another {differing[0]!r}" if differing and differing[0] else "other values"
        raise self._different(f"got {entry} in batch {index} of the second walk")

    def _told(self) -> Iterator[Any]:
        """Yield the batches, and explain an error that a second walk raises."""
        try:
            yield from self._batches
        except Exception as error:
            if not self._walks:
                raise
            raise ValueError(
                f"{self._name}: expected a collection that can be walked through again, got {error!r} in the second "
                "walk; pass list(loader), made of a new one"
            ) from error

    def _different(self, found: str) -> ValueError:
        return ValueError(f"{self._name}: expected the same batches in every walk, {found}; {_REMEDY}")


def drawn_once(batches: Iterable[Any]) -> Iterable[Any]:
    """Return batches that are the same in every walk: as they are, or a list of those that a seed draws.

    Examples:
        >>> walk = DataLoader(range(100), 10, collate_fn=lambda rows: torch.rand(len(rows)))
        >>> drawn = drawn_once(walk)
        >>> all(torch.equal(one, other) for one, other in zip(drawn, drawn, strict=True))
        True

    Raises:
        ValueError: They can be walked through only once.
    """
    watched = RepeatedBatches(batches)
    collator = getattr(batches, "collate_fn", None)
    try:
        with generator_kept(collator):
            watched.check()
    except ValueError:
        with watched.unseen(), generator_kept(collator):
            seed_the_cpu(0)
            drawn = [send_to_device(batch, "cpu") for batch in all_batches(batches)]
        if not drawn:  # all were seen in the walks before
            raise
        return drawn
    return watched


def _shuffler(batches: Iterable[Any]) -> str:
    """Return what shuffles a loader; two walks of few batches may be alike by chance."""
    if not isinstance(batches, DataLoader):
        return ""
    sampler = getattr(batches.batch_sampler, "sampler", batches.sampler)
    shuffles = type(sampler) in (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
    return type(sampler).__name__ if shuffles else ""
