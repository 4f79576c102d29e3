"""Parameter corruption and adversarial parameter defense for Hugging Face Transformers.

How fragile are a model's weights? `CorruptionEvaluator` measures it. `ParameterDefenseTrainer` trains models whose
weights are not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from hf_parcor.cards.mixin import PublishingMixin
    from hf_parcor.constraints import CorruptionConstraint
    from hf_parcor.corruptions import (
        BitFlips,
        ConductanceDrift,
        FloatQuantization,
        GaussianNoise,
        GradientCorruption,
        Interpolation,
        MultiStepCorruption,
        Pruning,
        Quantization,
        RandomCorruption,
        UniformNoise,
        WorstBitFlips,
    )
    from hf_parcor.defenses import ACRT, AWP, SAM, CorruptionRisk, GradientPenalty, MultiStepRisk
    from hf_parcor.evaluation import CorruptionEvaluator, LayerProbe, RobustnessCallback
    from hf_parcor.indicators import measure_flips_to_break, measure_indicators, sensitivity
    from hf_parcor.injection import corrupted
    from hf_parcor.recipes import export_recipe, measure_recipes, recipe, uniform_recipe
    from hf_parcor.records import (
        CorruptionRecord,
        EvaluationRecord,
        FlipRecord,
        IndicatorRecord,
        MetricInfo,
        RecipeRecord,
        SearchRecord,
        SensitivityRecord,
        SweepRecord,
    )
    from hf_parcor.reports import FirstLookReport, RecipeReport, RobustnessReport
    from hf_parcor.search import search_epsilon, search_strength
    from hf_parcor.targets import by_adapter, by_kind, by_layer, by_module, select_parameters
    from hf_parcor.trainers import ParameterDefenseTrainer, Seq2SeqParameterDefenseTrainer
    from hf_parcor.training import (
        DefendedBackward,
        DefenseConfig,
        ParameterDefenseMixin,
        ParameterDefenseTrainingArguments,
        Seq2SeqParameterDefenseTrainingArguments,
        defended_backward,
    )

__all__ = [
    "ACRT",
    "AWP",
    "SAM",
    "BitFlips",
    "ConductanceDrift",
    "CorruptionConstraint",
    "CorruptionEvaluator",
    "CorruptionRecord",
    "CorruptionRisk",
    "DefendedBackward",
    "DefenseConfig",
    "EvaluationRecord",
    "FirstLookReport",
    "FlipRecord",
    "FloatQuantization",
    "GaussianNoise",
    "GradientCorruption",
    "GradientPenalty",
    "IndicatorRecord",
    "Interpolation",
    "LayerProbe",
    "MetricInfo",
    "MultiStepCorruption",
    "MultiStepRisk",
    "ParameterDefenseMixin",
    "ParameterDefenseTrainer",
    "ParameterDefenseTrainingArguments",
    "Pruning",
    "PublishingMixin",
    "Quantization",
    "RandomCorruption",
    "RecipeRecord",
    "RecipeReport",
    "RobustnessCallback",
    "RobustnessReport",
    "SearchRecord",
    "SensitivityRecord",
    "Seq2SeqParameterDefenseTrainer",
    "Seq2SeqParameterDefenseTrainingArguments",
    "SweepRecord",
    "UniformNoise",
    "WorstBitFlips",
    "by_adapter",
    "by_kind",
    "by_layer",
    "by_module",
    "corrupted",
    "defended_backward",
    "export_recipe",
    "measure_flips_to_break",
    "measure_indicators",
    "measure_recipes",
    "recipe",
    "search_epsilon",
    "search_strength",
    "select_parameters",
    "sensitivity",
    "uniform_recipe",
]

# Where each name is: parts are imported when one of their names is first asked for, so that a command line's help, or
# a reader of records, does not wait for PyTorch.
_PARTS = {
    "cards.mixin": ("PublishingMixin",),
    "constraints": ("CorruptionConstraint",),
    "corruptions": (
        "BitFlips",
        "ConductanceDrift",
        "FloatQuantization",
        "GaussianNoise",
        "GradientCorruption",
        "Interpolation",
        "MultiStepCorruption",
        "Pruning",
        "Quantization",
        "RandomCorruption",
        "UniformNoise",
        "WorstBitFlips",
    ),
    "defenses": (
        "ACRT",
        "AWP",
        "SAM",
        "CorruptionRisk",
        "GradientPenalty",
        "MultiStepRisk",
    ),
    "evaluation": (
        "CorruptionEvaluator",
        "LayerProbe",
        "RobustnessCallback",
    ),
    "indicators": ("measure_flips_to_break", "measure_indicators", "sensitivity"),
    "injection": ("corrupted",),
    "recipes": ("export_recipe", "measure_recipes", "recipe", "uniform_recipe"),
    "records": (
        "CorruptionRecord",
        "EvaluationRecord",
        "FlipRecord",
        "IndicatorRecord",
        "MetricInfo",
        "RecipeRecord",
        "SearchRecord",
        "SensitivityRecord",
        "SweepRecord",
    ),
    "reports": ("FirstLookReport", "RecipeReport", "RobustnessReport"),
    "search": ("search_epsilon", "search_strength"),
    "targets": (
        "by_adapter",
        "by_kind",
        "by_layer",
        "by_module",
        "select_parameters",
    ),
    "training": (
        "DefendedBackward",
        "DefenseConfig",
        "ParameterDefenseMixin",
        "ParameterDefenseTrainingArguments",
        "Seq2SeqParameterDefenseTrainingArguments",
        "defended_backward",
    ),
    "trainers": ("ParameterDefenseTrainer", "Seq2SeqParameterDefenseTrainer"),
}
_HOMES = {name: part for part, names in _PARTS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f"{__name__}.{name}")
    if name == "__version__":
        found: Any = import_module(f"{__name__}.defense_file").installed_version()
    elif name in _HOMES:
        found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
