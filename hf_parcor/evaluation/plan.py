"""The order of a run: which trial of which corruption of which part has which number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from hf_parcor.corruptions import CORRUPTIONS, Corruption
from hf_parcor.evaluation.records import CorruptionRecord
from hf_parcor.evaluation.trials import Trial, record_of


@dataclass(frozen=True)
class Plan:
    """All trials of all corruptions of all parts, numbered from 1 in this order.

    Args:
        corruptions: What each part is measured under.
        trials: Trials of each stochastic corruption; others have one.
        seed: First seed.
        parts: How many parts there are.

    Raises:
        TypeError: Something is no `Corruption`.
    """

    corruptions: tuple[Corruption, ...]
    trials: int
    seed: int
    parts: int

    def __post_init__(self) -> None:
        for corruption in self.corruptions:
            if not isinstance(corruption, Corruption):
                raise TypeError(
                    f"corruptions: expected Corruption objects, got {corruption!r}; pass GaussianNoise(0.01), say"
                )

    def __len__(self) -> int:
        """Return how many trials there are."""
        return len(self._of_part()) * self.parts

    def part_of(self, number: int) -> int:
        """Return the index of the part that a trial corrupts."""
        return (number - 1) // len(self._of_part())

    def drawn(self, number: int) -> tuple[Corruption, int]:
        """Return the corruption of a trial, and its seed."""
        of_part = self._of_part()
        return of_part[(number - 1) % len(of_part)]

    def records(self, found: Mapping[int, Trial]) -> list[tuple[CorruptionRecord, ...]]:
        """Return the records of each part, from all trials by their number."""
        in_order = (found[number] for number in range(1, 1 + len(self)))
        return [
            tuple(
                record_of(
                    _catalogue_name(corruption),
                    str(corruption),
                    corruption.settings(),
                    list(islice(in_order, self._times(corruption))),
                )
                for corruption in self.corruptions
            )
            for _ in range(self.parts)
        ]

    def _times(self, corruption: Corruption) -> int:
        return self.trials if corruption.stochastic else 1

    def _of_part(self) -> list[tuple[Corruption, int]]:
        return [
            (corruption, self.seed + trial)
            for corruption in self.corruptions
            for trial in range(self._times(corruption))
        ]


def _catalogue_name(corruption: Corruption) -> str:
    for name, kind in CORRUPTIONS.items():
        if type(corruption) is kind:
            return name
    return type(corruption).__name__
