r"""The papers' images, trained: ResNets, plain and defended, under the rows of paper 2's Table 1 and more.

    python -m scripts.reproduce_images --weights FOLDER --data FOLDER --output scripts/results/images --jobs 2
    python -m scripts.reproduce_images --data FOLDER --size full --output runs/images-full
    python -m scripts.reproduce_images --weights FOLDER --data FOLDER --output scripts/results/images --jobs 2 \
        --arms sam-half awp-half awp-late
    python -m scripts.reproduce_images --data FOLDER --size tiny-imagenet-small --output runs/tiny-imagenet --jobs 2

The first folder holds `resnet20.safetensors`, which the small size fine-tunes beside training from scratch; the other
`cifar10_train_jpeg.npz` and `cifar10_test_jpeg.npz`. Each arm is trained with each seed by
`examples/train_image_classifier.py`; finished runs are kept, so an interrupted campaign goes on. The output folder
gets a record for each run, `runs.json` and `table.md`: accuracies under each corruption, mean ± sample standard
deviation over seeds with Student's t against the plain arm, beside both papers' numbers. `--arms` runs some arms
alone, as the third command those that came last; the table has all arms that have records with every seed.
`--size full` is the papers' setting, for a GPU: 200 epochs of a ResNet-34, paper 1's, or with `--depth 101` of
paper 2's. `--size tiny-imagenet-small` and, for a GPU, `--size tiny-imagenet` are paper 1's other images, by
`tiny_imagenet20_train.npz` and `tiny_imagenet20_val.npz`, 20 of the 200 classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    finished,
    l2,
    marked,
    measured_once,
    of_run,
    of_study,
    over,
    over_runs,
    run_example,
    write_table,
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_image_classifier.py"
FILES = ("train_file", "validation_file")
WEIGHTS = "resnet{depth}.safetensors"

# Both papers' own settings in L2. With α = ½ ACRT is K = 1 of the same ε, so that their arms differ in ε alone. SAM
# and AWP, which have no clean pass, get half the radius of K = 1, as on SST-2; AWP's inputs move by up to 0.1 in
# normalised pixels, which doubles the loss of the trained ResNet-20, as it does that of the BERT there.
ARMS = {
    "plain": PLAIN,
    "acrt": Arm("ACRT, ε = 0.5", l2("acrt", 0.5, "--defense_alpha", "0.5")),
    "multi_step_risk-1": Arm("K = 1, ε = 0.1", l2("multi_step_risk", 0.1, "--defense_steps", "1")),
    # λ = α ε of the first: what is left of it to first order.
    "penalty": Arm(
        "penalty, λ = 0.25", ["--defense", "gradient_penalty", "--defense_norm", "2", "--defense_weight", "0.25"]
    ),
    "sam-half": Arm("SAM, ε = 0.05", l2("sam", 0.05)),
    "awp-half": Arm("AWP, ε = 0.05", l2("awp", 0.05)),
    "awp-late": Arm("AWP, ε = 0.05, late", l2("awp", 0.05)),
}
LATE = "awp-late"
# Paper 1, appendix, on Tiny-ImageNet.
TINY = {
    "plain": PLAIN,
    "acrt-inf": Arm(
        "ACRT, L∞, ε = 2e-5",
        ["--defense", "acrt", "--defense_norm", "inf", "--defense_epsilon", "2e-5", "--defense_alpha", "0.5"],
    ),
    "multi_step_risk-1": ARMS["multi_step_risk-1"],
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

    def begin(self, name: str, arm: Arm) -> Arm:
        """Return an arm as it is trained from here: a late one is defended in the second half alone."""
        epoch = self.settings["num_train_epochs"] / 2 if name == LATE else self.start_epoch
        return replace(arm, flags=[*arm.flags, "--defense_start_epoch", f"{epoch:g}"]) if epoch else arm


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
# Paper 2, Table 3: SAM, which it calls ACRT there, and AWP; both with ε = 0.1 in L2, AWP with K = 3.
PAPER_2_VARIANTS = {
    CLEAN: (96.2, 96.1),
    "multi-step=1e-5:norm=inf": (96.0, 95.7),
    "multi-step=2e-5:norm=inf": (95.8, 95.5),
    "quantization=5": (95.5, 95.1),
    "quantization=4": (89.5, 88.1),
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
# Paper 1, Table 2, Tiny-ImageNet (ResNet-34, ACRT).
PAPER_1_TINY = {
    CLEAN: (66.56, 67.06),
    "gradient=0.05": (64.88, 65.79),
    "gradient=0.1": (60.70, 63.47),
    "gradient=0.2": (41.79, 52.51),
    "gradient=0.5": (1.07, 7.92),
    "gradient=1": (0.55, 1.26),
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


@dataclass(frozen=True)
class Images:
    """A data set, and what the papers have of it.

    Args:
        title: What tables call it.
        files: To train on, and to measure on.
        says: What is to be known of its images, and of the papers' numbers.
        arms: The ways to train.
        beside: The papers' columns, two each.
        more: Corruptions beside theirs.
    """

    title: str
    files: tuple[str, str]
    says: str
    arms: Mapping[str, Arm]
    beside: Mapping[tuple[str, tuple[str, str]], Mapping[str, tuple[float, float]]]
    more: Sequence[str]

    @property
    def corruptions(self) -> list[str]:
        """Those of the rows, but for the first one, which has none."""
        of_papers = (words for of_paper in self.beside.values() for words in of_paper)
        return [words for words in dict.fromkeys([*of_papers, *self.more]) if words != CLEAN]


CIFAR_10 = Images(
    "CIFAR-10",
    ("cifar10_train_jpeg.npz", "cifar10_test_jpeg.npz"),
    "All images are JPEG copies, so compare with no published figure. Beside them the papers: paper 2, Table 1, a "
    "ResNet-101, and with K = 1, ε = 0.1; its Table 3, SAM and AWP, ε = 0.1; paper 1, Table 2, a ResNet-34, and after "
    "ACRT, ε = 0.5. Rows are paper 2's, what paper 1 has beside them, and stronger ones.",
    ARMS,
    {
        ("paper 2", ("plain", "defended")): PAPER_2,
        ("paper 2", ("SAM", "AWP")): PAPER_2_VARIANTS,
        ("paper 1", ("plain", "defended")): PAPER_1,
    },
    STRONGER,
)
TINY_IMAGENET = Images(
    "Tiny-ImageNet",
    ("tiny_imagenet20_train.npz", "tiny_imagenet20_val.npz"),
    "Every tenth class, so that chance is 5 %, not 0.5: compare the falls. Beside them paper 1, Table 2, a ResNet-34 "
    "on all 200, and after ACRT, L∞, ε = 2e-5.",
    TINY,
    {("paper 1", ("plain", "defended")): PAPER_1_TINY},
    ["gradient=1e-4:norm=inf", "gaussian=0.01", "gaussian=0.02", "quantization=5", "quantization=4"],
)


@dataclass(frozen=True)
class Size:
    """How large a campaign is."""

    depth: int
    starts: Mapping[str, Start]
    measure: Mapping[str, Any]
    images: Images = CIFAR_10

    def arms(self, *names: str) -> dict[str, Arm]:
        """Return these arms, or all, from every start."""
        return {
            f"{at}-{name}": start.begin(name, self.images.arms[name])
            for at, start in self.starts.items()
            for name in names or self.images.arms
        }


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
    "tiny-imagenet-small": Size(
        20,
        {
            "scratch": Start(
                "trained from scratch at 32 pixels, 6 epochs",
                False,
                {"num_train_epochs": 6, "learning_rate": 0.1, "warmup_steps": 20},
            )
        },
        {
            "image_size": 32,
            "per_device_train_batch_size": 64,
            "per_device_eval_batch_size": 100,
            "max_eval_samples": 500,
        },
        TINY_IMAGENET,
    ),
    "tiny-imagenet": Size(
        34,
        {"scratch": Start("trained from scratch, 200 epochs", False, {"num_train_epochs": 200, "learning_rate": 0.1})},
        {"per_device_train_batch_size": 128, "per_device_eval_batch_size": 500},
        TINY_IMAGENET,
    ),
}


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = campaign_parser(
        __doc__, [*ARMS, *(name for name in TINY if name not in ARMS)], "runs/images", "the packs of images"
    )
    parser.add_argument(
        "--size", choices=SIZES, default="small", help="*small: minutes on two cores; full, tiny-imagenet: for a GPU"
    )
    parser.add_argument("--depth", type=int, help="layers of the ResNet; *small: 20, others: 34")
    parser.add_argument("--weights", type=Path, help="the folder with trained weights; needed where they are tuned")
    options = begin(parser)
    options.work = of_study(options.work, options.size, options.depth, options.weights)
    size = SIZES[options.size]
    options.depth = options.depth or size.depth
    unknown = [name for name in options.arms or () if name not in size.images.arms]
    if unknown:
        known = ", ".join(size.images.arms)
        parser.error(f"--arms: expected some of {known} on {size.images.title}, got {', '.join(unknown)}")
    if options.weights is None and any(start.tuned for start in size.starts.values()):
        parser.error(f"--weights: expected the folder with {WEIGHTS.format(depth=options.depth)}, got none; name it")
    return options


def measure(options: argparse.Namespace, run: Run) -> EvaluationRecord:
    """Train and measure one model, unless its record is there already."""
    size = SIZES[options.size]

    def example(folder: Path) -> None:
        start = size.starts[run.name.partition("-")[0]]
        settings = {
            **{flag: options.data / name for flag, name in zip(FILES, size.images.files, strict=True)},
            "resnet_depth": options.depth,
            **({"resnet_weights": options.weights / WEIGHTS.format(depth=options.depth)} if start.tuned else {}),
            **SGD,
            **size.measure,
            **start.settings,
            **of_run(run, folder),
            "save_strategy": "no" if options.size.endswith("small") else "epoch",
            "save_total_limit": 1,
            "resume_from_checkpoint": "true",
            "logging_steps": 10,
            **({"tf32": True} if DEVICE.type == "cuda" else {}),
        }
        flags = ["--do_train", "--do_eval", *run.arm.flags, "--corruptions", *size.images.corruptions]
        run_example([EXAMPLE], settings, *flags, threads=options.threads)

    return measured_once(options, run, example)


def beside(words: str, of_paper: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return a paper's two numbers of a row, nothing where it has none."""
    return [f"{value:.1f}" for value in of_paper[words]] if words in of_paper else ["", ""]


def table(images: Images, records: Mapping[str, Sequence[EvaluationRecord]]) -> str:
    """Return accuracies by arm, with a mark where Student's t-test says better than plain, beside the papers'."""
    rows = []
    for index, words in enumerate([CLEAN, *images.corruptions]):
        found = {name: [record.rows()[index] for record in of_arm] for name, of_arm in records.items()}
        values = {name: [100 * row.mean("accuracy") for row in of_arm] for name, of_arm in found.items()}
        cells = [marked(of_arm, values["plain"], 1) for of_arm in values.values()]
        published = (cell for paper in images.beside.values() for cell in beside(words, paper))
        rows.append([found["plain"][0].label, *cells, *published])
    head = [f"{paper}: {arm}" for paper, of_paper in images.beside for arm in of_paper]
    return markdown_table(["accuracy (%)", *(images.arms[name].label for name in records), *head], rows)


def page(options: argparse.Namespace, records: Mapping[str, Mapping[str, Sequence[EvaluationRecord]]]) -> str:
    """Return all tables; `records` by start, then by arm."""
    size = SIZES[options.size]
    measured = f"the first {size.measure['max_eval_samples']}" if "max_eval_samples" in size.measure else "all"
    parts = [
        f"# A ResNet-{options.depth} on {size.images.title}, trained\n",
        f"Accuracy on {measured} test images, whose gradients are followed, too. Size {options.size}, "
        f"{over(options.seeds)}. Defenses in L2 unless told.\n",
        f"{size.images.says}\n",
    ]
    for name, of_start in records.items():
        parts += [f"## {name}: {size.starts[name].says}\n", table(size.images, of_start) + "\n"]
    return "\n".join(parts)


def main() -> None:
    """Run what is missing, and write the tables."""
    options = parse_options()
    size = SIZES[options.size]
    over_runs(measure, "runs", options, size.arms(*(options.arms or ())))
    found = over_runs(measure, "records", options, finished(options, size.arms()))
    records: dict[str, dict[str, list[EvaluationRecord]]] = {start: {} for start in size.starts}
    for run, of_arm in found.items():
        start, _, name = run.partition("-")
        records[start][name] = of_arm
    if all("plain" in of_start for of_start in records.values()):  # there is something to compare with
        write_table(options.output, page(options, records))


if __name__ == "__main__":
    main()
