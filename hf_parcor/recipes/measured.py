"""A recipe as a corruption of the whole model: do costs add up?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_parcor.corruptions import CORRUPTIONS, Corruption
from hf_parcor.corruptions.corruption import GradientSource, Strength
from hf_parcor.evaluation import CorruptionEvaluator
from hf_parcor.injection import Pieces
from hf_parcor.records.evaluation import EvaluationRecord
from hf_parcor.records.sensitivity import RecipeRecord


def format_of(described: Mapping[str, Any]) -> Any:
    """Return the format that a record describes.

    Examples:
        >>> print(format_of({"corruption": "quantization", "settings": {"bits": 4, "per": 32}}))
        4-bit quantization per group of 32
    """
    return CORRUPTIONS[described["corruption"]](**described["settings"])


@dataclass(frozen=True)
class MixedQuantization(Corruption):
    """Every weight that a recipe names rounded to its own format; others stay as they are.

    Args:
        name: What tables call it.
        bits: Average bits a weight.
        formats: The format of each weight, by the weight's name.
        by: What the formats were chosen by; "" where nothing was chosen.

    Examples:
        >>> import torch
        >>> from hf_parcor import Quantization
        >>> mixed = MixedQuantization("mine", 2.0, (("a", Quantization(2)),))
        >>> mixed({"a": torch.tensor([1.0, 0.2]), "b": torch.tensor([0.5, 0.2])})
        {'a': tensor([1., 0.])}
    """

    name: str
    bits: float
    formats: tuple[tuple[str, Corruption], ...]
    by: str = ""
    title: ClassVar[str] = "mixed quantization"
    strengths: ClassVar[tuple[Strength, ...]] = (Strength("bits", "bits per weight", "{} bits", weakest=32.0),)

    @classmethod
    def of(cls, recipe: RecipeRecord, name: str = "recipe") -> MixedQuantization:
        """Return the corruption that a recipe stands for."""
        made = {label: format_of(one) for label, one in recipe.formats.items() if one}
        chosen = tuple((weight, made[one.format]) for weight, one in recipe.weights() if one.format is not None)
        return cls(name, recipe.bits, chosen, recipe.by if recipe.budget else "")

    def __str__(self) -> str:
        return self.name

    def settings(self) -> dict[str, Any]:
        """Return the settings; formats by the names of the weights, as labels."""
        formats = {name: str(one) for name, one in self.formats}
        return {"name": self.name, "bits": self.bits, "by": self.by, "formats": formats}

    def _choose(self, weights: Mapping[str, Tensor], gradients: GradientSource | None, generator: Any) -> Pieces:
        return Pieces(self._rounded(weights), replaces=True)

    def _rounded(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, one in self.formats:
            if name in weights:
                yield from one.pieces({name: weights[name]})


def measure_recipes(
    model: nn.Module,
    metric: Any,
    recipes: Mapping[str, RecipeRecord],
    *,
    checkpoint: str | Path | None = None,
    **settings: Any,
) -> EvaluationRecord:
    """Measure a model with the weights that each recipe gives it, all groups together.

    Args:
        model: The model that the recipes are for.
        metric: As in `CorruptionEvaluator`.
        recipes: By the names that rows of the record shall have.
        checkpoint: As in `CorruptionEvaluator.evaluate`.
        **settings: Further ones of `CorruptionEvaluator`.

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
    weights = list(dict.fromkeys(name for one in recipes.values() for name, _ in one.weights()))
    evaluator = CorruptionEvaluator(model, metric, target_modules=weights, **settings)
    return evaluator.evaluate(
        [MixedQuantization.of(one, name) for name, one in recipes.items()], trials=1, checkpoint=checkpoint
    )
