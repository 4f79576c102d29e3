"""Training on SST-2 by `examples/train_sst2.py`, and measuring on its dev sentences, run by run."""

from __future__ import annotations

import argparse
import gzip
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_parcor import CorruptionEvaluator
from hf_parcor.corruptions import Corruption
from hf_parcor.evaluation import ClassificationMetric
from hf_parcor.records import EvaluationRecord
from scripts.campaigns import DEVICE, PLAIN, Arm, Run, begin, campaign_parser, measured_once, of_study, run_example

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_sst2.py"


@dataclass(frozen=True)
class Size:
    """On how much of SST-2 a campaign trains, and how."""

    train_file: str
    train_samples: int
    epochs: int
    learning_rate: float
    trials: int  # of each random corruption: where the seeds of training are few and cheap, one each is enough

    def __str__(self) -> str:
        epochs = f"{self.epochs} epoch{'s' * (self.epochs > 1)}"
        return f"{self.train_samples} training sentences, {epochs}, batch 32, learning rate {self.learning_rate:g}"


SIZES = {
    # At 5e-5 its 64 steps end before this small model has learned anything.
    "small": Size("train_sentences.tsv.gz", 2048, 1, 2e-4, 1),
    "sentences": Size("train_sentences.tsv.gz", 6920, 2, 2e-4, 1),  # all whole ones
    "full": Size("train.tsv.gz", 67349, 2, 5e-5, 3),  # GLUE's phrases; for a GPU
}


def peer(label: str, name: str, radius: float | None = None) -> Arm:
    """Return an arm that a Trainer of `peer_trainers.py` trains."""
    how = [] if radius is None else ["--radius", str(radius)]
    return Arm(label, PLAIN.flags, program=("-m", "scripts.peer_trainers", name, *how))


def campaign_of_sizes(
    description: str | None, arms: Mapping[str, Arm] | None, work: str, *, size: str = "small", seeds: int = 3
) -> argparse.ArgumentParser:
    """Return the command line of a campaign on SST-2, which may get flags of its own."""
    parser = campaign_parser(description, arms, work, "the SST-2 files", seeds)
    parser.add_argument("--model", required=True, help="a folder or a name on the Hub")
    parser.add_argument("--size", choices=SIZES, default=size, help="; ".join(f"{k}: {v}" for k, v in SIZES.items()))
    parser.add_argument("--train-samples", type=int, help="fewer than the size has")
    return parser


def parse_options(
    description: str | None, arms: Mapping[str, Arm] | None, work: str, *, size: str = "small", seeds: int = 3
) -> argparse.Namespace:
    """Read the command line of a campaign that has no other flags."""
    return started(campaign_of_sizes(description, arms, work, size=size, seeds=seeds))


def started(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line of a campaign on SST-2, and begin it."""
    options = begin(parser)
    options.work = of_study(options.work, options.size, options.train_samples, options.model)
    options.size = SIZES[options.size]
    if options.train_samples:
        options.size = replace(options.size, train_samples=options.train_samples)
    return options


def train(options: argparse.Namespace, run: Run, *measuring: str) -> Path:
    """Train one model, unless it is there already, and return its folder.

    Args:
        options: Those of a campaign.
        run: What is trained.
        *measuring: Flags by which the example measures the model, too; also one that is there already.
    """
    folder: Path = options.work / run.file_name
    trained = (folder / "train_results.json").exists()
    if trained and not measuring:
        return folder
    size: Size = options.size
    fixed = {
        **({"model_name_or_path": folder} if trained else {"model_name_or_path": options.model, "do_train": True}),
        "train_file": str(options.data / size.train_file),
        "validation_file": str(options.data / "dev.tsv.gz"),
        "max_train_samples": size.train_samples,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "learning_rate": size.learning_rate,
        "num_train_epochs": size.epochs,
        "seed": run.seed,
        "output_dir": folder,
        "save_strategy": "no",
        "logging_steps": 10,
        "report_to": "none",
        **({"tf32": True} if DEVICE.type == "cuda" else {}),
    }
    program = run.arm.program or [EXAMPLE]
    run_example(program, fixed, *run.arm.flags, *measuring, threads=options.threads)
    return folder


def above_tables(options: argparse.Namespace, hypothesis: str, *, more: str = "") -> str:
    """Return what a page says above its tables: what was measured, over which seeds, and what its stars test.

    Args:
        options: Those of a campaign.
        hypothesis: What t is evidence against.
        more: What else is to be said of the training.
    """
    if len(options.seeds) == 1:
        return f"SST-2 dev accuracy with seed {options.seeds[0]}; {options.size}{more}.\n\n"
    return (
        f"SST-2 dev accuracy over {len(options.seeds)} seeds ({', '.join(map(str, options.seeds))}), mean ± sample "
        f"standard deviation; {options.size}{more}.\n"
        f"t: Student's test with pooled variance of the hypothesis that {hypothesis} "
        f"(df = {2 * (len(options.seeds) - 1)}); * p < 0.05, one-sided, not corrected for the number of rows.\n\n"
    )


def model_and_batches(options: argparse.Namespace, folder: Path) -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    """Return a trained model, and the dev sentences for it, sorted by length."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(folder)
    model.to(DEVICE)  # type: ignore[arg-type]
    return model, sentence_batches(AutoTokenizer.from_pretrained(folder), options.data / "dev.tsv.gz")


def read_sentences(path: Path) -> list[tuple[str, int]]:
    """Return the sentences of a file with their labels."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in list(file)[1:]]
    return [(text, int(label)) for text, label in rows]


def batch_of(tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
    """Return some sentences and their labels as the model takes them."""
    texts, labels = zip(*rows, strict=True)
    batch = tokenizer(list(texts), truncation=True, max_length=128, padding=True, return_tensors="pt")
    return {**batch, "labels": torch.tensor(labels)}


def sentence_batches(tokenizer: PreTrainedTokenizerBase, path: Path) -> list[dict[str, Tensor]]:
    """Return the sentences of a file in batches of like length, the shortest first."""
    rows = sorted(read_sentences(path), key=lambda row: len(row[0]))
    return [batch_of(tokenizer, rows[start : start + 64]) for start in range(0, len(rows), 64)]


def evaluator_of(options: argparse.Namespace, folder: Path, **selection: Any) -> CorruptionEvaluator:
    """Return an evaluator of a trained model on the dev sentences."""
    model, batches = model_and_batches(options, folder)
    return CorruptionEvaluator(model, ClassificationMetric(batches), progress=False, **selection)


def measured_under(options: argparse.Namespace, run: Run, corruptions: Sequence[Corruption]) -> EvaluationRecord:
    """Return the record of a run under corruptions; one that is not there yet is trained, measured, kept and noted."""

    def example(folder: Path) -> None:
        evaluator_of(options, train(options, run)).evaluate(corruptions).save(folder / "robustness.json")

    return measured_once(options, run, example)


def run_example_with(trainer: Callable[..., Any]) -> None:
    """Run the example with the flags of this program, and another Trainer."""
    example: Any = importlib.import_module(f"examples.{EXAMPLE.stem}")
    example.ParameterDefenseTrainer = trainer
    example.main()
