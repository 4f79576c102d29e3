"""Paper 2's detector: Faster R-CNN on a ResNet with a feature pyramid, on blood cells, plain and defended.

    python -m scripts.reproduce_detection --data FOLDER --output scripts/results/detection
    python -m scripts.reproduce_detection --data FOLDER --output scripts/results/detection_full --size full

FOLDER holds `bccd_train.npz` and `bccd_test.npz`. The paper has Pascal VOC, and a ResNet-101 that is trained already:
here all is learned from 205 images. Each arm is trained with each seed by `examples/train_detector.py`, which needs
torchvision and the extra `detection`; finished runs are kept, so an interrupted campaign goes on. The output folder
gets a record for each run, and `table.md`: AP50 and mAP under each corruption, mean ± sample standard deviation over
seeds. `--size small`, a ResNet-18 at 256 pixels, is for CPUs; `--size full`, a ResNet-50 at 640 pixels, for a GPU.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_parcor.records import EvaluationRecord
from scripts.campaigns import (
    ONE_STEP,
    PLAIN,
    Arm,
    Run,
    begin,
    campaign_parser,
    mean_and_deviation,
    measured_once,
    of_run,
    of_study,
    over_runs,
    run_example,
    write_table,
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_detector.py"
ARMS = {"plain": PLAIN, "multi_step_risk-1": Arm("K = 1, ACRT", ONE_STEP)}
METRICS = {"map_50": "AP50", "map": "mAP"}


@dataclass(frozen=True)
class Size:
    """A detector, and how it is trained.

    Attributes:
        config: What of the configuration is not the default.
        image_size: Longest side of an image.
        epochs: How often the images are seen.
        batch_size: Images in a step.
        learning_rate: At its highest, after the warm-up.
    """

    config: dict[str, Any]
    image_size: int
    epochs: int
    batch_size: int
    learning_rate: float


# Cells are about 100 pixels of 640 wide: anchors shrink with the image.
SIZES = {
    "small": Size(
        {
            "backbone": "resnet18",
            "fpn_channels": 64,
            "representation_size": 256,
            "anchor_sizes": [16, 32, 64, 128, 256],
            "proposals": 200,
            "sampled_proposals": 64,
        },
        image_size=256,
        epochs=4,
        batch_size=4,
        learning_rate=5e-4,
    ),
    "full": Size({"backbone": "resnet50"}, image_size=640, epochs=40, batch_size=8, learning_rate=2e-4),
}


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = campaign_parser(__doc__, ARMS, "runs/detection", "the images")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--train-samples", type=int, help="only the first so many images")
    parser.add_argument("--test-samples", type=int, help="only the first so many images")
    options = begin(parser)
    options.work = of_study(options.work, options.size, options.train_samples)
    return options


def measure(options: argparse.Namespace, run: Run) -> EvaluationRecord:
    """Train and measure one model, unless its record is there already."""

    def example(folder: Path) -> None:
        size = SIZES[options.size]
        trained = (folder / "train_results.json").exists()  # killed while it was measured
        most = {"max_train_samples": options.train_samples, "max_eval_samples": options.test_samples}
        model: dict[str, Any] = {"config_overrides": json.dumps(size.config), "do_train": True}
        settings = {
            "train_file": options.data / "bccd_train.npz",
            "validation_file": options.data / "bccd_test.npz",
            "image_size": size.image_size,
            "num_train_epochs": size.epochs,
            "per_device_train_batch_size": size.batch_size,
            "per_device_eval_batch_size": 8,
            "learning_rate": size.learning_rate,
            "warmup_steps": 50,
            **of_run(run, folder),
            "save_strategy": "no",
            "logging_steps": 10,
            **{name: count for name, count in most.items() if count is not None},
            **({"model_name_or_path": folder, "trust_remote_code": True} if trained else model),
        }
        run_example([EXAMPLE], settings, "--do_eval", *run.arm.flags, threads=options.threads)

    return measured_once(options, run, example)


def table(records: dict[str, list[EvaluationRecord]], metric: str) -> str:
    """Return mean ± deviation over seeds of each arm, in per cent, under each corruption."""
    heads = [ARMS[name].label for name in records]
    lines = [f"| {METRICS[metric]} (%) | {' | '.join(heads)} |", f"|:--|{'--:|' * len(heads)}"]
    for index, first in enumerate(next(iter(records.values()))[0].rows()):
        cells = [
            mean_and_deviation([100 * record.rows()[index].mean(metric) for record in of_arm], 1)
            for of_arm in records.values()
        ]
        lines.append(f"| {first.label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, and write the table."""
    options = parse_options()
    records = over_runs(measure, "runs", options, {name: ARMS[name] for name in options.arms or ARMS})
    if options.arms:
        return
    size = SIZES[options.size]
    seeds = f"{len(options.seeds)} seeds" if len(options.seeds) > 1 else "one seed, so that no spread is known"
    cut = [
        f" Only the first {count} {which} images."
        for which, count in (("training", options.train_samples), ("test", options.test_samples))
        if count is not None
    ]
    text = (
        f"Blood cells, test images, Faster R-CNN with a {size.config['backbone']} at {size.image_size} pixels, "
        f"learned from nothing in {size.epochs} epochs; {seeds} ({', '.join(map(str, options.seeds))}). "
        f"The defense is in L2, ε = 0.1.{''.join(cut)}\n\n" + "\n".join(table(records, metric) for metric in METRICS)
    )
    write_table(options.output, text)


if __name__ == "__main__":
    main()
