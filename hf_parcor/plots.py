"""Plots drawn from records; they compute nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hf_parcor.evaluation.records import CorruptionRecord, EvaluationRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, safe for colour-blind readers; markers differ too.
_STYLES = [("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v")]

# Which setting is a corruption's strength, and its axis title. Quantization grows weaker with more bits.
_STRENGTH = {
    "random": ("epsilon", "ε"),
    "gradient": ("epsilon", "ε"),
    "multi_step": ("epsilon", "ε"),
    "gaussian": ("std", "σ"),
    "uniform": ("bound", "b"),
    "quantization": ("bits", "bits"),
    "bit_flips": ("rate", "rate per bit"),
}


def plot_comparison(
    records: Mapping[str, EvaluationRecord], metric: str = "accuracy", title: str = "", chance: float | None = None
) -> Figure:
    """Draw the metric against the strength of each kind of corruption, a panel a kind, a line a record.

    Points are means over trials, bars sample standard deviations, dashed lines the clean metric.

    Args:
        records: Records by the name of their line.
        metric: Which metric to show.
        title: Above all panels.
        chance: The metric of a guess, drawn as a dotted line; None for no line.

    Returns:
        A figure; `figure.savefig("robustness.png")` writes it.

    Raises:
        ValueError: There are no records.
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install 'hf-parcor[plots]'") from error
    if not records:
        raise ValueError("records: expected at least one, got none; evaluate a model first")
    panels: dict[tuple[str, str], None] = {}
    for record in records.values():
        panels.update(dict.fromkeys(_panel(row) for row in record.corruptions))
    columns = min(len(panels), 3) or 1
    rows = math.ceil(len(panels) / columns) or 1
    figure = Figure(figsize=(3.4 * columns, 2.7 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw(axis, panel, records, metric, chance)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel(metric)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    if title:
        figure.suptitle(title)
    return figure


def _panel(row: CorruptionRecord) -> tuple[str, str]:
    """Return a corruption's name and what tells its panel from others of that name."""
    strength, _ = _STRENGTH.get(row.corruption, ("", ""))
    fixed = {name: value for name, value in row.settings.items() if name != strength and value is not None}
    if "p" in fixed:
        fixed = {"L": "∞" if math.isinf(fixed.pop("p")) else "2", **fixed} if fixed["p"] in (2, math.inf) else fixed
    detail = " ".join(f"{name}{value}" if name == "L" else f"{name}={value}" for name, value in fixed.items())
    return row.corruption, detail


def _draw(
    axis: Axes,
    panel: tuple[str, str],
    records: Mapping[str, EvaluationRecord],
    metric: str,
    chance: float | None,
) -> None:
    strength, unit = _STRENGTH.get(panel[0], ("", ""))
    for (color, marker), (name, record) in zip(_STYLES * len(records), records.items(), strict=False):
        rows = [row for row in record.corruptions if _panel(row) == panel]
        strengths = [row.settings.get(strength) or index for index, row in enumerate(rows)]
        deviations = [0.0 if math.isnan(row.deviation(metric)) else row.deviation(metric) for row in rows]
        axis.errorbar(
            strengths,
            [row.mean(metric) for row in rows],
            yerr=deviations,
            color=color,
            marker=marker,
            capsize=3,
            label=name,
        )
        axis.axhline(record.clean.mean(metric), color=color, linestyle="--", linewidth=0.8)
    if chance is not None:
        axis.axhline(chance, color="grey", linestyle=":", linewidth=0.8)
    if strength == "bits":
        axis.invert_xaxis()
    if strength == "rate":
        axis.set_xscale("log")
    axis.set_xlabel(unit)
    axis.set_title(" ".join(filter(None, [panel[0].replace("_", "-"), panel[1]])), fontsize="medium")
    axis.grid(alpha=0.25)
