"""Paper 1 without training, on images: Table 1 and Figures 4 and 5 for trained ResNets of CIFAR-10.

    python -m scripts.reproduce_paper_1 --weights FOLDER --data FOLDER --output scripts/results/paper_1

The first folder holds `resnet20.safetensors` and the like, the second `cifar10_test_jpeg.npz` and the strips
`cifar10_lossless*.png`. `examples/train_image_classifier.py` makes a model of each file. Gradients are those of the
lossless images, which are training images, as the paper takes them; accuracy is measured on them and on the test set.
What is finished is kept, and what was stopped goes on where it was, measurement by measurement. The output folder gets
a record for each model and data set, and for each probe, heat maps, and `README.md`, which stands beside the paper.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedModel

from hf_parcor import (
    CorruptionConstraint,
    CorruptionEvaluator,
    EvaluationRecord,
    GradientCorruption,
    LayerProbe,
    RandomCorruption,
    SweepRecord,
    by_kind,
    by_layer,
)
from hf_parcor.corruptions import Corruption
from hf_parcor.evaluation import ClassificationMetric
from hf_parcor.records import CorruptionRecord, EvaluationData
from hf_parcor.reports.plots import plot_heat_map
from hf_parcor.reports.tables import markdown_table
from hf_parcor.targets.groups import Groups
from hf_parcor.tasks import ImageClassification, decoded_images, load_rows
from scripts.campaigns import DEVICE, run_example

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_image_classifier.py"
COMMAND = "python -m scripts.reproduce_paper_1 --weights FOLDER --data FOLDER --output scripts/results/paper_1"
DEPTHS = (20, 32, 44, 56)
FILES = {"lossless": "cifar10_lossless*.png", "test": "cifar10_test_jpeg.npz"}
TITLES = {"lossless": "lossless training images", "test": "test images (JPEG q75)"}
BATCH = 250

# The CIFAR-10 column of the paper's Table 1, by (n, ε): random, gradient-based. None stands for its asterisk, less
# than 0.1 from no corruption.
PAPER_CLEAN = 94.3
K = None
PAPER: Mapping[tuple[int | None, float], tuple[float | None, float | None]] = {
    (K, 1e-4): (None, 93.3),
    (K, 1e-3): (None, 36.1),
    (K, 1e-2): (75.1, 10.0),
    (K, 1e-1): (10.0, 10.0),
    (K, 1e0): (10.0, 10.0),
    (100, 1e-2): (None, None),
    (100, 1e-1): (None, None),
    (100, 1e0): (None, None),
    (100, 1e1): (77.1, 44.8),
    (100, 1e2): (10.1, 9.6),
}
# Figures 4 and 5. The paper's ε, 10 for ten weights of a ResNet-34, destroys these small networks whatever it meets.
KINDS = (0.1, 0.2, 0.5, 1.0, 2.0)  # L∞, n = 10
STAGES = (0.5, 1.0, 2.0, 5.0, 10.0)  # L2, n = 100, as Table 4
BLOCKS = (0.1, 0.2, 0.5)  # L∞, n = 100


def table_1() -> list[Corruption]:
    """Return the corruptions of Table 1, random and gradient-based by turns."""
    constraints = [CorruptionConstraint(p=math.inf, epsilon=epsilon, top_n=n) for n, epsilon in PAPER]
    return [kind(constraint) for constraint in constraints for kind in (RandomCorruption, GradientCorruption)]


def gradient_based(p: float, n: int, epsilons: Sequence[float]) -> list[Corruption]:
    """Return gradient-based corruptions of n weights."""
    return [GradientCorruption(CorruptionConstraint(p=p, epsilon=epsilon, top_n=n)) for epsilon in epsilons]


def stages(model: torch.nn.Module) -> Groups:
    """Group the blocks by their stage, as the paper divides a ResNet into layers."""
    return {name: [name] for name in dict.fromkeys(block.split(".")[0] for block in by_layer(model))}


PROBES: Mapping[str, tuple[Callable[[torch.nn.Module], Groups], list[Corruption]]] = {
    "kinds": (by_kind, gradient_based(math.inf, 10, KINDS)),
    "stages": (stages, gradient_based(2, 100, STAGES)),
    "blocks": (by_layer, gradient_based(math.inf, 100, BLOCKS)),
}


def load_model(options: argparse.Namespace, depth: int) -> PreTrainedModel:
    """Return a trained ResNet, made a folder by the example if there is none yet."""
    folder = options.work / f"resnet{depth}"
    if not (folder / "preprocessor_config.json").exists():
        flags = {
            "resnet_depth": depth,
            "resnet_weights": options.weights / f"resnet{depth}.safetensors",
            "validation_file": options.data / FILES["test"],
            "output_dir": folder,
            "report_to": "none",
        }
        run_example([EXAMPLE], flags)
    model: Any = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    loaded: PreTrainedModel = model.to(options.device)
    return loaded


@cache
def load_batches(source: str, count: int) -> tuple[list[dict[str, Tensor]], EvaluationData]:
    """Return the first images of a file in batches, as bytes, and what records call them."""
    rows = load_rows(source).first(count)
    numbers = {name: number for number, name in enumerate(rows.class_names.get("label", map(str, range(10))))}
    images = decoded_images(rows, ImageClassification().find_columns(rows, {}), numbers)
    pixels = torch.from_numpy(images.pixels).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(images.labels)
    batches = zip(torch.split(pixels, BATCH), torch.split(labels, BATCH), strict=True)
    return [{"pixel_values": some, "labels": of_these} for some, of_these in batches], rows.data


def evaluate(options: argparse.Namespace, depth: int, split: str) -> EvaluationRecord:
    """Measure a model under the corruptions of Table 1, unless its record is there already."""
    name = f"resnet{depth}-{split}"
    path: Path = options.output / f"{name}.json"
    if not path.exists():
        batches, data = load_batches(str(options.data / FILES[split]), getattr(options, f"{split}_images"))
        gradients, _ = load_batches(str(options.data / FILES["lossless"]), options.lossless_images)
        evaluator = CorruptionEvaluator(
            load_model(options, depth), ClassificationMetric(batches), gradients, evaluated_on=data
        )
        evaluator.evaluate(table_1(), options.trials, checkpoint=options.work / f"{name}.jsonl").save(path)
    return EvaluationRecord.load(path)


def probe(options: argparse.Namespace, depth: int, grouping: str) -> SweepRecord:
    """Corrupt one part of a model after the other, unless the record is there already."""
    name = f"resnet{depth}-{grouping}"
    path: Path = options.output / f"{name}.json"
    if not path.exists():
        groups, corruptions = PROBES[grouping]
        batches, data = load_batches(str(options.data / FILES["test"]), options.probe_images)
        gradients, _ = load_batches(str(options.data / FILES["lossless"]), options.lossless_images)
        model = load_model(options, depth)
        metric = ClassificationMetric(batches)
        one = LayerProbe(model, metric, gradients, targets=groups(model), evaluated_on=data)
        one.evaluate(corruptions, options.trials, checkpoint=options.work / f"{name}.jsonl").save(path)
    return SweepRecord.load(path)


def percent(row: CorruptionRecord) -> float:
    """Return a mean accuracy in per cent."""
    return 100 * row.mean("accuracy")


def found_in(record: EvaluationRecord) -> dict[tuple[int | None, float], tuple[float, float]]:
    """Return the accuracies of a record as `PAPER` has them."""
    found: dict[tuple[int | None, float], dict[str, float]] = {}
    for row in record.corruptions:
        found.setdefault((row.settings["top_n"], row.settings["epsilon"]), {})[row.corruption] = percent(row)
    return {place: (of_place["random"], of_place["gradient"]) for place, of_place in found.items()}


def harm(accuracy: float | None, clean: float) -> int:
    """Return how much is lost: 0 for less than a tenth of what is above chance, 2 for more than nine tenths, else 1.

    Examples:
        >>> harm(93.3, 94.3), harm(36.1, 94.3), harm(10.1, 94.3), harm(None, 94.3)
        (0, 1, 2, 0)
    """
    lost = 0.0 if accuracy is None else (clean - accuracy) / (clean - 10)
    return 0 if lost < 0.1 else 2 if lost > 0.9 else 1


def cell(accuracy: float, clean: float, of_paper: float | None) -> str:
    """Return an accuracy, with a mark that says whether as much is lost as in the paper."""
    apart = abs(harm(accuracy, clean) - harm(of_paper, PAPER_CLEAN))
    return f"{accuracy:.1f} {('🟩', '🟨', '🟥')[apart]}"


def comparison(records: Mapping[str, EvaluationRecord]) -> str:
    """Return a row for each corruption of Table 1: the paper's two numbers, and those of each model."""
    sides = ("random", "gradient")
    header = ["L∞", *(f"paper, {side}" for side in sides), *(f"{name}, {side}" for name in records for side in sides)]
    clean = {name: 100 * record.clean.mean("accuracy") for name, record in records.items()}
    found = {name: found_in(record) for name, record in records.items()}
    rows = [["no corruption", *[f"{PAPER_CLEAN:.1f}"] * 2, *(f"{clean[name]:.1f}" for name in records for _ in sides)]]
    for (n, epsilon), of_paper in PAPER.items():
        cells = [
            cell(value, clean[name], theirs)
            for name in records
            for value, theirs in zip(found[name][n, epsilon], of_paper, strict=True)
        ]
        shown = ["*" if value is None else f"{value:.1f}" for value in of_paper]
        rows.append([f"n = {'k' if n is None else n}, ε = {epsilon:g}", *shown, *cells])
    return markdown_table(header, rows)


def worse_by_gradient(records: Mapping[str, EvaluationRecord]) -> tuple[bool, str]:
    """Whether the gradient does at least as much harm as chance wherever one of the two does any and is not at chance.

    At chance, which of the two leaves 9.8 % and which 10.1 % says nothing.
    """
    contrary, compared = [], 0
    for name, record in records.items():
        clean = 100 * record.clean.mean("accuracy")
        for (n, epsilon), pair in found_in(record).items():
            if {harm(accuracy, clean) for accuracy in pair} in ({0}, {2}):
                continue
            compared += 1
            if pair[1] > pair[0]:
                place = f"n = {'k' if n is None else n}, ε = {epsilon:g}"
                contrary.append(f"{name}, {place}: {pair[0]:.1f} % at random, {pair[1]:.1f} % by gradient")
    listed = f"; not so: {'; '.join(contrary)}" if contrary else ""
    return not contrary, f"In {compared - len(contrary)} of {compared} cells where the two can differ{listed}."


def breaking_epsilon(record: EvaluationRecord, n: int | None, side: int) -> float:
    """Return the smallest ε of the table at which more than half of what is above chance is lost."""
    clean = 100 * record.clean.mean("accuracy")
    broken = [
        epsilon for (of_n, epsilon), pair in found_in(record).items() if of_n == n and pair[side] < (clean + 10) / 2
    ]
    return min(broken, default=math.inf)


def smaller_by_gradient(records: Mapping[str, EvaluationRecord]) -> tuple[bool, str]:
    """Whether less than half of the accuracy is left at an ε that is at least ten times smaller, for n = k."""
    pairs = {name: [breaking_epsilon(record, K, side) for side in (0, 1)] for name, record in records.items()}
    listed = "; ".join(f"{name} {by_chance:g} against {worst:g}" for name, (by_chance, worst) in pairs.items())
    holds = all(by_chance >= 10 * worst for by_chance, worst in pairs.values())
    return holds, f"Half of what is above chance is lost at random against by gradient at ε: {listed}."


def means(sweep: SweepRecord) -> dict[str, float]:
    """Return the mean accuracy of each group over all ε, in per cent."""
    return {
        group: sum(map(percent, record.corruptions)) / len(record.corruptions)
        for group, record in sweep.records.items()
    }


def compared(sweeps: Mapping[str, SweepRecord]) -> tuple[dict[str, dict[str, float]], str]:
    """Return the mean accuracies of the groups of each model, and a sentence that lists them, the weakest first."""
    found = {name: means(sweep) for name, sweep in sweeps.items()}
    return found, f"{'; '.join(f'{name}: {ranked(of_groups)}' for name, of_groups in found.items())}."


def weakest(sweeps: Mapping[str, SweepRecord], group: str) -> tuple[bool, str]:
    """Whether one group is the weakest in each model, by its mean accuracy over ε."""
    found, listed = compared(sweeps)
    return all(min(of_groups, key=lambda one: of_groups[one]) == group for of_groups in found.values()), listed


def below(sweeps: Mapping[str, SweepRecord], weaker: str, stronger: str) -> tuple[bool, str]:
    """Whether one group is weaker than another in each model, by its mean accuracy over ε."""
    found = {name: means(sweep) for name, sweep in sweeps.items()}
    listed = "; ".join(
        f"{name}: {weaker} {of_groups[weaker]:.1f} %, {stronger} {of_groups[stronger]:.1f} %"
        for name, of_groups in found.items()
    )
    return all(of_groups[weaker] < of_groups[stronger] for of_groups in found.values()), f"{listed}."


def ranked(of_groups: Mapping[str, float]) -> str:
    """Return groups with their accuracies, the weakest first."""
    return ", ".join(f"{name} {of_groups[name]:.1f} %" for name in sorted(of_groups, key=lambda one: of_groups[one]))


def lower_is_weaker(sweeps: Mapping[str, SweepRecord]) -> tuple[bool, str]:
    """Whether each stage is weaker than the one above it, in each model."""
    found, listed = compared(sweeps)
    return all(list(of_groups.values()) == sorted(of_groups.values()) for of_groups in found.values()), listed


def claims(records: Mapping[str, EvaluationRecord], probes: Mapping[str, Mapping[str, SweepRecord]]) -> str:
    """Return what the paper says, and what is seen."""
    said = {
        "Gradient-based corruption does more harm than random corruption of the same size (Table 1).": (
            worse_by_gradient(records)
        ),
        "It needs a far smaller perturbation (Figure 3).": smaller_by_gradient(records),
        "Normalisation layers are the weakest kind (Figure 4 a).": weakest(probes["kinds"], "other normalization"),
        "Convolutions are more sensitive than fully connected layers (Figure 4 a).": (
            below(probes["kinds"], "convolution", "linear")
        ),
        "Lower layers are less robust (text of Figure 4 c, and of the appendix).": lower_is_weaker(probes["stages"]),
    }
    rows = [[claim, "confirmed" if holds else "not confirmed", why] for claim, (holds, why) in said.items()]
    rows += [
        [
            "Lower layers are more robust (captions of Figures 5 and 7).",
            "not testable here",
            "The paper says the opposite in its text, and its Table 4 has the last of four layers as the strongest by "
            "far; the row above says what is seen.",
        ],
        [
            "Batch normalisation is less robust than its neighbours (Figure 7).",
            "not testable here",
            "It is drawn for single modules of a ResNet-34, where n = 100 is a part of each; here normalisation "
            "layers have 32 to 128 weights in all.",
        ],
        [
            "The same on ImageNet.",
            "not testable here",
            "Neither ImageNet nor a ResNet-34 trained on it is at hand.",
        ],
        [
            "Corruption-resistant training helps (Table 2).",
            "elsewhere",
            "It needs training; see below.",
        ],
    ]
    return markdown_table(["paper 1", "here", "what is seen"], rows)


PAGE = """# Paper 1 on CIFAR-10, without training

Written from the records beside it by

    {command}

The paper has a ResNet-34 on CIFAR-10, {clean} %. Here are trained ResNets of {depths} layers (0.27 to 0.85 million
weights, against 21 million). A JPEG copy of the test set is at hand, on which networks that were trained on clean
images lose about ten points, and 4,000 lossless images of the training set. So accuracies are not those of the paper;
what can be compared is where they break. Gradients are those of {gradients:,} lossless images, as the paper takes them
from its training set; random corruptions are means over this many trials: {trials}.
An accuracy of 0 stands for weights so large that no logit is finite, which is never a right answer.

🟩 as much is lost as in the paper (nothing, a part, or all of what is above chance), 🟨 one step more or less, 🟥 two.
\\* is the paper's, for less than 0.1 from no corruption.

## Table 1 on {test:,} {title_test}

{table_test}

## Table 1 on {lossless:,} {title_lossless}

{table_lossless}

## What the paper says, and what is seen

Kinds, stages and blocks are compared by their mean accuracy over all ε of their heat map, on {probed:,} test images.

{claims}

Training against it: [a ResNet-20 on CIFAR-10](../images/table.md), and on [20 classes of
Tiny-ImageNet](../tiny_imagenet/table.md).

More than in the paper is lost at the same ε for n = 100: a hundred weights are a larger share of a small network.

## Figure 4: kinds of modules, n = 10, L∞

![kinds](kinds.png)

## Table 4: stages, n = 100, L2

![stages](stages.png)

## Figure 5: blocks, n = 100, L∞

{blocks}
"""


def main() -> None:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="the folder with resnet20.safetensors, ...")
    parser.add_argument("--data", type=Path, required=True, help="the folder with the images of CIFAR-10")
    parser.add_argument("--output", type=Path, required=True, help="the folder for records and the page")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/paper_1"), help="the folder for models and checkpoints"
    )
    parser.add_argument("--depths", type=int, nargs="+", choices=DEPTHS, default=DEPTHS)
    parser.add_argument("--lossless-images", type=int, default=4000, help="the first so many; default: all")
    parser.add_argument("--test-images", type=int, default=10_000, help="the first so many; default: all")
    parser.add_argument("--probe-images", type=int, default=2000, help="test images for kinds and layers")
    parser.add_argument("--trials", type=int, default=3, help="of random corruptions; default: %(default)s")
    parser.add_argument("--device", default=str(DEVICE))
    parser.add_argument(
        "--only-measure", action="store_true", help="write no page: some depths are measured elsewhere"
    )
    options = parser.parse_args()
    for folder in (options.output, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    names = {depth: f"ResNet-{depth}" for depth in options.depths}
    records = {
        split: {name: evaluate(options, depth, split) for depth, name in names.items()}
        for split in ("test", "lossless")
    }
    probes = {
        grouping: {name: probe(options, depth, grouping) for depth, name in names.items()} for grouping in PROBES
    }
    if options.only_measure:
        return
    for grouping in ("kinds", "stages"):
        plot_heat_map(probes[grouping]).savefig(options.output / f"{grouping}.png", dpi=80)
    for name, sweep in probes["blocks"].items():
        plot_heat_map({name: sweep}).savefig(options.output / f"blocks-{name}.png", dpi=80)
    rows = {split: next(iter(of_split.values())).evaluated_on for split, of_split in records.items()}
    probed = next(iter(next(iter(probes["kinds"].values())).records.values())).evaluated_on
    apart = {"weights", "data", "output", "work", "device"}
    changed = [
        f"--{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in vars(options).items()
        if name not in apart and value != parser.get_default(name)
    ]
    text = PAGE.format(
        command=" ".join([COMMAND, *changed]),
        clean=PAPER_CLEAN,
        depths=", ".join(map(str, options.depths)),
        gradients=rows["lossless"].rows if rows["lossless"] else 0,
        trials=options.trials,
        test=rows["test"].rows if rows["test"] else 0,
        lossless=rows["lossless"].rows if rows["lossless"] else 0,
        probed=probed.rows if probed else 0,
        title_test=TITLES["test"],
        title_lossless=TITLES["lossless"],
        table_test=comparison(records["test"]),
        table_lossless=comparison(records["lossless"]),
        claims=claims(records["test"], probes),
        blocks="\n".join(f"![{name}](blocks-{name}.png)" for name in probes["blocks"]),
    )
    (options.output / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
