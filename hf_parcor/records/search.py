"""The record of a search: plain frozen data, JSON in and out; tables and plots read nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal

from hf_parcor.records.stored import StoredRecord

Direction = Literal["maximize", "minimize"]
FORMAT = 2


@dataclass(frozen=True)
class SearchTrial:
    """One training of a search.

    Attributes:
        strength: The value that was searched: the radius ε of the constraint, or the strength of a corruption.
        steps: The corruption steps K; None if the defense has no steps to choose.
        objective: The value that is maximised or minimised; NaN if training diverged.
        metrics: All metrics that the objective was computed from.
        collapsed: Whether the run shows signs of collapse.
    """

    strength: float
    steps: int | None
    objective: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    collapsed: bool = False


@dataclass(frozen=True)
class SearchRecord(StoredRecord):
    """All trainings of a search so far.

    Attributes:
        defense: Name of the defense, and its settings except those that are searched.
        low: Lower end of the range of strengths.
        high: Upper end of the range of strengths.
        direction: "maximize" or "minimize" the objective.
        trials: One trial for each training, in their order.
        setting: The setting that is searched as the strength. Default "epsilon".
        format: Version of this layout.

    Examples:
        >>> from hf_parcor.records import SearchTrial
        >>> trials = (SearchTrial(0.01, 1, 0.80), SearchTrial(0.1, 1, 0.85), SearchTrial(1.0, 1, 0.60))
        >>> record = SearchRecord("multi_step_risk", low=0.01, high=1.0, direction="maximize", trials=trials)
        >>> record.best.strength, record.is_unimodal(steps=1)
        (0.1, True)
    """

    defense: str
    low: float
    high: float
    direction: Direction
    trials: tuple[SearchTrial, ...] = ()
    setting: str = "epsilon"
    format: int = FORMAT
    kind: ClassVar[str] = "search record"
    remedy: ClassVar[str] = "start a new search"

    @property
    def symbol(self) -> str:
        """The name of the strength in tables and plots."""
        return "ε" if self.setting == "epsilon" else self.setting

    def score(self, trial: SearchTrial) -> float:
        """Return the objective, with its sign changed if small is good; NaN is worst."""
        if math.isnan(trial.objective):
            return -math.inf
        return trial.objective if self.direction == "maximize" else -trial.objective

    @property
    def best(self) -> SearchTrial:
        """The best trial; the first of equal ones.

        Raises:
            ValueError: There is no trial yet.
        """
        if not self.trials:
            raise ValueError("trials: expected one or more, got none; run the search first")
        return max(self.trials, key=self.score)

    def curve(self, steps: int | None) -> list[SearchTrial]:
        """Return the trials of one K, sorted by strength."""
        return sorted((trial for trial in self.trials if trial.steps == steps), key=lambda trial: trial.strength)

    def is_unimodal(self, steps: int | None) -> bool:
        """Return whether the objective of one K first rises with the strength and then falls, as both papers report.

        If not, the search may have missed the best strength: the differences are noise, or the range is too wide.
        """
        scores = [self.score(trial) for trial in self.curve(steps)]
        signs = [after > before for before, after in pairwise(scores) if after != before]
        return signs == sorted(signs, reverse=True)
