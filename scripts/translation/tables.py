"""Paper 2's tables on translation, and its Figure 3, from the records of a campaign."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from campaigns.summary import mean_and_deviation

from hf_parcor.corruptions import Corruption
from hf_parcor.defenses import ConstrainedDefense
from hf_parcor.reports.markup import markdown_table
from hf_parcor.reports.plots import line_styles, new_figure
from hf_parcor.statistics import MeanAndSpread, student_t_test
from translation.campaign import Campaign
from translation.paper import TABLE_1, TABLE_2, TABLE_3, TABLE_4, TABLE_6

DEFENSES = ("plain", "acrt", "awp", "defended")
TARGETS = ("plain", "defended", "last-layer")


def shown(bleu: Sequence[float]) -> str:
    """Return a cell: BLEU over seeds."""
    return mean_and_deviation(bleu, 2)


def by_corruption(
    campaign: Campaign,
    part: str,
    corruptions: Sequence[Corruption],
    arms: Sequence[str],
    paper: Sequence[Sequence[float]],
) -> str:
    """Return a table with a row for each corruption, a column for each arm, and the paper's beside them."""
    records = {name: campaign.records(name, part, corruptions) for name in arms}
    labels = [campaign.study.arms[name].label for name in arms]
    rows = []
    for index, first in enumerate(records[arms[0]][0].rows()):
        cells = [shown(campaign.bleu(of_arm, index)) for of_arm in records.values()]
        rows.append([first.label, *cells, *(f"{value:.2f}" for value in (paper[index] if paper else ()))])
    return markdown_table(["BLEU", *labels, *(f"paper: {label}" for label in labels if paper)], rows)


def table_1(campaign: Campaign) -> str:
    """Return Table 1: all corruptions of the model without and with the defense."""
    paper = TABLE_1.get(campaign.options.study, [])
    return by_corruption(campaign, "table1", campaign.study.table_1, ("plain", "defended"), paper)


def table_2(campaign: Campaign) -> str:
    """Return Table 2: the settings of the defense, without corruption."""
    paper = TABLE_2 if campaign.options.study == "de-en" else {}
    rows = []
    for name, arm in campaign.study.arms.items():
        if name in ("last-layer", "acrt", "awp"):
            continue
        defense = arm.defense
        constraint = defense.constraint if isinstance(defense, ConstrainedDefense) else None
        steps = "-" if defense is None else str(getattr(defense, "steps", 1))
        norm = "-" if constraint is None else "L2" if constraint.p == 2 else "L∞"
        radius = "-" if constraint is None else f"{constraint.epsilon:.2g}"
        start = "random" if getattr(defense, "random_start", False) else ""
        bleu = shown(campaign.bleu(campaign.records(name, "clean", []), 0))
        rows.append([arm.label, norm, steps, radius, start, bleu, *([f"{paper[name]:.2f}"] if paper else [])])
    return markdown_table(["setting", "norm", "K", "ε", "start", "BLEU", *(["paper"] if paper else [])], rows)


def table_3(campaign: Campaign) -> str:
    """Return Table 3: defenses under multi-step corruption and quantization."""
    paper = TABLE_3.get(campaign.options.study, [])
    return by_corruption(campaign, "table3", campaign.study.table_3, DEFENSES, paper)


def table_4(campaign: Campaign) -> str:
    """Return Table 4: defenses without corruption, and the t-tests of Appendix C where there are several seeds."""
    bleu = {name: campaign.bleu(campaign.records(name, "clean", []), 0) for name in DEFENSES}
    paper = TABLE_4.get(campaign.options.study)
    rows = []
    for index, (name, values) in enumerate(bleu.items()):
        tested = ""
        if name != "plain" and len(values) > 1:
            test = student_t_test(MeanAndSpread.from_values(values), MeanAndSpread.from_values(bleu["plain"]))
            tested = f"{test.t:.2f}{'*' if test.is_significant() else ''}"
        beside = ["{:.2f} ± {:.3f}".format(*paper[index])] if paper else []
        rows.append([campaign.study.arms[name].label, shown(values), tested, *beside])
    return markdown_table(["defense", "BLEU", "t: no better than plain", *(["paper"] if paper else [])], rows)


def table_6(campaign: Campaign) -> str:
    """Return Table 6: what is defended against what is corrupted."""
    study = campaign.study
    paper = TABLE_6.get(campaign.options.study, {})
    header = ["defended", "no corruption"]
    rows: list[list[str]] = []
    for name in TARGETS:
        whole = campaign.records(name, "table6-whole", study.whole)
        last = campaign.records(name, "table6-last", study.last, "last-decoder-layer")
        corrupted = [("whole", whole, row) for row in range(1, 1 + len(study.whole))]
        corrupted += [("last layer", last, row) for row in range(1, 1 + len(study.last))]
        if not rows:
            header += [f"{what}: {records[0].rows()[row].label}" for what, records, row in corrupted]
            header += ["paper: no corruption", "whole", "last layer"] if paper else []
        cells = [shown(campaign.bleu(records, row)) for _, records, row in [("", whole, 0), *corrupted]]
        label = "nothing" if name == "plain" else study.arms[name].label
        rows.append([label, *cells, *(f"{value:.2f}" for value in paper.get(name, ()))])
    return markdown_table(header, rows)


def figure_3(campaign: Campaign) -> str:
    """Return Figure 3 as a table, a row for each layer, and draw it: the BLEU that a corruption of it leaves.

    Bars are means over seeds, with one sample standard deviation; the dashed line is the plain model, not corrupted.
    """
    sweeps = {name: campaign.sweeps(name) for name in TARGETS}
    layers = list(sweeps["plain"][0].records)
    values = {
        name: [[sweep.records[layer].corruptions[0].mean(campaign.metric) for sweep in of_arm] for layer in layers]
        for name, of_arm in sweeps.items()
    }
    figure = new_figure(4.5 + 0.55 * len(layers), 4)
    axes = figure.subplots()
    for place, ((name, of_arm), (color, _)) in enumerate(zip(values.items(), line_styles(), strict=False)):
        heights = [statistics.fmean(bleu) for bleu in of_arm]
        spread = [statistics.stdev(bleu) for bleu in of_arm] if len(of_arm[0]) > 1 else None
        places = [index + (place - 1) * 0.27 for index in range(len(layers))]
        label = campaign.study.arms[name].label
        axes.bar(places, heights, width=0.25, yerr=spread, capsize=3, color=color, label=label)
    clean = statistics.fmean(sweep.clean.mean(campaign.metric) for sweep in sweeps["plain"])
    axes.axhline(clean, color="grey", linestyle="--", linewidth=1, label="plain, no corruption")
    axes.set_xticks(range(len(layers)), [layer.removeprefix("model.") for layer in layers], rotation=30, ha="right")
    axes.set_ylabel(f"BLEU under {campaign.study.layers}")
    axes.set_title(f"{campaign.study.title}: one layer corrupted", fontsize="medium")
    figure.legend(title="defended", frameon=False, loc="outside right upper")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(campaign.options.output / "figure-3.png", dpi=150)
    header = [f"corrupted: {campaign.study.layers}", *(campaign.study.arms[name].label for name in TARGETS)]
    return markdown_table(
        header, [[layer, *(shown(values[name][row]) for name in TARGETS)] for row, layer in enumerate(layers)]
    )


TABLES: dict[str, Callable[[Campaign], str]] = {
    "1": table_1,
    "2": table_2,
    "3": table_3,
    "4": table_4,
    "6": table_6,
    "figure-3": figure_3,
}
