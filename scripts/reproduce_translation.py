"""Paper 2's Tables 1, 2, 3, 4 and 6 and Figure 3 for one translation data set, cell by cell.

    python scripts/reproduce_translation.py --study de-en --data FOLDER --output scripts/results/translation/de-en

FOLDER holds two files of lines for each split, `train.de` and `train.en`, say, also `.gz`, or a table for each,
`train.tsv.gz`. The studies `de-en` and `en-vi` are the papers' own (6 + 6 layers, for a GPU); `multi30k` and `tatoeba`
are small ones for a processor. `--tables 6` does that table alone. Models are trained by
`examples/train_translation.py`; what an arm shares with the plain one of its seed is trained once. Each run, record
and corruption within a record is kept, so an interrupted campaign goes on. The output folder gets records,
`runs.json`, `table.md`, and `figure-3.png`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from sst2_runs import Run
from translation_paper import TABLE_1, TABLE_2, TABLE_3, TABLE_4, TABLE_6
from translation_runs import Measured, train
from translation_studies import STUDIES, Study

from hf_parcor.corruptions import Corruption
from hf_parcor.evaluation import EvaluationRecord, SweepRecord
from hf_parcor.plots.style import line_styles, new_figure
from hf_parcor.statistics import MeanAndSpread, student_t_test

TABLES = ("1", "2", "3", "4", "6", "figure-3")
DEFENSES = ("plain", "acrt", "awp", "defended")
TARGETS = ("plain", "defended", "last-layer")


class Campaign:
    """The records of one study, measured when they are asked for.

    Args:
        options: The command line's.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.study: Study = STUDIES[options.study]
        self.metric = "tokenized_bleu"  # what the papers report
        self._measured = cache(self._measure)

    def _measure(self, name: str, seed: int) -> Measured:
        run = Run(name, self.study.arms[name], seed)
        return Measured(self.options, self.study, train(self.options, self.study, run))

    def _path(self, name: str, seed: int, part: str) -> Path:
        path: Path = self.options.output / f"{name}-seed{seed}-{part}.json"
        return path

    def records(
        self, name: str, part: str, corruptions: Sequence[Corruption], target: str | None = None
    ) -> list[EvaluationRecord]:
        """Return the records of an arm, one a seed, made now if they are not there."""
        found = []
        for seed in self.options.seeds:
            path = self._path(name, seed, part)
            if not path.exists():
                self._measured(name, seed).corrupted(path, corruptions, target)
            found.append(EvaluationRecord.load(path))
        return found

    def sweeps(self, name: str) -> list[SweepRecord]:
        """Return the sweeps through the layers of an arm, one a seed."""
        found = []
        for seed in self.options.seeds:
            path = self._path(name, seed, "layers")
            if not path.exists():
                self._measured(name, seed).layer_by_layer(path, self.study.layers)
            found.append(SweepRecord.load(path))
        return found

    def bleu(self, records: Sequence[EvaluationRecord], row: int) -> list[float]:
        """Return the BLEU of a row of the records, one a seed."""
        return [record.rows()[row].mean(self.metric) for record in records]


def shown(values: Sequence[float]) -> str:
    """Return mean ± sample standard deviation, or the single value."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    spread = MeanAndSpread.from_values(values)
    return f"{spread.mean:.2f} ± {spread.standard_deviation:.2f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, numbers on the right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


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
    return markdown(["BLEU", *labels, *(f"paper: {label}" for label in labels if paper)], rows)


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
        defense = arm.arguments if arm.defense is not None else None
        steps = "-" if defense is None else str(defense.defense_steps)
        norm = "-" if defense is None else "L2" if defense.defense_norm == 2 else "L∞"
        radius = "-" if defense is None else f"{defense.defense_epsilon:.2g}"
        start = "random" if defense is not None and defense.defense_random_start else ""
        bleu = shown(campaign.bleu(campaign.records(name, "clean", []), 0))
        rows.append([arm.label, norm, steps, radius, start, bleu, *([f"{paper[name]:.2f}"] if paper else [])])
    return markdown(["setting", "norm", "K", "ε", "start", "BLEU", *(["paper"] if paper else [])], rows)


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
    return markdown(["defense", "BLEU", "t: no better than plain", *(["paper"] if paper else [])], rows)


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
    return markdown(header, rows)


def figure_3(campaign: Campaign) -> str:
    """Return Figure 3 as a table, a row for each layer, and draw it: the BLEU that a corruption of it leaves."""
    sweeps = {name: campaign.sweeps(name) for name in TARGETS}
    layers = list(sweeps["plain"][0].records)
    values = {
        name: [[sweep.records[layer].corruptions[0].mean(campaign.metric) for sweep in of_arm] for layer in layers]
        for name, of_arm in sweeps.items()
    }
    figure = new_figure(4.5 + 0.55 * len(layers), 4)
    axes = figure.subplots()
    for place, ((name, of_arm), (color, _)) in enumerate(zip(values.items(), line_styles(), strict=False)):
        heights = [sum(bleu) / len(bleu) for bleu in of_arm]
        places = [index + (place - 1) * 0.27 for index in range(len(layers))]
        axes.bar(places, heights, width=0.25, color=color, label=campaign.study.arms[name].label)
    axes.set_xticks(range(len(layers)), [layer.removeprefix("model.") for layer in layers], rotation=30, ha="right")
    axes.set_ylabel(f"BLEU under {campaign.study.layers}")
    axes.set_title(f"{campaign.study.title}: one layer corrupted", fontsize="medium")
    figure.legend(title="defended", frameon=False, loc="outside right upper")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(campaign.options.output / "figure-3.png", dpi=150)
    header = [f"corrupted: {campaign.study.layers}", *(campaign.study.arms[name].label for name in TARGETS)]
    return markdown(
        header, [[layer, *(shown(values[name][row]) for name in TARGETS)] for row, layer in enumerate(layers)]
    )


DRAWN: dict[str, Callable[[Campaign], str]] = dict(
    zip(TABLES, (table_1, table_2, table_3, table_4, table_6, figure_3), strict=True)
)


def main() -> None:
    """Run what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, choices=STUDIES)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the files of lines")
    parser.add_argument("--output", type=Path, required=True, help="the folder for records and tables")
    parser.add_argument("--work", type=Path, default=Path("runs/translation"), help="the folder for models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="only these, in this order")
    parser.add_argument("--test-sentences", type=int, help="measure on the first so many")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    campaign = Campaign(options)
    study = campaign.study
    sentences = "all test sentences" if options.test_sentences is None else f"{options.test_sentences} test sentences"
    text = [
        f"{study.title}: tokenised BLEU of {sentences}, beam 5, seeds {', '.join(map(str, options.seeds))}; "
        f"{study.epochs} epochs, defended from epoch {study.start_epoch} on, "
        f"mean of the last {study.average} checkpoints.\n"
    ]
    for table in options.tables:
        title = "Figure 3" if table == "figure-3" else f"Table {table}"
        text.append(f"## {title}\n\n{DRAWN[table](campaign)}")
        (options.output / "table.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
