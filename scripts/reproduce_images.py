"""The papers' images, trained: ResNets on CIFAR-10, plain and defended, under the rows of paper 2's Table 1 and more.

    python -m scripts.reproduce_images --weights FOLDER --data FOLDER --output scripts/results/images --jobs 2
    python -m scripts.reproduce_images --data FOLDER --size full --output runs/images-full

The first folder holds `resnet20.safetensors`, which the small size fine-tunes beside training from scratch; the other
`cifar10_train_jpeg.npz` and `cifar10_test_jpeg.npz`. Each arm is trained with each seed by
`examples/train_image_classifier.py`; finished runs are kept, so an interrupted campaign goes on. The output folder
gets a record for each run, `runs.json` and `table.md`: accuracies under each corruption, mean ± sample standard
deviation over seeds with Student's t against the plain arm, beside both papers' numbers. `--size full` is their
setting, for a GPU: 200 epochs of a ResNet-34, paper 1's, or with `--depth 101` of paper 2's.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_parcor.records import EvaluationRecord
from hf_parcor.reports.tables import markdown_table
from scripts.campaigns import (
    DEVICE,
    PLAIN,
    Arm,
    Run,
    begin,
    campaign_parser,
    l2,
    marked,
    measured_once,
    of_run,
    over,
    over_runs,
    run_example,
    write_table,
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_image_classifier.py"
FILES = {"train_file": "cifar10_train_jpeg.npz", "validation_file": "cifar10_test_jpeg.npz"}
WEIGHTS = "resnet{depth}.safetensors"

# Both papers' own settings in L2. With α = ½ ACRT is K = 1 of the same ε, so that their arms differ in ε alone.
ARMS = {
    "plain": PLAIN,
    "acrt": Arm("ACRT, ε = 0.5", l2("acrt", 0.5, "--defense_alpha", "0.5")),
    "multi_step_risk-1": Arm("K = 1, ε = 0.1", l2("multi_step_risk", 0.1, "--defense_steps", "1")),
    # λ = α ε of the first: what is left of it to first order.
    "penalty": Arm(
        "penalty, λ = 0.25", ["--defense", "gradient_penalty", "--defense_norm", "2", "--defense_weight", "0.25"]
    ),
}


@dataclass(frozen=True)
class Start:
    """What a model begins with, and how it is trained from there.

    Args:
        says: What the page calls it.
        tuned: Whether it begins with trained weights.
        settings: Flags of the example.
        start_epoch: The first epoch with the defense.
    """

    says: str
    tuned: bool
    settings: Mapping[str, Any]
    start_epoch: int = 0


@dataclass(frozen=True)
class Size:
    """How large a campaign is."""

    depth: int
    starts: Mapping[str, Start]
    measure: Mapping[str, Any]


SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 5e-4, "lr_scheduler_type": "cosine"}
SIZES = {
    "small": Size(
        20,
        {
            "tuned": Start(
                "fine-tuned on 2,560 images, 1 epoch, from weights that were trained on clean images",
                True,
                {"max_train_samples": 2560, "num_train_epochs": 1, "learning_rate": 0.01},
            ),
            "scratch": Start(
                "trained from scratch on 5,000 images, 3 epochs",
                False,
                {"max_train_samples": 5000, "num_train_epochs": 3, "learning_rate": 0.1, "warmup_steps": 20},
            ),
        },
        {"per_device_train_batch_size": 64, "per_device_eval_batch_size": 100, "max_eval_samples": 500},
    ),
    # As the papers, but for a cosine: paper 2 divides the learning rate by ten after 150 epochs, paper 1 does not say.
    "full": Size(
        34,
        {
            "scratch": Start(
                "trained from scratch, 200 epochs, defended from the eleventh on",
                False,
                {"num_train_epochs": 200, "learning_rate": 0.1},
                start_epoch=10,
            )
        },
        {"per_device_train_batch_size": 128, "per_device_eval_batch_size": 500},
    ),
}

CLEAN = ""
# Paper 2, Table 1, CIFAR-10 (ResNet-101, K = 1, ε = 0.1): plain and defended, by the words of `--corruptions`.
PAPER_2 = {
    CLEAN: (94.5, 96.3),
    "multi-step=0.02": (94.0, 96.0),
    "multi-step=0.05": (89.8, 95.1),
    "multi-step=0.1": (55.1, 55.3),
    "multi-step=1e-5:norm=inf": (94.3, 95.9),
    "multi-step=2e-5:norm=inf": (92.7, 95.8),
    "multi-step=5e-5:norm=inf": (62.6, 67.3),
    "multi-step=2e-4:norm=inf,top_n=100": (94.5, 96.1),
    "multi-step=5e-4:norm=inf,top_n=100": (12.8, 21.7),
    "multi-step=1e-3:norm=inf,top_n=100": (10.0, 10.0),
    "gradient=0.1": (82.8, 94.5),
    "gradient=0.2": (49.7, 88.2),
    "gradient=0.5": (19.7, 41.7),
    "gradient=5e-5:norm=inf": (81.0, 93.4),
    "gradient=1e-4:norm=inf": (43.2, 81.7),
    "gradient=2e-4:norm=inf": (24.5, 28.3),
    "gaussian=2e-3": (94.1, 96.0),
    "gaussian=5e-3": (92.5, 94.6),
    "gaussian=1e-2": (21.3, 29.1),
    "uniform=2e-3": (94.3, 96.0),
    "uniform=5e-3": (92.4, 95.7),
    "uniform=1e-2": (17.1, 93.0),
    "quantization=5": (94.5, 96.2),
    "quantization=4": (84.0, 92.2),
}
# Paper 1, Table 2, CIFAR-10 (ResNet-34, ACRT, ε = 0.5).
PAPER_1 = {
    CLEAN: (94.26, 96.12),
    "gradient=0.05": (93.20, 95.65),
    "gradient=0.1": (89.84, 94.59),
    "gradient=0.2": (71.44, 87.92),
    "gradient=0.5": (13.77, 21.42),
    "gradient=1": (10.00, 10.94),
}
# A network with a hundredth of their weights bears more noise, and more in a hundred of them.
STRONGER = [
    "multi-step=1e-2:norm=inf,top_n=100",
    "multi-step=1e-1:norm=inf,top_n=100",
    "gaussian=0.02",
    "gaussian=0.05",
    "uniform=0.05",
    "uniform=0.1",
    "quantization=3",
]
CORRUPTIONS = list(dict.fromkeys([*PAPER_2, *PAPER_1, *STRONGER]))[1:]


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = campaign_parser(__doc__, ARMS, "runs/images", "the packs of CIFAR-10")
    parser.add_argument("--size", choices=SIZES, default="small", help="small: minutes on two cores; full: for a GPU")
    parser.add_argument("--depth", type=int, help="layers of the ResNet; small: 20, full: 34")
    parser.add_argument("--weights", type=Path, help="the folder with trained weights; needed where they are tuned")
    options = begin(parser)
    options.work /= options.size
    size = SIZES[options.size]
    options.depth = options.depth or size.depth
    if options.weights is None and any(start.tuned for start in size.starts.values()):
        parser.error(f"--weights: expected the folder with {WEIGHTS.format(depth=options.depth)}, got none; name it")
    return options


def measure(options: argparse.Namespace, run: Run) -> EvaluationRecord:
    """Train and measure one model, unless its record is there already."""

    def example(folder: Path) -> None:
        size = SIZES[options.size]
        start = size.starts[run.name.partition("-")[0]]
        settings = {
            **{flag: options.data / name for flag, name in FILES.items()},
            "resnet_depth": options.depth,
            **({"resnet_weights": options.weights / WEIGHTS.format(depth=options.depth)} if start.tuned else {}),
            **SGD,
            **size.measure,
            **start.settings,
            **of_run(run, folder),
            "save_strategy": "no" if options.size == "small" else "epoch",
            "save_total_limit": 1,
            "resume_from_checkpoint": "true",
            "logging_steps": 10,
            **({"tf32": True} if DEVICE.type == "cuda" else {}),
        }
        late = ["--defense_start_epoch", str(start.start_epoch)] if run.arm.defense is not None else []
        flags = ["--do_train", "--do_eval", *run.arm.flags, *late, "--corruptions", *CORRUPTIONS]
        run_example([EXAMPLE], settings, *flags, threads=options.threads)

    return measured_once(options, run, example)


def beside(words: str, of_paper: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return a paper's two numbers of a row, nothing where it has none."""
    return [f"{value:.1f}" for value in of_paper[words]] if words in of_paper else ["", ""]


def table(records: Mapping[str, Sequence[EvaluationRecord]]) -> str:
    """Return accuracies by arm, with a mark where Student's t-test says better than plain, beside the papers'."""
    rows = []
    for index, words in enumerate([CLEAN, *CORRUPTIONS]):
        found = {name: [record.rows()[index] for record in of_arm] for name, of_arm in records.items()}
        values = {name: [100 * row.mean("accuracy") for row in of_arm] for name, of_arm in found.items()}
        cells = [marked(of_arm, values["plain"], 1) for of_arm in values.values()]
        rows.append([found["plain"][0].label, *cells, *beside(words, PAPER_2), *beside(words, PAPER_1)])
    head = [f"{paper}: {arm}" for paper in ("paper 2", "paper 1") for arm in ("plain", "defended")]
    return markdown_table(["accuracy (%)", *(ARMS[name].label for name in records), *head], rows)


def page(options: argparse.Namespace, records: Mapping[str, Mapping[str, Sequence[EvaluationRecord]]]) -> str:
    """Return all tables; `records` by start, then by arm."""
    size = SIZES[options.size]
    images = f"the first {size.measure['max_eval_samples']}" if "max_eval_samples" in size.measure else "all"
    parts = [
        f"# A ResNet-{options.depth} on CIFAR-10, trained\n",
        f"Accuracy on {images} test images, whose gradients are followed, too; all images are JPEG copies, so compare "
        f"with no published figure. Size {options.size}, {over(options.seeds)}. Defenses in L2.\n",
        "Beside them the papers: paper 2, Table 1, a ResNet-101, and with K = 1, ε = 0.1; paper 1, Table 2, a "
        "ResNet-34, and after ACRT, ε = 0.5. Rows are paper 2's, what paper 1 has beside them, and stronger ones.\n",
    ]
    for name, of_start in records.items():
        parts += [f"## {name}: {size.starts[name].says}\n", table(of_start) + "\n"]
    return "\n".join(parts)


def main() -> None:
    """Run what is missing, and write the tables."""
    options = parse_options()
    starts = SIZES[options.size].starts
    chosen = {f"{start}-{name}": ARMS[name] for start in starts for name in options.arms or ARMS}
    found = over_runs(measure, "runs", options, chosen)
    if options.arms:
        return
    text = page(options, {start: {name: found[f"{start}-{name}"] for name in ARMS} for start in starts})
    write_table(options.output, text)


if __name__ == "__main__":
    main()
