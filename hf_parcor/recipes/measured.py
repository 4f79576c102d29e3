"""A recipe as a corruption of the whole model, and of two of its parts at a time: do costs add up?"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_parcor.arguments import check_count
from hf_parcor.corruptions import CORRUPTIONS, Corruption
from hf_parcor.corruptions.corruption import GradientSource, Strength
from hf_parcor.evaluation import CorruptionEvaluator, LayerProbe
from hf_parcor.evaluation.identity.fingerprint import fingerprint, fingerprint_of_weights
from hf_parcor.evaluation.identity.row_fingerprint import is_data
from hf_parcor.evaluation.losses import Batch, Loss, model_loss
from hf_parcor.evaluation.measurement import Metric
from hf_parcor.evaluation.metrics import BatchMetric, WithDivergence
from hf_parcor.evaluation.placement.replicas import whole_model
from hf_parcor.indicators.format_sensitivity import metric_and_batches
from hf_parcor.injection import Pieces
from hf_parcor.records.curves import metric_drop
from hf_parcor.records.evaluation import EvaluationRecord
from hf_parcor.records.recipe import PairCost, RecipeRecord
from hf_parcor.records.sensitivity import DIVERGENCE, FISHER, SensitivityRecord
from hf_parcor.strict_json import to_strict_json
from hf_parcor.targets import Targets


def format_of(described: Mapping[str, Any]) -> Any:
    """Return the format that a record describes.

    Examples:
        >>> print(format_of({"corruption": "quantization", "settings": {"bits": 4, "per": 32}}))
        4-bit quantization per group of 32
    """
    return CORRUPTIONS[described["corruption"]](**described["settings"])


@dataclass(frozen=True)
class MixedQuantization(Corruption):
    """Every weight that a recipe names, rounded to its own format; the others stay as they are.

    Args:
        name: Its name in tables.
        bits: Average bits a weight.
        formats: The format of each weight, by the weight's name.
        by: The metric or score that the formats were chosen by; "" if nothing was chosen.

    Examples:
        >>> import torch
        >>> from hf_parcor import Quantization
        >>> mixed = MixedQuantization("mine", 2.0, (("a", Quantization(2)),))
        >>> mixed({"a": torch.tensor([1.0, 0.2]), "b": torch.tensor([0.5, 0.2])})
        {'a': tensor([1., 0.]), 'b': tensor([0.5000, 0.2000])}
    """

    name: str
    bits: float
    formats: tuple[tuple[str, Corruption], ...]
    by: str = ""
    title: ClassVar[str] = "mixed quantization"
    strengths: ClassVar[tuple[Strength, ...]] = (Strength("bits", "bits per weight", "{} bits", weakest=32.0),)

    @classmethod
    def of(cls, recipe: RecipeRecord, name: str = "recipe") -> MixedQuantization:
        """Return the corruption that applies a recipe."""
        made = {label: format_of(one) for label, one in recipe.formats.items() if one}
        chosen = tuple((weight, made[one.format]) for weight, one in recipe.weights() if one.format is not None)
        return cls(name, recipe.bits, chosen, recipe.by if recipe.budget else "")

    def __str__(self) -> str:
        return self.name

    def settings(self) -> dict[str, Any]:
        """Return the settings, with the label of each weight's format by the weight's name."""
        formats = {name: str(one) for name, one in self.formats}
        return {"name": self.name, "bits": self.bits, "by": self.by, "formats": formats}

    def _choose(self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: Any) -> Pieces:
        rounded = (one.pieces({name: weights[name]}) for name, one in self.formats if name in weights)
        return Pieces(chain.from_iterable(rounded), replaces=True)


def measure_recipes(
    model: nn.Module,
    metric: Metric | Iterable[Batch],
    recipes: Mapping[str, RecipeRecord],
    *,
    batches: Iterable[Batch] | None = None,
    loss: Loss = model_loss,
    checkpoint: str | Path | None = None,
    **settings: Any,
) -> EvaluationRecord:
    """Measure a model with all groups quantized together as each recipe says.

    Args:
        model: The model that the recipes are for.
        metric: As in `CorruptionEvaluator`; or batches alone, for their mean loss.
        recipes: The recipes, by the names that the rows of the record will have.
        batches: As in `CorruptionEvaluator`.
        loss: As in `CorruptionEvaluator`.
        checkpoint: As in `CorruptionEvaluator.evaluate`. A fingerprint of the recipes is added to the file's name, so
            that recipes of other budgets have files of their own.
        **settings: Other arguments of `CorruptionEvaluator`.

    Raises:
        ValueError: There are no recipes, or they name weights that the model does not have.

    Examples:
        >>> import torch
        >>> from hf_parcor.records import Choice, RecipeRecord, WeightGroup
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.2]]))
        >>> two = {"2 bits": {"corruption": "quantization", "settings": {"bits": 2}}}
        >>> record = RecipeRecord("m", {"all": WeightGroup({"weight": 2}, 32.0)}, two, {"all": Choice("2 bits", 2.0)})
        >>> measured = measure_recipes(
        ...     model, lambda m: {"sum": m.weight.detach().sum().item()}, {"recipe": record}, progress=False
        ... )
        >>> measured.corruptions[0].label, measured.corruptions[0].mean("sum")
        ('recipe', 1.0)
    """
    if not recipes:
        raise ValueError("recipes: expected at least one, got none; call recipe(scores, bits=4.5), say")
    names = dict.fromkeys(name for one in recipes.values() for name, _ in one.weights())
    weights = Targets(whole_model(model)).named(names)
    if not callable(metric):
        metric, batches = metric_and_batches(metric, batches, loss)
    evaluator = CorruptionEvaluator(model, metric, batches, loss=loss, target_modules=weights, **settings)
    mixed = [MixedQuantization.of(one, name) for name, one in recipes.items()]
    own = _own_checkpoint(checkpoint, weights, mixed)
    return evaluator.evaluate(mixed, trials=1, checkpoint=own)


def _own_checkpoint(
    checkpoint: str | Path | None,
    targets: str | Collection[str] | Mapping[str, Any],
    mixed: Sequence[MixedQuantization],
) -> Path | None:
    """Return the file of these recipes on these weights beside those of others; None for none."""
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    measured = to_strict_json({"targets": targets, "recipes": [one.settings() for one in mixed]})
    return path.with_name(f"{path.stem}-{fingerprint([measured])[:12]}{path.suffix}")


def measure_pairs(
    model: nn.Module,
    metric: Metric | Iterable[Batch],
    scores: SensitivityRecord,
    chosen: RecipeRecord,
    *,
    pairs: int = 10,
    batches: Iterable[Batch] | None = None,
    loss: Loss = model_loss,
    checkpoint: str | Path | None = None,
    **settings: Any,
) -> RecipeRecord:
    """Measure which pairs of a recipe's groups interact, that is, cost more or less together than apart.

    The interaction is c(g, h) − c(g) − c(h), to second order δ_gᵀHδ_h. If the curvature is that of a divergence,
    which has no negative direction, its magnitude is at most 2 √(c(g) c(h)); the pairs with the largest bound are
    measured. Costs are drops of the metric that the recipe was chosen by. If it was chosen by a score, they are drops
    of the divergence, or else of the record's metric. A group that breaks the model by itself is in no pair.

    Args:
        model: The model that was scored, with the same weights.
        metric: As passed to `sensitivity`.
        scores: What `sensitivity` returned.
        chosen: The recipe that was chosen from `scores`.
        pairs: The largest number of pairs.
        batches: As passed to `sensitivity`.
        loss: As passed to `sensitivity`.
        checkpoint: As in `measure_recipes`.
        **settings: Other arguments of `LayerProbe`.

    Returns:
        The recipe with its `pairs`, the strongest interaction first. Groups that had not been measured alone are
        measured too.

    Raises:
        ValueError: Weights or data are not those that were scored.

    Examples:
        >>> import torch
        >>> from hf_parcor import Quantization, recipe, sensitivity
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> for weight, values in zip(model.parameters(), ([[1.0, 0.4], [0.2, 1.0]], [[1.0, 0.4]])):
        ...     weight.data = torch.tensor(values)
        >>> given = {"loss": lambda m, x: -m(x).mean(), "progress": False}
        >>> scores = sensitivity(model, [torch.eye(2)], [Quantization(2, "channel")], {"a": "0", "b": "1"}, **given)
        >>> chosen = measure_pairs(model, [torch.eye(2)], scores, recipe(scores, bits=20.0, keep=False), **given)
        >>> for pair in chosen.pairs:
        ...     print(f"{pair.first} + {pair.second}: {pair.together:.2f} together, {pair.apart:.2f} apart")
        a + b: 0.44 together, 0.48 apart
    """
    check_count("pairs", pairs, minimum=0)
    by = chosen.by if chosen.by in scores.clean else DIVERGENCE if DIVERGENCE in scores.clean else scores.metric
    cells = {
        group: scores.by_place[group, one.format] for group, one in chosen.choice.items() if one.format is not None
    }
    costs = scores.costs(by if any(by in cell.measured for cell in scores.cells) else FISHER)
    # What breaks the model by itself adds up to nothing.
    finite = [
        group for group, cell in cells.items() if math.isfinite(costs[group, cell.format]) and not scores.breaks(cell)
    ]
    sizes = {group: max(0.0, costs[group, cells[group].format]) for group in finite}
    promising = sorted(combinations(finite, 2), key=lambda pair: -sizes[pair[0]] * sizes[pair[1]])[:pairs]
    if not promising:
        return replace(chosen, pairs=())
    model = whole_model(model)
    if scores.weights and fingerprint_of_weights(model) != scores.weights:
        raise ValueError("model: expected the weights that were scored, got others; call sensitivity again")
    metric, batches = metric_and_batches(metric, batches, loss)
    if scores.data and not is_data(batches, scores.data):
        raise ValueError("metric: expected the data that was scored, got other; give what sensitivity was given")
    if by == DIVERGENCE and isinstance(metric, BatchMetric):
        metric = WithDivergence(metric, model)
    alone = {group: drop for group, cell in cells.items() if (drop := scores.drop(cell, by)) is not None}
    missing = [group for group in dict.fromkeys(chain(*promising)) if group not in alone]
    measured = [*promising, *((group,) for group in missing)]
    every = Targets(model)
    targets = {
        " + ".join(some): every.named(name for group in some for name in chosen.groups[group].weights)
        for some in measured
    }
    mixed = MixedQuantization.of(chosen)
    probe = LayerProbe(model, metric, batches, loss=loss, targets=targets, **settings)
    own = _own_checkpoint(checkpoint, targets, [mixed])
    clean = metric.clean if isinstance(metric, WithDivergence) else None
    sweep = probe.evaluate([mixed], trials=1, checkpoint=own, clean=clean)
    greater = scores.info(by).greater_is_better
    drops = {
        some: metric_drop(record.clean.mean(by), record.corruptions[0].mean(by), greater_is_better=greater)
        for some, record in zip(measured, sweep.records.values(), strict=True)
    }
    alone |= {group: drops[group,] for group in missing}
    found = [PairCost(g, h, by, drops[g, h], alone[g] + alone[h]) for g, h in promising]
    return replace(chosen, pairs=tuple(sorted(found, key=lambda pair: -abs(pair.interaction))))
