"""The objective of a search against ε."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_parcor.evaluation.series import short
from hf_parcor.plots.style import line_styles, new_figure
from hf_parcor.search_record import SearchRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_search(record: SearchRecord, objective: str = "objective") -> Figure:
    """Draw the objective of a search against ε on a log scale, a line for each K, a ring around the best training.

    Args:
        record: What `search_epsilon` returned.
        objective: What the vertical axis is called.

    Raises:
        ValueError: The record has no trials.
        ImportError: matplotlib is not installed.
    """
    best = record.best
    figure = new_figure(4.8, 3.4)
    axis = figure.subplots()
    counts = dict.fromkeys(trial.steps for trial in record.trials)
    for steps, (color, marker) in zip(counts, line_styles(), strict=False):
        curve = record.curve(steps)
        label = "" if steps is None else f"K = {steps}"
        radii, values = [trial.epsilon for trial in curve], [trial.objective for trial in curve]
        axis.plot(radii, values, color=color, marker=marker, markersize=5, linewidth=1.5, label=label)
    axis.plot(
        [best.epsilon], [best.objective], linestyle="", marker="o", markersize=13, fillstyle="none", color="black"
    )
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: short(value))
    axis.set_xlabel("radius ε")
    axis.set_ylabel(objective, parse_math=False)
    axis.set_title(f"best: ε = {best.epsilon:g}" + ("" if best.steps is None else f", K = {best.steps}"))
    axis.grid(alpha=0.25)
    if None not in counts:
        axis.legend(frameon=False)
    return figure
