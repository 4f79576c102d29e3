"""Training on SST-2 by `examples/train_sst2.py`, and measuring on its dev sentences, run by run."""

from __future__ import annotations

import argparse
import gzip
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from hf_parcor import CorruptionEvaluator
from hf_parcor.evaluation import ClassificationMetric
from hf_parcor.records import EvaluationRecord
from scripts.campaigns import Arm, Run

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


def parse_options(
    description: str | None, arms: Mapping[str, Arm], work: str, *, size: str = "small", seeds: int = 3
) -> argparse.Namespace:
    """Read the command line of a campaign."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a name on the Hub")
    parser.add_argument("--data", type=Path, required=True, help="the folder with the SST-2 files")
    parser.add_argument("--output", type=Path, required=True, help="the folder for records and the table")
    parser.add_argument("--work", type=Path, default=Path(work), help="the folder for models and logs")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 1 + seeds)))
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--arms", nargs="+", choices=arms, help="only run these, in this order, and draw no table")
    parser.add_argument("--size", choices=SIZES, default=size, help="; ".join(f"{k}: {v}" for k, v in SIZES.items()))
    parser.add_argument("--train-samples", type=int, help="fewer than the size has")
    options = parser.parse_args()
    options.size = SIZES[options.size]
    if options.train_samples:
        options.size = replace(options.size, train_samples=options.train_samples)
    options.output.mkdir(parents=True, exist_ok=True)
    # One thread each: a process that waits for its other thread gains nothing from a busy core.
    options.threads = max(1, (os.cpu_count() or 1) // options.jobs)
    torch.set_num_threads(options.threads)
    return options


def train(options: argparse.Namespace, run: Run, *more: str) -> Path:
    """Train one model, unless it is there already, and return its folder.

    Args:
        options: Those of a campaign.
        run: What is trained.
        *more: Flags for this run alone.
    """
    folder: Path = options.work / run.file_name
    if (folder / "train_results.json").exists():
        return folder
    size: Size = options.size
    fixed = {
        "model_name_or_path": options.model,
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
        **({"tf32": True} if torch.cuda.is_available() else {}),
    }
    flags = (part for name, value in fixed.items() for part in (f"--{name}", str(value)))
    subprocess.run(
        [sys.executable, *(run.arm.program or [str(EXAMPLE)]), "--do_train", *flags, *run.arm.flags, *more],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
    )
    return folder


def model_and_batches(options: argparse.Namespace, folder: Path) -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    """Return a trained model, and the dev sentences for it, sorted by length."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with gzip.open(options.data / "dev.tsv.gz", "rt", encoding="utf-8") as file:
        rows = sorted((line.rstrip("\n").split("\t") for line in list(file)[1:]), key=lambda row: len(row[0]))
    batches = []
    for start in range(0, len(rows), 64):
        texts, labels = zip(*rows[start : start + 64], strict=True)
        batch = tokenizer(list(texts), truncation=True, max_length=128, padding=True, return_tensors="pt")
        batches.append({**batch, "labels": torch.tensor([int(label) for label in labels])})
    return model, batches


def evaluator_of(options: argparse.Namespace, folder: Path, **selection: Any) -> CorruptionEvaluator:
    """Return an evaluator of a trained model on the dev sentences."""
    model, batches = model_and_batches(options, folder)
    return CorruptionEvaluator(model, ClassificationMetric(batches), progress=False, **selection)


def run_example_with(trainer: Callable[..., Any]) -> None:
    """Run the example with the flags of this program, and another Trainer."""
    sys.path.insert(0, str(EXAMPLE.parent))
    example: Any = importlib.import_module(EXAMPLE.stem)
    example.ParameterDefenseTrainer = trainer
    example.main()


Measure = Callable[[argparse.Namespace, Run], EvaluationRecord]


def over_runs(
    measure: Measure, title: str, options: argparse.Namespace, arms: Mapping[str, Arm]
) -> dict[str, list[EvaluationRecord]]:
    """Measure these arms with every seed, several side by side; one that fails does not stop the others.

    Raises:
        RuntimeError: Runs failed; when all others are done.
    """
    runs = [Run(name, arm, seed) for seed in options.seeds for name, arm in arms.items()]
    records: dict[str, list[EvaluationRecord]] = {name: [] for name in arms}
    failed: dict[str, BaseException] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        doing = {run.file_name: pool.submit(measure, options, run) for run in runs}
        for _ in tqdm(as_completed(doing.values()), desc=title, total=len(runs)):
            pass
    for run in runs:
        error = doing[run.file_name].exception()
        if error is None:
            records[run.name].append(doing[run.file_name].result())
        else:
            failed[run.file_name] = error
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(runs)} runs failed: {failed}; call again for them alone")
    return records
