"""The indicators against closed forms of a quadratic loss, brute force, and theory; and what must not change."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from for_each import for_each
from torch import nn

from hf_parcor import (
    CorruptionConstraint,
    CorruptionEvaluator,
    GradientCorruption,
    RandomCorruption,
    measure_indicators,
)
from hf_parcor.indicators import LossOverData, random_loss_changes
from hf_parcor.indicators.estimators import hessian_diagonal
from hf_parcor.theory import RandomCorruptionRatio

CONSTRAINTS = [
    CorruptionConstraint(p=p, epsilon=0.3, top_n=top_n) for p in (1.0, 1.5, 2.0, 3.0, math.inf) for top_n in (None, 2)
]
EXACT = {"rel": 1e-9}


def joined(corruption):
    return torch.cat([part.reshape(-1) for part in corruption.values()]).double()


def draw(known, constraint, seed):
    generator = torch.Generator().manual_seed(seed)
    return joined(RandomCorruption(constraint)(known.loss.parameters, generator=generator))


def test_a_constraint_beside_others_is_measured_as_alone(known):
    """Each ascent begins at the first batch: here all end behind it, before the second."""
    constraints = [CorruptionConstraint(epsilon=epsilon) for epsilon in (0.1, 0.3, 1.0)]
    together = known.measure(*constraints, steps=1, draws=2)
    alone = [known.measure(constraint, steps=1, draws=2) for constraint in constraints]
    assert list(together.indicators) == [record.indicators[0] for record in alone]


def test_a_constraint_alone_is_a_list_of_one():
    settings = {"loss": lambda model, rows: model(rows).sum(), "draws": 1, "progress": False}
    one = CorruptionConstraint(epsilon=0.1)
    model = nn.Linear(2, 1)
    found = [measure_indicators(model, [torch.ones(2, 2)], given, **settings) for given in (one, [one])]
    assert found[0].indicators == found[1].indicators


def test_estimates_of_no_draw_are_refused(known):
    with pytest.raises(ValueError, match="draws: expected a whole number >= 1, got 0"):
        random_loss_changes(known.loss, CONSTRAINTS[0], draws=0)
    with pytest.raises(ValueError, match="probes: expected a whole number >= 1, got 0"):
        hessian_diagonal(known.loss, probes=0)


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
class TestQuadratic:
    def test_everything_but_the_ascent_in_closed_form(self, known, constraint):
        record = known.measure(constraint, probes=3, draws=4, seed=5)
        (row,) = record.indicators
        assert record.loss == pytest.approx(known.loss.value(), **EXACT)
        assert record.gradient_norm == pytest.approx(float(known.gradient.norm()), **EXACT)
        worst = joined(GradientCorruption(constraint)(known.loss.parameters, known.loss.gradients))
        assert row.first_order == pytest.approx(float(known.gradient @ worst), **EXACT)
        assert row.gradient_based == pytest.approx(known.value(worst), **EXACT)
        drawn = [draw(known, constraint, seed) for seed in range(5, 9)]
        assert row.random.values == pytest.approx([known.value(a) for a in drawn], rel=1e-8)
        assert row.monte_carlo.values == pytest.approx([float(a @ known.hessian @ a) / 2 for a in drawn], rel=1e-8)
        square = sum(float(a.square().sum()) for a in drawn) / 4
        assert row.second_order.values == pytest.approx(
            [v * square / 14 for v in record.hessian_trace.values], **EXACT
        )

    def test_no_corruption_of_the_set_is_worse_to_first_order(self, known, constraint):
        (row,) = known.measure(constraint, probes=0, draws=1).indicators
        gradient, p, n = known.gradient, constraint.p, constraint.top_n or 7
        largest = -math.inf
        for chosen in itertools.combinations(range(7), n):
            for _ in range(40):
                a = torch.zeros(7).double()
                a[list(chosen)] = torch.randn(n).double() if p < math.inf else torch.randn(n).double().sign()
                a *= constraint.epsilon / torch.linalg.vector_norm(a, p)
                largest = max(largest, float(gradient @ a))
        assert 0.4 * row.first_order < largest <= row.first_order * (1 + 1e-12)

    @pytest.mark.slow
    def test_both_ways_to_the_average_agree(self, known, constraint):
        """Also where p is neither 2 nor ∞: ã has signs that are independent, and entries alike."""
        drawn = random_loss_changes(known.loss, constraint, 60)
        expected = float(known.hessian.trace()) * drawn.square_norms.mean / 14
        for estimate in (drawn.beyond_first_order, drawn.changes):
            assert abs(estimate.mean - expected) < 4 * estimate.standard_error
        assert abs(drawn.first_order.mean) < 4 * drawn.first_order.standard_error


class TestMultiStep:
    @for_each("p", [2.0, math.inf])
    def test_the_ascent_longhand(self, known, p):
        constraint = CorruptionConstraint(p=p, epsilon=0.3)
        (row,) = known.measure(constraint, probes=0, draws=1, steps=3).indicators
        a, w = torch.zeros(7).double(), known.model.w.detach()
        for step in range(3):
            _, matrix, vector = known.batches[step % 2]
            g = matrix @ (w + a) + vector
            a = a + 0.15 * (g / g.norm() if p == 2 else g.sign())
            a = a * min(1, 0.3 / float(a.norm())) if p == 2 else a.clamp(-0.3, 0.3)
        assert row.multi_step == pytest.approx(known.value(a), **EXACT)

    def test_norms_without_a_projection_have_none(self, known):
        first, second = known.measure(CONSTRAINTS[2], CONSTRAINTS[-1], probes=0, draws=1).indicators
        assert first.multi_step is None
        assert second.multi_step is not None
        assert first.lower_bound == max(0.0, first.gradient_based, *first.random.values)
        assert second.lower_bound >= second.multi_step

    def test_a_linear_loss(self):
        """All ways to the largest change are one, and the average change is nil."""
        model = nn.Linear(3, 1, bias=False).double()
        (row,) = measure_indicators(
            model,
            [torch.ones(2, 3).double(), torch.ones(1, 3).double()],
            [CorruptionConstraint(epsilon=0.1)],
            loss=lambda model, batch: model(batch).mean(),
            progress=False,
        ).indicators
        expected = 0.1 * math.sqrt(3)
        assert (row.first_order, row.gradient_based, row.multi_step) == pytest.approx((expected,) * 3, rel=1e-6)
        assert row.linearity == pytest.approx(1, rel=1e-6)
        assert row.second_order.mean == 0
        assert row.monte_carlo.mean == pytest.approx(0, abs=1e-9)
        assert row.random.standard_deviation > 0.01


class TestSpread:
    def test_what_is_known_of_the_first_order_is_taken_away(self, known):
        drawn = random_loss_changes(known.loss, CorruptionConstraint(epsilon=1e-3), 300)
        deviation = 1e-3 * float(known.gradient.norm()) / math.sqrt(7)
        assert drawn.changes.standard_deviation == pytest.approx(deviation, rel=0.15)
        assert drawn.beyond_first_order.standard_error < 0.01 * drawn.changes.standard_error

    def test_shares_of_the_worst_case_follow_theorem_1(self, known):
        stats = pytest.importorskip("scipy.stats")
        constraint = CorruptionConstraint(epsilon=1e-4)
        drawn = random_loss_changes(known.loss, constraint, 300)
        shares = [change / (1e-4 * float(known.gradient.norm())) for change in drawn.changes.values]
        assert stats.kstest(shares, RandomCorruptionRatio(7).signed_cdf).pvalue > 0.01


class TestData:
    def test_batches_do_not_matter(self, tiny_bert):
        model = tiny_bert(initializer_range=0.5).double()
        inputs, labels = torch.randint(1, 20, (6, 4)), torch.randint(0, 2, (6,))

        def record(*cuts):
            ends = zip((0, *cuts), (*cuts, 6), strict=True)
            data = [{"input_ids": inputs[a:b], "labels": labels[a:b]} for a, b in ends]
            return measure_indicators(model, data, CONSTRAINTS[4:5], probes=2, draws=2, progress=False)

        one, many = record(), record(1, 5)
        assert one.loss == pytest.approx(many.loss, rel=1e-12)
        assert one.gradient_norm == pytest.approx(many.gradient_norm, **EXACT)
        assert one.hessian_trace.values == pytest.approx(many.hessian_trace.values, **EXACT)
        assert one.indicators[0].random.values == pytest.approx(many.indicators[0].random.values, rel=1e-7)
        assert one.data == many.data

    @pytest.mark.slow
    def test_one_gradient_serves_all(self, classifier, batches):
        passes = []
        classifier.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
        measure_indicators(classifier, batches, CONSTRAINTS, probes=3, draws=2, steps=5, progress=False)
        climbing = sum(constraint.p in (2, math.inf) for constraint in CONSTRAINTS)
        assert sum(passes) == 2 * len(batches) + 5 * climbing
        assert len(passes) - sum(passes) == len(batches) * (1 + 3 * len(CONSTRAINTS) + climbing)

    def test_as_the_evaluator_finds_it(self, classifier, batches):
        constraint = CorruptionConstraint(epsilon=0.5)

        def metric(model):
            losses = [float(model(**batch).loss) * len(batch["labels"]) / 10 for batch in batches]
            return {"loss": sum(losses)}

        with torch.no_grad():
            evaluated = CorruptionEvaluator(classifier, metric, batches, progress=False).evaluate(
                [GradientCorruption(constraint), RandomCorruption(constraint)], trials=2, seed=4
            )
        (row,) = measure_indicators(
            classifier, batches, [constraint], probes=0, draws=2, seed=4, progress=False
        ).indicators
        clean = evaluated.clean.mean("loss")
        along, at_random = (one.metrics["loss"] for one in evaluated.corruptions)
        assert row.gradient_based == pytest.approx(along[0] - clean, abs=1e-6)
        assert row.random.values == pytest.approx([loss - clean for loss in at_random], abs=1e-6)


class TestNothingChanges:
    @pytest.mark.slow
    def test_on_every_family(self, family, bits_of):
        model, batches, loss = family
        modules = list(model.modules())
        modules[-1].eval()
        modes, bits, state = [module.training for module in modules], bits_of(model), torch.get_rng_state()
        options = {"loss": loss, "probes": 1, "draws": 2, "progress": False}
        record = measure_indicators(model, batches, CONSTRAINTS[4:5], **options)
        assert [module.training for module in modules] == modes
        assert bits_of(model) == bits
        assert torch.equal(torch.get_rng_state(), state)
        assert all(parameter.grad is None for parameter in model.parameters())
        (row,) = record.indicators
        assert row.first_order > 0
        assert row.lower_bound > 0
        assert measure_indicators(model, batches, CONSTRAINTS[4:5], **options) == record, "there was dropout"

    @pytest.mark.parametrize("failing", [2, 5, 8, 11, 14])
    def test_after_an_exception(self, classifier, batches, bits_of, failing):
        calls = itertools.count(1)

        def loss(model, batch):
            if next(calls) == failing:
                raise KeyError("out of luck")
            return model(**batch).loss

        bits, state = bits_of(classifier), torch.get_rng_state()
        classifier.classifier.requires_grad_(False)
        with pytest.raises(KeyError, match="out of luck"):
            measure_indicators(
                classifier, batches, CONSTRAINTS[4:5], loss=loss, target_modules="all", probes=1, progress=False
            )
        assert bits_of(classifier) == bits
        assert torch.equal(torch.get_rng_state(), state)
        assert classifier.training
        assert not classifier.classifier.weight.requires_grad


class TestNotes:
    def test_nothing_to_say(self, known):
        assert known.measure(*CONSTRAINTS, probes=1, draws=2).notes == ()

    def test_changes_below_rounding(self, classifier, batches):
        tiny, large = (CorruptionConstraint(epsilon=epsilon) for epsilon in (1e-9, 3.0))
        record = measure_indicators(classifier, batches, [tiny, large], probes=0, draws=2, progress=False)
        assert [note.partition(":")[0] for note in record.notes] == [f"random {tiny}"]
        assert "less than rounding" in record.notes[0]

    def test_the_dtype_of_the_loss_counts(self, known):
        constraint = CorruptionConstraint(epsilon=1e-4)
        assert known.measure(constraint, probes=0).notes == ()
        record = known.measure(constraint, probes=0, loss=lambda *pair: (known.model.w.sum() + 1e4).float())
        assert "computed in float64" in record.notes[0]

    def test_weights_that_swallow(self):
        model = nn.Linear(8, 1, bias=False).to(torch.bfloat16)
        nn.init.constant_(model.weight, 1.0)
        record = measure_indicators(
            model,
            [torch.ones(1, 8).bfloat16()],
            [CorruptionConstraint(epsilon=1e-3)],
            loss=lambda m, x: m(x).sum(),
            probes=1,
            draws=1,
            progress=False,
        )
        assert "random L2 ε=0.001: the weights took a norm of 0 where 0.001 was asked for" in record.notes[0]
        assert record.notes[1].startswith("gradient-based L2")

    def test_a_gradient_that_is_not_finite(self):
        model = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(model.weight)
        record = measure_indicators(
            model,
            [torch.ones(1, 2)],
            [CorruptionConstraint(epsilon=0.1)],
            loss=lambda m, x: m(x).abs().sqrt().sum() + 1,
            probes=0,
            draws=1,
            progress=False,
        )
        assert "the gradient over the data is not finite" in record.notes[0]
        assert record.indicators[0].gradient_based == 0


class TestErrors:
    @for_each(
        ("options", "message"),
        [
            ({"draws": 0}, "draws: expected a whole number >= 1, got 0"),
            ({"probes": -1}, "probes: expected a whole number >= 0, got -1"),
            ({"seed": -1}, "seed: expected a whole number >= 0, got -1"),
            ({"steps": 0}, "steps: expected a whole number >= 1, got 0"),
            ({"target_modules": "nothing-here"}, "nothing-here"),
        ],
    )
    def test_before_the_model_runs(self, known, options, message):
        calls = []
        with pytest.raises(ValueError, match=message):
            known.measure(CONSTRAINTS[4], loss=lambda *_: calls.append(1), **options)
        assert calls == []

    def test_a_bare_radius(self, known):
        with pytest.raises(TypeError, match=r"expected a CorruptionConstraint, got 0\.1"):
            known.measure(0.1)

    def test_data_that_is_gone_after_one_walk(self, known):
        with pytest.raises(ValueError, match="can be walked through again"):
            LossOverData(known.model, known.loss.parameters, iter(known.batches))

    @for_each("parameters, error", [({}, ValueError), ({"w": torch.ones(2, dtype=torch.int8)}, TypeError)])
    def test_weights_that_cannot_be_corrupted(self, known, parameters, error):
        with pytest.raises(error, match=r"expected (at least one tensor|a floating-point weight)"):
            LossOverData(known.model, parameters, known.batches)

    def test_weights_that_are_sharded(self, known, monkeypatch):
        monkeypatch.setattr("hf_parcor.evaluation.placement.replicas.model_has_dtensor", lambda model: True)
        with pytest.raises(ValueError, match="got weights that FSDP or tensor parallelism has split"):
            known.measure(CONSTRAINTS[4])
