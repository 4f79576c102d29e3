"""Plots drawn from records; they compute nothing but the means and deviations that records know themselves."""

from hf_parcor.plots.comparison import plot_comparison
from hf_parcor.plots.directions import plot_directions
from hf_parcor.plots.heat_map import plot_heat_map
from hf_parcor.plots.search import plot_search

__all__ = ["plot_comparison", "plot_directions", "plot_heat_map", "plot_search"]
