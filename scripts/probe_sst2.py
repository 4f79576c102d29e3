"""Which part of a small BERT is weak on SST-2? The probes of paper 1, Figures 4 and 5, plain and defended.

    python scripts/probe_sst2.py --model MODEL --data FOLDER --output model_cards/sst2-minilm-probes

MODEL is a folder or a name on the Hub, FOLDER holds `train_sentences.tsv.gz` and `dev.tsv.gz`. Both models are trained
by `examples/train_sst2.py`, the defended one with the defaults of the defense (K = 1, L2, ε = 0.1), and probed on the
dev sentences: by kind of module and by layer. Finished trainings and measurements are kept, so an interrupted run goes
on. The output folder gets the records, `runs.json` with what made them, a report of each grouping, and its heat map.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from campaigns.arms import ONE_STEP, PLAIN, Arm, Run
from campaigns.notes import note_run
from campaigns.sst2 import model_and_batches, parse_options, train
from observations.page import page

from hf_parcor import (
    CorruptionConstraint,
    GradientCorruption,
    LayerProbe,
    RandomCorruption,
    RobustnessReport,
    SweepRecord,
    by_kind,
    by_layer,
)
from hf_parcor.corruptions import Corruption
from hf_parcor.evaluation import ClassificationMetric
from hf_parcor.records.metric_info import SHARE
from hf_parcor.reports.plots import plot_heat_map

COMMAND = "python scripts/probe_sst2.py --model MODEL --data FOLDER --output model_cards/sst2-minilm-probes"
ARMS = {"plain": PLAIN, "defended": Arm("K = 1", ONE_STEP)}
GROUPINGS = {"kinds": by_kind, "layers": by_layer}
EPOCHS = 2
# The same ε for every group, as in paper 1: first without a limit, in the norm of the defense; then as there, in L∞
# and for few weights; and random directions, up to radii that do harm. The reports have ε in units of the norm of each
# group's weights, too.
RADII = (0.2, 0.5, 1.0, 2.0, 5.0)
RADII_OF_FEW = (0.2, 0.5, 1.0)
RADII_AT_RANDOM = (5.0, 20.0)
FEW = {"kinds": 10, "layers": 100}  # Figure 4, (a-b) and (c-f)


def corruptions_of(grouping: str) -> list[Corruption]:
    """Return what each group is measured under."""
    few = FEW[grouping]
    return [
        *(GradientCorruption(CorruptionConstraint(p=2, epsilon=epsilon)) for epsilon in RADII),
        *(GradientCorruption(CorruptionConstraint(p=math.inf, epsilon=e, top_n=few)) for e in RADII_OF_FEW),
        *(RandomCorruption(CorruptionConstraint(p=2, epsilon=epsilon)) for epsilon in RADII_AT_RANDOM),
    ]


def probe(options: argparse.Namespace, run: Run, grouping: str) -> SweepRecord:
    """Train a model and probe it, unless its record is there already."""
    path: Path = options.output / f"{run.file_name}-{grouping}.json"
    if not path.exists():
        folder = train(options, run, "--num_train_epochs", str(EPOCHS))
        note_run(options.output, options.work, run, options.threads, epochs=EPOCHS, command=COMMAND)
        model, batches = model_and_batches(options, folder)
        targets = GROUPINGS[grouping](model)
        layer_probe = LayerProbe(model, ClassificationMetric(batches), batches, targets=targets)
        layer_probe.evaluate(corruptions_of(grouping), trials=1, checkpoint=folder / f"{grouping}.jsonl").save(path)
    return SweepRecord.load(path)


def draw(folder: Path, grouping: str, sweeps: dict[str, list[SweepRecord]]) -> None:
    """Write the report that compares the models, and the heat maps of the first seed."""
    title = f"A BERT of 6 layers on SST-2, plain and defended, by {grouping}"
    report = RobustnessReport.compare(sweeps, unit=SHARE, title=title)  # as ClassificationMetric measures it
    report.to_html(folder / f"{grouping}.html")
    report.to_markdown(folder / f"{grouping}.md")
    figure = plot_heat_map({name: of_arm[0] for name, of_arm in sweeps.items()}, title=title)
    figure.savefig(folder / f"{grouping}.png", dpi=80)


def readme(sweeps: dict[str, dict[str, list[SweepRecord]]]) -> str:
    """Return the page on what was found with the first seed."""
    kinds, layers = ({name: of_arm[0] for name, of_arm in sweeps[grouping].items()} for grouping in GROUPINGS)
    return page(kinds, layers, COMMAND, " and ".join(f"{n} of {grouping}" for grouping, n in FEW.items()))


def main() -> None:
    """Train, probe and draw what is missing."""
    options = parse_options(__doc__, ARMS, "runs/probe_sst2", train_samples=6920, seeds=1)
    sweeps = {
        grouping: {
            name: [probe(options, Run(name, ARMS[name], seed), grouping) for seed in options.seeds]
            for name in options.arms or ARMS
        }
        for grouping in GROUPINGS
    }
    if options.arms:
        return
    for grouping, of_grouping in sweeps.items():
        draw(options.output, grouping, of_grouping)
    (options.output / "README.md").write_text(readme(sweeps), encoding="utf-8")


if __name__ == "__main__":
    main()
