"""Records made by hand, with numbers whose verdict one can tell in the head."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import pytest

from hf_parcor import CorruptionRecord, EvaluationRecord


@pytest.fixture(scope="session")
def record_of() -> Callable[..., EvaluationRecord]:
    """Return a builder of records from the metric at each ε; a list of values is one a trial."""

    def build(
        values: Mapping[float, float | Sequence[float]],
        clean: float = 0.9,
        *,
        metric: str = "accuracy",
        target: object = ("layer",),
        model: str = "bert",
        corruption: str = "gradient",
        parameters: int = 10,
        data: str = "",
        notes: tuple[str, ...] = (),
        unchanged: Collection[float] = (),
    ) -> EvaluationRecord:
        rows = []
        for epsilon, value in values.items():
            trials = tuple(value) if isinstance(value, Sequence) else (value,)
            settings = {"p": 2.0, "epsilon": epsilon, "top_n": None}
            label = f"{corruption} L2 ε={epsilon:g}"
            seeds = tuple(range(len(trials)))
            said = tuple(f"no weight changed with seed {seed}" for seed in seeds) if epsilon in unchanged else ()
            rows.append(CorruptionRecord(corruption, label, settings, seeds, {metric: trials}, notes=said))
        described = target if isinstance(target, str) else list(target)
        first = CorruptionRecord("none", "no corruption", {}, (0,), {metric: (clean,)})
        versions = {"torch": "2.13.0"}
        asked = {"target_modules": described}
        return EvaluationRecord(model, asked, parameters, first, tuple(rows), data, versions, notes)

    return build
