"""What was measured of the weights that a Trainer may publish."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from transformers import TrainerState

from hf_parcor.evaluation import EvaluationRecord

Results: TypeAlias = Mapping[str, EvaluationRecord]


class _Measured(NamedTuple):
    weights: str
    results: Results


class MeasuredWeights:
    """The results of the step that was measured last, and of the best step: `load_best_model_at_end` goes back to it.

    All others are forgotten, so that a long training keeps two. Results belong to weights, and to no step: those of a
    step count only where the weights are the same.
    """

    def __init__(self) -> None:
        self._by_step: dict[int, _Measured] = {}

    def keep(self, state: TrainerState, weights: str, results: Results, *, instead: bool) -> None:
        """Keep results.

        Args:
            state: The step they are of, and the best one until then.
            weights: Fingerprint of the weights.
            results: Records by the prefix of their metrics.
            instead: Whether they take the place of what is known of the same weights; else they are put beside it.
        """
        last = self._by_step.pop(state.global_step, None)
        known = {} if instead or last is None or last.weights != weights else last.results
        self._by_step = {step: one for step, one in self._by_step.items() if step == state.best_global_step}
        self._by_step[state.global_step] = _Measured(weights, {**known, **results, **known})

    def of(self, weights: str) -> Results:
        """Return what was measured of weights, the last that is kept; nothing if they were not measured."""
        found = [one.results for one in self._by_step.values() if one.weights == weights]
        return found[-1] if found else {}
