"""Does a model lose by quantization while it still gains in float? A small decoder on the Penn Treebank, step by step.

    python -m scripts.quantization_while_training --data FOLDER --output scripts/results/quantization_while_training

FOLDER holds `ptb.train.txt.gz`, `ptb.valid.txt.gz` and `ptb.test.txt.gz`. It was published that the harm of
quantization grows while a model is trained: with the tokens that it has seen ("Low-Bit Quantization Favors
Undertrained LLMs", Ouyang et al., 2024), or once its learning rate decays ("Training Dynamics Impact Post-Training
Quantization Robustness", Catalan-Tatjer et al., 2025). Here a Llama of random weights is trained on so little text
that its validation loss rises again, by `examples/train_language_model.py`: with a constant rate, with one that falls
to 0, and with that and the library's risk under 4 bits, or under 3. A `RobustnessCallback` measures every checkpoint
in every format, and the Trainer chooses the best one in 4 bits; that one, the best one in float and the last one are
measured on the test text, which has chosen nothing. Losses are log perplexities, the mean of a word in nats.

Finished runs are kept, so an interrupted campaign goes on. `--arms linear-4-bits linear-3-bits` runs these alone;
tables and the figure have all arms that were finished with every seed. The output folder gets for each run the losses
of its checkpoints on the validation text, `NAME-curve.json`, and a record on the test text for each choice, and of all
`runs.json`, `table.md` and `curves.png`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

from hf_parcor.corruptions.catalogue import read_corruptions
from hf_parcor.records import EvaluationRecord
from hf_parcor.records.curves import plain_name
from hf_parcor.reports.panels import new_figure
from hf_parcor.reports.tables import markdown_table
from scripts.campaigns import (
    Arm,
    Run,
    begin,
    campaign_parser,
    finished,
    mean_and_deviation,
    note_run,
    of_run,
    over_runs,
    risk,
    run_example,
    write_table,
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_language_model.py"
CONSTANT, LINEAR = (["--lr_scheduler_type", name] for name in ("constant_with_warmup", "linear"))


ARMS = {
    "constant": Arm("constant rate", ["--defense", "none", *CONSTANT]),
    "linear": Arm("rate falls to 0", ["--defense", "none", *LINEAR]),
    "linear-4-bits": Arm("rate falls to 0, half 4 bits", [*risk(0.5, "quantization=4"), *LINEAR]),
    "linear-3-bits": Arm("rate falls to 0, half 3 bits", [*risk(0.5, "quantization=3"), *LINEAR]),
}
SETTINGS: Mapping[str, object] = {
    "model_type": "llama",
    "config_overrides": "hidden_size=128,intermediate_size=352,num_hidden_layers=2,num_attention_heads=4,"
    "num_key_value_heads=4,tie_word_embeddings=true,max_position_embeddings=64",
    "block_size": 64,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 32,
    "learning_rate": 3e-3,
    "warmup_steps": 20,
    "max_train_tokens": 51_200,  # 200 steps an epoch
    "num_train_epochs": 7,
}
CHECKPOINTS = 14
CURVE = "-curve.json"
MOST_TOKENS = {"valid": 6_400, "test": 12_800}
FLOAT = "no corruption"
WORDS = [f"quantization={bits}{per}" for bits in (4, 3) for per in ("", ":per=channel")]
FORMATS = {words: str(corruption) for words in WORDS for corruption in read_corruptions([words])}
NAMES = (FLOAT, *FORMATS.values())
CHOSEN_BY = FORMATS["quantization=4"]
CHOICES = {"by-float": "best in float", "by-4-bits": "best in 4 bits", "last": "last"}


@dataclass(frozen=True)
class Curve:
    """What a run's checkpoints lose on the validation text.

    Args:
        steps: When they were kept.
        epochs: The same in epochs.
        losses: In nats, one for each checkpoint, in float and in each format, by their labels.
    """

    steps: list[int]
    epochs: list[float]
    losses: dict[str, list[float]]

    @classmethod
    def from_log(cls, log: Sequence[Mapping[str, float]]) -> Curve:
        """Read the log of a Trainer with a `RobustnessCallback`."""
        keys = {FLOAT: "eval_loss"} | {label: metric_of(label) for label in FORMATS.values()}
        found = {name: [entry for entry in log if key in entry] for name, key in keys.items()}
        kept = found[FLOAT]
        return cls(
            [int(entry["step"]) for entry in kept],
            [entry["epoch"] for entry in kept],
            {name: [entry[keys[name]] for entry in entries] for name, entries in found.items()},
        )

    def best(self, name: str) -> int:
        """Return which checkpoint loses least in float, or in a format."""
        return min(range(len(self.steps)), key=self.losses[name].__getitem__)

    def harm(self, name: str, place: int) -> float:
        """Return what a format costs a checkpoint: its loss less that in float."""
        return self.losses[name][place] - self.losses[FLOAT][place]

    def rise(self, name: str) -> float:
        """Return how far the loss in a format has risen from its lowest before, when that in float is lowest."""
        until = self.best(FLOAT) + 1
        return self.losses[name][until - 1] - min(self.losses[name][:until])


@dataclass(frozen=True)
class Watched:
    """A run: its curve, and the record of each choice on the test text."""

    curve: Curve
    chosen: dict[str, EvaluationRecord]


def metric_of(label: str) -> str:
    """Return what a `RobustnessCallback` calls the loss in a format."""
    return f"eval_robustness_{plain_name(label)}_loss"


def train(options: argparse.Namespace, run: Run, folder: Path) -> Curve:
    """Return what all checkpoints lose, trained unless they were; the best one in 4 bits is in the folder itself."""
    state = folder / "trainer_state.json"  # what a training leaves last
    settings = {
        **SETTINGS,
        "train_file": options.data / "ptb.train.txt.gz",
        "validation_file": options.data / "ptb.valid.txt.gz",
        "max_eval_tokens": MOST_TOKENS["valid"],
        **of_run(run, folder),
        **dict.fromkeys(("eval_strategy", "save_strategy"), "steps"),
        **dict.fromkeys(("eval_steps", "save_steps"), 1 / CHECKPOINTS),  # a share of all steps
        "save_only_model": "true",
        "load_best_model_at_end": "true",
        "metric_for_best_model": metric_of(CHOSEN_BY),
        "logging_steps": 20,
    }
    flags = ["--do_train", "--do_eval", "--skip_corruptions", *run.arm.flags, "--watched_corruptions", *FORMATS]
    if not state.exists():
        run_example([EXAMPLE], settings, *flags, threads=options.threads)
    return Curve.from_log(json.loads(state.read_text())["log_history"])


def judge(options: argparse.Namespace, run: Run, checkpoint: Path) -> EvaluationRecord:
    """Return what a checkpoint does on the test text, in float and in each format, measured unless it was."""
    record = checkpoint / "test" / "robustness.json"
    settings = {
        "model_name_or_path": checkpoint,
        "validation_file": options.data / "ptb.test.txt.gz",
        "max_eval_tokens": MOST_TOKENS["test"],
        **{name: SETTINGS[name] for name in ("block_size", "per_device_eval_batch_size")},
        **of_run(run, checkpoint / "test"),
    }
    if not record.exists():
        run_example([EXAMPLE], settings, "--do_eval", "--corruptions", *FORMATS, threads=options.threads)
    return EvaluationRecord.load(record)


def measure(options: argparse.Namespace, run: Run) -> Watched:
    """Train a model and measure each choice among its checkpoints, unless their records are there already."""
    path = options.output / f"{run.file_name}{CURVE}"
    records = {choice: options.output / f"{run.file_name}-{choice}.json" for choice in CHOICES}
    if not path.exists():
        started, folder = time.monotonic(), options.work / run.file_name
        curve = train(options, run, folder)
        places = {"by-float": curve.best(FLOAT), "by-4-bits": curve.best(CHOSEN_BY), "last": len(curve.steps) - 1}
        judged: dict[int, EvaluationRecord] = {}
        for choice, place in places.items():
            if place not in judged:
                judged[place] = judge(options, run, folder / f"checkpoint-{curve.steps[place]}")
            judged[place].save(records[choice])
        note_run(options.output, options.work, run, options.threads, seconds=round(time.monotonic() - started, 1))
        path.write_text(json.dumps(vars(curve)) + "\n")
    curve = Curve(**json.loads(path.read_text()))
    return Watched(curve, {choice: EvaluationRecord.load(record) for choice, record in records.items()})


Runs = Mapping[str, Sequence[Watched]]


def validation_table(runs: Sequence[Watched]) -> str:
    """Return where each format is best on the validation text, and how far it is from that where float is best."""

    def row(name: str) -> list[str]:
        curves = [run.curve for run in runs]
        return [
            name,
            mean_and_deviation([curve.epochs[curve.best(name)] for curve in curves], 2),
            mean_and_deviation([min(curve.losses[name]) for curve in curves], 3),
            mean_and_deviation([curve.losses[name][curve.best(FLOAT)] for curve in curves], 3),
            mean_and_deviation([curve.rise(name) for curve in curves], 3),
            mean_and_deviation([curve.losses[name][-1] for curve in curves], 3),
        ]

    places = ("lowest at epoch", "lowest", "where float is lowest", "risen by then", "at the end")
    return markdown_table(["validation loss (nats)", *places], map(row, NAMES))


def harm_table(runs: Runs) -> str:
    """Return what each format costs after about each quarter of the training."""
    epochs = next(iter(runs.values()))[0].curve.epochs
    shown = [len(epochs) * quarter // 4 - 1 for quarter in range(1, 5)]
    rows = []
    for name, (arm, of_arm) in product(FORMATS.values(), runs.items()):
        harms = ([run.curve.harm(name, place) for run in of_arm] for place in shown)
        rows.append([name, ARMS[arm].label, *(mean_and_deviation(of_seeds, 3) for of_seeds in harms)])
    places = (f"epoch {epochs[place]:g}" for place in shown)
    return markdown_table(["loss less that in float (nats)", "training", *places], rows, texts=2)


def test_table(runs: Runs) -> str:
    """Return what each choice loses on the test text, and what is gained by choosing in 4 bits."""
    rows = []
    for place, name in enumerate(NAMES):
        for arm, of_arm in runs.items():
            found = {choice: [run.chosen[choice].rows()[place].mean("loss") for run in of_arm] for choice in CHOICES}
            gains = [first - second for first, second in zip(found["by-float"], found["by-4-bits"], strict=True)]
            cells = (mean_and_deviation(values, 3) for values in (*found.values(), gains))
            rows.append([name, ARMS[arm].label, *cells])
    head = ["test loss (nats)", "training", *CHOICES.values(), "gained by choosing in 4 bits"]
    return markdown_table(head, rows, texts=2)


def draw(runs: Runs, path: Path) -> None:
    """Draw the losses on the validation text, a dot where each is lowest, and below what each format costs."""
    figure = new_figure(4.2 * len(runs), 6.4)
    axes = figure.subplots(2, len(runs), sharex=True, sharey="row", squeeze=False)
    for column, (arm, of_arm) in enumerate(runs.items()):
        curves = [run.curve for run in of_arm]
        epochs = curves[0].epochs
        losses, harms = axes[:, column]
        losses.set_title(ARMS[arm].label)
        harms.set_xlabel("epoch")
        for color, name in enumerate(NAMES):
            of_seeds = zip(*(curve.losses[name] for curve in curves), strict=True)
            means = [fmean(values) for values in of_seeds]
            lowest = min(range(len(means)), key=means.__getitem__)
            losses.plot(epochs, means, color=f"C{color}", label=name)
            losses.plot(epochs[lowest], means[lowest], "o", color=f"C{color}")
            if name != FLOAT:
                harm = [fmean(curve.harm(name, place) for curve in curves) for place in range(len(epochs))]
                harms.plot(epochs, harm, color=f"C{color}")
    low = min(min(run.curve.losses[FLOAT]) for of_arm in runs.values() for run in of_arm)
    axes[0, 0].set_ylim(low - 0.05, low + 1)
    axes[0, 0].set_ylabel("validation loss (nats)")
    axes[1, 0].set_ylabel("loss less that in float (nats)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)


def page(options: argparse.Namespace, runs: Runs) -> str:
    """Return all tables."""
    settings = ", ".join(f"`{name}` {value}" for name, value in SETTINGS.items())
    parts = [
        "# Quantization while a decoder is trained, on the Penn Treebank\n",
        f"Log perplexity (nats; lower is better), seeds {', '.join(map(str, options.seeds))}, mean ± sample standard "
        f"deviation. {CHECKPOINTS} checkpoints a run, measured on the first {MOST_TOKENS['valid']:,} words of the "
        f"validation text; the chosen ones on the first {MOST_TOKENS['test']:,} of the test text.\n",
        f"Settings: {settings}.\n",
        "![Loss by epoch](curves.png)\n",
    ]
    for arm, of_arm in runs.items():
        parts += [f"## {ARMS[arm].label}\n", validation_table(of_arm), ""]
    parts += ["## What each format costs\n", harm_table(runs), "", "## Which checkpoint\n", test_table(runs)]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Run what is missing, and write the tables and the figure."""
    parser = campaign_parser(__doc__, ARMS, "runs/quantization_while_training", "the Penn Treebank's files")
    options = begin(parser)
    over_runs(measure, "runs", options, {name: ARMS[name] for name in options.arms or ARMS})
    runs = over_runs(measure, "records", options, finished(options, ARMS, CURVE))
    draw(runs, options.output / "curves.png")
    write_table(options.output, page(options, runs))


if __name__ == "__main__":
    main()
