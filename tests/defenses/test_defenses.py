"""Every defense against its update written out longhand, in float64, on a small real network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from for_each import for_each
from torch import Tensor, nn

from hf_parcor import (
    ACRT,
    AWP,
    SAM,
    CorruptionConstraint,
    CorruptionRisk,
    GaussianNoise,
    GradientCorruption,
    GradientPenalty,
    MultiStepRisk,
    Quantization,
)
from hf_parcor.defenses import DEFENSES, DefendedStep, Defense, Objective

SELECTED = ("0.weight", "0.bias", "2.weight")


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    inputs, labels = torch.randn(11, 5, dtype=torch.float64), torch.randint(3, (11,))
    return model, inputs, labels


def gradients_at(model, inputs, labels, corruption: dict[str, Tensor], delta: Tensor | None = None):
    """Autograd at `w + a`, by functional call: no weight is written. With δ also its gradient, under its name."""
    values = {name: (p.detach() + corruption.get(name, 0)).requires_grad_() for name, p in model.named_parameters()}
    if delta is not None:
        values["delta"] = delta.detach().requires_grad_()
    hidden = nn.functional.linear(inputs, values["0.weight"], values["0.bias"]) + values.get("delta", 0)
    logits = nn.functional.linear(torch.tanh(hidden), values["2.weight"], values["2.bias"])
    loss = nn.functional.cross_entropy(logits, labels)
    return dict(zip(values, torch.autograd.grad(loss, list(values.values())), strict=True))


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].reshape(-1) for name in SELECTED])


def unflat(vector: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = vector.split([like[name].numel() for name in SELECTED])
    return {name: part.view_as(like[name]) for name, part in zip(SELECTED, parts, strict=True)}


def largest(vector: Tensor, n: int | None) -> Tensor:
    order = vector.abs().argsort(descending=True, stable=True)
    return vector if n is None else vector.clone().index_fill_(0, order[n:], 0)


def part_of(problem, share: float):
    """The first examples of a batch."""
    model, inputs, labels = problem
    count = math.ceil(share * len(labels))
    return model, inputs[:count], labels[:count]


def climb(gradient: Tensor, p: float, radius: float, top_n: int | None) -> Tensor:
    gradient = largest(gradient, top_n)
    direction = gradient.sign() * gradient.abs() ** (0 if math.isinf(p) else 1 / (p - 1))
    return radius * direction / torch.linalg.vector_norm(direction, p)


def into_ball(a: Tensor, p: float, epsilon: float, top_n: int | None) -> Tensor:
    a = largest(a, top_n)
    return a.clamp(-epsilon, epsilon) if math.isinf(p) else a * min(1.0, epsilon / max(float(a.norm()), 1e-300))


def multi_step_risk(defense: MultiStepRisk, problem) -> dict[str, Tensor]:
    """Paper 2, Algorithm 1 and Eq. 24, line by line."""
    constraint, steps = defense.constraint, defense.steps
    alpha = 1.5 * constraint.epsilon / steps if defense.step_size is None else defense.step_size
    clean = gradients_at(*problem, {})
    a = torch.zeros_like(flat(clean))
    if defense.random_start:
        shapes = [clean[name] for name in SELECTED]
        r = torch.cat([torch.empty_like(g).normal_().reshape(-1) for g in shapes])
        a = climb(r, constraint.p, constraint.epsilon, constraint.top_n)
    total = {name: torch.zeros_like(g) for name, g in clean.items()}
    for k in range(steps + 1):
        seen = problem if k == 0 else part_of(problem, defense.batch_share)
        g = gradients_at(*seen, unflat(a, clean))
        total = {name: total[name] + g[name] / (steps + 1) for name in total}
        if k < steps:
            u = climb(flat(g), constraint.p, alpha, constraint.top_n)
            a = a + u
            if constraint.p in (2, math.inf):
                a = into_ball(a, constraint.p, constraint.epsilon, constraint.top_n)
    return total


def acrt(defense: ACRT | SAM, problem) -> dict[str, Tensor]:
    """Paper 2, Eq. 27; SAM is its case of alpha = 1."""
    constraint, alpha = defense.constraint, getattr(defense, "alpha", 1.0)
    part = part_of(problem, defense.batch_share)
    clean = gradients_at(*(part if alpha == 1 else problem), {})
    a = climb(flat(clean), constraint.p, constraint.epsilon, constraint.top_n)
    corrupted = gradients_at(*(problem if alpha == 1 else part), unflat(a, clean))
    return {name: (1 - alpha) * clean[name] + alpha * corrupted[name] for name in clean}


def gradient_penalty(defense: GradientPenalty, problem) -> dict[str, Tensor]:
    """Paper 1, Eq. 16, with the penalty's gradient as a Hessian-vector product by central differences."""
    clean = gradients_at(*problem, {})
    g, q = flat(clean), 1.0 if math.isinf(defense.p) else defense.p / (defense.p - 1)
    direction = g.sign() * g.abs() ** (q - 1) / torch.linalg.vector_norm(g, q) ** (q - 1)
    step = 1e-5 / direction.norm()
    ahead = gradients_at(*problem, unflat(step * direction, clean))
    behind = gradients_at(*problem, unflat(-step * direction, clean))
    product = {name: (ahead[name] - behind[name]) / (2 * step) for name in clean}
    return {name: clean[name] + defense.weight * product[name] for name in clean}


def awp(defense: AWP, problem) -> dict[str, Tensor]:
    """Paper 2, Eq. 29, row by row and tensor by tensor; the first layer plays the input embedding."""
    constraint, model = defense.constraint, problem[0]
    p, epsilon = constraint.p, constraint.epsilon
    delta = torch.zeros(len(problem[1]), 7, dtype=torch.float64)
    for _ in range(defense.input_steps if defense.input_epsilon else 0):
        g = gradients_at(*problem, {}, delta)["delta"]
        for i, row in enumerate(g):
            delta[i] += 1.5 * defense.input_epsilon / defense.input_steps * row / row.norm()
            delta[i] = into_ball(delta[i], 2, defense.input_epsilon, None)
    alpha = 1.5 * epsilon / max(defense.steps, 1) if defense.step_size is None else defense.step_size
    clean = gradients_at(*problem, {}, delta)
    a = torch.zeros_like(flat(clean))
    if defense.random_start:
        r = torch.cat([torch.empty_like(clean[name]).normal_().reshape(-1) for name in SELECTED])
        a = climb(r, p, epsilon, constraint.top_n)
    for _ in range(defense.steps if epsilon else 0):
        g = gradients_at(*problem, unflat(a, clean), delta)
        if defense.per_tensor:
            parts = unflat(a, clean)
            for name in SELECTED:
                size = torch.linalg.vector_norm(dict(model.named_parameters())[name].detach(), p)
                moved = parts[name].reshape(-1) + climb(g[name].reshape(-1), p, alpha * size, constraint.top_n)
                parts[name] = moved if p == 3 else into_ball(moved, p, epsilon * float(size), constraint.top_n)
            a = flat(parts)
        else:
            moved = a + climb(flat(g), p, alpha, constraint.top_n)
            a = moved if p == 3 else into_ball(moved, p, epsilon, constraint.top_n)
    g = gradients_at(*problem, unflat(a, clean), delta)
    return {name: g[name] for name, _ in model.named_parameters()}


def corruption_risk(defense: CorruptionRisk, problem) -> dict[str, Tensor]:
    """The mean of the gradients at the corrupted weights beside that at the clean ones, each corruption by itself."""
    model, clean = problem[0], gradients_at(*problem, {})
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    corruptions = defense.corruptions
    if defense.draw_one:
        corruptions = [corruptions[int(torch.randint(len(corruptions), ()))]]
    total = {name: defense.clean_weight * clean[name] for name in clean}
    for corruption in corruptions:
        if isinstance(corruption, GradientCorruption):
            constraint = corruption.constraint
            a = unflat(climb(flat(clean), constraint.p, constraint.epsilon, constraint.top_n), clean)
        elif isinstance(corruption, Quantization):
            scales = {name: weights[name].abs().max() / (2 ** (corruption.bits - 1) - 1) for name in SELECTED}
            a = {name: torch.round(weights[name] / scales[name]) * scales[name] - weights[name] for name in SELECTED}
        else:
            source = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
            drawn = {name: torch.empty_like(weights[name]).normal_(generator=source) for name in SELECTED}
            a = {name: corruption.std * part for name, part in drawn.items()}
        g = gradients_at(*problem, a)
        total = {name: total[name] + (1 - defense.clean_weight) / len(corruptions) * g[name] for name in total}
    return total


@dataclass
class Row:
    """A defense of the catalogue: settings to check it at, and its update written out."""

    settings: list[Defense]
    longhand: Callable[[Defense, object], dict[str, Tensor]]
    tolerance: float = 1e-12


L2, MAX = CorruptionConstraint(p=2, epsilon=0.3), CorruptionConstraint(p=math.inf, epsilon=0.05)
L3, SPARSE = CorruptionConstraint(p=3, epsilon=0.2), CorruptionConstraint(p=1.5, epsilon=0.3, top_n=7)
ROWS = {
    "multi_step_risk": Row(
        [
            *(MultiStepRisk(constraint, steps=steps) for constraint in (L2, MAX) for steps in (1, 2, 3)),
            MultiStepRisk(L2, steps=2, step_size=0.05),
            MultiStepRisk(CorruptionConstraint(p=2, epsilon=0.3, top_n=9), steps=3),
            MultiStepRisk(CorruptionConstraint(p=math.inf, epsilon=0.1, top_n=4), steps=2),
            # Within the radius, and beyond n entries.
            *(MultiStepRisk(CorruptionConstraint(epsilon=6.0, top_n=3), steps=n, step_size=2.0) for n in (2, 3)),
            MultiStepRisk(L2, steps=2, step_size=0.9),
            MultiStepRisk(L2, steps=2, random_start=True),
            MultiStepRisk(MAX, steps=1, random_start=True),
            MultiStepRisk(L3, steps=2, step_size=0.1),
            MultiStepRisk(SPARSE, steps=1, step_size=0.3),
            MultiStepRisk(L2, steps=2, batch_share=0.5),
            MultiStepRisk(MAX, steps=1, batch_share=0.01),
        ],
        multi_step_risk,
    ),
    "acrt": Row(
        [
            *(ACRT(constraint, alpha=0.3) for constraint in (L2, MAX, L3, SPARSE)),
            ACRT(L2),
            ACRT(L3, alpha=1.0),
            *(ACRT(L2, alpha=alpha, batch_share=0.3) for alpha in (0.3, 1.0)),
        ],
        acrt,
    ),
    "sam": Row([*(SAM(constraint) for constraint in (L2, MAX, L3, SPARSE)), SAM(L2, batch_share=0.25)], acrt),
    "awp": Row(
        [
            *(AWP(constraint, steps=steps) for constraint in (L2, MAX) for steps in (1, 2, 3)),
            *(AWP(constraint, steps=2, input_epsilon=0) for constraint in (L2, MAX)),
            *(AWP(constraint, steps=2, per_tensor=True, input_steps=2) for constraint in (L2, MAX)),
            AWP(CorruptionConstraint(p=2, epsilon=0.3, top_n=4), steps=2, per_tensor=True),
            AWP(L2, steps=2, random_start=True, input_steps=3, input_epsilon=0.5),
            AWP(L3, steps=2, step_size=0.1),
            AWP(CorruptionConstraint(p=3, epsilon=0.2), steps=1, step_size=0.2, per_tensor=True),
            AWP(CorruptionConstraint(epsilon=0.0), input_steps=2),
        ],
        awp,
    ),
    "corruption": Row(
        [
            CorruptionRisk(Quantization(3)),
            CorruptionRisk(Quantization(4), clean_weight=0),
            CorruptionRisk([GaussianNoise(0.3), Quantization(2), GaussianNoise(0.1)], clean_weight=0.3),
            CorruptionRisk([GaussianNoise(0.3), Quantization(2)], draw_one=True),
            CorruptionRisk([Quantization(3), GradientCorruption(MAX), GradientCorruption(SPARSE)], clean_weight=0.2),
            CorruptionRisk([GradientCorruption(L3), GaussianNoise(0.2)], clean_weight=0),
            # What goes along the gradient does not find the sum of the passes in its place, whatever comes first.
            *(
                CorruptionRisk(order, clean_weight=clean_weight)
                for count in (1, 2, 3)
                for order in itertools.permutations(
                    [GradientCorruption(L2), GradientCorruption(MAX), Quantization(3)], count
                )
                for clean_weight in (0.0, 0.4)
            ),
        ],
        corruption_risk,
    ),
    "gradient_penalty": Row(
        [GradientPenalty(p, weight=0.1) for p in (2, math.inf, 3)], gradient_penalty, tolerance=1e-6
    ),
}


def test_every_defense_of_the_catalogue_has_a_row():
    assert ROWS.keys() == DEFENSES.keys()
    assert all(type(defense) is DEFENSES[name] for name, row in ROWS.items() for defense in row.settings)


@pytest.mark.slow
@for_each(("name", "defense"), [(name, defense) for name, row in ROWS.items() for defense in row.settings])
@for_each("accumulated", [False, True])
def test_update_equals_longhand(problem, name, defense, accumulated):
    model = problem[0]
    model.zero_grad()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    earlier = {key: torch.randn_like(p) if accumulated else torch.zeros_like(p) for key, p in before.items()}
    if accumulated:
        for key, p in model.named_parameters():
            p.grad = earlier[key].clone()
    torch.manual_seed(3)
    expected = ROWS[name].longhand(defense, problem)
    passes, clean, stock = [], [], []

    def run_pass(objective: Objective, index: int) -> Tensor:
        passes.append(index)
        _, some, theirs = part_of(problem, defense.share_of_batch(index))
        clean.append(all(torch.equal(p, before[key]) for key, p in model.named_parameters()))
        stock.append(clean[-1] and len(theirs) == len(problem[-1]))
        loss = objective(nn.functional.cross_entropy(model(some), theirs))
        loss.backward()
        return loss.detach()

    selected = {key: p for key, p in model.named_parameters() if key in SELECTED}
    torch.manual_seed(3)
    others = [p for key, p in model.named_parameters() if key not in SELECTED]
    with DefendedStep(selected, run_pass, defense.passes, others, model[0]) as step:
        defense.minimize(step)
    assert passes == list(range(defense.passes))
    assert (clean[0], stock[0]) == (defense.first_pass_is_clean, defense.first_pass_is_stock)
    tolerance = ROWS[name].tolerance
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, earlier[key] + expected[key], rtol=tolerance, atol=tolerance / 100)
        assert torch.equal(parameter, before[key])


@for_each("name", ROWS)
def test_is_inactive_before_its_start(name):
    defense = ROWS[name].settings[0]
    assert defense.is_active(0.0)
    later = replace(defense, start_epoch=1.5)
    assert [later.is_active(epoch) for epoch in (0.0, 1.49, 1.5, 2.0)] == [False, False, True, True]


@for_each("name", ROWS)
def test_is_active_at_every_so_many_steps(name):
    some = replace(ROWS[name].settings[0], interval=3, start_epoch=0.5)
    assert [some.is_active(1.0, step) for step in range(7)] == [True, False, False, True, False, False, True]
    assert not some.is_active(0.4, 0)


@for_each(
    "defense",
    [
        MultiStepRisk(CorruptionConstraint(epsilon=0.0)),
        MultiStepRisk(L2, steps=0),
        ACRT(CorruptionConstraint(epsilon=0.0)),
        ACRT(L2, alpha=0),
        SAM(CorruptionConstraint(epsilon=0.0)),
        AWP(CorruptionConstraint(epsilon=0.0), input_epsilon=0),
        AWP(L2, steps=0, input_steps=0),
        CorruptionRisk(Quantization(4), clean_weight=1),
        CorruptionRisk([GaussianNoise(0.0), GradientCorruption(CorruptionConstraint(epsilon=0.0))]),
        GradientPenalty(weight=0),
    ],
)
def test_is_inactive_where_it_minimises_the_plain_loss(defense):
    assert not defense.is_active(10.0)


@for_each(
    ("settings", "error", "says"),
    [
        ({"steps": -1}, ValueError, "steps: expected a whole number >= 0, got -1"),
        ({"steps": 1.5}, TypeError, "steps: expected a whole number"),
        ({"step_size": math.nan}, ValueError, "step_size: expected .* got NaN"),
        ({"start_epoch": -1.0}, ValueError, "start_epoch: expected"),
        ({"interval": 0}, ValueError, "interval: expected a whole number >= 1, got 0"),
        ({"interval": 1.5}, TypeError, "interval: expected a whole number"),
        ({"batch_share": 0.0}, ValueError, "batch_share: expected 0 < batch_share <= 1, got 0.0"),
        ({"batch_share": 1.1}, ValueError, "batch_share: expected 0 < batch_share <= 1, got 1.1"),
        ({"batch_share": math.nan}, ValueError, "batch_share: expected 0 < batch_share <= 1, got"),
    ],
)
def test_bad_settings_are_refused(settings, error, says):
    with pytest.raises(error, match=says):
        MultiStepRisk(L2, **settings)


@for_each("weight", [-0.1, math.nan])
def test_a_penalty_that_rewards_is_refused(weight):
    with pytest.raises(ValueError, match="weight: expected"):
        GradientPenalty(weight=weight)


@for_each("alpha", [-0.1, 1.1, math.nan])
def test_a_weight_of_the_corrupted_loss_that_is_no_share_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha: expected 0 <= alpha <= 1"):
        ACRT(L2, alpha=alpha)


def test_adversarial_inputs_are_those_of_the_whole_batch():
    with pytest.raises(ValueError, match="batch_share: expected 1 with AWP"):
        AWP(L2, batch_share=0.5)


def test_norms_without_a_projection_are_refused():
    with pytest.raises(NotImplementedError, match="expected p = 2 or p = inf, got p = 3"):
        MultiStepRisk(CorruptionConstraint(p=3, epsilon=0.1))


@for_each("constraint", [L2, MAX, CorruptionConstraint(p=2, epsilon=0.3, top_n=9)])
def test_one_step_of_the_multi_step_risk_is_the_direct_form(problem, constraint):
    """A step of 1.5 ε, projected onto S, is the worst corruption of S; half of each loss is the mean of both."""
    multi_step = multi_step_risk(MultiStepRisk(constraint, steps=1), problem)
    direct = acrt(ACRT(constraint, alpha=0.5), problem)
    for name, gradient in direct.items():
        torch.testing.assert_close(multi_step[name], gradient, rtol=1e-12, atol=1e-15)


def test_a_tensor_of_zeros_stays_where_each_has_its_own_radius(problem):
    """A radius in units of its norm is zero, and no NaN."""
    model, inputs, labels = problem
    nn.init.zeros_(model[2].bias)
    seen = []

    def run_pass(objective: Objective, index: int) -> Tensor:
        seen.append(model[2].bias.tolist())
        loss = objective(nn.functional.cross_entropy(model(inputs), labels))
        loss.backward()
        return loss.detach()

    defense = AWP(L2, steps=2, input_epsilon=0, per_tensor=True)
    with DefendedStep(dict(model.named_parameters()), run_pass, defense.passes, [], model[0]) as step:
        defense.minimize(step)
    assert seen == [[0.0] * 3] * 3
