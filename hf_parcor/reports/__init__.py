"""Reports from result records: a verdict in plain words, heat maps, curves, tables; HTML and Markdown."""

from hf_parcor.reports.report import FirstLookReport, RecipeReport, RobustnessReport

__all__ = ["FirstLookReport", "RecipeReport", "RobustnessReport"]
