"""Which format each part of a model gets under a budget: chosen, measured as a whole, and exported."""

from hf_parcor.recipes.choice import BudgetError, check_bits, front, recipe, uniform_recipe
from hf_parcor.recipes.exports import Exports, export_recipe
from hf_parcor.recipes.measured import MixedQuantization, measure_pairs, measure_recipes

__all__ = [
    "BudgetError",
    "Exports",
    "MixedQuantization",
    "check_bits",
    "export_recipe",
    "front",
    "measure_pairs",
    "measure_recipes",
    "recipe",
    "uniform_recipe",
]
