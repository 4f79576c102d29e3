"""An interrupt, wherever it comes, leaves a measured model as it was."""

from __future__ import annotations

import pytest
from interrupts import MAY_BE_IGNORED, interrupted_at_lines, state_of

from hf_parcor import (
    CorruptionConstraint,
    GaussianNoise,
    GradientCorruption,
    LayerProbe,
    Quantization,
    measure_flips_to_break,
    measure_indicators,
    sensitivity,
)
from hf_parcor.evaluation.metrics.loss import LossMetric

CONSTRAINT = CorruptionConstraint(epsilon=0.1)
PARTS = {"last layer": ["bert.encoder.layer.1"], "head": ["classifier"]}


def probe(corruption):
    def run(model, batches):
        LayerProbe(model, LossMetric(batches), batches, targets=PARTS, progress=False).evaluate([corruption], trials=1)

    return run


def flips(model, batches):
    metric = LossMetric(batches)
    measure_flips_to_break(model, metric, most=2, target_modules=["classifier"], progress=False)


def indicators(model, batches):
    measure_indicators(model, batches, [CONSTRAINT], target_modules=["classifier"], draws=2, probes=2, progress=False)


def scores(model, batches):
    sensitivity(model, batches, [Quantization(4)], {name: part[0] for name, part in PARTS.items()}, progress=False)


MEASUREMENTS = {
    "noise": (probe(GaussianNoise(0.01)), 1499),
    "along the gradient": (probe(GradientCorruption(CONSTRAINT)), 1499),
    "flips": (flips, 101),
    "indicators": (indicators, 401),
    "scores": (scores, 997),
}


@MAY_BE_IGNORED
@pytest.mark.slow
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_interrupt_at_any_line_leaves_the_model_as_it_was(classifier, batches, name):
    run, every = MEASUREMENTS[name]
    model = classifier.train()
    before, tried = state_of(model), 0
    for at in interrupted_at_lines(lambda: run(model, batches), every):
        assert state_of(model) == before, at
        tried += 1
    assert tried > 20
