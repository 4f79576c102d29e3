"""What two parts cost together: against a longhand quadratic, and what a recipe's pairs may be measured on."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from for_each import for_each
from torch import nn

from hf_parcor import Quantization, RecipeRecord, measure_recipes, recipe, sensitivity, uniform_recipe
from hf_parcor.evaluation import ClassificationMetric, CorruptionEvaluator
from hf_parcor.evaluation.metrics.loss import LossMetric
from hf_parcor.recipes import front, measure_pairs
from hf_parcor.targets import TargetError

FORMATS = [Quantization(4, "channel"), Quantization(2, "channel")]
PARTS = 4


class Summed(nn.Module):
    """A model whose answer is linear in all its weights, so that a squared loss is a quadratic of them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(3, 2, bias=False) for _ in range(PARTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(part(x**power) for power, part in enumerate(self.parts, start=1))


@pytest.fixture
def model() -> Summed:
    torch.manual_seed(3)
    return Summed().double()


@pytest.fixture
def batches(model) -> list[dict[str, torch.Tensor]]:
    """Rows whose targets are the model's own answers: its loss is 0, and so is its gradient."""
    x = torch.randn(6, 3, dtype=torch.float64)
    return [{"x": rows, "y": model(rows).detach()} for rows in x.split(2)]


def half_square(model, batch) -> torch.Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean() / 2


GIVEN = {"loss": half_square, "progress": False}


def scored(model, batches, **settings):
    """Return the scores of all parts, and a recipe in which both formats occur."""
    groups = {str(n): f"parts.{n}" for n in range(PARTS)}
    scores = sensitivity(model, batches, FORMATS, groups, **{**GIVEN, **settings})
    middle = sum(cell.bits for cell in scores.cells) / len(scores.cells)
    by = "fisher" if settings.get("budget") == 0 else "loss"
    return scores, recipe(scores, bits=middle, by=by, keep=False)


def test_an_interaction_is_the_block_of_the_hessian_between_two_parts(model, batches) -> None:
    before = [weight.clone() for weight in model.parameters()]
    scores, chosen = scored(model, batches)
    found = measure_pairs(model, batches, scores, chosen, **GIVEN)
    assert len(found.pairs) == PARTS * (PARTS - 1) // 2
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))

    def loss(*weights: torch.Tensor) -> torch.Tensor:
        named = dict(zip((name for name, _ in model.named_parameters()), weights, strict=True))
        losses = [
            (torch.func.functional_call(model, named, batch["x"]) - batch["y"]).square().mean() / 2
            for batch in batches
        ]
        return torch.stack(losses).mean()

    weights = tuple(weight.detach() for weight in model.parameters())
    hessian = torch.autograd.functional.hessian(loss, weights)
    made = {str(one): one for one in FORMATS}
    formats = [made[one.format] for one in chosen.choice.values()]
    errors = [one({"w": weight})["w"] - weight for one, weight in zip(formats, weights, strict=True)]
    for pair in found.pairs:
        g, h = int(pair.first), int(pair.second)
        expected = float((errors[g].flatten() @ hessian[g][h].reshape(6, 6)) @ errors[h].flatten())
        assert pair.interaction == pytest.approx(expected, rel=1e-6, abs=1e-12)
    sizes = [abs(pair.interaction) for pair in found.pairs]
    assert sizes == sorted(sizes, reverse=True)


def test_weights_whose_names_are_the_ends_of_other_names_are_measured_alone(batches) -> None:
    """As a list of targets, the name of the first would stand for the second, too."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = (nn.Linear(3, size, bias=False) for size in (3, 2))
            self.inner = nn.ModuleDict({"fc": nn.Linear(3, 3, bias=False)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.inner["fc"](self.fc(x)))

    model = Nested().double()
    scores = sensitivity(model, batches, FORMATS[1:], "modules", **GIVEN)
    chosen = replace(uniform_recipe(scores, str(FORMATS[1])), by="loss")
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(*groups: str) -> float:
        own = {f"{group}.weight": weights[f"{group}.weight"] for group in groups}
        rounded = FORMATS[1](own) if own else {}
        given = [torch.func.functional_call(model, {**weights, **rounded}, batch["x"]) for batch in batches]
        return sum(float((y - batch["y"]).square().mean() / 2) for y, batch in zip(given, batches, strict=True)) / 3

    for pair in measure_pairs(model, batches, scores, chosen, **GIVEN).pairs:
        assert pair.together == pytest.approx(loss(pair.first, pair.second) - loss(), rel=1e-9)
    alone = replace(
        chosen,
        groups={"fc": chosen.groups["fc"]},
        choice={"fc": chosen.choice["fc"]},
    )
    measured = measure_recipes(model, batches, {"fc": alone}, **GIVEN)
    assert measured.corruptions[0].mean("loss") == pytest.approx(loss("fc"), rel=1e-9)
    assert measured.parameters == 9
    with pytest.raises(TargetError, match=r'got "fc\.weight", which .* does not have'):
        measure_recipes(nn.Sequential(model), batches, {"fc": alone}, **GIVEN)


@for_each("known", ["divergence", "loss"])
def test_pairs_of_a_recipe_that_a_score_chose_are_measured_by_the_divergence_or_else_by_the_metric(
    known, model, batches
) -> None:
    scores, chosen = scored(model, batches)
    if known == "loss":
        scores = replace(scores, clean={"loss": scores.clean["loss"]})
    by_score = measure_pairs(model, batches, scores, replace(chosen, by="fisher"), **GIVEN)
    assert by_score.pairs == measure_pairs(model, batches, scores, replace(chosen, by=known), **GIVEN).pairs
    assert {pair.metric for pair in by_score.pairs} == {known}


def test_parts_and_pairs_add_up_to_the_whole_of_a_quadratic(model, batches) -> None:
    scores, _ = scored(model, batches)
    chosen = replace(uniform_recipe(scores, str(FORMATS[1])), by="loss")
    found = measure_pairs(model, batches, scores, chosen, **GIVEN)
    expected = sum(scores.costs("loss")[group, str(FORMATS[1])] for group in chosen.groups)
    expected += sum(pair.interaction for pair in found.pairs)
    whole = measure_recipes(model, LossMetric(batches, half_square), {"all": chosen}, batches=batches, progress=False)
    assert whole.corruptions[0].mean("loss") == pytest.approx(expected, rel=1e-9)
    assert RecipeRecord.from_json(found.to_json()) == found


def test_the_pairs_that_can_interact_most_come_first(model, batches) -> None:
    scores, chosen = scored(model, batches)
    costs = {group: scores.costs("loss")[group, one.format] for group, one in chosen.choice.items()}
    bounds = {pair: costs[pair[0]] * costs[pair[1]] for pair in combinations(costs, 2)}
    for count in range(1, len(bounds) + 1):
        found = measure_pairs(model, batches, scores, chosen, pairs=count, **GIVEN)
        measured = {(pair.first, pair.second) for pair in found.pairs}
        assert measured == set(sorted(bounds, key=lambda pair: -bounds[pair])[:count])
        for pair in found.pairs:
            assert abs(pair.interaction) <= 2 * bounds[pair.first, pair.second] ** 0.5 * (1 + 1e-9)


def test_what_was_not_measured_apart_is_measured_beside_the_pairs(model, batches) -> None:
    whole, chosen = scored(model, batches)
    expected = {
        (pair.first, pair.second): pair for pair in measure_pairs(model, batches, whole, chosen, **GIVEN).pairs
    }
    for budget in (0, 1, PARTS):
        part, _ = scored(model, batches, budget=budget)
        for pair in measure_pairs(model, batches, part, chosen, **GIVEN).pairs:
            assert pair == expected[pair.first, pair.second]
    assert measure_pairs(model, batches, whole, chosen, pairs=0, **GIVEN).pairs == ()


def test_a_recipe_that_keeps_everything_is_measured_as_the_model_that_it_is() -> None:
    """Also where recipes are measured together, behind a beginning that none of them changes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    metric = ClassificationMetric([{"input": torch.randn(4, 4), "labels": torch.tensor([0, 1, 2, 0])}] * 12)
    before = [weight.clone() for weight in model.parameters()]
    scores = sensitivity(model, metric, FORMATS, {"a": "2", "b": "4"}, progress=False)
    chosen = recipe(scores, bits=1e9)
    assert chosen.base is None
    measured = measure_recipes(model, metric, front(scores, chosen), progress=False)
    rows = {row.label: row for row in measured.corruptions}
    assert rows["recipe"].metrics == measured.clean.metrics
    assert rows["recipe"].settings["bits"] == chosen.bits
    assert rows[str(FORMATS[1])].metrics != measured.clean.metrics
    assert measure_pairs(model, metric, scores, chosen, progress=False).pairs == ()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


class Counted(LossMetric):
    """Counts its batches, and is killed at one of them."""

    calls, last = 0, 10**9

    def of_batch(self, model, batch):
        Counted.calls += 1
        if Counted.calls > Counted.last:
            raise KeyboardInterrupt
        return super().of_batch(model, batch)


@pytest.mark.slow
@for_each("of_pairs", [False, True])
def test_other_recipes_go_on_beside_each_other_in_one_folder_and_after_a_kill(
    of_pairs, model, batches, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("hf_parcor.evaluation.measurement.BETWEEN_WRITES", 1)
    scores, chosen = scored(model, batches)
    other = uniform_recipe(scores, str(FORMATS[1]))
    fewer, _ = scored(model, batches, budget=2)

    def measure(of, pairs=3, known=scores, last=10**9, path=tmp_path / f"{of_pairs}.jsonl"):
        Counted.calls, Counted.last = 0, last
        metric = Counted(batches, half_square)
        if of_pairs:
            return measure_pairs(model, metric, known, of, pairs=pairs, checkpoint=path, **GIVEN)
        return measure_recipes(model, metric, front(known, of), batches=batches, checkpoint=path, progress=False)

    first = measure(chosen)
    whole = Counted.calls
    assert whole > len(batches)
    with suppress(KeyboardInterrupt):
        measure(other, last=2 * len(batches))
    again = measure(other)
    resumed = Counted.calls
    assert again == measure(other, path=None)
    assert 0 < resumed < Counted.calls, "what was measured before the kill is not measured again"
    assert measure(chosen) == first
    assert not Counted.calls, "nor what was measured before another recipe was"
    for more in ({"pairs": 5}, {"known": fewer}):
        assert measure(chosen, **more) == measure(chosen, **more, path=None)


def test_whole_recipes_are_measured_on_what_was_scored_on(model, batches) -> None:
    scores, chosen = scored(model, batches)
    whole = measure_recipes(model, batches, {"one": chosen}, **GIVEN)
    expected = measure_recipes(
        model, LossMetric(batches, half_square), {"one": chosen}, batches=batches, progress=False
    )
    assert whole.corruptions[0].metrics == expected.corruptions[0].metrics
    assert whole.clean.metrics == expected.clean.metrics
    assert whole.data == scores.data
    with pytest.raises(ValueError, match="recipes: expected at least one"):
        measure_recipes(model, batches, {}, **GIVEN)
    with pytest.raises(TypeError, match="metric") as caught:
        CorruptionEvaluator(model, batches)
    assert len(str(caught.value)) < 300, "no tensors of the data"


def test_what_breaks_the_model_by_itself_is_in_no_pair(model, batches) -> None:
    scores, chosen = scored(model, batches)
    for odd in (math.inf, math.nan):
        broken = tuple(replace(one, measured={"loss": odd}) if one.group == "0" else one for one in scores.cells)
        found = measure_pairs(model, batches, replace(scores, cells=broken), chosen, **GIVEN)
        assert {pair.first for pair in found.pairs} | {pair.second for pair in found.pairs} == {"1", "2", "3"}


def test_by_the_divergence_a_classifier_without_labels_in_it_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    data = [{"input": torch.randn(4, 4), "labels": torch.tensor([0, 1, 2, 0])}]
    metric = ClassificationMetric(data)
    scores = sensitivity(model, metric, FORMATS, {"a": "0", "b": "2"}, progress=False)
    runs = []
    counting = model.register_forward_hook(lambda *_: runs.append(1))
    found = measure_pairs(model, metric, scores, uniform_recipe(scores, str(FORMATS[1])), progress=False)
    counting.remove()
    assert len(runs) == 2, "as it is, and with both parts rounded"
    (pair,) = found.pairs
    rounded = [FORMATS[1]({"w": model[at].weight.detach()})["w"] for at in (0, 2)]
    before = model(data[0]["input"]).log_softmax(-1)
    hidden = (data[0]["input"] @ rounded[0].T + model[0].bias).tanh()
    after = (hidden @ rounded[1].T + model[2].bias).log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1).mean().item()
    assert (pair.metric, pair.together) == ("divergence", pytest.approx(kl, rel=1e-4))


def test_other_weights_and_other_data_are_refused(model, batches) -> None:
    scores, chosen = scored(model, batches)
    with pytest.raises(ValueError, match="metric:"):
        measure_pairs(model, batches[:2], scores, chosen, **GIVEN)
    model.parts[0].weight.data.add_(1.0)
    with pytest.raises(ValueError, match="model:"):
        measure_pairs(model, batches, scores, chosen, **GIVEN)
